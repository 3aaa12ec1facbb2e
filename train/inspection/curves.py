"""`heedful plot` and `heedful compare`: curves of the metrics of runs, as a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from heedful.train.errors import TrainError, require
from heedful.train.growing_files import read_lines
from heedful.train.hosts import is_first
from heedful.train.inspection.pictures import require_ours, save
from heedful.train.messages import first_line
from heedful.train.reproducibility.record import environments
from heedful.train.run import Run

LOSSES = ("loss", "smoothed_loss")
FILE = "plot.png"
PANEL = 5.0, 3.2  # Width and height of a panel in inches.
MAX_MARKED = 40  # Largest number of points of a curve that are marked.


def plot(run: Run, console: Console, output: Path | None = None) -> Path:
    """Draw the curves of a run, and return the path of the picture; None: plot.png in the run.

    Raises TrainError for a run without metrics, and for an output that heedful did not draw.
    """
    path = output or run.directory / FILE
    require_ours(path)
    draw({run.directory.resolve().name: run}, path)
    console.print(f"curves of {run.directory}: {path}")
    return path


def try_plot(run: Run, console: Console) -> None:
    """Draw plot.png at the end of a training run; on any failure, only print a message."""
    if not is_first():
        return
    try:
        plot(run, console)
    except Exception as error:  # A failed picture must not lose a result.
        console.print(f"{run.directory / FILE} was not drawn: {first_line(error)}", style="yellow")


def metrics(run: Run) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; raise TrainError if there are none."""
    lines = read_lines(run.metrics) if run.metrics.is_file() else []
    require(
        len(lines) > 0,
        f"{run.metrics} has no metrics: train the run for train.log_every = "
        f"{run.train.log_every} steps first",
    )
    return lines


def curve(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and the values of a metric; a value that was not finite is NaN."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [math.nan if v is None else v for _, v in found]


def draw(runs: Mapping[str, Run], path: Path) -> None:
    """Draw the curves of runs, each with its label, into one PNG."""
    from matplotlib.figure import Figure

    scores = sorted({run.train.metric for run in runs.values()} - set(LOSSES))
    panels = [
        ("loss", "loss, nats or squared error", ["loss", "valid_loss"]),
        *((name, f"{name} of the validation data", [f"valid_{name}"]) for name in scores),
        ("learning rate", "learning rate", ["lr"]),
        ("gradient norm", "norm before clipping", ["grad_norm"]),
        ("throughput", "predicted tokens per second", ["tokens_per_second"]),
    ]
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(2 * PANEL[0], rows * PANEL[1] + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.remove()
    for i, (label, run) in enumerate(runs.items()):
        lines = metrics(run)
        for axis, (_, _, names) in zip(axes, panels, strict=False):
            for name in names:
                _draw_curve(axis, *curve(lines, name), name, label, f"C{i}", len(runs) == 1)
    resumed = _changed(next(iter(runs.values()))) if len(runs) == 1 else []
    for axis, (title, unit, names) in zip(axes, panels, strict=False):
        for step in resumed:
            axis.axvline(step, color="0.5", linestyle=":", linewidth=1)
        axis.set_title(title)
        axis.set(xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
        values = [v for line in axis.lines for v in line.get_ydata() if v > 0]
        if title == "gradient norm" and values and max(values) > 20 * min(values):
            axis.set_yscale("log")
        if title == "throughput":
            axis.set_ylim(bottom=0)
        if axis.get_legend_handles_labels()[0] and (len(runs) > 1 or len(names) > 1):
            axis.legend(fontsize=8)
    title = f"{', '.join(runs)}: metrics of training"
    if resumed:
        title += "\ndotted: resumed with another setting or in another environment"
    figure.suptitle(title, parse_math=False)
    save(figure, path, title, dpi=110)


def _draw_curve(
    axis: Any,
    steps: list[int],
    values: list[float],
    name: str,
    label: str,
    colour: str,
    is_alone: bool,
) -> None:
    if not steps:
        return
    is_valid, is_loss = name.startswith("valid_"), name.endswith("loss")
    split = "validation" if is_valid else "training"
    style: dict[str, Any] = {"color": colour}
    if is_loss and not is_valid:
        style |= {"alpha": 0.5, "linewidth": 1}
    elif is_loss and is_alone:
        style["color"] = "C1"
    if len(steps) == 1 or (is_valid and len(steps) <= MAX_MARKED):
        style["marker"] = "o"
        style["markersize"] = 4
    text = label if not is_loss else split if is_alone else f"{label}, {split}"
    axis.plot(steps, values, label=text.lstrip("_") or text, **style)


def _changed(run: Run) -> list[int]:
    """Return the steps at which the run was resumed in another environment or with other settings.

    These are the later entries of environment.json.
    """
    try:
        return [each["from_step"] for each in environments(run.directory) if each["from_step"]]
    except (OSError, TrainError):
        return []
