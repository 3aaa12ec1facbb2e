"""`heedful compare`: the settings, the numbers and the curves of several runs."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from heedful.train.errors import require
from heedful.train.inspection.curves import draw, metrics
from heedful.train.inspection.pictures import require_ours
from heedful.train.run import Run

NOTHING = "-"


def compare(directories: Sequence[Path], console: Console, output: Path | None = None) -> Path:
    """Print where runs differ and their last numbers, draw their curves; return the picture's path.

    None: compare.NAME.NAME.png in the current directory. Raises TrainError for a directory that is
    no run or has no metrics, and for the same run twice.
    """
    runs = {str(directory): Run.open(directory) for directory in directories}
    same = len({directory.resolve() for directory in directories}) < len(directories)
    require(not same, "the runs are the same: give the directories of different runs")
    names = [re.sub(r"[^\w.=-]", "_", directory.resolve().name)[:40] for directory in directories]
    path = output or Path(f"compare.{'.'.join(names)[:150]}.png")
    require_ours(path)
    last = {name: numbers(run) for name, run in runs.items()}
    configs = {name: _flat(run.values()) for name, run in runs.items()}
    rows = _rows(configs, only_different=True)
    console.print(_table("setting", rows, list(runs)) if rows else "all settings are the same")
    console.print()
    console.print(_table("number", _rows(last), list(runs)))
    draw(runs, path)
    console.print(f"\ncurves: {path}")
    return path


def numbers(run: Run) -> dict[str, str]:
    """Return the last value of each metric of a run, and the results of its evaluation."""
    found: dict[str, Any] = {}
    for line in metrics(run):
        found |= line
    try:
        result = json.loads((run.directory / "result.json").read_bytes())
    except (OSError, ValueError):  # The run has not ended.
        result = {}
    tests = {name: value for name, value in result.items() if name.startswith("test_")}
    return {name: _text(value) for name, value in (found | tests).items()}


def _text(value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return NOTHING if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) and abs(value) < 1000 else f"{value:,.0f}"


def _flat(values: Any, name: str = "") -> dict[str, str]:
    """Return the fields of a config (JSON values) by full name, as text."""
    if not isinstance(values, dict):
        is_list = isinstance(values, list)
        return {name: (" ".join(map(str, values)) or NOTHING) if is_list else str(values)}
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{name}.{key}".lstrip("."))
    return flat


def _rows(
    columns: Mapping[str, Mapping[str, str]], only_different: bool = False
) -> list[tuple[str, list[str]]]:
    """Return (name, value of each column) for each name, in the order of their first mention."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [(name, [column.get(name, NOTHING) for column in columns.values()]) for name in names]
    return [(name, row) for name, row in rows if not only_different or len(set(row)) > 1]


def _table(first: str, rows: list[tuple[str, list[str]]], names: list[str]) -> Table:
    table = Table(first, *names, box=None)
    for name, row in rows:
        table.add_row(name, *row)
    return table
