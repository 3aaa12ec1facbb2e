"""Trainings beside each other: each a run of the command line, in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Trained(NamedTuple):
    """What a run left behind."""

    said: str
    """Its output."""
    result: dict[str, Any]
    """Its losses and scores in the end."""
    metrics: list[dict[str, Any]]
    """Those on its way."""

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps, and the metric `name` at each."""
        found = [entry for entry in self.metrics if name in entry]
        return [entry["step"] for entry in found], [entry[name] for entry in found]


def train(
    config: str, directory: Path, flags: Sequence[str] = (), cwd: Path | None = None
) -> Trained:
    """`heedful train CONFIG --run-dir DIRECTORY FLAGS`, unless it has come to its end before."""
    directory, log = directory.resolve(), directory.with_suffix(".log")
    if not (directory / "result.json").exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "train.cli", "train", config, "--run-dir", str(directory)]
        with log.open("w") as out:
            code = subprocess.call([*command, *flags], stdout=out, stderr=out, cwd=cwd)
        if code:
            raise SystemExit(f"{' '.join(command[3:])} ended with {code}: see {log}")
    lines = (directory / "metrics.jsonl").read_text("utf-8").splitlines()
    result = json.loads((directory / "result.json").read_text("utf-8"))
    return Trained(log.read_text("utf-8"), result, [json.loads(line) for line in lines])
