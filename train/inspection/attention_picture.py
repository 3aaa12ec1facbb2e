"""`heedful attention`: a picture of the attention weights of a model."""

import hashlib
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from rich.console import Console

from heedful.data.objectives import source_and_target
from heedful.train import model_loss
from heedful.train.errors import require
from heedful.train.inference.read import framed
from heedful.train.inference.translate import Translator
from heedful.train.inspection.attention_weights import (
    attention_kinds,
    attention_masks,
    attention_weights,
)
from heedful.train.inspection.pictures import require_ours, save, to_png
from heedful.train.inspection.token_labels import drawable, pieces
from heedful.train.load import Trained

MAX_TOKENS = 64
"""Largest number of tokens on an axis of a readable picture."""
CELL, MIN_PANEL, FONT = 0.17, 1.6, 8
"""Size of a token on an axis and smallest size of a panel (inches), and size of labels (points)."""
TITLE = 300
"""Largest number of characters of a text in a title."""
TICKS = (0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)
"""Weights that are marked on the colour scale."""


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """The attention weights of one layer for one text; a notebook shows them as a picture.

    Example:
        >>> import numpy as np, heedful as hf
        >>> weights = np.array([[[1.0, 0.0], [0.5, 0.5]]])
        >>> hf.AttentionWeights(weights, weights > 0, ["a", "b"], ["a", "b"], "a b", ["head 1"])
        AttentionWeights(a b: 1 heads, 2 queries x 2 keys)
    """

    weights: Float[np.ndarray, "N T S"]
    """Weight of each key for each query: N heads, T queries, S keys; without dropout."""
    allowed: Bool[np.ndarray, "n T S"]
    """True for the pairs that the mask allows; n is N, or 1 if all heads have the same mask."""
    queries: Sequence[str]
    """Tokens of the queries [T]."""
    keys: Sequence[str]
    """Tokens of the keys [S]."""
    title: str
    """Run, attention and layer."""
    heads: Sequence[str]
    """Names of the heads [N]."""

    def __repr__(self) -> str:
        heads, rows, columns = self.weights.shape
        name = self.title.splitlines()[0]
        return f"AttentionWeights({name}: {heads} heads, {rows} queries x {columns} keys)"

    def draw(self) -> tuple[Any, list[str]]:
        """Return the picture as a matplotlib figure, and notes about characters without a font."""
        names = self.queries, self.keys, self.title, self.heads
        return draw(self.weights, self.allowed, *names)

    def _repr_png_(self) -> bytes:
        return to_png(self.draw()[0], self.title)


def attention_picture(
    trained: Trained,
    text: str,
    console: Console,
    *,
    target: str | None = None,
    which: str | None = None,
    layer: int | None = None,
    mean: bool = False,
    output: Path | None = None,
) -> Path:
    """Draw the attention weights of a text, and return the path of the picture.

    For the arguments see `heedful attention --help`. Raises TrainError for an empty or too long
    text, a layer or an attention that the model lacks, and an existing output that is not a picture
    of heedful.
    """
    directory = trained.run.directory
    which, layer, layers = _chosen(trained, which, layer)
    name = f"attention.{which}.layer{layer}{'.mean' if mean else ''}.{_slug(trained, text, target)}"
    output = output or directory / f"{name}.png"
    require_ours(output)
    found = attention_of(trained, text, target=target, which=which, layer=layer, mean=mean)
    figure, notes = found.draw()
    save(figure, output, found.title)
    for note in notes:
        console.print(note, style="yellow")
    rows, columns = found.weights.shape[1:]
    what = f"{attention_kinds(trained.run.model)[which]}, layer {layer} of {layers}"
    console.print(f"{what}, {rows} queries x {columns} keys: {output}")
    return output


