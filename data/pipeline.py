"""The data pipeline: tokens on disk, a plan of batches, and batches that grain reads in advance."""

import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, Self

import numpy as np

from heedful.data import labels, sources
from heedful.data.batch import pad_and_stack
from heedful.data.config import DataConfig
from heedful.data.errors import DataError
from heedful.data.examples import Example
from heedful.data.labels import classes
from heedful.data.objectives import Arrays, ChunkingSpec
from heedful.data.packing import PackedPlan, Pieces, Plan, pack
from heedful.data.split_plan import SplitPlan, plan_split
from heedful.data.store import TokenStore, fingerprint
from heedful.data.text_parts import cut_text
from heedful.data.tokenizer import Tokenizer

Reader = Callable[[int, int], Generator[Arrays, None, None]]
DevicePut = Callable[[Arrays], Any]


def tokenizer_texts(config: DataConfig) -> Iterable[str]:
    """Return the training texts of all fields, to learn a vocabulary from.

    The texts can be iterated several times. Long texts are cut into parts, which need less memory.
    """
    return _Texts(config)


class _Texts:
    def __init__(self, config: DataConfig):
        self.config = config

    @cached_property
    def examples(self) -> Sequence[Example]:
        return sources.load(self.config, "train")

    def __iter__(self) -> Iterator[str]:
        fields = sources.fields(self.config)
        for example in self.examples:
            for field in fields:
                yield from cut_text(example[field])


