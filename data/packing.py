"""Which tokens make up which row, and which rows which batch, planned ahead for a whole epoch.

Two ways. By length: rows of similar length share a batch, and batches come in a few shapes only,
because every shape is compiled once. Packed: documents stand end to end, and rows of one length are
cut from that. A plan is a pure function of the lengths, the config and the seed: any batch can be
asked for by its number, so a run resumes where it stopped and any number of processes sees the same
batches.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, Self

import numpy as np

from heedful.data.config import DataConfig
from heedful.data.errors import DataError


class Shape(NamedTuple):
    """Rows of a batch, and their length on each side of the model: the encoder's comes first."""

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
    shapes: list[Shape]  # of all batches, by length

    def rows(self, index: int) -> tuple[Shape, np.ndarray]:
        """Returns the shape and the row numbers of global batch `index`.

        There may be fewer row numbers than rows; the other rows are padding.
        """
        ...

    def in_order(self) -> Self:
        """Returns the plan for evaluation, where every epoch is the same, without any shuffling."""
        ...


def choose_buckets(lengths: np.ndarray, config: DataConfig) -> list[int]:
    """Returns at most `config.buckets` row lengths, ascending, that leave the least padding.

    The candidates are all lengths, rounded up (see `round_up`). Dynamic programming over them: the
    best way to cover the shortest j candidates with k buckets covers the shortest i < j with k - 1,
    and the rest at length j.
    """
    counts = np.bincount(lengths)
    counts = np.bincount(round_up(np.arange(len(counts)), config), counts)
    candidates = np.flatnonzero(counts)
    examples = np.concatenate([[0], np.cumsum(counts[candidates])])
    n = len(candidates)
    best = np.full(n + 1, np.inf)  # best[j]: fewest positions for the j shortest candidates.
    best[0] = 0
    choices = []
    for _ in range(min(config.buckets, n)):
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


def round_up(lengths: np.ndarray, config: DataConfig) -> np.ndarray:
    """Returns the next multiple of `config.length_multiple`, at most `config.max_length`."""
    multiple = config.length_multiple
    return np.minimum(-(-lengths // multiple) * multiple, config.max_length)


class BatchPlan:
    """The batches of rows that are put together by length; the rows of a batch share a bucket.

    The longer side of a row decides on its bucket; each side has a length of its own there. Where a
    bucket does not fill a batch, its batch has fewer rows.

    lengths: [sides, E] tokens of every row, on each side of the model.
    shuffle: every epoch has its own order of rows and batches; otherwise there is one order, by
    bucket.
    """

    def __init__(self, lengths: np.ndarray, config: DataConfig, seed: int, *, shuffle: bool = True):
        rows = lengths.max(0)
        self.seed = seed
        self.shuffle = shuffle
        longest = choose_buckets(rows, config)
        # 8 and 32 bits: there may be many millions of rows.
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
        places = sum(
            count * shape.rows * sum(shape.lengths)
            for count, shape in zip(self._batches, self.shapes, strict=True)
        )
        self.padding_share = 1 - int(lengths.sum(dtype=np.int64)) / places
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
        """Returns the rows of every bucket in order, and the batches as (bucket, number)."""
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
    """The batches of rows, all `max_length` long, that are cut from documents end to end.

    Every position of every document is in exactly one row; a document may reach over several rows,
    and a row over several documents. Only the last row of the stream has padding. Memory does not
    depend on the number of tokens, but for the order of the rows.

    starts: [D + 1] where each document starts in the stream, in positions, and where that ends.
    shuffle: every epoch has its own order of rows, and its own place where the first row starts, so
    that documents are cut elsewhere; the stream goes on from its end to its beginning.
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
        """Returns what a row holds, in its order."""
        shift, _ = self._epoch(epoch if self.shuffle else 0)
        start = row * self.length
        stop = min(start + self.length, self._positions)
        turn = self._positions - shift  # Where the stream goes on at its beginning.
        before = self._between(start + shift, min(stop, turn) + shift)
        return before + self._between(max(start, turn) - turn, stop - turn)

    def _between(self, start: int, stop: int) -> list[Span]:
        """The documents between two places of the stream, which is none if start >= stop."""
        spans, starts = [], self.starts
        # The last one that starts there: those before it are empty.
        document = int(np.searchsorted(starts, start, "right")) - 1
        while start < stop:
            first, end = int(starts[document]), min(int(starts[document + 1]), stop)
            if start < end:
                spans.append(Span(document, start - first, end - first))
                start = end
            document += 1
        return spans

    def _make_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """Returns where in the stream the first row starts, and the order of the rows."""
        if not self.shuffle:
            return 0, np.arange(self._count)
        rng = np.random.default_rng((self.seed, epoch))
        return int(rng.integers(self._positions)), rng.permutation(self._count)


class Pieces:
    """Documents cut into pieces of at most `longest` positions, to be numbered and put in batches.

    starts: as for PackedPlan. Piece `u` is `pieces[u]`.
    """

    def __init__(self, starts: np.ndarray, longest: int):
        self.starts, self.longest = starts, longest
        counts = np.diff(starts)
        counts += longest - 1
        counts //= longest
        self._first = np.zeros(len(starts), np.int64)  # The number of each document's first piece.
        np.cumsum(counts, out=self._first[1:])

    def lengths(self) -> np.ndarray:
        """Returns the positions of every piece, int32 [U]."""
        lengths = np.full(self._first[-1], self.longest, np.int32)
        is_last = np.zeros(len(lengths), bool)
        is_last[self._first[1:] - 1] = True  # Of an empty document, the last piece before it.
        rest = np.diff(self.starts)
        rest = rest[rest > 0]
        rest -= 1
        rest %= self.longest
        rest += 1
        lengths[is_last] = rest
        return lengths

    def __getitem__(self, number: int) -> Span:
        document = int(np.searchsorted(self._first, number, "right")) - 1
        start = (number - int(self._first[document])) * self.longest
        size = int(self.starts[document + 1] - self.starts[document])
        return Span(document, start, min(start + self.longest, size))


def pack(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins rows of arrays [T] into one, in which each has its own segment id.

    Its positions count from 0, unless the row has positions.
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
    """A function of the epoch that keeps what it has made for the last one and its neighbour.

    Around the end of an epoch threads ask for both. They need no lock: at worst two make the same.
    """

    def __init__(self, make: Callable[[int], tuple]):
        self.make, self.made = make, {}

    def __call__(self, epoch: int) -> tuple:
        made = self.made
        if epoch not in made:
            made = {e: value for e, value in made.items() if abs(e - epoch) == 1}
            made[epoch] = self.make(epoch)
            self.made = made
        return made[epoch]


def batch_rows(length: int, config: DataConfig) -> int:
    """Rows of a batch whose rows have this length, at most."""
    rows = config.batch_tokens // length // config.batch_multiple * config.batch_multiple
    if not rows:
        raise DataError(
            f"data.batch_tokens {config.batch_tokens} does not hold data.batch_multiple "
            f"{config.batch_multiple} rows of {length} tokens: give data.batch_tokens "
            f"{config.batch_multiple * length} or more, or lower data.max_length"
        )
    return rows
