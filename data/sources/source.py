"""Description of a source of examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from heedful.data.config import DataConfig
from heedful.data.examples import Example
from heedful.data.objectives import OBJECTIVES, Objective


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of examples. Other files of this folder define one each; `SOURCES` lists them.

    Example:
        >>> import heedful as hf
        >>> source = hf.Source(load=lambda config, split: [{"text": f"{split} {i}"} for i in "ab"])
        >>> source.load(hf.DataConfig(), "train")
        [{'text': 'train a'}, {'text': 'train b'}]
    """

    load: Callable[[DataConfig, str], Sequence[Example]]
    """Return the examples of a split, in the order of the source; raise DataError for bad data."""
    serves: Callable[[Objective], bool] = lambda objective: True
    """Tell if an objective can learn from these examples."""
    fields: Callable[[DataConfig], tuple[str, ...]] = lambda config: config.objective_spec.fields
    """Return the names of the text fields of an example, in order."""
    classes: Callable[[DataConfig], tuple[str, ...]] = lambda config: ()
    """Return the classes in the order of the source; (): the source does not define classes."""
    argument: str = ""
    """Form of the argument in data.source NAME:ARGUMENT; empty: there is no colon and argument."""
    reads_columns: bool = False
    """True if data.columns and data.label choose among the columns of this source."""
    is_stored: bool = True
    """False if a Python program gives the examples, so that no command can load them."""
    if_empty: str = "choose another source or other languages"
    """Fix in the error message for an empty split; {split} stands for the name of the split."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names of the objectives that can learn from these examples."""
        return tuple(name for name, each in OBJECTIVES.items() if self.serves(each))
