"""Who looks at whom in a model: its attention weights, and the masks that it applies."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model import masks
from model.config import ModelConfig
from model.masks import AttentionMask
from model.transformer import build

Inputs = Mapping[str, jax.Array]  # what the model is called with, by the names of data/batch.py


def attention_kinds(config: ModelConfig) -> dict[str, str]:
    """The attentions of a model and what they are called."""
    if config.architecture == "encoder_decoder":
        return {
            "encoder": "encoder self-attention",
            "self": "decoder self-attention",
            "cross": "cross-attention",
        }
    return {"self": "self-attention"}


def attention_weights(
    config: ModelConfig, params: Any, inputs: Inputs
) -> dict[str, Float[Array, "_L _B _N _T _S"]]:
    """What share each query takes of each key, by attention, layer and head; nothing is dropped."""
    stacks = _sown(config, params, dict(inputs))
    only = "encoder" if config.architecture == "encoder_only" else "decoder"
    places = {
        "encoder": ("encoder", "self_attention"),
        "self": (only, "self_attention"),
        "cross": ("decoder", "cross_attention"),
    }
    weights = {}
    for kind in attention_kinds(config):
        stack, attention = places[kind]
        (weights[kind],) = stacks[stack]["blocks"][attention]["weights"]
    return weights


@partial(jax.jit, static_argnums=0)
def _sown(config: ModelConfig, params: Any, inputs: dict[str, Any]) -> Any:
    _, sown = build(config).apply({"params": params}, **inputs, mutable=["intermediates"])
    return sown["intermediates"]


def attention_masks(config: ModelConfig, inputs: Inputs) -> dict[str, AttentionMask]:
    """The masks that the model applies to a batch, by attention."""

    def own(segment_ids: jax.Array | None) -> AttentionMask:
        return masks.full() if segment_ids is None else masks.packed(segment_ids)

    segment_ids, prefix_len = inputs.get("segment_ids"), inputs.get("prefix_len")
    if config.architecture == "encoder_only":
        return {"self": own(segment_ids)}
    past = masks.causal() if prefix_len is None else masks.prefix(prefix_len)
    if config.architecture == "decoder_only":
        return {"self": past & own(segment_ids)}
    source = inputs.get("encoder_segment_ids")
    target = jnp.ones_like(inputs["inputs"]) if segment_ids is None else segment_ids
    cross = masks.full() if source is None else masks.cross(target, source)
    return {"encoder": own(source), "self": past & own(segment_ids), "cross": cross}
