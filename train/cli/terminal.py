"""Input and output of commands; of several processes, only the first reads and prints."""

import json
import sys
from collections.abc import Iterable
from typing import Any

from heedful.data.errors import DataError
from heedful.data.text_files import CR_ONLY, checked_text


def console(stderr: bool = False) -> Any:
    """Return a console for commands; it prints brackets and colons in texts unchanged."""
    from rich.console import Console

    from heedful.train.hosts import is_first

    return Console(
        stderr=stderr,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=True,
        quiet=not is_first(),
    )


def print_lines(lines: Iterable[str]) -> None:
    """Print lines on the first process."""
    from heedful.train.hosts import is_first

    for line in lines:
        if is_first():
            print(line)


def read_lines() -> list[str]:
    """Return the lines of standard input, in UTF-8; the same on all processes."""
    from heedful.train.hosts import from_first, is_first, primary_first

    lines = primary_first(lambda: _lines_here() if is_first() else [])
    return json.loads(from_first(json.dumps(lines)))


def _lines_here() -> list[str]:
    text = sys.stdin.buffer.read()
    lines = checked_text(text, "standard input").split("\n")
    lines = lines if lines[-1] else lines[:-1]
    if len(lines) == 1 and "\r" in lines[0].rstrip("\r"):
        raise DataError(f"standard input {CR_ONLY}")
    return [line.rstrip("\r") for line in lines]
