"""Time and peak memory of the attention cores and of other implementations, by length.

python -m venv /tmp/peers
/tmp/peers/bin/python -m pip install -r benchmarks/peers.txt
python -m benchmarks.attention --peers /tmp/peers/bin/python

The peers are torch's scaled_dot_product_attention, the Longformer of `transformers`, and the
packages performer-pytorch and linformer. Without --peers only the cores are measured. The batch is
1, with 8 heads of 64 in float32, unless flags change this. Longformer's w is 512 (256 on each
side), Performer has 256 features, and Linformer has 256 rows.

Each attention at each length is measured in two processes of its own. The processes for time take
turns: each takes one sample per round, with the allocator settings of `heedful`. A time is the
median over the rounds; a ratio is the median of the ratios in each round. The process for memory
measures the peak of a run without its inputs: it includes results and gradients, but not the
compiler. An attention is skipped if memory or --budget is too small, and the reason is listed. The
growth is the slope of a line through log time over log length, from 4,096 tokens on.

With a GPU the same command measures on the GPU; both interpreters need packages for GPUs. On two
CPU cores all lengths take about an hour: choose --lengths, --core, --mask or --mode.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.command import parser
from benchmarks.report import plot, tables
from benchmarks.turns import Process
from benchmarks.worker import RETURNS_MEMORY, Case
from heedful.train.cpu_allocator import ALLOCATOR

STARTUP = 120.0  # seconds for a process to import, compile and run for the first time
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # The processes share the memory of a GPU.
    "JAX_TRACEBACK_FILTERING": "off",  # The last line of a traceback is then the error.
}
PEERS = {
    "dense": "torch sdpa",
    "flash": "torch sdpa",
    "cudnn": "torch sdpa",
    "longformer": "transformers longformer",
    "performer": "performer-pytorch",
    "linformer": "pypi linformer",
}


def worker(case: Case, what: str, interpreter: str) -> Process:
    """Start a process that measures "memory" or "time" of one case."""
    module = "attention_peers" if case.name in PEERS.values() else "attention_cores"
    return Process(
        [interpreter, "-m", f"benchmarks.{module}", case.text(), what],
        ENVIRONMENT | (RETURNS_MEMORY if what == "memory" else ALLOCATOR),
        STARTUP + 3 * case.budget,
    )


def measure(cases: Sequence[Case], interpreters: dict[str, str], rounds: int) -> Iterator[dict]:
    """Yield the measurements of each case after all rounds."""
    workers: dict[Case, Process] = {}
    points: dict[Case, dict[str, Any]] = {}

    def ask(case: Case, what: str) -> dict[str, Any]:
        workers[case] = worker(case, what, interpreters[case.name])
        return workers[case].ask()

    try:
        for case in cases:
            points[case] = ask(case, "memory")
            workers.pop(case).close()
            if "skipped" not in points[case]:
                points[case] |= ask(case, "time")
        for _ in range(rounds):
            for case, point in points.items():
                if "skipped" not in point:
                    answer = workers[case].ask("again")
                    point.setdefault("seconds", []).append(answer.pop("seconds", None))
                    point.update(answer)
    finally:
        for process in workers.values():
            process.close()
    for case, point in points.items():
        yield _place(case) | point


def _place(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in ("name", "length", "causal", "backward")}


def expected(points: Sequence[dict], case: Case) -> float:
    """Return a lower bound for the seconds of a run, from shorter lengths of the same attention."""
    alike = [
        (point["length"], statistics.median(point["seconds"]))
        for point in points
        if "skipped" not in point and point | {"length": case.length} == point | _place(case)
    ]
    if not alike:
        return 0.0
    length, time = alike[-1]
    slope = 1.0
    if len(alike) > 1:
        before, earlier = alike[-2]
        slope = max(1.0, math.log(time / earlier) / math.log(length / before))
    return time * (case.length / length) ** slope


def available_memory() -> int:
    """Return the bytes that processes can take without pushing other processes out (Linux)."""
    text = Path("/proc/meminfo").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield all results so far after each length."""
    interpreters = {name: sys.executable for name in arguments.core}
    if arguments.peers:
        interpreters |= {PEERS[name]: arguments.peers for name in arguments.core if name in PEERS}
    environments: dict[str, Any] = {
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "memory GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
            **ALLOCATOR,
        }
    }
    settings = {name: value for name, value in vars(arguments).items() if name != "peers"}
    points: list[dict] = []
    for mask, mode, length in product(arguments.mask, arguments.mode, sorted(arguments.lengths)):
        cases = []
        for name in interpreters:
            case = Case(
                name=name,
                length=length,
                causal=mask == "causal",
                backward=mode == "forward+backward",
                heads=arguments.heads,
                head_dim=arguments.head_dim,
                window=arguments.window,
                features=arguments.features,
                rank=arguments.rank,
                dtype=arguments.dtype,
                memory=int(0.9 * available_memory()),
                budget=arguments.budget,
            )
            time = expected(points, case)
            if time <= arguments.budget:
                cases.append(case)
            else:
                reason = f"a run would take {time:.0f} s"
                points.append(_place(case) | {"skipped": reason})
        print(f"{mask} {mode} {length:,}", file=sys.stderr, flush=True)
        for point in measure(cases, interpreters, arguments.rounds):
            environment = point.pop("environment", None)
            if environment:
                environments["peers" if point["name"] in PEERS.values() else "cores"] = environment
            points.append(point)
        yield {"environment": environments, "settings": settings, "points": points}


def flags() -> argparse.ArgumentParser:
    command = parser("attention", __doc__)
    add = command.add_argument
    add("--lengths", type=int, nargs="+", default=[1024 * 2**i for i in range(7)])
    cores = [name for name in PEERS if name != "cudnn" or shutil.which("nvidia-smi")]
    add("--core", nargs="+", metavar="NAME", default=cores)
    add("--peers", metavar="PYTHON", help="interpreter that has benchmarks/peers.txt")
    add("--mask", nargs="+", choices=["full", "causal"], default=["full", "causal"])
    modes = ["forward", "forward+backward"]
    add("--mode", nargs="+", choices=modes, default=modes)
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--heads", type=int, default=8)
    add("--head-dim", type=int, default=64)
    add("--window", type=int, default=256, help="of longformer, to each side")
    add("--features", type=int, default=256, help="of performer")
    add("--rank", type=int, default=256, help="of linformer")
    add("--rounds", type=int, default=5)
    add("--budget", type=float, default=30.0, help="most seconds of one run")
    add("--out", default="runs/attention", help="OUT.json and OUT.png are written")
    return command


def main(argv: Sequence[str] | None = None) -> None:
    arguments = flags().parse_args(argv)
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    for results in run(arguments):
        out.with_suffix(".json").write_text(json.dumps(results, indent=1))
    print(tables(results, PEERS))
    plot(results, out.with_suffix(".png"))
    print(f"{out.with_suffix('.json')} has the raw numbers, {out.with_suffix('.png')} the plot")


if __name__ == "__main__":
    main()
