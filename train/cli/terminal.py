"""Input and output of commands; of several processes, only the first reads and prints."""

import json
import sys
import termios
from collections.abc import Callable, Iterable
from typing import Any

from heedful.data.errors import DataError
from heedful.data.text_files import CR_ONLY, checked_text
from heedful.model.config import ModelError
from heedful.train import signals
from heedful.train.errors import TrainError

PROMPT = "> "


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


def lines_of(text: str | None) -> list[str] | None:
    """Return the text as a line, or the lines of standard input; None: ask for them at a prompt.

    A single process at a terminal asks.
    """
    from heedful.train.hosts import is_multiprocess

    if text is not None:
        return [text]
    return None if sys.stdin.isatty() and not is_multiprocess() else read_lines()


def answer_each(lines: list[str] | None, answer: Callable[[list[str]], None]) -> None:
    """Answer the lines at once; None: ask for one line after the other, until Ctrl-D.

    At the prompt, the error of a line is printed, and the next line can be given.
    """
    if lines is not None:
        answer(lines)
        return
    import readline  # noqa: F401  (With it, a prompt has arrow keys and a history.)

    signals.terminal = termios.tcgetattr(sys.stdin.fileno())
    print("one text per line; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            print()
            return
        try:
            text = checked_text(line.encode("utf-8", "surrogateescape"), "the line")
            if text.strip():
                answer([text])
        except (DataError, ModelError, TrainError) as error:
            print(f"heedful: error: {error}", file=sys.stderr)


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
