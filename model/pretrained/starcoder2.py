"""StarCoder2 (arXiv:2402.19173): LayerNorm, biases, no gate, a window."""

from collections.abc import Set
from dataclasses import replace
from typing import Any

from heedful.model.config import FeedForwardConfig, ModelConfig, NormConfig
from heedful.model.pretrained.decoder import (
    KEYS_OF_FIELDS,
    TABLE,
    decoder_family,
    decoder_values,
    read_decoder,
    sliding_window,
    window,
)
from heedful.model.pretrained.keys import Keys

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
OWN = {
    "decoder/blocks/feed_forward/up": "model.layers.{}.mlp.c_fc",
    "decoder/blocks/feed_forward/down": "model.layers.{}.mlp.c_proj",
}


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of a StarCoder2 checkpoint; `names` are the names of its tensors."""
    keys.only("norm_type", "layer_norm")
    keys.only("mlp_type", "default")
    bias = keys.get("use_bias", True)
    config = read_decoder(
        keys,
        name,
        names,
        sizes=SIZES,
        norm=NormConfig(position="pre", epsilon=keys.get("norm_epsilon", 1e-5)),
        feed_forward=FeedForwardConfig(
            width=keys.get("intermediate_size", 12288),
            activation=keys.activation("hidden_act", "gelu_pytorch_tanh"),
            bias=bias,
        ),
        attention={"bias": bias, "window": window(keys, None)},
        tied=True,
    )
    return replace(config, dropout=keys.same("embedding_dropout", "residual_dropout", 0.0))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of a StarCoder2 checkpoint."""
    values = decoder_values(config, "Starcoder2")
    values["norm_epsilon"] = values.pop("rms_norm_eps")
    return values | {
        "use_bias": config.attention.bias,
        "sliding_window": sliding_window(config),
        "embedding_dropout": config.dropout,
        "residual_dropout": config.dropout,
    }


STARCODER2 = decoder_family(
    "starcoder2",
    "Starcoder2",
    from_hf=from_hf,
    to_hf=to_hf,
    table=lambda config: TABLE | OWN,
    keys_of_fields=KEYS_OF_FIELDS
    | {"norm.epsilon": "norm_epsilon", "model.dropout": "residual_dropout"},
)
