"""The directory of a run while it trains."""

import os
from pathlib import Path


class Home:
    """Open handle of the directory of a run, to notice if the directory is moved or deleted."""

    def __init__(self, directory: Path):
        self._directory, self._handle = directory, os.open(directory, os.O_RDONLY)

    def close(self) -> None:
        os.close(self._handle)

    def is_lost(self) -> bool:
        """Tell if the path of the run now leads to another directory, or to none."""
        try:
            return not self._is(self._directory)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # A network file system may not answer for a while.
            return False

    def found(self) -> Path | None:
        """Return the new path of a moved directory; None: it is deleted, or the path is unknown."""
        try:
            path = Path(os.readlink(f"/proc/self/fd/{self._handle}"))
            return path if self._is(path) else None
        except OSError:
            return None

    def _is(self, path: Path) -> bool:
        return os.path.samestat(os.stat(path), os.fstat(self._handle))
