"""Fine-tuning: start a run from the parameters of a pretrained model."""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from heedful.model.config import ModelConfig
from heedful.train.config_json import differences, from_json, to_json
from heedful.train.conversion import generation_config
from heedful.train.conversion.source import Source, print_notes
from heedful.train.errors import TrainError
from heedful.train.trainable import named

# Fields of attention that the new run sets; the other fields come from the source, as its
# parameters depend on them. The mask also comes from the source, unless the new run sets a window.
RUN_FIELDS = ("core", "decoder_core", "cross_core", "dropout")
WINDOW_FIELDS = ("window", "dilation", "global_tokens", "global_projections")


def merge_pretrained_config(model: ModelConfig, source: ModelConfig) -> ModelConfig:
    """Return the body of `source` with the head and the training settings of `model`."""
    head, attention = model.head, model.attention
    own_fields = (*RUN_FIELDS, *attention.core_options)
    own_fields += () if attention.window is None else WINDOW_FIELDS
    # A classifier without outputs is a model without a head.
    if head.kind == source.head.kind and (head.kind != "classifier" or source.head.outputs):
        head = dataclasses.replace(source.head, dropout=head.dropout, outputs=head.outputs)
    return dataclasses.replace(
        source,
        attention=dataclasses.replace(
            source.attention, **{name: getattr(attention, name) for name in own_fields}
        ),
        feed_forward=dataclasses.replace(source.feed_forward, dropout=model.feed_forward.dropout),
        head=head,
        lora=model.lora,
        dropout=model.dropout,
        init=model.init,
        dtype=model.dtype,
        remat=model.remat,
        unroll=model.unroll,
    )


def merge_set_fields(model: ModelConfig, source: ModelConfig) -> ModelConfig:
    """Return the merged config, in which the fields that `model` sets keep their values.

    `init_from_pretrained` refuses values that the source does not have.
    """
    merged = merge_pretrained_config(model, source)
    return from_json(
        ModelConfig,
        _with_own_values(to_json(merged), to_json(model), to_json(ModelConfig())),
        "model",
    )


def _with_own_values(merged: Any, own: Any, default: Any) -> Any:
    """Return `merged` with the values of `own` that differ from the default (all JSON values)."""
    if isinstance(own, dict) and isinstance(merged, dict):
        unset = default if isinstance(default, dict) else {}
        return {name: _with_own_values(merged[name], own[name], unset.get(name)) for name in merged}
    return merged if own == default else own


def init_from_pretrained(
    fresh: Any, source: Source, model: ModelConfig, reinit: Sequence[str], console: Console
) -> Any:
    """Return the `fresh` (random) parameters, replaced by the parameters of the source.

    Only the head, low-rank updates, and parameters that a pattern of `reinit` matches may stay
    random. A table of loaded, copied, random and unused parameters is printed. Raises TrainError if
    the model below the head differs, if a shape does not fit, or if a pattern matches nothing.
    """
    wanted = to_json(merge_pretrained_config(model, source.model))
    wanted["head"] = to_json(model.head)
    if _is_longer(model, source.model):
        wanted["positions"]["max_length"] = model.positions.max_length
    differing = list(differences(to_json(model), wanted, "model"))
    if differing:
        raise TrainError(
            f"{source.name} has another model ({'; '.join(differing[:3])}): leave the flags of "
            "these fields out, or start from another model"
        )
    given = dict(named(source.params()))
    copies = _copies(given, fresh)
    unused = set(reinit)
    rows: dict[str, list[tuple[str, int]]] = {
        "loaded": [], "copied": [], "new, random": [], "left out": []
    }  # fmt: skip
    leaves, misfits = [], dict[str, str]()
    for name, leaf in named(fresh):
        matching = [pattern for pattern in reinit if re.search(pattern, name)]
        unused.difference_update(matching)
        if name in copies and not matching:
            given.pop(name, None)
            leaves.append(_to_device(copies[name], leaf))
            rows["copied"].append((name, leaf.size))
        elif name in given and not matching:
            value = given.pop(name)
            if value.shape != leaf.shape:
                misfits[name] = (
                    f"{name} has shape {value.shape} in the source and {leaf.shape} in the run"
                )
                continue
            leaves.append(_to_device(value, leaf))
            rows["loaded"].append((name, leaf.size))
        elif matching or name.startswith("head.") or "lora_" in name:
            given.pop(name, None)
            leaves.append(leaf)
            rows["new, random"].append((name, leaf.size))
        else:
            raise TrainError(
                f"{source.name} has no parameter {name}: start from a model of the same kind"
            )
    if misfits:
        patterns = shlex.join([*reinit, *map(re.escape, misfits)])
        raise TrainError(
            f"{source.name} does not fit ({', '.join(misfits.values())}): "
            f"give --train.reinit {patterns} to start with random values of these parameters"
        )
    if unused:
        raise TrainError(
            f"train.reinit has {sorted(unused)[0]!r}, which matches no parameter: correct the "
            "pattern (heedful inspect --names lists the parameters)"
        )
    rows["left out"] = [(name, leaf.size) for name, leaf in given.items()]
    _print(source.name, rows, console)
    print_notes(source, console)
    if source.generation:
        console.print(
            f"{generation_config.FILE} of {source.name} is not followed in training: train.decode "
            "has the settings of decoding",
            style="yellow",
        )
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def _is_longer(model: ModelConfig, source: ModelConfig) -> bool:
    """Tell if the model has more learned positions than the source."""
    is_learned = source.positions.has_table
    return is_learned and model.positions.max_length > source.positions.max_length


def _copies(given: dict[str, Any], fresh: Any) -> dict[str, np.ndarray]:
    """Return initial values of parameters that only a model for longer inputs has.

    As in arXiv:2004.05150 §5, its position table repeats the table of the source, and its global
    projections are copies of the local projections.
    """
    copies = {}
    for name, leaf in named(fresh):
        local = name.replace(".global_", ".")
        if name not in given and local in given:
            copies[name] = given[local]
        elif name.endswith("positions.table") and len(leaf) > len(given.get(name, leaf)):
            copies[name] = np.resize(given[name], leaf.shape)
    return copies


def _to_device(value: Any, like: jax.Array) -> jax.Array:
    host = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(host.shape, like.sharding, lambda index: host[index])


def _print(name: str, rows: dict[str, list[tuple[str, int]]], console: Console) -> None:
    table = Table("", "parameters", "names", title=f"fine-tuning {name}", title_justify="left")
    for what, entries in rows.items():
        if what == "copied" and not entries:
            continue
        parts: dict[str, int] = {}
        for entry, size in entries:
            # Loaded parameters of the body are listed by part, all others by name.
            is_body = what == "loaded" and not entry.startswith("head.")
            part = entry.split(".")[0] if is_body else entry
            parts[part] = parts.get(part, 0) + size
        names = ", ".join(parts) or "nothing"
        table.add_row(what, f"{sum(parts.values()):,}", names)
    console.print(table)
