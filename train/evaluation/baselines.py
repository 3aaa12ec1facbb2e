"""Losses of guesses that have read no input: what a model has to be better than."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from heedful.data.pipeline import Dataset


def target_entropy(dataset: Dataset) -> float:
    """Return the loss, in nats, of a guess that knows how frequent each target is, nothing else."""
    counts: Counter[int] = Counter()
    for some in _targets(dataset):
        counts.update(dict(zip(*np.unique(some, return_counts=True), strict=True)))
    shares = np.array(list(counts.values())) / counts.total()
    return float(-np.sum(shares * np.log(shares)))


def target_variance(dataset: Dataset) -> float:
    """Return the squared error of a guess that knows the mean of all targets."""
    return float(np.concatenate(list(_targets(dataset))).var())


def _targets(dataset: Dataset) -> Iterator[np.ndarray]:
    """Yield the targets of each batch that have a weight."""
    for batch in dataset.eval_batches():
        yield batch["targets"][batch["weights"] > 0]
