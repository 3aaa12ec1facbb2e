"""Files that are written whole or not at all, and never through a link."""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, contents: bytes | str) -> None:
    """Replaces the file at `path`, or makes it; raises OSError and leaves what was there.

    It is written beside its place, put on disk, and renamed. What stands at `path` may be a link:
    the link is replaced, and never what it leads to.
    """
    draft = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(contents.encode() if isinstance(contents, str) else contents)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync(path.parent)
    except OSError as error:
        # The name of the draft would tell nobody what was to be written.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Puts the names in a folder on disk, where the file system can do that."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
