"""From a source to batches: tokens on disk, a plan over them, and grain reading ahead."""

import hashlib
import json
import sys
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from data import packages, sources
from data.batch import pad_and_stack
from data.config import DataConfig, DataError
from data.objectives import OBJECTIVES, Arrays
from data.packing import BatchPlan
from data.tokenizer import Tokenizer

SIDES = ("source", "target")
Reader = Callable[[int, int], Generator[Arrays, None, None]]
CHUNK = 10_000  # Examples tokenised at a time: enough for all cores, little memory.


def tokenizer_texts(config: DataConfig) -> Iterator[str]:
    """Yields the training texts of both sides: what a shared vocabulary is learned from."""
    for example in sources.load(config, "train"):
        yield from (example[side] for side in SIDES)


class TokenStore:
    """The tokens of every example of a split, in files that are mapped into memory.

    SIDE.ids holds the ids of all examples end to end, raw int32; SIDE.offsets.npy where each one
    starts, int64 [E + 1]; blank.npy whether a side of it is blank, bool [E].
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.blank = np.load(folder / "blank.npy")
        self.offsets = {side: np.load(folder / f"{side}.offsets.npy") for side in SIDES}
        self.ids = {
            # An empty file cannot be mapped; a plain view because slicing a memmap is slow.
            side: np.memmap(folder / f"{side}.ids", np.int32, "r").view(np.ndarray)
            if offsets[-1]
            else np.empty(0, np.int32)
            for side, offsets in self.offsets.items()
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder,)  # A worker process maps the files itself.

    @classmethod
    def build(cls, examples: Sequence[sources.Example], tokenizer: Tokenizer, text: str) -> Self:
        """Tokenises the examples, whose fingerprint is `text`, unless the cache has them."""
        key = hashlib.sha256(f"{text} {tokenizer.fingerprint}".encode()).hexdigest()
        write = partial(_write_tokens, examples, tokenizer)
        return cls(packages.build_once(packages.cache() / "tokens" / key, write))

    def lengths(self) -> dict[str, np.ndarray]:
        """Returns the token counts of all examples, side -> [E]."""
        return {side: np.diff(offsets) for side, offsets in self.offsets.items()}

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {
            side: np.array(self.ids[side][offsets[index] : offsets[index + 1]])
            for side, offsets in self.offsets.items()
        }


def _write_tokens(examples: Sequence[sources.Example], tokenizer: Tokenizer, folder: Path) -> None:
    blank, counts = [], {side: [np.zeros(1, np.int64)] for side in SIDES}
    for start in range(0, len(examples), CHUNK):
        chunk = [examples[i] for i in range(start, min(start + CHUNK, len(examples)))]
        blank.append([not all(example[side].strip() for side in SIDES) for example in chunk])
        for side in SIDES:
            rows = tokenizer.encode_batch([example[side] for example in chunk])
            counts[side].append(np.array([len(row) for row in rows], np.int64))
            with (folder / f"{side}.ids").open("ab") as file:
                np.concatenate(rows).tofile(file)
    np.save(folder / "blank.npy", np.concatenate(blank))
    for side in SIDES:
        np.save(folder / f"{side}.offsets.npy", np.cumsum(np.concatenate(counts[side])))


def fingerprint(examples: Sequence[sources.Example]) -> str:
    """Returns the sha256 (hex) of the texts in their order, or of the identity of a fixed set."""
    identity = getattr(examples, "identity", None)
    if identity is not None:
        return hashlib.sha256(identity.encode()).hexdigest()
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example[side] for side in SIDES]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """The batches of one split. Example i is line i of the source, whether it is kept or not."""

    config: DataConfig
    split: str
    seed: int
    data_fingerprint: str
    store: TokenStore
    kept: np.ndarray
    train_plan: BatchPlan
    eval_plan: BatchPlan
    report: list[str]

    @classmethod
    def prepare(
        cls, config: DataConfig, tokenizer: Tokenizer, split: str, *, seed: int = 0
    ) -> Self:
        """Reads and tokenises a split, leaves out what cannot be used, and plans its batches.

        Raises DataError when the source or the config does not work out, or nothing is left.
        """
        if config.objective not in OBJECTIVES:
            raise DataError(
                f"data.objective is {config.objective!r}: give one of {', '.join(OBJECTIVES)}"
            )
        examples = sources.load(config, split)
        data_fingerprint = fingerprint(examples)
        store = TokenStore.build(examples, tokenizer, data_fingerprint)
        lengths = OBJECTIVES[config.objective].lengths(store.lengths())
        fits = lengths.max(0) <= config.max_length
        kept = np.flatnonzero(fits & ~store.blank)
        blank, too_long = int(store.blank.sum()), int((~fits & ~store.blank).sum())
        if not len(kept):
            raise DataError(
                f"no example of split {split!r} is left: {blank:,} are blank and {too_long:,} have "
                f"more than data.max_length {config.max_length} tokens; give a larger one"
            )
        plan = partial(BatchPlan, lengths[:, kept], config, seed)
        train_plan, eval_plan = plan(shuffle=True), plan(shuffle=False)
        report = [f"{split}: {len(kept):,} examples, {int(lengths[:, kept].sum()):,} tokens"]
        if too_long:
            report.append(
                f"{split}: {too_long:,} examples left out, longer than {config.max_length} tokens "
                "(--data.max-length)"
            )
        if blank:
            report.append(f"{split}: {blank:,} examples left out, blank on a side")
        shapes = ", ".join(f"{rows} x {length}" for rows, length in train_plan.shapes)
        report.append(
            f"{split}: {train_plan.batches_per_epoch:,} batches of {shapes}, "
            f"{train_plan.padding_share:.1%} padding"
        )
        return cls(
            config, split, seed, data_fingerprint, store, kept, train_plan, eval_plan, report
        )

    @property
    def batches_per_epoch(self) -> int:
        return self.train_plan.batches_per_epoch

    def train_iterator(self, process_index: int = 0, process_count: int = 1) -> "TrainIterator":
        """Returns the endless batches of this process, `{name: [B / process_count, T]}`."""
        return TrainIterator(self._reader(self.train_plan, process_index, process_count))

    def eval_batches(self, process_index: int = 0, process_count: int = 1) -> Iterator[Arrays]:
        """Returns the batches of this process in a fixed order, every example exactly once."""
        read = self._reader(self.eval_plan, process_index, process_count)
        return read(0, self.batches_per_epoch)

    def _reader(self, plan: BatchPlan, process_index: int, process_count: int) -> Reader:
        """Returns read(start, stop), which yields this process's part of those global batches."""
        if self.config.batch_multiple % process_count:
            raise DataError(
                f"{process_count} processes do not divide data.batch_multiple "
                f"{self.config.batch_multiple}: give a multiple of {process_count}"
            )
        batch = partial(self.batch, plan, process_index, process_count)
        return partial(_read_ahead, batch, self.config.workers)

    def batch(self, plan: BatchPlan, process_index: int, process_count: int, index: int) -> Arrays:
        """Returns this process's rows of global batch `index`."""
        length, n_rows, examples = plan.rows(index)
        n = n_rows // process_count
        mine = examples[process_index * n : (process_index + 1) * n]
        epoch = index // plan.batches_per_epoch
        rows = [self._row(epoch, int(i)) for i in mine]
        if not rows:  # The last batch of a bucket has rows for some processes only.
            row = self._row(epoch, int(examples[0]))
            rows = [{name: values[:0] for name, values in row.items()}]
        return pad_and_stack(rows, n, length)

    def _row(self, epoch: int, index: int) -> Arrays:
        example = int(self.kept[index])
        rng = np.random.default_rng((self.seed, epoch, example))
        return OBJECTIVES[self.config.objective].row(self.store[example], rng, self.config)


