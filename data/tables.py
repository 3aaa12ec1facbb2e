"""Tables on disk: .tsv and .csv with a header, .jsonl with keys; rows by number."""

import csv
import json
import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from heedful.data.errors import DataError, listed, short
from heedful.data.examples import Example
from heedful.data.reading import parse_json
from heedful.data.text_files import CR_ONLY, TextFile, checked_lines

# Each takes lines with their ends and takes no more of them than a row needs.
_READERS: dict[str, Callable[[Iterable[str]], Iterator[Any]]] = {
    ".tsv": lambda lines: (line.rstrip("\r\n").split("\t") for line in lines),  # No quoting.
    ".csv": lambda lines: _csv_rows(lines),
    ".jsonl": lambda lines: map(_json_value, lines),
}
SUFFIXES = ", ".join(_READERS)
csv.field_size_limit(1 << 30)  # Characters of a cell; 131,072 unless told.
_HALF = re.compile("[\ud800-\udfff]")  # JSON can write these alone; UTF-8 cannot.


def is_table(path: str) -> bool:
    return Path(path).suffix.lower() in _READERS


def _is_json(path: str) -> bool:
    return Path(path).suffix.lower() == ".jsonl"


def _rows(path: str, lines: Iterable[str]) -> Iterator[Any]:
    """Yields lists of cells, or the values of JSON."""
    return _READERS[Path(path).suffix.lower()](lines)


class _RowError(Exception):
    """A fault of a row, and what to do, without its file and line."""


def _csv_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    try:
        yield from csv.reader(lines, strict=True)
    except csv.Error as error:
        if "new-line character" in str(error):
            raise _RowError(f"{CR_ONLY}, or quote the cells that have them") from error
        raise _RowError(
            f"begins a row that is no CSV ({error}): quote a cell that has a comma, a quote or a "
            "line end, and double the quotes in it"
        ) from error


def _json_value(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise _RowError(f"is no JSON ({error}): give one object a line") from error


def header(path: str) -> tuple[str, ...]:
    """Returns the names of the columns: the first row, or the keys of the first object."""
    lines = (line.decode("utf-8-sig") for line in checked_lines(path))
    try:
        names = next(_rows(path, lines), ())
    except _RowError as error:
        raise DataError(f"{path}, line 1 {error}") from error
    if names == ():
        raise DataError(f"{path} is empty: give it rows")
    if _is_json(path) and not isinstance(names, dict):
        raise DataError(f"{path}, line 1 is no JSON object: give one object a line")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"{path} names a column twice, {short(twice)!r}: rename one")
    if not any(names):
        raise DataError(f"{path} has no header: name the columns in its first line")
    if Path(path).suffix.lower() == ".tsv" and any("\r" in name for name in names):
        raise DataError(f"{path}, line 1 {CR_ONLY}")
    return tuple(names)


class Table(Sequence[Example]):
    """The rows of a table, read from disk when asked for; all are checked once, at the start.

    `columns` maps the fields of an example to columns; a field "label" may not be blank, and must
    be a finite number where `numbers` says so. Raises DataError that names file and line.
    """

    def __init__(self, path: str, columns: Mapping[str, str], *, numbers: bool):
        self.path, self.columns, self.numbers = path, columns, numbers
        self.header = header(path)
        for column in columns.values():
            if column not in self.header:
                raise DataError(
                    f"{path} has no column {column!r}, only {listed(self.header)}: "
                    "all tables need the same columns, unless data.columns and data.label say so"
                )
        self.lines = TextFile(path)
        self.starts = array("q", self._check())

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        start, stop = self.starts[index], self.starts[index + 1]
        return self._example(next(_rows(self.path, [self.lines.span(start, stop)])), start)

    def _check(self) -> Iterator[int]:
        """Yields the line where each row starts, and the one after the last."""
        n_taken = 0

        def take() -> Iterator[str]:
            nonlocal n_taken
            for n_taken in range(1, self._last() + 1):
                yield self.lines.span(n_taken - 1, n_taken)

        rows = _rows(self.path, take())
        if not _is_json(self.path):
            next(rows)  # The header.
        while True:
            start = n_taken
            try:
                row = next(rows)
            except StopIteration:
                break
            except _RowError as error:
                raise self._error(start, str(error)) from error
            self._example(row, start)
            yield start
        yield n_taken

    def _last(self) -> int:
        """Returns the line after the last row: blank lines at the end are none."""
        last = len(self.lines)
        is_row = len(self.header) == 1 and Path(self.path).suffix.lower() == ".tsv"
        while last and not is_row and not self.lines.span(last - 1, last).strip(" \r\n"):
            last -= 1
        return last

    def _example(self, row: Any, line: int) -> Example:
        if not _is_json(self.path):
            if len(row) != len(self.header):
                raise self._error(
                    line,
                    f"has {len(row)} columns, the header has {len(self.header)}: "
                    "give every row the same",
                )
            row = dict(zip(self.header, row, strict=True))
        elif not isinstance(row, dict):
            raise self._error(line, "is no JSON object: give one object a line")
        example = {}
        for field, column in self.columns.items():
            if column not in row:
                raise self._error(line, f"has no {column!r}, only {listed(row)}")
            value = row[column]
            if field == "label":
                value = self._label(value, column, line)
            elif not isinstance(value, str):
                raise self._error(line, f"has {_shown(value)} as {column!r}: give a text")
            if _HALF.search(value):
                raise self._error(
                    line, f"has half a character (\\ud800-\\udfff) in {column!r}: repair it"
                )
            example[field] = value
        return example

    def _label(self, value: Any, column: str, line: int) -> str:
        no_label = isinstance(value, float) and not math.isfinite(value)  # JSON has no such number.
        if no_label or isinstance(value, (dict, list)):
            raise self._error(line, f"has {_shown(value)} as {column!r}: give a class or number")
        label = (
            value.strip() if isinstance(value, str) else "" if value is None else json.dumps(value)
        )
        if not label:
            raise self._error(line, f"has no label in column {column!r}: give one, or take it out")
        if self.numbers and not is_finite(label):
            raise self._error(
                line, f"has the label {short(label)!r}: regression needs a finite number"
            )
        return label

    def _error(self, line: int, message: str) -> DataError:
        return DataError(f"{self.path}, line {line + 1} {message}")


def _shown(value: Any) -> str:
    """A JSON value in an error."""
    try:
        return short(json.dumps(value))
    except RecursionError:
        return "a value of many levels"


def is_finite(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False
