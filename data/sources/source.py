"""A source of examples, described in one value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from heedful.data.config import DataConfig, Objective
from heedful.data.examples import Example, fields_of


def _usual_fields(config: DataConfig) -> tuple[str, ...]:
    return fields_of(config.objective, 1)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of examples. Each file of this folder ends with one, and `SOURCES` lists them."""

    load: Callable[[DataConfig, str], Sequence[Example]]
    """Return the examples of a split, in their order; raise DataError where there are none."""
    objectives: tuple[Objective, ...]
    """Objectives that can learn from these examples."""
    fields: Callable[[DataConfig], tuple[str, ...]] = _usual_fields
    """Return the names of the text fields of an example, in order."""
    classes: Callable[[DataConfig], tuple[str, ...]] = lambda config: ()
    """Return the classes in the order of the source; () where it has none of its own."""
    argument: str = ""
    """Form of what follows the name and a colon in data.source; empty: nothing follows."""
    reads_columns: bool = False
    """True where data.columns and data.label choose among columns."""
    if_empty: str = "choose another source or other languages"
    """Advice for an empty split; {split} stands for the name of the split."""
