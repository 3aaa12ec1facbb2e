"""What all sources share: examples, the columns that hold their fields, and what is held out."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from heedful.data.config import DataConfig
from heedful.data.errors import DataError, listed
from heedful.data.objectives import Objective

Example = dict[str, str]
SPLITS = ("train", "valid", "test")

# The names that public tables and datasets use. Pairs first: one of a pair may look like a single.
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("text", "pair"),
)
_SINGLES = (("text",), ("sentence",))


# Columns ----------------------------------------------------------------------------------------


def fields_of(objective: Objective, n_columns: int) -> tuple[str, ...]:
    """Return the names that this many columns of text have in an example, or the least of them."""
    names = objective.fields + objective.optional_fields
    return names[: max(n_columns, len(objective.fields))]


def text_columns(config: DataConfig, known: Sequence[str], has: str) -> tuple[str, ...]:
    """Returns the columns, among the known ones, that hold the text: data.columns or usual names.

    `has` starts like "FILE has the columns"; it is part of the errors. Raises DataError.
    """
    has, objective = f"{has} {listed(known)}", config.objective_spec
    least = len(objective.fields)
    counts = range(least, least + len(objective.optional_fields) + 1)
    if objective.is_parallel:
        usual = [config.languages, objective.fields]
        expected = f"{' and '.join(config.languages)} (data.languages)"
    else:
        usual = [columns for columns in (*_PAIRS, *_SINGLES) if len(columns) in counts]
        expected = "text, sentence or a pair like sentence1 and sentence2"
        expected = expected if 2 in counts else "text or sentence"
    if config.columns:
        for column in config.columns:
            if column not in known:
                raise DataError(f"data.columns has {column!r}, but {has}: choose from these")
        if len(config.columns) not in counts:
            raise DataError(
                f"data.columns is {' '.join(config.columns)!r}: {config.objective} reads "
                f"{' or '.join(map(str, counts))}"
            )
        return config.columns
    for columns in usual:
        if set(columns) <= set(known):
            return columns
    raise DataError(f"{has}, not {expected}: name those with the text in data.columns")


def label_column(config: DataConfig, known: Sequence[str], has: str) -> str | None:
    """Returns the column of the label, or None for an objective without labels."""
    if config.objective_spec.label is None:
        return None
    for column in (config.label, "score") if config.label == "label" else (config.label,):
        if column in known:
            return column
    raise DataError(f"data.label is {config.label!r}, but {has} {listed(known)}: choose one")


# Splits -----------------------------------------------------------------------------------------


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def shares(texts: Iterable[str]) -> np.ndarray:
    """Returns the share of every text, float64 [E]."""
    return np.fromiter(map(share, texts), np.float64)


def select(parts: np.ndarray, split: str, held: Sequence[str], holdout: float) -> np.ndarray:
    """Returns the numbers of the examples of `split`, when the splits `held` are taken from train.

    parts [E] are the shares of the training examples. By the text alone: a text, however often and
    however labelled or translated, is in one split only.
    """
    first = holdout * (held.index(split) if split in held else len(held))
    last = first + holdout if split in held else 1
    return np.flatnonzero((first <= parts) & (parts < last))


class Subset(Sequence[Example]):
    """The chosen examples of a sequence, by their numbers."""

    def __init__(
        self, examples: Sequence[Example], chosen: np.ndarray, identity: str | None = None
    ):
        self.examples = examples
        self.chosen = chosen
        self.identity = identity

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Example:
        return self.examples[int(self.chosen[index])]


class Joined(Sequence[Example]):
    """Several sequences, one after the other."""

    def __init__(self, sequences: Sequence[Sequence[Example]]):
        self.sequences = sequences
        self.stops = np.cumsum([len(sequence) for sequence in sequences])

    def __len__(self) -> int:
        return int(self.stops[-1])

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        which = int(np.searchsorted(self.stops, index, side="right"))
        return self.sequences[which][index - int(self.stops[which])]  # From the end: negative.
