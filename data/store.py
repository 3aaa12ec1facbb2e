"""Tokenise a split once and store its tokens on disk."""

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

CHUNK = 1 << 20
"""Number of characters that are tokenised at a time: enough to use all cores, in little memory."""
LAYOUT = "3"
"""Version of the layout of the files; it is a part of the key in the cache."""


class TokenStore:
    """Tokens of all E examples of a split, in files that are mapped into memory.

    FIELD.ids: concatenated ids of all examples, raw int32.
    FIELD.offsets.npy: start of each example in FIELD.ids, int64 [E + 1].
    sizes.npy: numbers of characters and of UTF-8 bytes of each example, int64 [2, E].
    blank.npy: true if any field of an example is blank, bool [E].
    labels.json: label of each example, if examples have labels.
    """

    def __init__(self, folder: Path, fields: tuple[str, ...]):
        self.folder, self.fields = folder, fields
        load = lambda name: np.load(folder / f"{name}.npy", "r").view(np.ndarray)  # noqa: E731
        self.blank, self.sizes = load("blank"), load("sizes")
        self.offsets = {field: load(f"{field}.offsets") for field in fields}
        self.ids = {
            # An empty file cannot be mapped. Slicing a plain view is faster than slicing a memmap.
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
        """Tokenise the examples, or take their tokens from the cache.

        `text` is the fingerprint of the examples.
        """
        key = hashlib.sha256(
            f"{LAYOUT} {fields} {text} {tokenizer.fingerprint}".encode()
        ).hexdigest()
        write = partial(_write, examples, fields, tokenizer)
        return cls(packages.build_once(packages.cache() / "tokens" / key, write), fields)

    def counts(self) -> dict[str, np.ndarray]:
        """Return the number of tokens of each example, {field: [E]}."""
        return {field: np.diff(offsets) for field, offsets in self.offsets.items()}

    def count(self, token: int | None) -> tuple[int, int]:
        """Return the number of all tokens, and how many of them are `token`; 0 if it is None."""
        occurrences = 0
        for ids in self.ids.values() if token is not None else ():
            parts = (ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK))
            occurrences += sum(int(np.count_nonzero(part == token)) for part in parts)
        return sum(map(len, self.ids.values())), occurrences

    def labels(self) -> list[str]:
        """Return the label of each example, as in the source."""
        return json.loads((self.folder / "labels.json").read_text("utf-8"))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {field: np.array(self._ids(field, index)) for field in self.fields}

    def text(
        self, index: int, start: int, stop: int, frame: tuple[Any, Any] | None = None
    ) -> np.ndarray:
        """Return tokens [start, stop) of a document; with `frame`, of begin + document + end.

        `frame` has the ids of begin and end.
        """
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
    """Return the sha256 (hex) of all texts in order, or of `examples.identity` if it exists."""
    identity = getattr(examples, "identity", None)
    if identity is not None:
        return hashlib.sha256(identity.encode()).hexdigest()
    digest = hashlib.sha256()
    for example in examples:
        for field, text in example.items():
            encoded = text.encode() if isinstance(text, str) else text.tobytes()
            digest.update(f"{field} {len(encoded)} ".encode() + encoded)
    return digest.hexdigest()


def _write(
    examples: Sequence[Example], fields: tuple[str, ...], tokenizer: Tokenizer, folder: Path
) -> None:
    blank, sizes, labels = [], [], []
    offsets = {field: [np.zeros(1, np.int64)] for field in fields}
    for chunk in _chunks(examples, fields):
        rows = [[example[field] for field in fields] for example in chunk]
        texts = [[_spelled(text, tokenizer) for text in row] for row in rows]
        blank.append(np.array([not all(text.strip() for text in row) for row in texts]))
        sizes.append(np.array([_size("".join(row)) for row in texts], np.int64))
        labels += [example["label"] for example in chunk if "label" in example]
        for i, field in enumerate(fields):
            counts = np.zeros(len(chunk), np.int64)
            with (folder / f"{field}.ids").open("ab") as file:
                for number, ids in _encode([row[i] for row in rows], tokenizer):
                    file.write(ids.tobytes())
                    counts[number] += len(ids)
            offsets[field].append(counts)
    np.save(folder / "blank.npy", np.concatenate(blank))
    np.save(folder / "sizes.npy", np.concatenate(sizes).T)
    for field in fields:
        np.save(folder / f"{field}.offsets.npy", np.cumsum(np.concatenate(offsets[field])))
    if labels:
        (folder / "labels.json").write_text(json.dumps(labels), "utf-8")


def _spelled(text: str | np.ndarray, tokenizer: Tokenizer) -> str:
    return text if isinstance(text, str) else tokenizer.decode(text)


def _size(text: str) -> tuple[int, int]:
    return len(text), len(text.encode())


def _chunks(examples: Sequence[Example], fields: tuple[str, ...]) -> Iterator[list[Example]]:
    """Yield the examples in lists of about CHUNK characters."""
    chunk, size = [], 0
    for example in examples:
        chunk.append(example)
        size += sum(len(example[field]) for field in fields)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(
    texts: list[str] | list[np.ndarray], tokenizer: Tokenizer
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index of a text, ids of its next part); tokenise about CHUNK characters at a time.

    A text may already be an array of ids.
    """
    if any(isinstance(text, np.ndarray) for text in texts):
        yield from enumerate(texts)  # type: ignore[misc]
        return
    numbers, parts, size = [], [], 0
    for number, text in enumerate(texts):
        for part in tokenizer.parts(text):  # type: ignore[arg-type]
            numbers.append(number)
            parts.append(part)
            size += len(part)
            if size >= CHUNK:
                yield from zip(numbers, tokenizer.encode_batch(parts), strict=True)
                numbers, parts, size = [], [], 0
    yield from zip(numbers, tokenizer.encode_batch(parts), strict=True)
