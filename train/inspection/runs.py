"""`heedful runs`: a table of the runs in a folder."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from heedful.data.reading import parse_json
from heedful.train.errors import TrainError
from heedful.train.growing_files import read_lines
from heedful.train.messages import first_line
from heedful.train.metrics import scores_in
from heedful.train.patience import Patience
from heedful.train.run import Run, steps_of

SIGNS = ("metrics.jsonl", "environment.json", "fingerprints.jsonl")
"""Files of a run that has lost its config.json."""
NOT_SEARCHED = ("checkpoints", "checkpoints.corrupt", "evaluations")


@dataclass(frozen=True)
class Summary:
    """The state of a run, and its last numbers."""

    directory: Path
    state: str
    """running, finished, stopped, imported, no checkpoint, or broken."""
    problem: str = ""
    """Reason of the state broken."""
    step: int = 0
    steps: int = 0
    """Number of steps that the config asks for."""
    loss: float | None = None
    """Mean training loss of the last train.log_every steps."""
    best: str = ""
    """Metric, value and step of the best evaluation on validation data."""
    when: float = 0.0
    """Time of the last change, in seconds since 1970."""


def find_runs(folder: Path) -> Iterator[Path]:
    """Yield the directories of the runs in and below a folder, in alphabetical order.

    A config.json without model, data and train is not the config of a run.
    """
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in NOT_SEARCHED)
        if "config.json" in files:
            try:
                values = parse_json((Path(path) / "config.json").read_text("utf-8"))
                is_run = isinstance(values, dict) and bool({"model", "data", "train"} & {*values})
            except (OSError, ValueError):
                is_run = True  # It is listed as broken.
        else:
            is_run = any(name in files for name in SIGNS)
        if is_run:
            yield Path(path)


def summarize(directory: Path) -> Summary:
    """Return the summary of a run; an error in its files becomes the state broken."""
    try:
        return _summary(Run.open(directory))
    except (OSError, ValueError) as error:
        return Summary(directory, "broken", first_line(error), when=directory.stat().st_mtime)


def _summary(run: Run) -> Summary:
    saved = steps_of(run.checkpoints)
    lines = read_lines(run.metrics) if run.metrics.is_file() else []
    logged = [line for line in lines if "loss" in line]
    last, is_running = max(saved, default=0), run.is_locked()
    step = max([last, *(line["step"] for line in lines)]) if is_running else last
    evaluated = scores_in(lines, run.train.metric)
    if is_running:
        state = "running"
    elif not saved:
        state = "no checkpoint"
    elif saved == [0] and not lines:
        state = "imported"
    elif last >= run.train.steps or Patience(run.train, evaluated).is_over(last):
        state = "finished"
    else:
        state = "stopped"
    best = ""
    if evaluated:
        at = max(evaluated, key=lambda s: (evaluated[s], -s))
        best = f"{run.train.metric} {abs(evaluated[at]):.4f} at {at:,}"
    files = (run.metrics, run.directory / "result.json", run.directory / "config.json")
    return Summary(
        run.directory,
        state,
        step=step,
        steps=run.train.steps,
        loss=logged[-1]["loss"] if logged else None,
        best=best,
        when=max(path.stat().st_mtime for path in files if path.exists()),
    )


def _date(when: float) -> str:
    """Return the time of this year's days, and the date of earlier days."""
    day = time.localtime(when)
    is_recent = day.tm_year == time.localtime().tm_year
    return time.strftime("%d %b %H:%M" if is_recent else "%d %b %Y", day)


def print_runs(folder: Path, console: Console) -> None:
    """Print a table of the runs below a folder; raise TrainError if there are none."""
    if not folder.is_dir():
        raise TrainError(f"{folder} is no folder: give the folder of your runs")
    found = list(map(summarize, find_runs(folder)))
    if not found:
        raise TrainError(f"{folder} has no runs: heedful train CONFIG starts one in runs/CONFIG")
    table = Table("run", "state", "step", "loss", "best validation", "when", box=None)
    for column in (2, 3):
        table.columns[column].justify = "right"
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.no_wrap = True
    for run in found:
        is_begun = run.steps > 0 and run.state != "imported"
        table.add_row(
            str(run.directory),
            run.state,
            f"{run.step:,}/{run.steps:,}" if is_begun else "",
            "" if run.loss is None else f"{run.loss:.4f}",
            run.best,
            _date(run.when),
        )
    console.print(table)
    for run in found:
        if run.problem:
            console.print(f"{run.directory} is broken: {run.problem}", style="red")
