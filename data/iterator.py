"""Batches that are prepared ahead: by grain, and by a thread that puts them on devices."""

import sys
import weakref
from collections.abc import Callable, Generator
from queue import SimpleQueue
from threading import Thread
from typing import Any, Self

from heedful.data.objectives import Arrays

Reader = Callable[[int, int], Generator[Arrays, None, None]]
DevicePut = Callable[[Arrays], Any]


def read_ahead(
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


def one_ahead(read: Reader, place: DevicePut, start: int, stop: int) -> Generator[Any, None, None]:
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
