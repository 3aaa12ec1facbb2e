"""Measure a model on a split, and describe the measurements."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from heedful.data.pipeline import Dataset
from heedful.train.errors import TrainError
from heedful.train.evaluation import scores
from heedful.train.evaluation.perplexity import NOTHING_TO_PREDICT
from heedful.train.sharding import rows_here, to_devices
from heedful.train.tasks import task_of


def measure(eval_step: Callable, params: Any, dataset: Dataset, mesh: Mesh) -> dict[str, float]:
    """Return mean losses over the whole dataset, each example once, and the scores of its task.

    A loss is a weighted mean: nats per predicted token or class, or the squared error.
    """
    task = task_of(dataset.config)
    totals: defaultdict[str, float] = defaultdict(float)
    total_weight = 0.0
    kept: list[dict[str, np.ndarray]] = []
    pending = []
    for batch in dataset.eval_batches(*rows_here(mesh)):
        pending.append(eval_step(params, to_devices(batch, mesh)))
    for losses, weight, outputs in jax.device_get(pending):
        for name, loss in losses.items():
            totals[name] += float(loss)
        total_weight += float(weight)
        if outputs is not None:
            is_example = outputs.pop("weights") > 0
            kept.append({name: array[is_example] for name, array in outputs.items()})
    if not total_weight:
        raise TrainError(NOTHING_TO_PREDICT.format(split=dataset.split))
    measured = {name: total / total_weight for name, total in totals.items()}
    if task.scores is not None:
        names = kept[0]
        measured |= task.scores(
            **{name: np.concatenate([outputs[name] for outputs in kept]) for name in names}
        )
    return measured


def frequency_loss(dataset: Dataset) -> float | None:
    """Return the loss of a guess without any input; None: the task has no such baseline."""
    baseline = task_of(dataset.config).baseline
    return None if baseline is None else baseline(dataset)


def describe(measured: dict[str, float], dataset: Dataset) -> list[str]:
    """Describe a measurement in lines for people; the main scores of the data come first."""
    lines = task_of(dataset.config).describe(measured["loss"], dataset)
    others = {name: value for name, value in measured.items() if name != "loss"}
    deciding = scores.main_scores(dataset.config.source, others)
    ordered = [*deciding, *(name for name in others if name not in deciding)]
    named = {name: name for name in ordered}
    if "f1" in named:
        of = (
            f"class {dataset.classes[1]}"
            if len(dataset.classes) == 2
            else "all classes, their mean"
        )
        named["f1"] = f"f1 of {of}"
    return lines + [f"{named[name]}: {100 * others[name]:.2f} %" for name in ordered]
