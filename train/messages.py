"""Print messages; an error while printing never ends a training run."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console


def first_line(error: BaseException) -> str:
    """Return the first line of the text of an exception; without text, the name of its class."""
    return str(error).partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def lasting(console: Console) -> Iterator[None]:
    """Leave out text that cannot be printed within the context: a full disk must not end a run."""
    former, console.file = console.file, _Lasting(console.file)  # type: ignore[assignment]
    try:
        yield
    finally:
        console.file = former


class _Lasting:
    """Stream that ignores write errors, as of a full disk; a closed pipe raises BrokenPipeError."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except BrokenPipeError:
            raise
        except OSError:
            return 0


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """Hide warnings of the absl logger within the context or the decorated function."""
    logger = logging.getLogger("absl")
    former = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(former)


def quiet() -> Console:
    """Return a console that prints nothing."""
    return Console(quiet=True, markup=False)


def tell(text: str) -> None:
    """Print a line to standard error; do nothing if the line cannot be written."""
    with contextlib.suppress(OSError):
        print(f"heedful: {text}", file=sys.stderr, flush=True)
