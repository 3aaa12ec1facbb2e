"""Messages to people that never end a training."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console


@contextlib.contextmanager
def lasting(console: Console) -> Iterator[None]:
    """Leave out, while entered, text that cannot be printed: a full disk ends no training."""
    former, console.file = console.file, _Lasting(console.file)  # type: ignore[assignment]
    try:
        yield
    finally:
        console.file = former


class _Lasting:
    """A stream whose disk may be full. A pipe without a reader raises as ever."""

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


def tell(text: str) -> None:
    """Print a line to standard error, where that can be written."""
    with contextlib.suppress(OSError):
        print(f"heedful: {text}", file=sys.stderr, flush=True)
