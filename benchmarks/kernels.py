"""Time of each kernel in a profile: `python -m benchmarks.kernels DIR`."""

import collections
import gzip
import json
import re
import sys
from pathlib import Path


def times(directory: Path) -> dict[str, float]:
    """Return seconds by kind of operation in a trace of jax.profiler, the longest first.

    Operations of one kind have the same name but for the number at its end. If several cores of a
    CPU share an operation, its time is the time of the core that began it.
    """
    found: collections.Counter[str] = collections.Counter()
    for path in directory.rglob("*.trace.json.gz"):
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
        for event in events:
            if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
                found[re.sub(r"[.\d_]+$", "", event["name"])] += event["dur"] * 1e-6
    return dict(found.most_common())


def table(directory: Path, lines: int = 15) -> str:
    found = times(directory)
    total = sum(found.values())
    rows = [f"{seconds / total:7.1%}  {name}" for name, seconds in list(found.items())[:lines]]
    return "\n".join([f"{1000 * total:,.1f} ms in operations of {directory}:", *rows])


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
