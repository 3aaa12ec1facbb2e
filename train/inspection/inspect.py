"""`heedful inspect`: parameters, memory, FLOPs and masks of an experiment."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh
from rich.columns import Columns
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from heedful.data.config import DataConfig
from heedful.data.tokenizer import Tokenizer
from heedful.model.attention import spec_of
from heedful.model.cache import remembered
from heedful.model.config import ModelConfig
from heedful.model.mask_picture import MAY, MAY_NOT, as_text
from heedful.train.config import MeshConfig, TrainConfig
from heedful.train.errors import require
from heedful.train.inspection.attention_weights import attention_masks, attentions
from heedful.train.inspection.costs import (
    BACKWARD,
    STACKED,
    Memory,
    Part,
    logits_at_once,
    memory,
    parts,
    recomputed,
)
from heedful.train.sharding import MESH_AXES
from heedful.train.state import Setup, parameter_count, set_up
from heedful.train.tasks import task_of
from heedful.train.trainable import named

ROW = 16
"""Length of the row whose masks are drawn."""


def inspect(
    title: str,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    console: Console,
    *,
    length: int | None = None,
    names: bool = False,
) -> None:
    """Print tables and masks from shapes alone, without allocating the model.

    Raises TrainError for a mesh that does not divide a parameter, and for a pattern in
    train.optimizer.freeze that matches no parameter.
    """
    length = data.max_length if length is None else length
    require(length > 0, f"--length {length}: give a positive number")
    is_open = model.vocab_size is None
    model, notes = complete(model, data)
    if is_open and train.init_from is not None:
        notes.append(f"the sizes of {train.init_from} (train.init_from) will replace these")
    setup = set_up(model, train, layout(train.mesh))
    for line in (f"{title}: {describe(model)}", *notes):
        console.print(line)
    if names:
        console.print(_names_table(setup))
    found = parts(model, setup.abstract.params, length)
    console.print(_parts_table(found, model, parameter_count(setup.abstract.params), length))
    console.print(_flops_text(found, model, data, train, setup) + "\n")
    console.print(_memory_table(memory(model, data, train, setup), model, data, train, setup))
    console.print(masks_drawn(model, data))


def complete(model: ModelConfig, data: DataConfig) -> tuple[ModelConfig, list[str]]:
    """Return the model with the sizes that the data decide, and notes about assumed sizes."""
    notes = []
    if model.vocab_size is None:
        if data.tokenizer.path is not None:
            size = Tokenizer.load(data.tokenizer.path).vocab_size
        else:
            size = data.tokenizer.vocab_size
            notes.append(
                f"vocabulary of {size:,} entries assumed: it is not learned yet, and may have at "
                "most data.tokenizer.vocab_size"
            )
        model = dataclasses.replace(model, vocab_size=size)
    if model.head.kind == "classifier" and model.head.outputs is None:
        count = task_of(data).outputs
        outputs = count(data) if count else 0
        if not outputs:
            outputs = 2
            notes.append("2 classes assumed: data.classes is not given, the data will decide")
        head = dataclasses.replace(model.head, outputs=outputs)
        model = dataclasses.replace(model, head=head)
    return model, notes


def layout(config: MeshConfig) -> Mesh:
    """Return the mesh of a config without any devices; data = -1 counts as 1."""
    sizes = tuple(max(getattr(config, axis), 1) for axis in MESH_AXES)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return cast(Mesh, mesh)  # Only its shape is used.


def describe(model: ModelConfig) -> str:
    """Describe the sizes of a model in one line."""
    layers = f"{model.layers} layers"
    if model.architecture == "encoder_decoder":
        layers = f"{model.encoder_layers or model.layers} + {model.layers} layers"
    narrow = "" if model.embedding_width is None else f", embeddings of {model.embedding_width}"
    keys = "" if model.key_dim == model.head_dim else f", keys of {model.key_dim},"
    return (
        f"{model.architecture}, {layers}, width {model.width}{narrow}, "
        f"{model.attention.heads} heads of {model.head_dim}{keys} "
        f"({model.kv_heads} for keys and values), feed-forward {model.feed_forward.width}"
        f"{' gated' if model.feed_forward.gated else ''}, vocabulary {model.vocab_size:,}"
        + (f", layers in the pattern {' '.join(map(str, model.pattern))}" if model.pattern else "")
    )


# Tables -----------------------------------------------------------------------------------------


def _parts_table(found: list[Part], model: ModelConfig, parameters: int, length: int) -> Table:
    flops = sum(part.flops for part in found)
    pair = model.architecture == "encoder_decoder"
    token = "token of the target and one of the source" if pair else "token"
    table = Table(title=f"parameters, and FLOPs of the forward pass per {token}")
    table.caption = (
        f"FLOPs: 2 per multiply-add of a matrix product (arXiv:2001.08361 §2.1); scores of all "
        f"pairs that the core computes in rows of {length:,} tokens, masked ones too"
    )
    table.title_justify = table.caption_justify = "left"
    for name in ("stack", "part"):
        table.add_column(name)
    for name in ("parameters", "share", "FLOPs", "share"):
        table.add_column(name, justify="right")

    def add(stack: str, name: str, some: list[Part], **style: Any) -> None:
        count, cost = sum(part.parameters for part in some), sum(part.flops for part in some)
        shares = f"{count / parameters:.1%}", f"{cost / flops:.1%}"
        table.add_row(stack, name, f"{count:,}", shares[0], number(cost), shares[1], **style)

    stacks = list(dict.fromkeys(part.stack for part in found))
    for stack in stacks:
        inside = [part for part in found if part.stack == stack]
        for i, part in enumerate(inside):
            add("" if i else stack, part.name, [part])
        if len(inside) > 1:
            add("", "together", inside, style="bold")
        table.add_section()
    both = dict.fromkeys(part.name for part in found if part.stack == "decoder")
    if "encoder" in stacks and "decoder" in stacks:
        for i, name in enumerate(both):
            same = [part for part in found if part.name == name and part.stack in STACKED]
            add("" if i else "both stacks", name, same)
        table.add_section()
    add("total", "", found, style="bold")
    return table


def _flops_text(
    found: list[Part], model: ModelConfig, data: DataConfig, train: TrainConfig, setup: Setup
) -> str:
    forward = sum(part.flops for part in found)
    training = forward * (1 + BACKWARD)
    lines = [
        f"training: {number(training)}FLOPs per token, 3 x forward; a batch of "
        f"{data.batch_tokens:,} positions {number(training * data.batch_tokens)}, "
        f"{train.steps:,} steps {number(training * data.batch_tokens * train.steps)}",
    ]
    if again := recomputed(model, found):
        lines.append(f"model.remat {model.remat}: {number(again)}FLOPs per token more, recomputed")
    if not all(np.any(factor) for factor in jax.tree.leaves(setup.factors)):
        lines.append("frozen parameters need no gradient: training needs less than that")
    return "\n".join(lines)


def _memory_table(
    sizes: Memory, model: ModelConfig, data: DataConfig, train: TrainConfig, setup: Setup
) -> Table:
    shape = ", ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
    table = Table(title=f"memory per device (mesh: {shape})")
    table.title_justify = table.caption_justify = "left"
    table.add_column("what")
    table.add_column("bytes", justify="right")
    first = train.optimizer.first_moment
    moments = "float32" if first == "float32" else f"{first} and float32"
    rows = [
        ("parameters, float32", sizes.parameters),
        ("gradients, float32", sizes.gradients),
        (f"moments of {train.optimizer.kind}, {moments}", sizes.moments),
    ]
    for what, size in [*rows, ("together", sum(size for _, size in rows))]:
        table.add_row(what, number(size, 1024) + "B")
    table.add_section()
    batch = data.batch_tokens // train.accumulate
    if model.head.kind == "classifier":
        what = f"of a batch: {batch:,} positions in rows, x {model.head.outputs} outputs"
    else:
        count = logits_at_once(batch, data, train)
        what = f"at once: {count:,} positions x {model.vocab_size:,} scores"
    table.add_row(f"outputs {what}, float32", number(sizes.outputs, 1024) + "B")
    if sizes.cache:
        of = " of the target" if sizes.source_cache else ""
        kept = Counter(remembered(model.layer(i)) for i in range(model.layers))
        for last, layers in kept.items():
            in_layers = f" in {layers} layers" if len(kept) > 1 else ""
            of += "" if last is None else f", for the last {last}{in_layers}"
        what = f"cache per token{of}: {model.kv_heads} key and value heads of {model.head_dim} in "
        what += f"{model.layers} layers, {model.dtype}"
        spec = spec_of(model.attention.core_of(model.decoding_site))
        if spec.new_cache is not None:
            what = f"cache{of}, for any number of tokens: {spec.cached} in {model.layers} layers"
        table.add_row(what, number(sizes.cache, 1024) + "B")
    if sizes.source_cache:
        table.add_row("cache per token of the source", number(sizes.source_cache, 1024) + "B")
    table.caption = "activations for the backward pass are not included"
    if train.mesh.data == -1:
        table.caption += "; train.mesh.data = -1 counts as 1: more devices only shard the batch"
    return table


def _names_table(setup: Setup) -> Table:
    table = Table(title="parameters by name; * is the layer, from 0, and the first dimension")
    table.title_justify = "left"
    for name in ("name", "shape", "count", "rate x"):
        table.add_column(name, justify="left" if name == "name" else "right", overflow="fold")
    factors = dict(named(setup.factors))
    for name, leaf in named(setup.abstract.params):
        rates = dict.fromkeys(f"{rate:.3g}" for rate in np.unique(factors[name]))
        rates = "frozen" if list(rates) == ["0"] else " ... ".join([*rates][:: len(rates) - 1 or 1])
        name = name.replace(".blocks.", ".blocks.*.")
        table.add_row(name, " x ".join(map(str, leaf.shape)), f"{leaf.size:,}", rates)
    return table


def number(value: float, base: int = 1000) -> str:
    """Format a number with three digits and a prefix: "1.23 G", or with base 1024 "1.15 Gi"."""
    prefixes = ["", *"kMGTPEZY"] if base == 1000 else ["", "Ki", "Mi", "Gi", "Ti", "Pi"]
    power = 0
    while value >= 999.5 and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    digits = 0 if not power else 2 - (value >= 9.995) - (value >= 99.95)
    return f"{value:,.{digits}f} {prefixes[power]}"


# Masks ------------------------------------------------------------------------------------------


def masks_drawn(model: ModelConfig, data: DataConfig) -> Group:
    """Draw the masks of a row of 16 tokens with block characters, side by side if there is room.

    If heads differ, a pair of query and key is drawn as allowed if any head allows it.
    """
    batch, meaning = example(model, data)
    pictures = []
    for (kind, layer), name in attentions(model).items():
        mask = attention_masks(model, batch, layer)[kind]
        lines = as_text(np.asarray(mask.to_bool(ROW, ROW))[0].any(0, keepdims=True))
        pictures.append(Text(f"{name}\n{lines}\n", no_wrap=True))
    legend = (
        f"masks of a row of {ROW}: {meaning}\n"
        f"{MAY} the query (down) attends to the key (across)   {MAY_NOT} it does not\n"
    )
    return Group(Text(legend), Columns(pictures, padding=(0, 3)))


def example(model: ModelConfig, data: DataConfig) -> tuple[Mapping[str, jax.Array], str]:
    """Return a batch of one row of 16 tokens, as the objective makes rows, and its description."""

    def row(*lengths: int) -> jax.Array:
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        return jax.numpy.asarray(np.pad(ids, (0, ROW - len(ids)))[None], np.int32)

    def batch(segments: jax.Array, **others: jax.Array) -> Mapping[str, jax.Array]:
        return {"inputs": segments, "segment_ids": segments, **others}

    if model.architecture == "encoder_decoder":
        source, target = row(13), row(11)
        others = {"encoder_inputs": source, "encoder_segment_ids": source}
        return batch(target, **others), "a source of 13 tokens, a target of 11, padding"
    if data.is_packed:
        return batch(row(8, 5)), "documents of 8 and 5 tokens, packed, and 3 of padding"
    if data.objective_spec.has_prefix:
        prefix = jax.numpy.asarray([6])
        return batch(row(13), prefix_len=prefix), "a prefix of 6 tokens, 7 more, 3 of padding"
    return batch(row(13)), "13 tokens and 3 of padding"
