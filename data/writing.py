"""Write files atomically, and replace links instead of the files that links point to."""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, contents: bytes | str) -> None:
    """Write a file atomically; after an OSError the previous file is unchanged.

    The contents are written to a temporary file in the same folder, synced, and renamed. A link at
    `path` is replaced; the file that it points to is not changed.
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
        # Name the file, not the temporary file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Sync a file or folder to disk if the file system can."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
