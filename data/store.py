"""The tokens of a split, computed once and kept on disk."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from heedful.data import packages
from heedful.data.examples import Example
from heedful.data.tokenizer import Tokenizer

CHUNK = 1 << 20  # Characters tokenised at a time: enough for all cores, little memory.
LAYOUT = "3"  # Of the files. The cache may hold folders of another layout.


class TokenStore:
    """The tokens of every example of a split, in files that are mapped into memory.

    FIELD.ids holds the ids of all examples end to end, raw int32; FIELD.offsets.npy where each one
    starts, int64 [E + 1]; sizes.npy the characters and UTF-8 bytes of all fields, int64 [2, E];
    blank.npy whether a field is blank, bool [E]; labels.json the labels, if there are any.
    """

    def __init__(self, folder: Path, fields: tuple[str, ...]):
        self.folder, self.fields = folder, fields
        load = lambda name: np.load(folder / f"{name}.npy", "r").view(np.ndarray)  # noqa: E731
        self.blank, self.sizes = load("blank"), load("sizes")
        self.offsets = {field: load(f"{field}.offsets") for field in fields}
        self.ids = {
            # An empty file cannot be mapped; a plain view because slicing a memmap is slow.
            field: np.memmap(folder / f"{field}.ids", np.int32, "r").view(np.ndarray)
            if offsets[-1]
            else np.empty(0, np.int32)
            for field, offsets in self.offsets.items()
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder, self.fields)  # A worker process maps the files itself.

    @classmethod
    def build(
        cls, examples: Sequence[Example], fields: tuple[str, ...], tokenizer: Tokenizer, text: str
    ) -> Self:
        """Tokenises the examples, whose fingerprint is `text`, unless the cache has them."""
        key = hashlib.sha256(
            f"{LAYOUT} {fields} {text} {tokenizer.fingerprint}".encode()
        ).hexdigest()
        write = partial(_write, examples, fields, tokenizer)
        return cls(packages.build_once(packages.cache() / "tokens" / key, write), fields)

    def counts(self) -> dict[str, np.ndarray]:
        """Returns the token counts of all examples, field -> [E]."""
        return {field: np.diff(offsets) for field, offsets in self.offsets.items()}

    def count(self, token: int | None) -> tuple[int, int]:
        """Returns how many tokens there are, and how often this one, counted part by part."""
        found = 0
        for ids in self.ids.values() if token is not None else ():
            parts = (ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK))
            found += sum(int(np.count_nonzero(part == token)) for part in parts)
        return sum(map(len, self.ids.values())), found

    def labels(self) -> list[str]:
        """Returns the label of every example, as the source has it."""
        return json.loads((self.folder / "labels.json").read_text("utf-8"))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {field: np.array(self._ids(field, index)) for field in self.fields}

    def text(
        self, index: int, start: int, stop: int, frame: tuple[Any, Any] | None = None
    ) -> np.ndarray:
        """Returns tokens [start, stop) of a document; with a frame, of begin + document + end."""
        ids = self._ids("text", index)
        if frame is None:
            return np.array(ids[start:stop])
        begin = np.full(int(start == 0), frame[0], np.int32)
        end = np.full(int(stop > len(ids) + 1), frame[1], np.int32)
        return np.concatenate([begin, ids[max(start - 1, 0) : stop - 1], end])

    def _ids(self, field: str, index: int) -> np.ndarray:
        offsets = self.offsets[field]
        return self.ids[field][offsets[index] : offsets[index + 1]]


def fingerprint(examples: Sequence[Example]) -> str:
    """Returns the sha256 (hex) of the texts in their order, or of the identity of a fixed set."""
    identity = getattr(examples, "identity", None)
    if identity is not None:
        return hashlib.sha256(identity.encode()).hexdigest()
    digest = hashlib.sha256()
    for example in examples:
        for field, text in example.items():
            encoded = text.encode()
            digest.update(f"{field} {len(encoded)} ".encode() + encoded)
    return digest.hexdigest()


def _write(
    examples: Sequence[Example], fields: tuple[str, ...], tokenizer: Tokenizer, folder: Path
) -> None:
    blank, sizes, labels = [], [], []
    offsets = {field: [np.zeros(1, np.int64)] for field in fields}
    for chunk in _chunks(examples, fields):
        texts = [[example[field] for field in fields] for example in chunk]
        blank.append(np.array([not all(text.strip() for text in row) for row in texts]))
        sizes.append(np.array([_size("".join(row)) for row in texts], np.int64))
        labels += [example["label"] for example in chunk if "label" in example]
        for i, field in enumerate(fields):
            counts = np.zeros(len(chunk), np.int64)
            with (folder / f"{field}.ids").open("ab") as file:
                for number, ids in _encode([row[i] for row in texts], tokenizer):
                    file.write(ids.tobytes())
                    counts[number] += len(ids)
            offsets[field].append(counts)
    np.save(folder / "blank.npy", np.concatenate(blank))
    np.save(folder / "sizes.npy", np.concatenate(sizes).T)
    for field in fields:
        np.save(folder / f"{field}.offsets.npy", np.cumsum(np.concatenate(offsets[field])))
    if labels:
        (folder / "labels.json").write_text(json.dumps(labels), "utf-8")


def _size(text: str) -> tuple[int, int]:
    return len(text), len(text.encode())


def _chunks(examples: Sequence[Example], fields: tuple[str, ...]) -> Iterator[list[Example]]:
    """Yields the examples in lists of about CHUNK characters."""
    chunk, size = [], 0
    for example in examples:
        chunk.append(example)
        size += sum(len(example[field]) for field in fields)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(texts: list[str], tokenizer: Tokenizer) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (number of a text, the ids of its next part), about CHUNK characters at a time."""
    numbers, parts, size = [], [], 0
    for number, text in enumerate(texts):
        for part in tokenizer.parts(text):
            numbers.append(number)
            parts.append(part)
            size += len(part)
            if size >= CHUNK:
                yield from zip(numbers, tokenizer.encode_batch(parts), strict=True)
                numbers, parts, size = [], [], 0
    yield from zip(numbers, tokenizer.encode_batch(parts), strict=True)
