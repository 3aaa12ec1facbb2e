"""Mistral (arXiv:2310.06825): LLaMA with a window."""

from collections.abc import Set
from typing import Any

from heedful.model.config import ModelConfig
from heedful.model.pretrained.decoder import (
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
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of a Mistral checkpoint; `names` are the names of its tensors."""
    for key in ("attention_bias", "mlp_bias"):
        keys.only(key, False)
    return read_decoder(
        keys,
        name,
        names,
        sizes=SIZES,
        norm=rms_norm(keys),
        feed_forward=gated(keys, 14336),
        attention={"bias": False, "window": window(keys, 4096)},
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of a Mistral checkpoint."""
    return decoder_values(config, "Mistral") | {"sliding_window": sliding_window(config)}


MISTRAL = decoder_family("mistral", "Mistral", from_hf=from_hf, to_hf=to_hf)
