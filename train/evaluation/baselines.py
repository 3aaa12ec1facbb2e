"""Losses of guesses without any input; a useful model has a lower loss."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from heedful.data.pipeline import Dataset


def target_entropy(dataset: Dataset) -> float:
    """Return the loss, in nats, of a guess that knows only the frequency of each target."""
    counts: Counter[int] = Counter()
    for some in _targets(dataset):
        counts.update(dict(zip(*np.unique(some, return_counts=True), strict=True)))
    shares = np.array(list(counts.values())) / counts.total()
    return float(-np.sum(shares * np.log(shares)))


def target_variance(dataset: Dataset) -> float:
    """Return the squared error of a guess that knows only the mean of all targets."""
    return float(np.concatenate(list(_targets(dataset))).var())


def _targets(dataset: Dataset) -> Iterator[np.ndarray]:
    """Yield for each batch the targets whose weight is above 0."""
    for batch in dataset.eval_batches():
        yield batch["targets"][batch["weights"] > 0]
