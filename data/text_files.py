"""Text files on disk: lines by number, parallel files, and documents."""

import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO

import numpy as np

from heedful.data.errors import DataError
from heedful.data.examples import Example, select

DOCUMENT_BYTES = 1 << 24
"""Largest size of a document: to tokenise it may take a hundred times as much memory."""
MANY_FILES = 500
"""Smallest number of files of which whole files are held out; with fewer, the share is inexact."""
_BOM = "\ufeff"  # Byte order mark, which some editors write before UTF-8.
_LOOK = 1 << 16  # Bytes in which the end of a line is searched.
_HEAD = 1024  # Bytes from which the kind of a file is recognised.
# First bytes of files that are not text, and the fix.
_SIGNATURES = {
    b"\x1f\x8b": "is compressed with gzip: decompress it",
    b"\x28\xb5\x2f\xfd": "is compressed with Zstandard: decompress it",
    b"BZh": "is compressed with bzip2: decompress it",
    b"\xfd7zXZ\x00": "is compressed with xz: decompress it",
    b"\x04\x22\x4d\x18": "is compressed with LZ4: decompress it",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"7z\xbc\xaf": "is a 7z archive: unpack it",
    b"PAR1": "is a Parquet file: write its rows as .jsonl, .csv or .tsv",
    b"ARROW1": "is an Arrow file: write its rows as .jsonl, .csv or .tsv",
    b"SQLite": "is a database: write its rows as .jsonl, .csv or .tsv",
    b"%PDF": "is a PDF: write its text into a file",
    b"\xff\xfe": "is UTF-16: convert it to UTF-8",
    b"\xfe\xff": "is UTF-16: convert it to UTF-8",
}
CR_ONLY = "has line ends of \\r alone: convert them to \\n"
_BREAK = re.compile("\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


def one_line(text: str) -> str:
    """Replace each line break, of any kind, by a space."""
    return _BREAK.sub(" ", text)


def checked_lines(path: str) -> Iterator[bytes]:
    """Yield the lines of a file with their line ends; raise DataError if the file is not UTF-8."""
    line, head = 0, b""
    try:
        with open(path, "rb") as file:
            head = _head(file, path)
            for text in file:
                line += 1
                text.decode("utf-8")
                yield text
    except UnicodeDecodeError as error:
        raise _not_utf8(path, head, error, line, error.start) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error


def checked_text(text: bytes, name: str) -> str:
    """Decode UTF-8 without its byte order mark; raise DataError with the line of a wrong byte."""
    _require_text(text[:_HEAD], name)
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]  # Without the mark.
        line, start = before.count(b"\n") + 1, error.start - before.rfind(b"\n") - 1
        raise _not_utf8(name, text, error, line, start) from error


def _head(file: BinaryIO, path: str) -> bytes:
    """Return the first bytes of a file, and seek back to its beginning."""
    head = file.read(_HEAD)
    file.seek(0)
    _require_text(head, path)
    return head


def _require_text(head: bytes, name: str) -> None:
    """Raise DataError if zeros in `head`, the first bytes of a file, show that it is not UTF-8."""
    kind = _kind(head) if 0 in head else None
    if kind or head.count(0) > len(head) // 4:
        raise DataError(f"{name} {kind or 'is UTF-16 or not text: convert it to UTF-8'}")


def _not_utf8(name: str, head: bytes, error: UnicodeDecodeError, line: int, at: int) -> DataError:
    """Return the error for byte `at` of a line, or for a known kind of file that is not text."""
    if kind := _kind(head):
        return DataError(f"{name} {kind}")
    return DataError(
        f"{name}, line {line}: byte {at + 1} of the line ({error.object[error.start]:#04x}) is not "
        "valid UTF-8; convert it to UTF-8"
    )


def _kind(head: bytes) -> str | None:
    """Return the kind of a file from its first bytes, with the fix; None for an unknown kind."""
    return next((kind for start, kind in _SIGNATURES.items() if head.startswith(start)), None)


class TextFile(Sequence[str]):
    """Lines of a UTF-8 file of any size, read from disk on access.

    Raises DataError, which names the file and the line, for a file that is not UTF-8.
    """

    def __init__(self, path: str):
        self.starts = array("q", [0])
        for line in checked_lines(path):
            self.starts.append(self.starts[-1] + len(line))
        with open(path, "rb") as file:
            # An empty file cannot be mapped into memory.
            self.bytes = mmap(file.fileno(), 0, access=ACCESS_READ) if self.starts[-1] else b""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return self.span(index, index + 1).rstrip("\r\n")

    def span(self, start: int, stop: int) -> str:
        """Return lines [start, stop) as one text with line ends."""
        text = self.bytes[self.starts[start] : self.starts[stop]].decode("utf-8")
        return text.removeprefix(_BOM if start == 0 else "")


