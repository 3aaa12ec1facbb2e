"""Files that grow while a run trains: lines of JSON and events of TensorBoard."""

import contextlib
import io
import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from heedful.data.writing import write_whole
from heedful.train.config_json import finite
from heedful.train.errors import TrainError
from heedful.train.messages import tell


class Appended:
    """A file that grows; a write error neither ends nor delays the training run.

    A full disk is reported once. Data that cannot be written wait until there is space.
    """

    def __init__(self, path: Path):
        self._path, self._is_told, self._waiting = path, False, b""
        self._file: io.RawIOBase | None = None

    def append(self, data: bytes) -> None:
        self._waiting += data
        try:
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._is_told:
                self._is_told = True
                reason = f"{self._path} cannot be written ({error.strerror}): free disk space"
                tell(f"{reason} or check permissions; training goes on")

    def close(self) -> None:
        self.append(b"")
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


class Events(Appended):
    """A file of TensorBoard events, written by the thread that calls `add`."""

    def __init__(self, directory: Path, from_step: int):
        """Start a file; TensorBoard then ignores events from `from_step` on in older files."""
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
        from tensorboardX.record_writer import masked_crc32c

        self._scalar, self._event, self._checksum = summary.scalar, Event, masked_crc32c
        began = time.time()
        name = f"events.out.tfevents.{int(began)}.{socket.gethostname()}"
        super().__init__(directory / name)
        self._add(wall_time=began, file_version="brain.Event:2")
        start = SessionLog(status=SessionLog.START)
        self._add(wall_time=began, step=from_step, session_log=start)

    def add(self, step: int, name: str, value: float) -> None:
        self._add(wall_time=time.time(), step=step, summary=self._scalar(name, value))

    def _add(self, **fields: Any) -> None:
        data = self._event(**fields).SerializeToString()
        # A record: the length, its checksum, the data, its checksum.
        parts = struct.pack("<Q", len(data)), data
        self.append(b"".join(p + struct.pack("<I", self._checksum(p)) for p in parts))


class Lines(Appended):
    """A file of JSON objects with a "step", one per line, that is continued after a step."""

    def __init__(
        self, path: Path, from_step: int, is_old: Callable[[dict], bool] = lambda _: False
    ):
        """Drop lines of steps after `from_step`, and an incomplete last line.

        Lines of `from_step` are dropped if `is_old(line)`. If other lines cannot be read, a copy of
        the file is kept. Raises TrainError if the file cannot be written.
        """
        super().__init__(path)
        try:
            if path.exists():
                *whole, last = path.read_bytes().split(b"\n")
                if any(_value(line) is None for line in whole):
                    keep_damaged(path, "some of its lines cannot be read")
                values = [value for line in (*whole, last) if (value := _value(line)) is not None]
                kept = [
                    line
                    for line in values
                    if line["step"] < from_step or (line["step"] == from_step and not is_old(line))
                ]
                write_whole(path, "".join(json.dumps(finite(line)) + "\n" for line in kept))
            elif path.is_symlink():  # A broken link: opening it would create a file elsewhere.
                path.unlink()
        except OSError as error:
            raise TrainError(
                f"{path} cannot be written ({error.strerror}): free disk space or check permissions"
            ) from error

    def write(self, line: Mapping[str, Any]) -> None:
        self.append(json.dumps(finite(line), allow_nan=False).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the values in a file of JSON lines; lines that cannot be read are left out."""
    return [v for line in path.read_bytes().split(b"\n") if (v := _value(line)) is not None]


def _value(line: bytes) -> dict[str, Any] | None:
    """Parse a line as a JSON object with an integer "step"; return None for any other line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_ours = isinstance(value, dict) and type(value.get("step")) is int
    return value if is_ours else None


def keep_damaged(path: Path, reason: str) -> None:
    """Copy a damaged file before it is overwritten, and print a message."""
    names = (f"{path.name}.damaged{n}" for n in ("", *(f".{i}" for i in range(2, 1000))))
    copy = next(each for each in map(path.with_name, names) if not os.path.lexists(each))
    shutil.copyfile(path, copy)
    tell(f"{path} is damaged ({reason}): it is written again; a copy of it is kept in {copy}")
