"""The directory of a run while it trains."""

import os
from pathlib import Path


class Home:
    """Handle of the directory of a run while it trains: a move or a deletion is noticed."""

    def __init__(self, directory: Path):
        self._directory, self._handle = directory, os.open(directory, os.O_RDONLY)

    def close(self) -> None:
        os.close(self._handle)

    def is_lost(self) -> bool:
        """Tell if another directory, or none, has its name."""
        try:
            return not self._is(self._directory)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # A share that does not answer for a while.
            return False

    def found(self) -> Path | None:
        """Return the path that it was moved to, if the system tells; None: it was deleted."""
        try:
            path = Path(os.readlink(f"/proc/self/fd/{self._handle}"))
            return path if self._is(path) else None
        except OSError:
            return None

    def _is(self, path: Path) -> bool:
        return os.path.samestat(os.stat(path), os.fstat(self._handle))
