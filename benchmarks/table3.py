"""Table 3 of "Attention Is All You Need" in a small size: the change of perplexity per variation.

python -m benchmarks.table3 --data FOLDER    # of the files of configs/multi30k

Each row is one run of `multi30k_table3`; the base has a run for each seed. A change of perplexity
counts if it is more than twice the deviation between the seeds of the base.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.command import parser
from benchmarks.runs import train
from heedful.configs.vaswani_table3 import BASE, ROWS


def main(argv: Sequence[str] | None = None) -> None:
    command = parser("table3", __doc__)
    add = command.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER")
    add("--seeds", type=int, default=3, help="of the base model, at least 2")
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    add("--out", type=Path, default=Path("runs/table3"), help="where the runs lie")
    arguments, flags = command.parse_known_args(argv)
    if arguments.seeds < 2:
        command.error("--seeds must be at least 2: their deviation says what a difference means")
    runs = {f"seed_{i}": ("multi30k_table3", i) for i in range(arguments.seeds)}
    runs |= {row: (f"multi30k_table3:{row}", 0) for row in arguments.rows}
    losses = {}
    for name, (config, seed) in runs.items():
        given = ["--train.seed", str(seed), *flags]
        trained = train(config, arguments.out / name, given, cwd=arguments.data)
        if not trained.result:
            raise SystemExit(f"{name} did not come to its end:\n{trained.said}")
        losses[name] = trained.result["valid_loss"]
        print(f"{name}: validation perplexity {math.exp(losses[name]):.2f}", flush=True)
    print("\n" + table(losses))


def table(losses: Mapping[str, float]) -> str:
    """Return a Markdown table of validation losses in nats by run; the base's runs are seed_I."""
    seeds = [loss for name, loss in losses.items() if name.startswith("seed_")]
    base, spread = statistics.mean(seeds), statistics.stdev(seeds)
    lines = [
        f"Base: perplexity {math.exp(base):.2f}, deviation of its logarithm {spread:.4f} "
        f"between {len(seeds)} seeds.",
        "",
        "| | variation | perplexity | to the base | in the paper | direction |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        if name not in losses:
            continue
        moved, published = losses[name] - base, math.log(row.perplexity / BASE[0])
        lines.append(
            f"| {row.group} | {name} | {math.exp(losses[name]):.2f} | {math.expm1(moved):+.1%} "
            f"| {row.perplexity} ({math.expm1(published):+.1%}) "
            f"| {direction(moved, published, spread)} |"
        )
    return "\n".join(lines)


def direction(moved: float, published: float, spread: float) -> str:
    """Return whether a loss changes in the published direction, or too little for the seeds."""
    if abs(moved) <= 2 * spread:
        return "too small to tell"
    if published == 0:
        return "none in the paper"
    return "the same" if moved * published > 0 else "the other"


if __name__ == "__main__":
    main()
