"""Tables on disk: .tsv and .csv with a header, and .jsonl with keys."""

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

# Each reader takes lines with their line ends, and only as many as the next row needs.
_READERS: dict[str, Callable[[Iterable[str]], Iterator[Any]]] = {
    ".tsv": lambda lines: (line.rstrip("\r\n").split("\t") for line in lines),  # No quoting.
    ".csv": lambda lines: _csv_rows(lines),
    ".jsonl": lambda lines: map(_json_value, lines),
}
SUFFIXES = ", ".join(_READERS)
csv.field_size_limit(1 << 30)  # Characters of a cell; the default is 131,072.
_HALF = re.compile("[\ud800-\udfff]")  # Lone surrogates: JSON can encode them, UTF-8 cannot.


def is_table(path: str) -> bool:
    """Tell if a path has the suffix of a table."""
    return Path(path).suffix.lower() in _READERS


def _is_json(path: str) -> bool:
    return Path(path).suffix.lower() == ".jsonl"


def _rows(path: str, lines: Iterable[str]) -> Iterator[Any]:
    """Yield the rows of a table: lists of cells, or the JSON value of each line."""
    return _READERS[Path(path).suffix.lower()](lines)


class _RowError(Exception):
    """Problem of a row and its fix; the caller adds the file and the line."""


def _csv_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    try:
        yield from csv.reader(lines, strict=True)
    except csv.Error as error:
        if "new-line character" in str(error):
            raise _RowError(f"{CR_ONLY}, or quote the cells that have them") from error
        raise _RowError(
            f"begins a row that is not CSV ({error}): quote cells with a comma, a quote or a line "
            "end, and double the quotes in them"
        ) from error


def _json_value(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise _RowError(f"is not JSON ({error}): write one object per line") from error


def header(path: str) -> tuple[str, ...]:
    """Return the names of the columns: the first row, or the keys of the first object.

    Raises DataError with the name of the file for a missing, empty or wrong header.
    """
    lines = (line.decode("utf-8-sig") for line in checked_lines(path))
    try:
        names = next(_rows(path, lines), ())
    except _RowError as error:
        raise DataError(f"{path}, line 1 {error}") from error
    if names == ():
        raise DataError(f"{path} is empty: give a table with rows")
    if _is_json(path) and not isinstance(names, dict):
        raise DataError(f"{path}, line 1 is not a JSON object: write one object per line")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"{path} has two columns {short(twice)!r}: rename one of them")
    if not any(names):
        raise DataError(f"{path} has no header: name the columns in its first line")
    if Path(path).suffix.lower() == ".tsv" and any("\r" in name for name in names):
        raise DataError(f"{path}, line 1 {CR_ONLY}")
    return tuple(names)


class Table(Sequence[Example]):
    """Rows of a table as examples, read from disk on access; all rows are checked at the start.

    `columns` maps each field of an example to a column. A field "label" must not be blank, and with
    `numbers` it must be a finite number. Raises DataError with the file and the line.
    """

    def __init__(self, path: str, columns: Mapping[str, str], *, numbers: bool):
        self.path, self.columns, self.numbers = path, columns, numbers
        self.header = header(path)
        for column in columns.values():
            if column not in self.header:
                raise DataError(
                    f"{path} has no column {column!r}, only {listed(self.header)}: "
                    "add the column, or name columns that all tables have in data.columns and "
                    "data.label"
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
        """Check all rows; yield the line where each row starts, and the line after the last row."""
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
        """Return the number of lines without blank lines at the end."""
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
                    f"has {len(row)} columns, but the header has {len(self.header)}: "
                    "give every row as many columns as the header",
                )
            row = dict(zip(self.header, row, strict=True))
        elif not isinstance(row, dict):
            raise self._error(line, "is not a JSON object: write one object per line")
        example = {}
        for field, column in self.columns.items():
            if column not in row:
                raise self._error(
                    line, f"has no {column!r}, only {listed(row)}: add this key, or delete the line"
                )
            value = row[column]
            if field == "label":
                value = self._label(value, column, line)
            elif not isinstance(value, str):
                raise self._error(line, f"has {_shown(value)} as {column!r}: give a text")
            if _HALF.search(value):
                raise self._error(
                    line,
                    f"has half of a surrogate pair (\\ud800-\\udfff) in {column!r}: delete it, or "
                    "add the other half",
                )
            example[field] = value
        return example

    def _label(self, value: Any, column: str, line: int) -> str:
        no_label = isinstance(value, float) and not math.isfinite(
            value
        )  # Not valid JSON, but Python reads it.
        if no_label or isinstance(value, (dict, list)):
            raise self._error(line, f"has {_shown(value)} as {column!r}: give a class or number")
        label = (
            value.strip() if isinstance(value, str) else "" if value is None else json.dumps(value)
        )
        if not label:
            raise self._error(
                line, f"has no label in column {column!r}: add a label, or delete the line"
            )
        if self.numbers and not is_finite(label):
            raise self._error(
                line,
                f"has the label {short(label)!r}: give a finite number, which data.objective "
                "regression needs",
            )
        return label

    def _error(self, line: int, message: str) -> DataError:
        return DataError(f"{self.path}, line {line + 1} {message}")


def _shown(value: Any) -> str:
    """Return a JSON value for an error message."""
    try:
        return short(json.dumps(value))
    except RecursionError:
        return "a value of many levels"


def is_finite(label: str) -> bool:
    """Tell if a text is a finite number."""
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False
