"""Examples, the columns of their fields, and held-out splits, for all sources."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from heedful.data.config import DataConfig
from heedful.data.errors import DataError, listed
from heedful.data.objectives import Objective

Example = dict[str, str]
SPLITS = ("train", "valid", "test")

# Names in public tables and datasets. Pairs first: "text" may be the first of a pair.
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
    """Return the fields of an example for this many text columns, at least the required fields."""
    names = objective.fields + objective.optional_fields
    return names[: max(n_columns, len(objective.fields))]


def text_columns(config: DataConfig, known: Sequence[str], has: str) -> tuple[str, ...]:
    """Return the text columns: data.columns, or `known` columns with usual names.

    `has` begins an error message: "FILE has the columns". Raises DataError where no columns fit.
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
    raise DataError(f"{has}, not {expected}: name the text columns in data.columns")


def label_column(config: DataConfig, known: Sequence[str], has: str) -> str | None:
    """Return the column of the label, or None for an objective without labels.

    Raises DataError where the column is missing; `has` is as in `text_columns`.
    """
    if config.objective_spec.label is None:
        return None
    for column in (config.label, "score") if config.label == "label" else (config.label,):
        if column in known:
            return column
    raise DataError(f"data.label is {config.label!r}, but {has} {listed(known)}: choose one")


# Splits -----------------------------------------------------------------------------------------


def share(text: str) -> float:
    """Return a hash of the text in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def shares(texts: Iterable[str]) -> np.ndarray:
    """Return the hash in [0, 1) of every text, float64 [E]."""
    return np.fromiter(map(share, texts), np.float64)


def select(parts: np.ndarray, split: str, held: Sequence[str], holdout: float) -> np.ndarray:
    """Return the numbers of the examples of `split` if the splits `held` are taken from train.

    `parts` [E] are the hashes of the training texts. As only the text decides, all examples with
    the same text are in one split.
    """
    first = holdout * (held.index(split) if split in held else len(held))
    last = first + holdout if split in held else 1
    return np.flatnonzero((first <= parts) & (parts < last))


class Subset(Sequence[Example]):
    """Examples of a sequence, chosen by their numbers."""

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
    """Concatenation of several sequences."""

    def __init__(self, sequences: Sequence[Sequence[Example]]):
        self.sequences = sequences
        self.stops = np.cumsum([len(sequence) for sequence in sequences])

    def __len__(self) -> int:
        return int(self.stops[-1])

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        which = int(np.searchsorted(self.stops, index, side="right"))
        return self.sequences[which][index - int(self.stops[which])]  # From the end: negative.
