"""Phi-3 (arXiv:2404.14219): LLaMA with fused matrices and a window."""

from collections.abc import Set
from dataclasses import replace
from typing import Any

from heedful.model.config import ModelConfig
from heedful.model.pretrained.decoder import (
    KEYS_OF_FIELDS,
    TABLE,
    decoder_family,
    decoder_values,
    gated,
    read_decoder,
    rms_norm,
    sliding_window,
    window,
)
from heedful.model.pretrained.keys import Keys

SIZES = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
OWN = {
    "decoder/blocks/self_attention/query": "model.layers.{}.self_attn.qkv_proj",
    "decoder/blocks/self_attention/key": "model.layers.{}.self_attn.qkv_proj",
    "decoder/blocks/self_attention/value": "model.layers.{}.self_attn.qkv_proj",
    "decoder/blocks/feed_forward/gate": "model.layers.{}.mlp.gate_up_proj",
    "decoder/blocks/feed_forward/up": "model.layers.{}.mlp.gate_up_proj",
}


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of a Phi-3 checkpoint; `names` are the names of its tensors."""
    for key in ("attention_bias", "mlp_bias"):
        keys.only(key, False)
    config = read_decoder(
        keys,
        name,
        names,
        sizes=SIZES,
        norm=rms_norm(keys, 1e-5),
        feed_forward=gated(keys, 8192),
        attention={"bias": False, "window": window(keys, None)},
        scalings=(),  # transformers refuses other types than longrope.
    )
    return replace(config, dropout=keys.same("embd_pdrop", "resid_pdrop", 0.0))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of a Phi-3 checkpoint."""
    return decoder_values(config, "Phi3") | {
        "sliding_window": sliding_window(config),
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
    }


PHI3 = decoder_family(
    "phi3",
    "Phi3",
    from_hf=from_hf,
    to_hf=to_hf,
    table=lambda config: TABLE | OWN,
    keys_of_fields=KEYS_OF_FIELDS | {"model.dropout": "resid_pdrop"},
)