class Parallel(Sequence[Example]):
    """Pairs of line i of the source file and line i of the target file.

    Raises DataError for empty files, and for files with different numbers of lines.
    """

    def __init__(self, paths: Sequence[str]):
        self.source, self.target = map(TextFile, paths)
        for path, lines in zip(paths, (self.source, self.target), strict=True):
            if len(lines) == 1 and "\r" in lines[0]:
                raise DataError(f"{path} {CR_ONLY}")
        if len(self.source) != len(self.target):
            raise DataError(
                f"{paths[0]} has {len(self.source)} lines but {paths[1]} has {len(self.target)}: "
                "give files in which line i of one translates line i of the other"
            )
        if not len(self.source):
            raise DataError(f"{paths[0]} and {paths[1]} are empty: give files with text")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return {"source": self.source[index], "target": self.target[index]}


# Documents --------------------------------------------------------------------------------------


class Documents(Sequence[Example]):
    """Documents (path, first byte, last byte + 1) in files, read from disk on access."""

    def __init__(self, pieces: Sequence[tuple[str, int, int]]):
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> Example:
        path, start, stop = self.pieces[index]
        with open(path, "rb") as file:
            file.seek(start)
            text = file.read(stop - start)
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError:
            for _ in checked_lines(path):  # Raises an error with the line.
                pass
            raise
        return {"text": decoded.removeprefix(_BOM if start == 0 else "").replace("\r\n", "\n")}


def documents(paths: Sequence[str], split: str, held: Sequence[str], holdout: float) -> Documents:
    """Return the documents of `split` in files and folders, one per file.

    Folders are read recursively in the order of names, without names that begin with a dot, and
    without following links to folders. Windows line ends become \\n. A file of more than 16 MiB
    is several documents, cut at line ends.

    The splits `held`, each a share `holdout`, are taken from these files. Of 500 or more files,
    whole files are chosen by a hash of their text. Of fewer files, the end of each file is taken,
    cut at a line end: the last share of a file is for valid, and the share before it is for test,
    so that valid is the same with and without test files.
    """
    files = [file for path in paths for file in _files_under(Path(path))]
    pieces = []
    try:
        if held and len(files) >= MANY_FILES:
            parts = np.array([_share_of_file(file) for file in files])
            files = [files[i] for i in select(parts, split, held, holdout)]
            held = ()
        n_after = held.index(split) if split in held else len(held)
        first = 1 - holdout * (n_after + 1) if split in held else 0
        last = 1 - holdout * n_after
        for path in files:
            with open(path, "rb") as file:
                _head(file, path)
                size = os.fstat(file.fileno()).st_size
                start, stop = _cut(file, int(size * first)), _cut(file, int(size * last))
                while start < stop:
                    middle = min(_cut(file, start + DOCUMENT_BYTES), stop)
                    pieces.append((path, start, middle))
                    start = middle
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename}: {error.strerror}; check the path"
        ) from error
    return Documents(pieces)


def _files_under(path: Path) -> list[str]:
    if not path.is_dir():
        return [str(path)]
    files = [
        str(file)
        for file in sorted(path.rglob("*"), key=Path.as_posix)
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
    ]
    if not files:
        raise DataError(f"{path} has no files: give a folder with text files")
    return files


def _share_of_file(path: str) -> float:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _cut(file: BinaryIO, at: int) -> int:
    """Return the position, in bytes, of the first start of a line at or after byte `at`.

    If no line starts within 64 KiB, since a corpus may be one line, return the first start of a
    word, or else of a character. The last line of the file may lack its line end.
    """
    if at <= 0:
        return 0
    file.seek(max(at - 1 - _LOOK, 0))
    before = file.read(min(at - 1, _LOOK))
    ahead = file.read(_LOOK)
    if len(ahead) < _LOOK and b"\n" not in ahead and b"\n" in before:
        return at - 1 + len(ahead)
    for mark in (b"\n", b" "):
        if (found := ahead.find(mark)) >= 0:
            return at + found
    # Not the end of the file, and not inside of a character.
    return at + next((i for i, byte in enumerate(ahead[1:]) if byte & 0xC0 != 0x80), len(ahead) - 1)
