"""Which examples make up which batch: length bucketing, planned ahead for a whole epoch.

Examples of similar length share a batch, and batches come in a few shapes only, because every shape
is compiled once. The plan is a pure function of the lengths, the config and the seed: any batch can
be asked for by its number, so a run resumes where it stopped and any number of processes sees the
same batches.
"""

import numpy as np

from data.config import DataConfig, DataError

LENGTH_MULTIPLE = 8  # Matrix units work on tiles: a length in between costs as much as the next.


def choose_buckets(lengths: np.ndarray, buckets: int, max_length: int) -> list[int]:
    """Returns at most `buckets` row lengths, ascending, that leave the least padding.

    Every length is rounded up to a multiple of 8 (or to `max_length`), and all of those are
    candidates. Dynamic programming over the candidates: the best way to cover the shortest j
    candidates with k buckets covers the shortest i < j with k - 1, and the rest at length j.
    """
    rounded = np.minimum(-(-lengths // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, max_length)
    candidates, counts = np.unique(rounded, return_counts=True)
    examples = np.concatenate([[0], np.cumsum(counts)])
    n = len(candidates)
    best = np.full(n + 1, np.inf)  # best[j]: fewest positions for the j shortest candidates.
    best[0] = 0
    choices = []
    for _ in range(min(buckets, n)):
        # cost[i, j]: the first i as well as possible so far, then one bucket up to candidate j.
        width = np.concatenate([[0], candidates])[None, :]
        cost = best[:, None] + (examples[None, :] - examples[:, None]) * width
        cost[np.tril_indices(n + 1)] = np.inf
        choices.append(cost.argmin(0))
        best = cost.min(0)
    chosen, j = [], n
    for choice in reversed(choices):
        chosen.append(int(candidates[j - 1]))
        j = choice[j]
    return chosen[::-1]


class BatchPlan:
    """The batches of every epoch. Global batch `i` belongs to epoch `i // batches_per_epoch`.

    lengths: [sides, E] tokens of every example's row, on each side of the model.
    shuffle: every epoch has its own order of examples and batches; otherwise there is one order, by
    bucket, for evaluation.
    """

    def __init__(self, lengths: np.ndarray, config: DataConfig, seed: int, *, shuffle: bool = True):
        rows = lengths.max(0)
        self.seed = seed
        self.shuffle = shuffle
        self.lengths = choose_buckets(rows, config.buckets, config.max_length)
        self.n_rows = [_rows(length, config) for length in self.lengths]
        bucket = np.searchsorted(self.lengths, rows)
        self._members = [np.flatnonzero(bucket == b) for b in range(len(self.lengths))]
        self._batches = [-(-len(m) // n) for m, n in zip(self._members, self.n_rows, strict=True)]
        self.batches_per_epoch = sum(self._batches)
        positions = sum(map(np.prod, zip(self._batches, self.n_rows, self.lengths, strict=True)))
        self.padding_share = 1 - int(lengths.sum()) / (len(lengths) * int(positions))
        self._epochs: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The (rows, length) of every batch shape, by length."""
        return list(zip(self.n_rows, self.lengths, strict=True))

    def rows(self, index: int) -> tuple[int, int, np.ndarray]:
        """Returns length, number of rows and the examples of global batch `index`.

        The last batch of a bucket may have fewer examples than rows; the other rows are padding.
        """
        epoch, index = divmod(index, self.batches_per_epoch)
        members, order = self._epoch(epoch if self.shuffle else 0)
        bucket, number = order[index]
        n = self.n_rows[bucket]
        return self.lengths[bucket], n, members[bucket][number * n : (number + 1) * n]

    def _epoch(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Returns the examples of every bucket in order, and the batches as (bucket, number)."""
        # Threads may ask at the same time, without a lock: at worst two compute the same order.
        epochs = self._epochs
        if epoch not in epochs:
            members = self._members
            order = np.array(
                [(b, i) for b, count in enumerate(self._batches) for i in range(count)]
            )
            if self.shuffle:
                rng = np.random.default_rng((self.seed, epoch))
                members = [rng.permutation(m) for m in members]
                order = rng.permutation(order)
            # The neighbour is kept: around the end of an epoch, threads still ask for both.
            epochs = {k: v for k, v in epochs.items() if abs(k - epoch) == 1}
            epochs[epoch] = members, order
            self._epochs = epochs
        return epochs[epoch]


def _rows(length: int, config: DataConfig) -> int:
    rows = config.batch_tokens // length // config.batch_multiple * config.batch_multiple
    if not rows:
        raise DataError(
            f"data.batch_tokens {config.batch_tokens} does not hold data.batch_multiple "
            f"{config.batch_multiple} rows of {length} tokens: give data.batch_tokens "
            f"{config.batch_multiple * length} or more, or lower data.max_length"
        )
    return rows
