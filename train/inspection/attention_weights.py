"""Attention weights of a model, and the masks that it applies."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from heedful.model.attention import spec_of
from heedful.model.attention_masks import cross_mask, decoder_mask, encoder_mask
from heedful.model.config import ModelConfig, ModelError
from heedful.model.masks import AttentionMask
from heedful.model.transformer import build

ModelInputs = Mapping[str, jax.Array]  # Keys are the names in data/batch.py.
FIELDS = {"self": "core", "decoder": "decoder_core", "cross": "cross_core"}
"""Fields of model.attention that set the core of each site."""


def attention_kinds(config: ModelConfig) -> dict[str, str]:
    """Return the kinds of attention in a model, with their names for people."""
    if config.architecture == "encoder_decoder":
        return {
            "encoder": "encoder self-attention",
            "self": "decoder self-attention",
            "cross": "cross-attention",
        }
    return {"self": "self-attention"}


class Attention(NamedTuple):
    """A kind of attention, and the first of the layers that have the same mask of this kind."""

    kind: str
    """A key of `attention_kinds`."""
    layer: int
    """Index of the first layer, from 0."""


def attentions(config: ModelConfig) -> dict[Attention, str]:
    """Return one attention for each different mask of the model, with its name for people."""
    found = {}
    for kind, name in attention_kinds(config).items():
        depth = (kind == "encoder" and config.encoder_layers) or config.layers
        alike: dict[Any, list[int]] = {}
        for layer in range(depth if kind != "cross" else 1):
            alike.setdefault(config.layer(layer).attention, []).append(layer)
        for layers in alike.values():
            noun = "layers" if len(layers) > 1 else "layer"
            of_layers = f" of {noun} {_ranges(layers)}" if len(alike) > 1 else ""
            found[Attention(kind, layers[0])] = name + of_layers
    return found


def _ranges(layers: list[int]) -> str:
    """Return "1-5, 7" for the layers 0 to 4 and 6."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(f"{a + 1}" if a == b else f"{a + 1}-{b + 1}" for a, b in pairs)


def attention_weights(
    config: ModelConfig, params: Any, inputs: ModelInputs
) -> dict[str, Float[Array, "_L _B _N _T _S"]]:
    """Return the attention weights without dropout, by kind: [layers, B, heads, queries, keys].

    B is the number of rows of the batch. Raises ModelError for a core without attention weights.
    """
    for site in config.sites:
        core = config.attention.core_of(site)
        if not spec_of(core).has_weights:
            field = FIELDS[site] if getattr(config.attention, FIELDS[site]) else "core"
            raise ModelError(
                f"model.attention.{field} = {core}: this core has no attention weights to show; "
                "choose another core"
            )
    stacks = _intermediates(config, params, dict(inputs))
    only = "encoder" if config.architecture == "encoder_only" else "decoder"
    modules = {
        "encoder": ("encoder", "self_attention"),
        "self": (only, "self_attention"),
        "cross": ("decoder", "cross_attention"),
    }
    weights = {}
    for kind in attention_kinds(config):
        stack, attention = modules[kind]
        (weights[kind],) = stacks[stack]["blocks"][attention]["weights"]
    return weights


@partial(jax.jit, static_argnums=0)
def _intermediates(config: ModelConfig, params: Any, inputs: dict[str, Any]) -> Any:
    _, collections = build(config).apply({"params": params}, **inputs, mutable=["intermediates"])
    return collections["intermediates"]


def attention_masks(
    config: ModelConfig, inputs: ModelInputs, layer: int = 0
) -> dict[str, AttentionMask]:
    """Return the masks of layer `layer` (from 0) for a batch, by kind of attention."""
    config = config.layer(layer)
    segment_ids = inputs.get("segment_ids")
    if config.architecture == "encoder_only":
        return {"self": encoder_mask(config, segment_ids)}
    own = decoder_mask(config, segment_ids, inputs.get("prefix_len"))
    if config.architecture == "decoder_only":
        return {"self": own}
    source = inputs.get("encoder_segment_ids")
    cross = cross_mask(inputs["inputs"], segment_ids, source)
    return {"encoder": encoder_mask(config, source), "self": own, "cross": cross}
