"""Gemma (arXiv:2403.08295), version 1: large heads, scaled embeddings, a gate with GELU."""

from collections.abc import Set
from dataclasses import replace
from typing import Any

from heedful.model.config import ModelConfig
from heedful.model.pretrained.decoder import (
    decoder_family,
    decoder_values,
    gated,
    read_decoder,
    rms_norm,
)
from heedful.model.pretrained.keys import Keys

SIZES = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
}


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of a Gemma checkpoint; `names` are the names of its tensors."""
    keys.only("use_bidirectional_attention", None, False)
    feed_forward = gated(keys, 24576, "gelu_pytorch_tanh")
    if feed_forward.activation == "gelu":  # In Gemma this names the tanh approximation.
        feed_forward = replace(feed_forward, activation="gelu_tanh")
    config = read_decoder(
        keys,
        name,
        names,
        sizes=SIZES,
        norm=rms_norm(keys),
        feed_forward=feed_forward,
        attention={"bias": keys.get("attention_bias", False)},
        tied=True,
    )
    return replace(config, scale_embeddings=True)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of a Gemma checkpoint."""
    return decoder_values(config, "Gemma") | {"attention_bias": config.attention.bias}


GEMMA = decoder_family(
    "gemma",
    "Gemma",
    from_hf=from_hf,
    to_hf=to_hf,
    scale_offset=1.0,
    ignored_keys=frozenset({"hidden_activation"}),
)
