"""LLaMA (arXiv:2302.13971), versions 1 to 3."""

from collections.abc import Set
from typing import Any

from heedful.model.config import ModelConfig, require
from heedful.model.pretrained.decoder import (
    decoder_family,
    decoder_values,
    gated,
    read_decoder,
    rms_norm,
)
from heedful.model.pretrained.keys import ACTIVATION_NAMES, Keys

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of a LLaMA checkpoint; `names` are the names of its tensors."""
    layers, types = keys.get("num_hidden_layers", 32), keys.value("layer_types")
    is_full = isinstance(types, list) and all(x == "full_attention" for x in types)
    if types is not None and not (is_full and len(types) == layers):
        raise keys.unsupported("layer_types", types, f"full_attention for each of {layers} layers")
    keys.only("rope_interleaved", False)
    return read_decoder(
        keys,
        name,
        names,
        sizes=SIZES,
        norm=rms_norm(keys),
        feed_forward=gated(keys, 11008, bias=keys.get("mlp_bias", False)),
        attention={"bias": keys.get("attention_bias", False)},
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of a LLaMA checkpoint."""
    heads = config.attention.heads
    require(
        config.width % heads == 0,
        f"model.attention.heads = {heads} cannot be exported: in transformers' LLaMA, the number "
        f"of heads must divide model.width = {config.width}; train a model with such sizes",
    )
    return decoder_values(config, "Llama") | {
        "hidden_act": ACTIVATION_NAMES[config.feed_forward.activation],
        "attention_bias": config.attention.bias,
        "mlp_bias": config.feed_forward.bias,
    }


LLAMA = decoder_family(
    "llama",
    "Llama",
    from_hf=from_hf,
    to_hf=to_hf,
    ignored_keys=frozenset(
        {
            "is_decoder",
            "max_sequence_length",
            "pretraining_tp",
            "unsloth_fixed",
            "unsloth_version",
        }
    ),
)
