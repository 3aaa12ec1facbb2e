"""Plan the rows and batches of an epoch.

There are two kinds of plans. By length: rows of similar length share a batch, and batches have few
shapes, since the training step is compiled for every shape. Packed: all documents are concatenated,
and rows of one length are cut from the concatenation. A plan is a pure function of the lengths, the
config and the seed. Any batch can be computed from its number, so that a run can resume at any
step, and the batches do not depend on the number of processes.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, Self

import numpy as np

from heedful.data.config import DataConfig
from heedful.data.errors import DataError


class Shape(NamedTuple):
    """Number of rows of a batch, and their length on each side of the model (encoder first)."""

    rows: int
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        if len(set(self.lengths)) == 1:
            return f"{self.rows} x {self.lengths[0]}"
        return f"{self.rows} x ({' + '.join(map(str, self.lengths))})"


class Plan(Protocol):
    """The batches of every epoch. Global batch `i` belongs to epoch `i // batches_per_epoch`."""

    batches_per_epoch: int
    padding_share: float
    shapes: list[Shape]
    """Shapes of the batches, in the order of their lengths."""

    def rows(self, index: int) -> tuple[Shape, np.ndarray]:
        """Return the shape and the row numbers of global batch `index`.

        If there are fewer numbers than rows in the shape, the other rows are padding.
        """
        ...

    def in_order(self) -> Self:
        """Return the plan for evaluation: not shuffled, the same in every epoch."""
        ...


def choose_buckets(lengths: np.ndarray, config: DataConfig) -> list[int]:
    """Return at most `config.buckets` row lengths, ascending, with the least padding.

    The candidates are all lengths, rounded up by `round_up`. Dynamic programming: the best k
    buckets for the shortest j candidates are the best k - 1 buckets for the shortest i < j, and one
    bucket of length j for the rest.
    """
    counts = np.bincount(lengths)
    counts = np.bincount(round_up(np.arange(len(counts)), config), counts)
    candidates = np.flatnonzero(counts)
    examples = np.concatenate([[0], np.cumsum(counts[candidates])])
    n = len(candidates)
    best = np.full(n + 1, np.inf)  # best[j]: positions for the j shortest candidates.
    best[0] = 0
    choices = []
    for _ in range(min(config.buckets, n)):
        # cost[i, j]: the best buckets for the first i candidates, then one bucket up to j.
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


def round_up(lengths: np.ndarray, config: DataConfig) -> np.ndarray:
    """Round lengths up to a multiple of `config.length_multiple`, at most `config.max_length`."""
    multiple = config.length_multiple
    return np.minimum(-(-lengths // multiple) * multiple, config.max_length)


class BatchPlan:
    """Plan of batches by length: all rows of a batch belong to one bucket.

    The longer side of a row decides its bucket; in a bucket, each side of the model has its own
    length. A bucket with few rows has smaller batches.

    lengths: [sides, rows], number of tokens of every row on each side of the model.
    shuffle: draw a new order of rows and batches in every epoch; False: the order is by bucket.
    """

    def __init__(self, lengths: np.ndarray, config: DataConfig, seed: int, *, shuffle: bool = True):
        rows = lengths.max(0)
        self.seed = seed
        self.shuffle = shuffle
        longest = choose_buckets(rows, config)
        # Small integer types, as there may be many millions of rows.
        bucket_of = np.searchsorted(longest, np.arange(longest[-1] + 1))
        bucket = bucket_of.astype(np.min_scalar_type(len(longest)))[rows]
        numbers = np.min_scalar_type(-len(rows))
        self._members = [np.flatnonzero(bucket == b).astype(numbers) for b in range(len(longest))]
        multiple = config.batch_multiple
        self.shapes = [
            Shape(
                min(batch_rows(length, config), -(-len(m) // multiple) * multiple),
                tuple(int(round_up(side[m].max(), config)) for side in lengths),
            )
            for length, m in zip(longest, self._members, strict=True)
        ]
        self._batches = [
            -(-len(m) // shape.rows) for m, shape in zip(self._members, self.shapes, strict=True)
        ]
        self.batches_per_epoch = sum(self._batches)
        positions = sum(
            count * shape.rows * sum(shape.lengths)
            for count, shape in zip(self._batches, self.shapes, strict=True)
        )
        self.padding_share = 1 - int(lengths.sum(dtype=np.int64)) / positions
        self._epoch = _Recent(self._make_epoch)

    def rows(self, index: int) -> tuple[Shape, np.ndarray]:
        epoch, index = divmod(index, self.batches_per_epoch)
        members, order = self._epoch(epoch if self.shuffle else 0)
        bucket, number = order[index]
        n = self.shapes[bucket].rows
        return self.shapes[bucket], members[bucket][number * n : (number + 1) * n]

    def in_order(self) -> Self:
        plan = copy.copy(self)
        plan.shuffle, plan._epoch = False, _Recent(plan._make_epoch)
        return plan

    def _make_epoch(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the row numbers of every bucket, and the batches as (bucket, number)."""
        members = self._members
        order = np.array([(b, i) for b, count in enumerate(self._batches) for i in range(count)])
        if self.shuffle:
            rng = np.random.default_rng((self.seed, epoch))
            members = [rng.permutation(m) for m in members]
            order = rng.permutation(order)
        return members, order


class Span(NamedTuple):
    """Positions [start, stop) of a document."""

    document: int
    start: int
    stop: int