def _read_ahead(
    batch: Callable[[int], Arrays], workers: int, start: int, stop: int
) -> Generator[Arrays, None, None]:
    """Yields batch(start) ... batch(stop - 1), assembled ahead by a thread or worker processes."""
    # Not at the top: grain imports jax where it is installed, and `import data.pipeline` must not.
    import grain
    from absl import flags

    # Small numpy calls hold the interpreter lock: more threads make it slower.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    batches = grain.MapDataset.range(start, stop).map(batch).to_iter_dataset(options)
    if workers:
        # grain reads absl flags when it starts processes, and only absl's own main parses those.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers))
        # Through the queue: arrays in shared memory would outlive the iterator and leak at exit.
        queued = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        batches = grain.experimental.WithOptionsIterDataset(batches, queued)
    ahead = iter(batches)
    try:
        yield from ahead
    finally:
        ahead.close()


class TrainIterator:
    """Endless batches. The state is the number of the next one, whatever was read ahead."""

    def __init__(self, read: Reader):
        self._read = read
        self.close: Callable[[], object] = lambda: None
        self.set_state({"next_batch": 0})

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Arrays:
        batch = next(self._batches)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns what `set_state` takes to go on with the same batches, with any process count."""
        return {"next_batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._next = state["next_batch"]
        self._batches = self._read(self._next, 2**62)
        # Also runs at interpreter exit, while threads and shared memory can still be released.
        self.close = weakref.finalize(self, self._batches.close)
