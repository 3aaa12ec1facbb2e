"""Loss of a language model on long documents, where tokens have a long context."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from heedful.data.batch import pad_and_stack
from heedful.data.objectives import Arrays
from heedful.data.pipeline import Dataset
from heedful.train.errors import TrainError
from heedful.train.sharding import whole_to_devices
from heedful.train.tasks import TASKS, task_of

NOTHING_TO_PREDICT = (
    "the {split} data has nothing to predict: all its tokens are special, or unknown to the "
    "tokenizer; give other data, or another data.tokenizer"
)


def strided_loss(
    eval_step: Callable, params: Any, dataset: Dataset, mesh: Mesh, stride: int
) -> float:
    """Return the mean loss in nats per token, in windows that move by `stride` positions.

    A window has data.max_length positions. Only the last `stride` positions of a window are
    predicted, with the positions before them as context; in the first window of a document, all
    positions are predicted. So each token is predicted once. Raises TrainError for an objective
    without windows, and for a stride longer than a window.
    """
    config = dataset.config
    if not task_of(config).has_stride:
        names = " or ".join(name for name, task in TASKS.items() if task.has_stride)
        raise TrainError(
            f"--stride {stride}: only for data.objective {names}, not {config.objective}; leave "
            "--stride out"
        )
    if not 1 <= stride <= config.max_length:
        raise TrainError(
            f"--stride {stride}: give a number from 1 to data.max_length = {config.max_length}"
        )
    n_rows = max(config.batch_tokens // config.max_length, 1)
    n_rows = -(-n_rows // config.batch_multiple) * config.batch_multiple
    total, weight = 0.0, 0.0
    with jax.set_mesh(mesh):
        windows = _windows(dataset, stride)
        while rows := list(islice(windows, n_rows)):
            batch = whole_to_devices(pad_and_stack(rows, n_rows, config.max_length), mesh)
            losses, weights, _ = eval_step(params, batch)
            total, weight = total + float(losses["loss"]), weight + float(weights)
    if not weight:
        raise TrainError(NOTHING_TO_PREDICT.format(split=dataset.split))
    return total / weight


def _windows(dataset: Dataset, stride: int) -> Iterator[Arrays]:
    config, tokenizer = dataset.config, dataset.tokenizer
    objective, rng = config.objective_spec, np.random.default_rng(0)
    counts = dataset.store.counts()["text"]
    for document in dataset.kept:
        positions, done = int(counts[document]) + 1, 0
        while done < positions:
            stop = min(done + (stride if done else config.max_length), positions)
            start = max(stop - config.max_length, 0)
            text = dataset.store.text(int(document), start, stop + 1, tokenizer.frame)
            row = objective.row({"text": text}, rng, config, tokenizer)
            is_new = np.arange(start, stop) >= done
            yield {**row, "weights": is_new.astype(np.float32)}
            done = stop
