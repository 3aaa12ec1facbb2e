"""Runs that are compared: each is trained by the command line in a process of its own."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Trained(NamedTuple):
    """Results of a run that has ended."""

    said: str
    """Text that the command printed."""
    metrics: list[dict[str, Any]]
    """Losses and other metrics, by step."""
    result: dict[str, Any]
    """Losses and scores at the end; empty if the run did not come to its end."""

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps, and the metric `name` at each step."""
        found = [entry for entry in self.metrics if name in entry]
        return [entry["step"] for entry in found], [entry[name] for entry in found]


def train(
    config: str,
    directory: Path,
    flags: Sequence[str] = (),
    *,
    cwd: Path | None = None,
    program: Sequence[str] = (),
) -> Trained:
    """Run `heedful train CONFIG --run-dir DIRECTORY FLAGS`, unless the run has ended before.

    The command runs in `cwd`; `program` replaces the arguments for Python that start heedful. The
    file DIRECTORY.flags records the flags. Raises SystemExit if a run there had other flags.
    """
    directory = directory.resolve()
    log, metrics, result = directory.with_suffix(".log"), "metrics.jsonl", "result.json"
    record, where = directory.with_suffix(".flags"), f" in {cwd.resolve()}" if cwd else ""
    given = shlex.join([*program, config, *flags]) + where
    if not (directory / result).exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(given, "utf-8")
        command = [sys.executable, *(program or ("-m", "heedful")), "train", config]
        with log.open("w") as out:
            whole = [*command, "--run-dir", str(directory), *flags]
            subprocess.call(whole, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=cwd)
    elif (before := _text(record)) != given:
        raise SystemExit(
            f"{directory} was trained with {before or f'flags that are not in {record}'}, "
            f"not with {given}: give another --out, or delete it"
        )
    lines = _text(directory / metrics).splitlines()
    found = json.loads(_text(directory / result) or "{}")
    return Trained(_text(log), [json.loads(line) for line in lines], found)


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""