@dataclass(frozen=True)
class Dataset:
    """The batches of a split. Example i is line i of the source, even if examples are left out.

    A row number of a plan is an index in `kept` (indices of the used examples), an index in
    `pieces` of documents, or the number of a row that a PackedPlan cuts from all documents.
    labels: the class or the number to predict, [examples]; None for objectives without labels.
    characters, bytes: size of the used texts, in characters and in UTF-8 bytes. target_count:
    number of positions with a target, or of examples with a label, in an epoch.
    """

    config: DataConfig
    tokenizer: Tokenizer
    split: str
    seed: int
    data_fingerprint: str
    classes: tuple[str, ...]
    store: TokenStore
    labels: np.ndarray | None
    kept: np.ndarray
    pieces: Pieces | None
    train_plan: Plan
    eval_plan: Plan
    characters: int
    bytes: int
    target_count: int
    report: list[str]

    @classmethod
    def prepare(
        cls, config: DataConfig, tokenizer: Tokenizer, split: str, *, seed: int = 0
    ) -> Self:
        """Read and tokenise a split, leave out blank and long examples, and plan the batches.

        Raises DataError if source, config and tokenizer do not fit together, or if no example is
        left.
        """
        tokenizer.require(config.objective)
        examples = sources.load(config, split)
        data_fingerprint = fingerprint(examples)
        store = TokenStore.build(examples, sources.fields(config), tokenizer, data_fingerprint)
        names = classes(config)
        targets = None
        if config.objective_spec.label:
            targets = labels.numbers(store.labels(), names, split)
        split_plan = plan_split(config, tokenizer, store, split, seed)
        is_kept = np.zeros(len(store.blank), bool)
        is_kept[split_plan.kept] = True
        characters, size = (int(n) for n in store.sizes.sum(1, where=is_kept))
        report = _report(config, split, store, split_plan, characters)
        report += _tokenizer_warnings(config, split, store, tokenizer)
        if names and targets is not None:
            counts = np.bincount(targets[split_plan.kept], minlength=len(names))
            report.append(
                f"{split}: {len(names)} classes, the largest {names[counts.argmax()]!r} with "
                f"{counts.max() / len(split_plan.kept):.1%}"
            )
        return cls(
            config=config,
            tokenizer=tokenizer,
            split=split,
            seed=seed,
            data_fingerprint=data_fingerprint,
            classes=names,
            store=store,
            labels=targets,
            kept=split_plan.kept,
            pieces=split_plan.pieces,
            train_plan=split_plan.plan,
            eval_plan=split_plan.plan.in_order(),
            characters=characters,
            bytes=size,
            target_count=split_plan.target_count,
            report=report,
        )

    @property
    def batches_per_epoch(self) -> int:
        return self.train_plan.batches_per_epoch

    def train_iterator(
        self, parts: Sequence[int] = (0,), count: int = 1, place: DevicePut | None = None
    ) -> "TrainIterator":
        """Return endless training batches of a process, `{name: [B * len(parts) / count, ...]}`.

        The B rows of each global batch are divided into `count` parts; the process gets the parts
        with the indices `parts` (ascending). With `place`, the iterator yields place(batch); a
        thread computes it before the caller asks for the batch.
        """
        read = self._reader(self.train_plan, parts, count)
        return TrainIterator(read if place is None else partial(_one_ahead, read, place))

    def eval_batches(self, parts: Sequence[int] = (0,), count: int = 1) -> Iterator[Arrays]:
        """Return the evaluation batches of a process: every example once, in a fixed order.

        `parts` and `count` are those of `train_iterator`.
        """
        read = self._reader(self.eval_plan, parts, count)
        return read(0, self.batches_per_epoch)

    def _reader(self, plan: Plan, parts: Sequence[int], count: int) -> Reader:
        """Return read(start, stop), which yields `parts` of global batches start to stop - 1."""
        if self.config.batch_multiple % count:
            raise DataError(
                f"data.batch_multiple is {self.config.batch_multiple}: give a multiple of {count}, "
                "the number of parts into which batches are divided"
            )
        batch = partial(self.batch, plan, parts=parts, count=count)
        return partial(_read_ahead, batch, self.config.workers)

    def batch(self, plan: Plan, index: int, parts: Sequence[int] = (0,), count: int = 1) -> Arrays:
        """Return the rows of global batch `index` that are in `parts`, of `count` parts in all."""
        shape, numbers = plan.rows(index)
        size, lengths = shape.rows // count, shape.lengths[::-1]
        local = np.concatenate([numbers[part * size : (part + 1) * size] for part in parts])
        n, epoch = size * len(parts), index // plan.batches_per_epoch
        if len(local):
            return pad_and_stack([self._row(plan, epoch, int(i)) for i in local], n, *lengths)
        # In the last batch of a bucket, some parts have no rows: return only padding.
        batch = pad_and_stack([self._row(plan, epoch, int(numbers[0]))], n, *lengths)
        return {name: np.zeros_like(array) for name, array in batch.items()}

    def _row(self, plan: Plan, epoch: int, number: int) -> Arrays:
        objective = self.config.objective_spec
        if objective.chunking:
            examples = self._pieces(objective.chunking, plan, epoch, number)
        else:
            number = int(self.kept[number])
            examples = [self._example(number)]
        rng = np.random.default_rng((self.seed, epoch, number)) if objective.draws else None
        rows = [objective.row(e, rng, self.config, self.tokenizer) for e in examples]
        return pack(rows) if isinstance(plan, PackedPlan) else rows[0]

    def _example(self, number: int) -> Arrays:
        example = self.store[number]
        return example if self.labels is None else {**example, "label": self.labels[number]}

    def _pieces(self, chunking: ChunkingSpec, plan: Plan, epoch: int, number: int) -> list[Arrays]:
        if isinstance(plan, PackedPlan):
            spans = plan.spans(epoch, number)
        else:
            assert self.pieces is not None
            spans = [self.pieces[number]]
        frame = self.tokenizer.frame if chunking.has_frame else None
        return [
            {"text": self.store.text(document, start, stop + chunking.overlap, frame)}
            for document, start, stop in spans
        ]


