"""Examples, the columns of their fields, and held-out splits, for all sources."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from heedful.data.config import DataConfig
from heedful.data.errors import DataError, listed
from heedful.data.objectives import Objective

Example = dict[str, str]
SPLITS = ("train", "valid", "test")

# Names of text columns in public tables and datasets. Pairs are tried first, because "text" may be
# the first text of a pair.
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
    """Return the text fields of an example with `n_columns` text columns.

    The required fields of the objective are always among them.
    """
    names = objective.fields + objective.optional_fields
    return names[: max(n_columns, len(objective.fields))]


def text_columns(config: DataConfig, known: Sequence[str], has: str) -> tuple[str, ...]:
    """Return the names of the text columns: data.columns, or else usual names among `known`.

    `known` has the names of all columns; `has` is the text before them in an error message, such as
    "FILE has the columns". Raises DataError if no columns fit.
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
                raise DataError(f"data.columns has {column!r}, but {has}: choose among these")
        if len(config.columns) not in counts:
            raise DataError(
                f"data.columns is {' '.join(config.columns)!r}, but data.objective "
                f"{config.objective} reads {' or '.join(map(str, counts))}: name as many"
            )
        return config.columns
    for columns in usual:
        if set(columns) <= set(known):
            return columns
    raise DataError(f"{has}, not {expected}: name the text columns in data.columns")


def label_column(config: DataConfig, known: Sequence[str], has: str) -> str | None:
    """Return the column of the label, or None for an objective without labels.

    Raises DataError if the column is missing. `known` and `has` are those of `text_columns`.
    """
    if config.objective_spec.label is None:
        return None
    for column in (config.label, "score") if config.label == "label" else (config.label,):
        if column in known:
            return column
    raise DataError(
        f"data.label is {config.label!r}, but {has} {listed(known)}: choose one of these"
    )


# Splits -----------------------------------------------------------------------------------------


def share(text: str) -> float:
    """Return a hash of the text in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def shares(texts: Iterable[str]) -> np.ndarray:
    """Return the hash in [0, 1) of every text, float64 [texts]."""
    return np.fromiter(map(share, texts), np.float64)


def select(parts: np.ndarray, split: str, held: Sequence[str], holdout: float) -> np.ndarray:
    """Return the indices of the examples of `split`, if the splits `held` are held out of train.

    `parts` has the hash of every training text (see `share`). Since only the text decides, all
    examples with the same text are in one split. `holdout` is the share of each held-out split.
    """
    first = holdout * (held.index(split) if split in held else len(held))
    last = first + holdout if split in held else 1
    return np.flatnonzero((first <= parts) & (parts < last))


class Subset(Sequence[Example]):
    """Examples of a sequence, chosen by their indices.

    identity: name of a version that fixes the texts (see `sources.load`); None: no version does.
    """

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
        # A negative index, which counts from the end.
        return self.sequences[which][index - int(self.stops[which])]
