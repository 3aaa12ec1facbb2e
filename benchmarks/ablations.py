"""Failures of training without warmup, positions, residuals or norms, or with a wrong mask.

python -m benchmarks.ablations

Each demonstration trains a small model twice: correctly, and with one part missing or wrong. It
plots both validation losses and the loss of a guess by frequency alone, and prints the messages of
`heedful train` about the wrong model.

Warmup: Adam's first steps push a stack of post-norm blocks to parameters at which its gradients
vanish, and it stays there (arXiv:2002.04745). Positions: a bidirectional model without positions
sees a row as a bag of characters. Residuals and norms: gradients vanish, or activations grow, with
each layer. Mask: a model that sees the next character copies it. Its loss falls below the possible
minimum, and its generated text is worthless, because no next character exists then.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.command import parser
from benchmarks.runs import Trained, train


class Demonstration(NamedTuple):
    """Two runs of a config with the flags `both`: one with the flags `right`, one with `wrong`."""

    config: str
    title: str
    """Title of the picture, which names the two runs that it compares."""
    both: str
    right: str = ""
    wrong: str = ""
    is_leaking: bool = False
    """True if the wrong run has no causal mask."""


SHORT = "--train.steps 400 --train.checkpoint-every 25"
DEEP = f"{SHORT} --model.layers 8 --train.optimizer.peak-lr 1e-3"
DEMONSTRATIONS = {
    "warmup": Demonstration(
        "shakespeare_char",
        "Post-norm GPT with a warmup of 100 steps, and without warmup",
        f"{SHORT} --model.norm.position post --train.optimizer.peak-lr 2e-3",
        "--train.optimizer.warmup-steps 100",
        "--train.optimizer.warmup-steps 0",
    ),
    "positions": Demonstration(
        "bert_tiny",
        "BERT with positions, and without positions",
        "--train.steps 1000 --train.checkpoint-every 50",
        wrong="--model.positions.kind none",
    ),
    "residuals": Demonstration(
        "shakespeare_char",
        "GPT of 8 layers with residual connections, and without",
        DEEP,
        "--no-audit",
        "--model.no-residuals --no-audit",
    ),
    "norm": Demonstration(
        "shakespeare_char",
        "GPT of 8 layers with layer norms, and without",
        DEEP,
        wrong="--model.norm.kind none",
    ),
    "mask": Demonstration(
        "shakespeare_char",
        "GPT with the causal mask, and with a mask that shows the next character",
        SHORT,
        is_leaking=True,
    ),
}
LEAKING = (
    "-c",
    "from heedful.model import masks; masks.causal = masks.full; "
    "from heedful.train.cli import main; main()",
)


def main(argv: Sequence[str] | None = None) -> None:
    command = parser("ablations", __doc__)
    add = command.add_argument
    names = list(DEMONSTRATIONS)
    add("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--out", type=Path, default=Path("runs/ablations"), help="where runs and plots lie")
    arguments, flags = command.parse_known_args(argv)
    for name in arguments.only:
        demonstrate(name, DEMONSTRATIONS[name], arguments.out, flags)


def demonstrate(name: str, shown: Demonstration, out: Path, flags: Sequence[str]) -> None:
    """Train both runs, plot OUT/NAME.png, and print the messages about the wrong run."""
    both, program = [*shown.both.split(), *flags], LEAKING if shown.is_leaking else ()
    right = train(shown.config, out / name / "right", [*both, *shown.right.split()])
    wrong_flags = [*both, *shown.wrong.split()]
    if shown.is_leaking:
        refused = train(shown.config, out / name / "refused", wrong_flags, program=program)
        print(f"{name}: the wrong one is refused:\n{refused.said.strip()}\n")
        wrong_flags.append("--no-audit")
    wrong = train(shown.config, out / name / "wrong", wrong_flags, program=program)
    print(
        f"{name}: {ends(right)} as it should be, the wrong one {ends(wrong)}:\n{verdict(wrong)}\n"
    )
    if shown.is_leaking:
        for which in ("right", "wrong"):
            print(f"{which} writes: {write(out / name / which)!r}")
        print()
    plot(out / f"{name}.png", shown.title, {"as it should be": right, f"wrong {name}": wrong})


def ends(trained: Trained) -> str:
    loss = trained.result.get("valid_loss")
    return "stopped" if loss is None else f"ended at {loss:.3f} nats"


def verdict(trained: Trained) -> str:
    """Return the output of a run about its loss: the error, or the lines on validation data."""
    lines = trained.said.splitlines()
    first = [i for i, line in enumerate(lines) if line.startswith(("heedful: error", "validation"))]
    last = [i for i, line in enumerate(lines) if line.startswith("test loss")]
    return "\n".join(lines[first[0] : last[0] if last else None]) if first else trained.said


def write(run: Path) -> str:
    command = [sys.executable, "-m", "heedful", "generate", str(run), "ROMEO:"]
    command += ["--decode.max-tokens", "57"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def plot(path: Path, title: str, runs: dict[str, Trained]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, trained in runs.items():
        axis.plot(*trained.curve("valid_loss"), label=label)
    known = next(iter(runs.values())).result["valid_frequency_loss"]
    axis.axhline(known, color="black", linestyle=":", label="frequencies alone")
    axis.set(xlabel="step", ylabel="validation loss, nats per letter", ylim=(0, None))
    axis.set_title(title, fontsize=9)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
