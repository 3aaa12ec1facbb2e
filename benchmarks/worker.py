"""A process that is measured: it answers in JSON, one line when it is ready, one for each sample.

No library that is measured is imported here.
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

# The environment of glibc for measuring memory: otherwise a run is served from what earlier ones
# have freed, which is not counted.
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SAMPLE_SECONDS = 0.2  # A sample is the median of as many runs as fit, at least one.
Run = Callable[[], object]
Ready = tuple[Callable[[], dict[str, Any]], dict[str, Any]]
"""A function that takes a sample, and what is to be said before the first."""


class Program(NamedTuple):
    """A program to measure; `peak` runs it once and returns the most bytes that it held."""

    run: Run
    peak: Callable[[], int]


class Skipped(Exception):
    """Why this cannot be measured."""


def answer_with(prepare: Callable[[], Ready]) -> None:
    """Say what `prepare` tells, or why it cannot; then gives a sample for each line that comes."""
    answers, sys.stdout = sys.stdout, sys.stderr  # Libraries may print.

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
    """A function that times a run, and tells the bytes held at most, which `peak` gives.

    It runs once before the time is taken: after a pause, caches and memory that the system has
    taken back are not what they are in the middle of work.
    """

    def sample() -> dict[str, Any]:
        run()
        return {"seconds": seconds(run), "peak": peak()}

    return sample


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention at one length."""

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
    """Bytes that the process may have on a CPU."""
    budget: float
    """Seconds that a run may take."""

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
            time.sleep(0.1)  # Libraries may give back what the first run took a little later.
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
    """FLOP/s of `product`, which multiplies two square matrices of this size; the best of ten."""
    return 2 * size**3 / min(seconds(product) for _ in range(10))


def limit_memory(n_bytes: int) -> None:
    """Lets an allocation fail that the machine has no room for, instead of ending other work."""
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))


def peak_resident(run: Run) -> int:
    """Bytes that a run takes at its peak beyond what the process holds before it (Linux).

    Right where what is freed is given back to the system, as with `RETURNS_MEMORY`.
    """
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # The peak begins anew, at what is resident now (man 5 proc).
    before = highest_resident()
    run()
    return highest_resident() - before


def highest_resident() -> int:
    """Bytes that this process has held at most (Linux)."""
    with open("/proc/self/status") as file:
        found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
    assert found
    return int(found[1]) * 1024