def attention_of(
    trained: Trained,
    text: str,
    *,
    target: str | None = None,
    which: str | None = None,
    layer: int | None = None,
    mean: bool = False,
) -> AttentionWeights:
    """Return the attention weights of a text; the arguments are those of `attention_picture`."""
    model = trained.run.model
    which, layer, layers = _chosen(trained, which, layer)
    inputs = model_inputs(trained, text, target, needs_target=which != "encoder")
    with jax.set_mesh(trained.mesh):
        weights = np.asarray(attention_weights(model, trained.params, inputs)[which])[layer - 1, 0]
    heads, rows, columns = weights.shape
    allowed = np.asarray(attention_masks(model, inputs, layer - 1)[which].to_bool(rows, columns))[0]
    sides = {"encoder": ("encoder_inputs",) * 2, "cross": ("inputs", "encoder_inputs")}
    queries, keys = (
        pieces(trained.tokenizer, np.asarray(inputs[side])[0])
        for side in sides.get(which, ("inputs",) * 2)
    )
    names = [f"head {head} of {heads}" for head in range(1, heads + 1)]
    if mean:
        weights, names = weights.mean(0, keepdims=True), [f"mean of {heads} heads"]
        allowed = allowed.any(0, keepdims=True)
    title = (
        f"{_quoted(text, target)}\n{trained.run.directory.resolve().name}: "
        f"{attention_kinds(model)[which]}, layer {layer} of {layers}\n{_origin(trained.steps)}\n"
        "queries down, keys across"
    )
    return AttentionWeights(weights, allowed, queries, keys, title, names)


def _chosen(trained: Trained, which: str | None, layer: int | None) -> tuple[str, int, int]:
    """Return the kind of attention, the layer (from 1) and the number of layers."""
    directory, model = trained.run.directory, trained.run.model
    kinds = attention_kinds(model)
    which = which or list(kinds)[-1]
    require(
        which in kinds,
        f"which = {which}: the {model.architecture} of {directory} has only {', '.join(kinds)}; "
        "choose one of these",
    )
    layers = (model.encoder_layers or model.layers) if which == "encoder" else model.layers
    layer = layers if layer is None else layer
    require(1 <= layer <= layers, f"layer = {layer}: give a layer from 1 to {layers}")
    return which, layer, layers


# Inputs -----------------------------------------------------------------------------------------


def model_inputs(
    trained: Trained, text: str, target: str | None, *, needs_target: bool = True
) -> dict[str, jax.Array]:
    """Return the input arrays [1, T] of the model for a text of T tokens.

    The text gets begin and end as in training; no token is masked. If an encoder-decoder needs a
    target and `target` is None, its own output is the target. Raises TrainError for a text that is
    empty or too long for a picture, and for a target that the model does not read.
    """
    model, objective, tokenizer = (
        trained.run.model, trained.run.data.objective_spec, trained.tokenizer
    )  # fmt: skip
    tokens = _encode(trained, "text", text)
    second = None if target is None else _encode(trained, "target", target)
    if model.architecture == "encoder_decoder":
        if second is None:
            second = _own_output(trained, tokens) if needs_target else tokens[:0]
        row = source_and_target(tokens, second, tokenizer)
    elif model.head.kind == "classifier":
        pair = {} if second is None else {"pair": second}
        example = {"text": tokens, "label": np.array(0, np.int32), **pair}
        row = objective.row(example, None, trained.run.data, tokenizer)
    else:
        require(
            second is None or objective.has_prefix,
            f"target: {trained.run.data.objective} of {trained.run.directory} reads one text; "
            "leave target out",
        )
        after = tokens[:0] if second is None else second
        row = framed(np.concatenate([tokens, after]), trained)
        if objective.has_prefix:
            row["prefix_len"] -= len(after)
    inputs = model_loss.model_inputs(model, row)
    for side, name in {"encoder_inputs": "source", "inputs": "text that is read"}.items():
        if side in inputs:
            _require_readable(name, len(inputs[side]))
    return {name: jnp.asarray(array, jnp.int32)[None] for name, array in inputs.items()}


def _encode(trained: Trained, name: str, text: str) -> np.ndarray:
    require(bool(text.strip()), f"the {name} is empty: give some words")
    (tokens,) = trained.tokenizer.encode_batch([text])
    _require_readable(name, len(tokens))
    return tokens


def _own_output(trained: Trained, source: np.ndarray) -> np.ndarray:
    """Translate a source as `heedful translate` does; return the tokens without the end."""
    translator = trained.writer(Translator, trained.run.train.decode)
    ((_, tokens),) = translator.tokens({0: np.append(source, translator.eos)})
    return tokens[tokens != translator.eos]