class PackedPlan:
    """Plan of rows of length `max_length` that are cut from a stream, all documents concatenated.

    Every position of every document is in exactly one row; a document may extend over several rows,
    and a row over several documents. Only the last row of the stream has padding. The plan needs
    memory only for `starts` and for the order of the rows.

    starts: [documents + 1], start of each document in the stream, then the length of the stream.
    shuffle: in every epoch draw the order of the rows and the position where the first row starts,
    so that documents are cut at other positions; at its end the stream continues at its beginning.
    """

    def __init__(self, starts: np.ndarray, config: DataConfig, seed: int, *, shuffle: bool = True):
        self.starts = starts
        self.seed = seed
        self.shuffle = shuffle
        self.length = config.max_length
        shape = Shape(batch_rows(self.length, config), (self.length,))
        self.shapes = [shape]
        self._positions = int(starts[-1])
        self._count = -(-self._positions // self.length)
        self.batches_per_epoch = -(-self._count // shape.rows)
        places = self.batches_per_epoch * shape.rows * self.length
        self.padding_share = 1 - self._positions / places
        self._epoch = _Recent(self._make_epoch)

    def rows(self, index: int) -> tuple[Shape, np.ndarray]:
        epoch, index = divmod(index, self.batches_per_epoch)
        _, order = self._epoch(epoch if self.shuffle else 0)
        [shape] = self.shapes
        return shape, order[index * shape.rows : (index + 1) * shape.rows]

    def in_order(self) -> Self:
        plan = copy.copy(self)
        plan.shuffle, plan._epoch = False, _Recent(plan._make_epoch)
        return plan

    def spans(self, epoch: int, row: int) -> list[Span]:
        """Return the parts of documents in a row, in order."""
        shift, _ = self._epoch(epoch if self.shuffle else 0)
        start = row * self.length
        stop = min(start + self.length, self._positions)
        turn = self._positions - shift  # Here the stream continues at its beginning.
        before = self._between(start + shift, min(stop, turn) + shift)
        return before + self._between(max(start, turn) - turn, stop - turn)

    def _between(self, start: int, stop: int) -> list[Span]:
        """Return the parts of documents in [start, stop) of the stream; none if start >= stop."""
        spans, starts = [], self.starts
        # The last document that starts at or before `start`; others with the same start are empty.
        document = int(np.searchsorted(starts, start, "right")) - 1
        while start < stop:
            first, end = int(starts[document]), min(int(starts[document + 1]), stop)
            if start < end:
                spans.append(Span(document, start - first, end - first))
                start = end
            document += 1
        return spans

    def _make_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """Return the start of the first row in the stream, and the order of the rows."""
        if not self.shuffle:
            return 0, np.arange(self._count)
        rng = np.random.default_rng((self.seed, epoch))
        return int(rng.integers(self._positions)), rng.permutation(self._count)


class Pieces:
    """Documents cut into pieces of at most `max_positions` positions; `pieces[u]` is piece u.

    starts: see PackedPlan.
    """

    def __init__(self, starts: np.ndarray, max_positions: int):
        self.starts, self.max_positions = starts, max_positions
        counts = np.diff(starts)
        counts += max_positions - 1
        counts //= max_positions
        self._first = np.zeros(len(starts), np.int64)  # First piece of each document.
        np.cumsum(counts, out=self._first[1:])

    def lengths(self) -> np.ndarray:
        """Return the number of positions of every piece, int32 [pieces]."""
        lengths = np.full(self._first[-1], self.max_positions, np.int32)
        is_last = np.zeros(len(lengths), bool)
        is_last[self._first[1:] - 1] = True  # Empty documents mark the piece before them.
        rest = np.diff(self.starts)
        rest = rest[rest > 0]
        rest -= 1
        rest %= self.max_positions
        rest += 1
        lengths[is_last] = rest
        return lengths

    def __getitem__(self, number: int) -> Span:
        document = int(np.searchsorted(self._first, number, "right")) - 1
        start = (number - int(self._first[document])) * self.max_positions
        size = int(self.starts[document + 1] - self.starts[document])
        return Span(document, start, min(start + self.max_positions, size))


def pack(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate rows of arrays [T] into one row, in which each of them has its own segment id.

    The positions of each row count from 0, unless the rows have an array `positions`.
    """
    lengths, joined = [len(row["inputs"]) for row in rows], rows[0]
    if len(rows) > 1:
        joined = {name: np.concatenate([row[name] for row in rows]) for name in joined}
    return {
        "positions": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        **joined,
        "segment_ids": np.repeat(np.arange(1, len(rows) + 1, dtype=np.int32), lengths),
    }


class _Recent:
    """Cache of a function of the epoch, for the last epoch and a neighbouring epoch.

    Around the end of an epoch, threads need both values. There is no lock: at worst two threads
    compute the same value.
    """

    def __init__(self, make: Callable[[int], tuple]):
        self.make, self.values = make, {}

    def __call__(self, epoch: int) -> tuple:
        values = self.values
        if epoch not in values:
            values = {e: value for e, value in values.items() if abs(e - epoch) == 1}
            values[epoch] = self.make(epoch)
            self.values = values
        return values[epoch]


def batch_rows(length: int, config: DataConfig) -> int:
    """Return the largest number of rows of this length in a batch; raise DataError if it is 0."""
    rows = config.batch_tokens // length // config.batch_multiple * config.batch_multiple
    if not rows:
        raise DataError(
            f"data.batch_tokens {config.batch_tokens} does not hold data.batch_multiple "
            f"{config.batch_multiple} rows of {length} tokens: give data.batch_tokens "
            f"{config.batch_multiple * length} or more, or lower data.max_length"
        )
    return rows
