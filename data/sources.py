"""Where examples come from: a source's name and a split in, random-access text examples out."""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from mmap import ACCESS_READ, mmap
from typing import Any

import numpy as np

from data import packages
from data.config import DataConfig, DataError

Example = dict[str, str]
SPLITS = ("train", "valid", "test")


def load(config: DataConfig, split: str) -> Sequence[Example]:
    """Returns the examples of a split in their order, each `{"source": text, "target": text}`.

    Nothing is left out here, blank lines included, so that line i of a test file is example i.
    Raises DataError for an unknown source, missing or broken data, and an empty split.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: give one of {', '.join(SPLITS)}")
    if config.source.startswith("tfds:"):
        examples = _tfds(config, split)
    elif config.source in SOURCES:
        examples = SOURCES[config.source](config, split)
    else:
        known = ", ".join([*SOURCES, "tfds:NAME/CONFIG"])
        raise DataError(f"data.source is {config.source!r}: give one of {known}")
    if not len(examples):
        fix = "choose another source or other languages"
        if config.source == "files":
            fix = f"give files to data.{split}, or another share to data.holdout"
        raise DataError(f"split {split!r} of data.source {config.source!r} is empty: {fix}")
    return examples


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


# Two parallel text files ------------------------------------------------------------------------


class _TextFile(Sequence[str]):
    """The lines of a UTF-8 file by number, read from disk when asked for (any size fits)."""

    def __init__(self, path: str):
        starts = array("q", [0])
        try:
            with open(path, "rb") as file:
                for line in file:
                    line.decode("utf-8")
                    starts.append(starts[-1] + len(line))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {len(starts)}: byte {error.start + 1} of the line "
                f"({error.object[error.start]:#04x}) is not valid UTF-8; convert the file to UTF-8"
            ) from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error
        self.starts = starts
        with open(path, "rb") as file:
            # An empty file cannot be mapped into memory.
            self.bytes = mmap(file.fileno(), 0, access=ACCESS_READ) if starts[-1] else b""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        line = self.bytes[self.starts[index] : self.starts[index + 1]].decode("utf-8")
        # Some editors mark UTF-8 with a byte order mark; it is no part of the text.
        return line.removeprefix("\ufeff" if index == 0 else "").rstrip("\r\n")


class _Parallel(Sequence[Example]):
    """Line i of one file with line i of the other, for all lines or for the given ones."""

    def __init__(self, paths: Sequence[str], chosen: np.ndarray | None = None):
        self.source, self.target = map(_TextFile, paths)
        if len(self.source) != len(self.target):
            raise DataError(
                f"{paths[0]} has {len(self.source)} lines but {paths[1]} has {len(self.target)}: "
                "line i of one must translate line i of the other"
            )
        if not len(self.source):
            raise DataError(f"{paths[0]} and {paths[1]} are empty: give files with text")
        self.chosen = np.arange(len(self.source)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Example:
        line = int(self.chosen[index])
        return {"source": self.source[line], "target": self.target[line]}


def _files(config: DataConfig, split: str) -> Sequence[Example]:
    if getattr(config, split) and split != "train":
        return _Parallel(getattr(config, split))
    pairs = _Parallel(config.train)
    missing = [name for name in ("valid", "test") if not getattr(config, name)]
    if not missing:
        return pairs
    # By the source text alone: a text, however often and however translated, is in one split only.
    part = np.fromiter((share(text) for text in pairs.source), float, len(pairs))
    first = config.holdout * (missing.index(split) if split in missing else len(missing))
    last = first + config.holdout if split in missing else 1
    pairs.chosen = np.flatnonzero((first <= part) & (part < last))
    return pairs


# TensorFlow Datasets ----------------------------------------------------------------------------


class _Tfds(Sequence[Example]):
    """Pairs of a TFDS data source, whose features are named by their language."""

    def __init__(self, records: Any, languages: tuple[str, str], identity: str):
        self.records = records
        self.languages = languages
        # A prepared version never changes: its name stands for texts that take minutes to read.
        self.identity = f"{identity} {languages} {len(records)}"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[range(len(self))[index]]  # Raises IndexError, which tfds does not.
        source, target = (record[language] for language in self.languages)
        return {"source": source.decode("utf-8"), "target": target.decode("utf-8")}


def _tfds(config: DataConfig, split: str) -> Sequence[Example]:
    import tensorflow_datasets as tfds  # Slow to import and needed by this source only.

    name = config.source.removeprefix("tfds:")
    wanted = "validation" if split == "valid" else split
    try:
        # array_record is the format that is read by index, and without TensorFlow.
        builder: Any = tfds.builder(
            name, data_dir=os.environ.get("TFDS_DATA_DIR"), file_format="array_record"
        )
    except Exception as error:  # tfds raises many kinds; whichever it is, the name was not usable.
        raise DataError(
            f"data.source {config.source!r} cannot be opened ({_first_line(error)}): "
            "see https://www.tensorflow.org/datasets/catalog for names"
        ) from error
    features = [
        name
        for name, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Text)
    ]
    for language in config.languages:
        if language not in features:
            raise DataError(
                f"data.languages has {language!r}, but {config.source!r} has the texts "
                f"{', '.join(features)}: name two of them"
            )
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise DataError(
            f"{config.source!r} cannot be prepared in {builder.data_dir} ({_first_line(error)}): "
            "prepare it where there is a network and set TFDS_DATA_DIR to that data folder"
        ) from error
    if wanted not in builder.info.splits:
        raise DataError(
            f"{config.source!r} has no split {wanted!r}, only {', '.join(builder.info.splits)}: "
            "choose a dataset with train, validation and test"
        )
    records = builder.as_data_source(split=wanted)
    return _Tfds(records, config.languages, f"tfds:{builder.info.full_name} {wanted}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


# Home Assistant: user-interface texts, Apache-2.0 ------------------------------------------------

_PLACEHOLDER = re.compile(r"\{.*?\}|\[%.*?%\]")
_MARKUP = re.compile(r"<[^>]+>|\[[^\]]*\]\(|`|\*\*|__|\n|^#|^[-*] ")
_URL = re.compile(r"://|\bwww\.")
# Chinese and Japanese do not separate words: there every character counts as one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")


def _homeassistant(config: DataConfig, split: str) -> Sequence[Example]:
    source, target = (_translations(language) for language in config.languages)
    owners: dict[tuple[str, str], str] = {}
    for component in sorted(source):
        for key, text in source[component].items():
            translation = target.get(component, {}).get(key)
            if translation is not None:
                # The first component keeps a pair, so that no pair is in two splits.
                owners.setdefault((text, translation), component)
    return [
        {"source": text, "target": translation}
        for (text, translation), component in owners.items()
        if _split_of(component) == split and _is_sentence_pair(text, translation)
    ]


def _split_of(component: str) -> str:
    """Whole components, because the texts of one resemble each other: 5 % valid, 5 % test."""
    part = share(component)
    return "valid" if part < 0.05 else "test" if part < 0.1 else "train"


def _is_sentence_pair(source: str, target: str) -> bool:
    for unwanted in (_PLACEHOLDER, _MARKUP, _URL):
        if unwanted.search(source) or unwanted.search(target):
            return False
    short, long = sorted(len(_WORD.findall(text)) for text in (source, target))
    # The longer side decides: a German compound is one word where English has three.
    return source != target and 3 <= long <= 50 and long <= 2.2 * short


def _translations(language: str) -> dict[str, dict[str, str]]:
    """Returns component -> key -> text, for every component that has this language."""
    file = re.compile(rf"homeassistant/components/\w+/translations/{re.escape(language)}\.json")
    try:
        folder = packages.extract("homeassistant", language, file.fullmatch)
    except LookupError as error:
        members = " ".join(packages.members("homeassistant"))
        known = sorted(set(re.findall(r"/translations/([\w-]+)\.json", members)))
        raise DataError(
            f"data.languages has {language!r}, but homeassistant has {', '.join(known)}"
        ) from error
    return {
        path.parts[-3]: dict(_flatten(json.loads(path.read_text("utf-8"))))
        for path in sorted(folder.glob("homeassistant/components/*/translations/*.json"))
    }


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value.strip()


SOURCES: dict[str, Callable[[DataConfig, str], Sequence[Example]]] = {
    "homeassistant": _homeassistant,
    "files": _files,
}
