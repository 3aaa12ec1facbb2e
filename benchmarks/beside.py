"""Libraries are measured in turns: each runs in its own process and takes one sample per round.

A ratio is the median of the ratios in each round; it is above 1 if this library is faster. `start`
is the time from the import of a library until it is ready, without cached compiled programs. `peak`
is the largest memory of its process.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import kernels
from benchmarks.command import parser
from benchmarks.turns import Process
from heedful.train.cpu_allocator import ALLOCATOR

OURS = ALLOCATOR | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # Peers need memory of a GPU too.
PATIENCE = 600.0
PAUSE = 0.5  # Threads of the previous process may still spin after their work.

ON_GPU: dict[str, Any] = {"dtype": "bfloat16", "product": 8192}


class Setting(NamedTuple):
    """A model, the shape of its batch, and the number of steps in one sample."""

    config: str
    rows: int
    length: int
    vocab_size: int
    steps: int
    peers: tuple[str, ...]
    dropout: float = 0.0
    targets: int = 0
    """Number of targets in a row; 0: all tokens."""
    beam: int = 0
    """Beams of decoding, where a step writes one token per row; 0: a step trains on all tokens."""
    dtype: str = "float32"
    """Type of the computations; parameters are always float32."""
    core: str = "auto"
    """Attention core of this library."""
    product: int = 2048
    """Rows of the matrices whose product is the ceiling."""
    profile: str = ""
    """Folder in which this library writes a profile of one sample."""

    @property
    def tokens(self) -> int:
        """Number of tokens that a step trains on or writes."""
        return self.rows if self.beam else self.rows * self.length


def measure(name: str, setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return samples and facts of each library; `name` is the name of the benchmark's modules."""
    libraries = ["heedful", *(peer for peer in setting.peers if _is_given(peer, arguments))]
    found: dict[str, dict[str, Any]] = {}
    processes: dict[str, Process] = {}
    given = json.dumps(setting._asdict())
    with tempfile.TemporaryDirectory() as cache:
        clones = {"NANOGPT": arguments.nanogpt or "", "FLAX": arguments.flax or ""}
        fresh = {"TORCHINDUCTOR_CACHE_DIR": cache} | clones
        try:
            for library in libraries:
                which = {"heedful": "ours", "flax": "flax"}.get(library.split()[0], "peers")
                interpreter = arguments.peers if which == "peers" else sys.executable
                command = [interpreter, "-m", f"benchmarks.{name}_{which}", given, library]
                process = Process(command, OURS if which == "ours" else fresh, PATIENCE)
                processes[library] = process
                found[library] = process.ask() | {"seconds": []}
            for _ in range(arguments.rounds):
                for library, process in processes.items():
                    if "skipped" not in found[library]:
                        time.sleep(PAUSE)
                        answer = process.ask("again")
                        found[library]["seconds"].append(answer.pop("seconds", None))
                        found[library].update(answer)
        finally:
            for process in processes.values():
                process.close()
    return found


def _is_given(peer: str, arguments: argparse.Namespace) -> bool:
    """Return True if the command line gives the path of a peer."""
    if peer.startswith("flax"):
        return bool(arguments.flax)
    return bool(arguments.peers and (arguments.nanogpt or "nanogpt" not in peer))


def table(name: str, setting: Setting, found: dict[str, Any]) -> str:
    """Return the table of one setting; utilisation is relative to the fastest matrix product."""
    ours = found["heedful"]
    if "skipped" in ours:
        return f"{name}: heedful was not measured: {ours['skipped']}"
    measured = {key: values for key, values in found.items() if "skipped" not in values}
    ceiling = max(values["ceiling"] for values in measured.values())
    lines = [
        f"{name}: {setting.rows} x {setting.length} tokens, "
        f"{ours['parameters']:,} parameters, ceiling {ceiling / 1e9:.0f} GFLOP/s",
        f"{'':22}{'ms/step':>10}{'tokens/s':>10}{'ratio':>8}{'utilised':>10}"
        f"{'start s':>9}{'peak MiB':>10}",
    ]
    for library, values in found.items():
        if "skipped" in values:
            lines.append(f"{library:22}{values['skipped']}")
            continue
        seconds = statistics.median(values["seconds"]) / setting.steps
        pairs = zip(values["seconds"], ours["seconds"], strict=True)
        ratio = statistics.median(theirs / own for theirs, own in pairs)
        lines.append(
            f"{library:22}{1000 * seconds:10,.1f}{setting.tokens / seconds:10,.0f}{ratio:8.2f}"
            f"{ours['flops'] / seconds / ceiling:10.0%}{values['start']:9.1f}"
            f"{values['peak'] / 2**20:10,.0f}"
        )
    return "\n".join(lines)


def main(
    name: str, description: str | None, settings: Mapping[str, Setting], argv: Sequence[str] | None
) -> None:
    """Run the command line of a benchmark."""
    command = parser(name, f"{description}\n{__doc__}")
    add = command.add_argument
    is_gpu = shutil.which("nvidia-smi") is not None
    names = [key for key in settings if key.startswith("gpu ") == is_gpu]
    listed = f"default: {', '.join(names)}"
    add("--setting", nargs="+", choices=list(settings), default=names, metavar="NAME", help=listed)
    add("--peers", metavar="PYTHON", help="interpreter that has benchmarks/peers.txt")
    add("--nanogpt", metavar="DIR", help="where nanoGPT's model.py lies")
    add("--flax", metavar="DIR", help="a clone of flax, for its examples")
    add("--rounds", type=int, default=5)
    add("--profile", metavar="DIR", default="", help="where this library's profiles go")
    add("--out", default=f"runs/{name}.json", help="where the raw numbers go")
    arguments = command.parse_args(argv)
    print(f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores", flush=True)
    results = {}
    for chosen in arguments.setting:
        profile = arguments.profile and os.path.join(arguments.profile, chosen.replace(" ", "_"))
        setting = settings[chosen]._replace(profile=profile)
        results[chosen] = measure(name, setting, arguments)
        print("\n" + table(chosen, setting, results[chosen]), flush=True)
        if profile and "skipped" not in results[chosen]["heedful"]:
            print("\n" + kernels.table(Path(profile)), flush=True)
        out = Path(arguments.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1))
    facts = [values for found in results.values() for values in found.values()]
    versions = {values["versions"] for values in facts if "versions" in values}
    print("\n" + ", ".join(sorted(versions)))
