"""Processes that are measured in turns: each answers a line of standard input with a line of JSON.

This module must not import a measured library.
"""

import contextlib
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Process:
    """A process that answers; it is killed if an answer takes longer than `patience` seconds."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], patience: float):
        # A full pipe that nobody reads would block the process.
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.patience = patience

    def ask(self, request: str = "") -> dict[str, Any]:
        """Return the next answer, or the reason for its absence."""
        process = self.process
        assert process.stdin and process.stdout
        timer = threading.Timer(self.patience, process.kill)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                if request:
                    process.stdin.write(request + "\n")
                    process.stdin.flush()
            if answer := process.stdout.readline():
                return json.loads(answer)
            code, timely = process.wait(), timer.is_alive()
            return {"skipped": self._last(code) if timely else f"over {self.patience:.0f} s"}
        finally:
            timer.cancel()

    def _last(self, code: int) -> str:
        """Return the last line of errors that the process wrote before its end."""
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - 4096))
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else f"the process ended with {code} and no message"

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()
