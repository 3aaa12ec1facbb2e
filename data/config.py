"""What a user may choose about the data. The strings under fields are the command line's help."""

from dataclasses import dataclass, field
from typing import Literal


class DataError(ValueError):
    """Bad data or a bad data setting: one line that names the thing and the fix."""


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise DataError(f"{name} is {value}: give {least} or more")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How text becomes token ids. One vocabulary is shared by both sides."""

    kind: Literal["bpe", "words"] = "bpe"
    """bpe: byte-level BPE, learned from the training text, reads any text. words: the text is
    tokenised already, space separated, with pieces of one word joined by a trailing @@."""

    vocab_size: int = 8000
    """Most entries that the vocabulary may have, the 4 special tokens included."""

    def __post_init__(self) -> None:
        if self.kind not in ("bpe", "words"):
            raise DataError(f"data.tokenizer.kind is {self.kind!r}: give 'bpe' or 'words'")
        # A byte-level vocabulary starts from all 256 bytes, so that no text is out of reach.
        least = 4 + 256 if self.kind == "bpe" else 4 + 1
        _at_least("data.tokenizer.vocab_size", self.vocab_size, least)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which examples are read and how they are put into batches."""

    source: str = "homeassistant"
    """Where examples come from: homeassistant (user-interface texts in many languages, fetched from
    PyPI), files (two parallel text files per split), or tfds:NAME/CONFIG (TensorFlow Datasets)."""

    languages: tuple[str, str] = ("en", "de")
    """Language to translate from and language to translate to, as the source names them."""

    train: tuple[str, ...] = ()
    """For source files: the training text, as the source file and the target file."""

    valid: tuple[str, ...] = ()
    """For source files: the validation text. Without it, a share of train is held out."""

    test: tuple[str, ...] = ()
    """For source files: the test text. Without it, a share of train is held out."""

    holdout: float = 0.02
    """For source files: share of train that is held out for valid, and for test, where they have no
    files of their own."""

    objective: str = "translation"
    """What the model learns from an example: translation."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    batch_tokens: int = 4096
    """Most positions (rows x length) of one global batch, padding included, on each side."""

    batch_multiple: int = 8
    """The rows of every batch are a multiple of this. The processes, and the devices along the data
    axes of the mesh, must divide it."""

    buckets: int = 4
    """Number of row lengths that batches may have. Each compiles once; more leave less padding."""

    max_length: int = 64
    """Longest row in tokens, begin or end included. Longer examples are left out and reported."""

    workers: int = 0
    """Processes that assemble batches ahead of the training step; 0 uses threads instead."""

    def __post_init__(self) -> None:
        if len(self.languages) != 2 or self.languages[0] == self.languages[1]:
            raise DataError(
                f"data.languages is {' '.join(self.languages)!r}: give two different languages"
            )
        for name in ("train", "valid", "test"):
            paths = getattr(self, name)
            if len(paths) not in (0, 2):
                raise DataError(
                    f"data.{name} has {len(paths)} paths: give a source file and a target file"
                )
            if paths and self.source != "files":
                raise DataError(
                    f"data.{name} is given but data.source is {self.source!r}: "
                    "set data.source to 'files'"
                )
        if self.source == "files" and not self.train:
            raise DataError(
                "data.source is 'files' but data.train is empty: give data.train SOURCE TARGET"
            )
        if not 0 <= self.holdout < 0.5:
            raise DataError(
                f"data.holdout is {self.holdout}: give a share of at least 0 and below 0.5"
            )
        _at_least("data.batch_tokens", self.batch_tokens, 1)
        _at_least("data.batch_multiple", self.batch_multiple, 1)
        _at_least("data.buckets", self.buckets, 1)
        _at_least("data.max_length", self.max_length, 2)
        _at_least("data.workers", self.workers, 0)