def _report(
    config: DataConfig, split: str, store: TokenStore, split_plan: SplitPlan, characters: int
) -> list[str]:
    """Describe, in lines, the examples that were read, the examples left out, and the batches."""
    is_text = config.objective_spec.is_text
    noun = "documents" if is_text else "examples"
    lines = [f"{split}: {len(split_plan.kept):,} {noun}, {split_plan.tokens:,} tokens"]
    if is_text:
        lines[0] += f", {characters:,} characters"
    blank = int(store.blank.sum())
    too_long = len(store.blank) - blank - len(split_plan.kept)
    if too_long:
        lines.append(
            f"{split}: {too_long:,} examples left out, longer than {config.max_length} tokens "
            "(--data.max-length)"
        )
    if blank:
        where = " on a side" if len(store.fields) > 1 else ""
        lines.append(f"{split}: {blank:,} {noun} left out, blank{where}")
    shapes = ", ".join(map(str, split_plan.plan.shapes))
    lines.append(
        f"{split}: {split_plan.plan.batches_per_epoch:,} batches of {shapes}, "
        f"{split_plan.plan.padding_share:.1%} padding" + (", packed" if config.is_packed else "")
    )
    return lines


def _tokenizer_warnings(
    config: DataConfig, split: str, store: TokenStore, tokenizer: Tokenizer
) -> Iterator[str]:
    """Yield a warning about unknown tokens, and a warning about spaces that decoding changes."""
    total, unknown = store.count(tokenizer.unknown)
    if tokenizer.unknown is not None and unknown:
        yield (
            f"{split}: {unknown:,} of {total:,} tokens ({unknown / total:.2%}) are "
            f"{tokenizer.name(tokenizer.unknown)}: the vocabulary lacks these parts of the text"
        )
    if tokenizer.loses_spaces and config.objective_spec.writes:
        yield (
            f"{split}: the tokenizer does not keep spaces: generated texts have one around each "
            "punctuation mark, which lowers their scores"
        )


def _read_ahead(
    batch: Callable[[int], Arrays], workers: int, start: int, stop: int
) -> Generator[Arrays, None, None]:
    """Yield batch(start) ... batch(stop - 1), computed in advance by a thread or `workers`."""
    # Imported here because grain imports jax, which importing heedful.data must not do.
    import grain
    from absl import flags

    # One thread: small numpy calls hold the interpreter lock, so that more threads are slower.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    batches = grain.MapDataset.range(start, stop).map(batch).to_iter_dataset(options)
    if workers:
        # grain reads absl flags when it starts processes; only absl's own main parses them.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers))
        # Use the queue: arrays in shared memory would outlive the iterator and leak at exit.
        queued = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        batches = grain.experimental.WithOptionsIterDataset(batches, queued)
    ahead = iter(batches)
    try:
        yield from ahead
    finally:
        ahead.close()


def _one_ahead(read: Reader, place: DevicePut, start: int, stop: int) -> Generator[Any, None, None]:
    """Yield place(batch) for each batch of `read`; a thread prepares the next one meanwhile.

    The thread starts to prepare the next batch when the caller has the previous batch and releases
    the interpreter lock. So the thread does not delay a caller that at once starts a computation on
    a device. Reading from a queue of grain would release the lock and delay the caller.
    """
    batches = read(start, stop)
    wanted: SimpleQueue[bool] = SimpleQueue()
    results: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def work() -> None:
        while wanted.get():
            try:
                results.put((place(next(batches)), None))
            except BaseException as error:  # Raised again by the caller's thread.
                results.put((None, error))

    thread = Thread(target=work, daemon=True)
    thread.start()
    wanted.put(True)
    try:
        for _ in range(start, stop):
            batch, error = results.get()
            if error is not None:
                raise error
            wanted.put(True)
            yield batch
    finally:
        wanted.put(False)
        thread.join()
        batches.close()


class TrainIterator:
    """Endless batches. The state is the number of the next batch that the caller gets."""

    def __init__(self, read: Reader):
        self._read = read
        self.close: Callable[[], object] = lambda: None
        self.set_state({"next_batch": 0})

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Return the state for `set_state`, valid for any number of processes."""
        return {"next_batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._next = state["next_batch"]
        self._batches = self._read(self._next, 2**62)
        # Also called at interpreter exit, while threads and shared memory can be released.
        self.close = weakref.finalize(self, self._batches.close)
