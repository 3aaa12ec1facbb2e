"""A source of examples, described in one value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from heedful.data.config import DataConfig
from heedful.data.examples import Example
from heedful.data.objectives import OBJECTIVES, Objective


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of examples. Each file of this folder ends with one, and `SOURCES` lists them."""

    load: Callable[[DataConfig, str], Sequence[Example]]
    """Return the examples of a split, in their order; raise DataError where there are none."""
    serves: Callable[[Objective], bool] = lambda objective: True
    """Tell if an objective can learn from these examples."""
    fields: Callable[[DataConfig], tuple[str, ...]] = lambda config: config.objective_spec.fields
    """Return the names of the text fields of an example, in order."""
    classes: Callable[[DataConfig], tuple[str, ...]] = lambda config: ()
    """Return the classes in the order of the source; () where it has none of its own."""
    argument: str = ""
    """Form of what follows the name and a colon in data.source; empty: nothing follows."""
    reads_columns: bool = False
    """True where data.columns and data.label choose among columns."""
    if_empty: str = "choose another source or other languages"
    """Advice for an empty split; {split} stands for the name of the split."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names of the objectives that can learn from these examples."""
        return tuple(name for name, each in OBJECTIVES.items() if self.serves(each))
