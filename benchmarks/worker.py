"""A measured process: it prints a line of JSON when it is ready, and one for each sample.

This module must not import a measured library.
"""

import json
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

# Settings of glibc for measuring memory: freed memory returns to the system. Otherwise a run would
# reuse memory that earlier runs freed, and this memory would not be counted.
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SAMPLE_SECONDS = 0.2  # A sample is the median of the runs that fit into this time, at least one.
Run = Callable[[], object]
Ready = tuple[Callable[[], dict[str, Any]], dict[str, Any]]
"""A function that takes a sample, and facts to print before the first sample."""


class Program(NamedTuple):
    """A program to measure; `peak` runs it once and returns its peak memory in bytes."""

    run: Run
    peak: Callable[[], int]


class Skipped(Exception):
    """The reason why a case cannot be measured."""


def answer_with(prepare: Callable[[], Ready]) -> None:
    """Print the facts of `prepare` or the reason to skip; then print a sample per line of input."""
    answers, sys.stdout = sys.stdout, sys.stderr  # Libraries may print to stdout.

    def say(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        sample, facts = prepare()
    except Skipped as reason:
        say({"skipped": str(reason)})
        return
    say(facts)
    for _ in sys.stdin:
        say(sample())


def samples(run: Run, peak: Callable[[], int]) -> Callable[[], dict[str, Any]]:
    """Return a function that times a run and returns the seconds and the bytes of `peak`.

    The function runs once before it takes the time, because after a pause the caches are cold and
    the system may have taken memory back.
    """

    def sample() -> dict[str, Any]:
        run()
        return {"seconds": seconds(run), "peak": peak()}

    return sample


@dataclass(frozen=True, kw_only=True)
class Case:
    """An attention at one length."""

    name: str
    length: int
    causal: bool
    backward: bool
    heads: int
    head_dim: int
    window: int
    features: int
    rank: int
    dtype: str
    memory: int
    """Limit of the process's memory on a CPU, in bytes."""
    budget: float
    """Limit of the time of a run, in seconds."""

    def text(self) -> str:
        return json.dumps(asdict(self))


def serve(prepare: Callable[[Case], Program], environment: dict[str, Any]) -> None:
    """Measure the attention that the command line describes: its "memory" or its "time"."""
    case, what = Case(**json.loads(sys.argv[1])), sys.argv[2]

    def ready() -> Ready:
        program = prepare(case)
        first = seconds(program.run)
        if first > case.budget:
            raise Skipped(f"a run takes {first:.0f} s")
        facts: dict[str, Any] = {"environment": environment}
        if what == "memory":
            time.sleep(0.1)  # Libraries may return memory of the first run with a delay.
            facts["memory"] = program.peak()
        repeats = range(max(1, round(SAMPLE_SECONDS / first)))
        median = lambda: statistics.median(seconds(program.run) for _ in repeats)  # noqa: E731
        return lambda: {"seconds": median()}, facts

    answer_with(ready)


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ceiling(product: Run, size: int) -> float:
    """Return the best FLOP/s of ten runs of `product`, a product of two square matrices."""
    return 2 * size**3 / min(seconds(product) for _ in range(10))


def limit_memory(n_bytes: int) -> None:
    """Limit the memory of this process: a large allocation fails and does not end other work."""
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))


def peak_resident(run: Run) -> int:
    """Return the bytes that a run takes at its peak, without those held before it (Linux).

    The result is right only if freed memory returns to the system, as with `RETURNS_MEMORY`.
    """
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # This resets the peak to the current memory (man 5 proc).
    before = highest_resident()
    run()
    return highest_resident() - before


def highest_resident() -> int:
    """Return the peak memory of this process in bytes (Linux)."""
    with open("/proc/self/status") as file:
        found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
    assert found
    return int(found[1]) * 1024