# Drawing ----------------------------------------------------------------------------------------


def draw(
    weights: Float[np.ndarray, "N T S"],
    allowed: Bool[np.ndarray, "n T S"],
    queries: Sequence[str],
    keys: Sequence[str],
    title: str,
    heads: Sequence[str],
) -> tuple[Any, list[str]]:
    """Return a matplotlib figure with a panel for each head, and notes about missing characters.

    Rows are T queries, columns S keys. All N panels share one colour scale from 0 to the largest
    weight; the colour follows the square root of the weight, so that small weights differ, too.
    Pairs that are not `allowed` are hatched; n is N, or 1 if all heads have the same mask.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    labels, families, notes = drawable([title, *queries, *keys])
    title, queries, keys = labels[0], labels[1 : len(queries) + 1], labels[len(queries) + 1 :]
    columns = math.ceil(math.sqrt(len(weights)))
    rows = math.ceil(len(weights) / columns)
    letter = 0.65 * FONT / 72  # inches
    left, top = (letter * max(map(len, texts)) for texts in (queries, keys))
    width = columns * (max(CELL * len(keys), MIN_PANEL) + left + 0.3) + 1.2
    height = rows * (max(CELL * len(queries), MIN_PANEL) + top + 0.4) + 1.2
    width = max(width, 0.1 * max(map(len, title.splitlines())))
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    hidden = {"facecolor": "0.92", "hatch": "/////", "edgecolor": "0.7", "linewidth": 0}
    allowed = np.broadcast_to(allowed, weights.shape)
    most = float(weights[allowed].max(initial=0.0)) or 1.0
    image: Any = None
    for i, panel in enumerate(panels.flat):
        if i >= len(weights):
            panel.remove()
            continue
        panel.patch.set(**hidden)
        shown = np.ma.masked_where(~allowed[i], weights[i])
        image = panel.imshow(shown, cmap=colormaps["viridis"], norm=PowerNorm(0.5, 0.0, most))
        panel.set_title(heads[i], fontsize=FONT + 1)
        panel.xaxis.tick_top()
        panel.tick_params(length=2)
        text = {"fontsize": FONT, "fontfamily": families, "parse_math": False}
        panel.set_xticks(range(len(keys)), keys, rotation=90, **text)
        panel.set_yticks(range(len(queries)), queries, **text)
    ticks = [tick for tick in TICKS if tick < 0.9 * most] + [most]
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, aspect=30, ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:.2g}" for tick in ticks], fontsize=FONT)
    bar.set_label("weight, square-root scale", fontsize=FONT + 1)
    figure.suptitle(title, fontsize=FONT + 3, fontfamily=families, parse_math=False)
    if not allowed.all():
        patch = Patch(**hidden, label="masked: the query does not attend to the key")
        figure.legend(handles=[patch], loc="outside lower center", fontsize=FONT, frameon=False)
    return figure, notes


def _quoted(text: str, target: str | None) -> str:
    """Return the texts in quotation marks, in lines of a title."""
    texts = [
        f"“{textwrap.shorten(part, TITLE, placeholder=' ...')}”" for part in (text, target) if part
    ]
    return textwrap.fill(" → ".join(texts), 70)


def _slug(trained: Trained, text: str, target: str | None) -> str:
    """Return a part of a file name for these texts and parameters: words, and a hash of all."""
    words = re.sub(r"\W+", "-", text).strip("-")[:30].rstrip("-")
    digest = hashlib.sha256(repr((text, target, trained.steps)).encode()).hexdigest()[:6]
    return f"{words}.{digest}".lstrip(".")


def _origin(steps: Sequence[int]) -> str:
    """Name the checkpoints that the parameters come from."""
    if len(steps) == 1:
        return f"checkpoint of step {steps[0]:,}"
    return f"mean of {len(steps)} checkpoints, steps {min(steps):,} to {max(steps):,}"


def _require_readable(name: str, length: int) -> None:
    require(
        length <= MAX_TOKENS,
        f"the {name} has {length} tokens, but a picture is readable only up to {MAX_TOKENS}: "
        "shorten the text",
    )
