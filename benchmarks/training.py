"""Training steps beside those of other libraries, on the same cores in the same run.

python -m venv /tmp/peers
/tmp/peers/bin/python -m pip install -r benchmarks/peers.txt
git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT
python -m benchmarks.training --peers /tmp/peers/bin/python --nanogpt /tmp/nanoGPT

The same model, batch and float32 for all, random tokens, gradients clipped at 1, AdamW (Adam for
the translation). nanoGPT runs as it is and with torch.compile, transformers' GPT-2 and BERT and
torch.nn.Transformer in a plain loop; without --peers this library is measured alone. Each has a
process of its own; they take turns, one sample each in every round, and a sample is the mean of
some steps after three for warming up. A ratio is the median of those in each round, above 1 where
this library is faster.

The utilisation is that of the floating-point operations of the model (attention of a GPT counted
half, for what its mask hides; all of it elsewhere), of the best rate at which this library or torch
multiplied two matrices of 2,048 x 2,048 in the same run. `start` is the time from when the library
is imported to the end of the third step, with what it compiles not cached; `peak` is what the
process held at most.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.turns import Process
from train.cli import ALLOCATOR


class Setting(NamedTuple):
    """A model and the shape of its batch; steps in one sample."""

    config: str
    rows: int
    length: int
    vocab_size: int
    dropout: float
    steps: int
    peers: tuple[str, ...]


GPT = ("nanogpt", "nanogpt compiled", "transformers")
SETTINGS = {
    "gpt 4x128": Setting("shakespeare_char", 12, 64, 65, 0.0, 30, GPT),
    "gpt 6x384": Setting("shakespeare_char_gpu", 12, 256, 65, 0.0, 2, GPT),
    "gpt2 124M": Setting("gpt2_small", 2, 1024, 50_304, 0.0, 1, GPT),
    "bert base": Setting("bert_base", 8, 128, 30_522, 0.1, 2, ("transformers",)),
    "transformer base": Setting("vaswani_base", 16, 64, 37_000, 0.1, 2, ("torch.nn.Transformer",)),
}
PATIENCE = 600.0
PAUSE = 0.5  # Threads of the process before may spin for a while when their work is done.


def run(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Samples and facts of each library at one setting."""
    setting, found = SETTINGS[name], {}
    libraries = ["heedful"]
    if arguments.peers:
        libraries += [p for p in setting.peers if arguments.nanogpt or "nanogpt" not in p]
    processes: dict[str, Process] = {}
    given = json.dumps(setting._asdict() | {"nanogpt": arguments.nanogpt})
    with tempfile.TemporaryDirectory() as cache:
        fresh = {"TORCHINDUCTOR_CACHE_DIR": cache}
        try:
            for library in libraries:
                ours = library == "heedful"
                module = "benchmarks.training_step" if ours else "benchmarks.training_peers"
                interpreter = sys.executable if ours else arguments.peers
                command = [interpreter, "-m", module, given, library]
                process = Process(command, ALLOCATOR if ours else fresh, PATIENCE)
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


def table(name: str, found: dict[str, Any]) -> str:
    """Lines for one setting."""
    setting = SETTINGS[name]
    tokens, ours = setting.rows * setting.length, found["heedful"]
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
            f"{library:22}{1000 * seconds:10,.1f}{tokens / seconds:10,.0f}{ratio:8.2f}"
            f"{ours['flops'] / seconds / ceiling:10.0%}{values['start']:9.1f}"
            f"{values['peak'] / 2**20:10,.0f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--setting", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="NAME")
    add("--peers", metavar="PYTHON", help="interpreter that has benchmarks/peers.txt")
    add("--nanogpt", metavar="DIR", help="where nanoGPT's model.py lies")
    add("--rounds", type=int, default=5)
    add("--out", default="runs/training.json", help="where the raw numbers go")
    arguments = parser.parse_args(argv)
    print(f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores", flush=True)
    results = {}
    for name in arguments.setting:
        results[name] = run(arguments, name)
        print("\n" + table(name, results[name]), flush=True)
        out = Path(arguments.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1))
    facts = [values for found in results.values() for values in found.values()]
    versions = {values["versions"] for values in facts if "versions" in values}
    print("\n" + ", ".join(sorted(versions)))


if __name__ == "__main__":
    main()
