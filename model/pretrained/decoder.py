"""The config.json that LLaMA and its relatives share: keys, names of tensors, and a family."""

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
)
from heedful.model.pretrained.family import Family, vocab_size
from heedful.model.pretrained.keys import ACTIVATION_NAMES, Keys
from heedful.model.pretrained.rotary import SCALINGS, are_frequencies, read_rotary, rotary_values

TABLE = {
    "embedding": "model.embed_tokens",
    "decoder/blocks/self_attention_norm": "model.layers.{}.input_layernorm",
    "decoder/blocks/self_attention/query": "model.layers.{}.self_attn.q_proj",
    "decoder/blocks/self_attention/key": "model.layers.{}.self_attn.k_proj",
    "decoder/blocks/self_attention/value": "model.layers.{}.self_attn.v_proj",
    "decoder/blocks/self_attention/out": "model.layers.{}.self_attn.o_proj",
    "decoder/blocks/feed_forward_norm": "model.layers.{}.post_attention_layernorm",
    "decoder/blocks/feed_forward/gate": "model.layers.{}.mlp.gate_proj",
    "decoder/blocks/feed_forward/up": "model.layers.{}.mlp.up_proj",
    "decoder/blocks/feed_forward/down": "model.layers.{}.mlp.down_proj",
    "decoder/norm": "model.norm",
    "head/kernel": "lm_head.weight",
}
BARE = HeadConfig(kind="classifier", pooling="last", pooler=False)
"""Head of a bare body, a classifier without classes."""


def read_decoder(
    keys: Keys,
    name: str,
    names: Set[str],
    *,
    sizes: Mapping[str, Any],
    norm: NormConfig,
    feed_forward: FeedForwardConfig,
    attention: Mapping[str, Any],
    tied: bool = False,
    base: float = 10_000.0,
    scalings: tuple[str, ...] = SCALINGS,
) -> ModelConfig:
    """Read the keys that the decoders share, for class `name` and a file with these `names`.

    `sizes` has the defaults of keys with sizes; num_key_value_heads and head_dim may be left out.
    `attention` has further fields of AttentionConfig; `tied` and `base` are the defaults of
    tie_word_embeddings and rope_theta, `scalings` the supported types of rotary scaling.
    """
    heads = keys.get("num_attention_heads", sizes["num_attention_heads"])
    width = keys.get("hidden_size", sizes["hidden_size"])
    kv_heads = optional(keys, "num_key_value_heads", sizes.get("num_key_value_heads"))
    head_dim = optional(keys, "head_dim", sizes.get("head_dim"))
    longest = sizes["max_position_embeddings"]
    is_bare = name.endswith("Model")
    is_tied = keys.get("tie_word_embeddings", tied) and "lm_head.weight" not in names
    return ModelConfig(
        architecture="decoder_only",
        vocab_size=keys.get("vocab_size", sizes["vocab_size"]),
        width=width,
        layers=keys.get("num_hidden_layers", sizes["num_hidden_layers"]),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=None if kv_heads == heads else kv_heads,
            head_dim=None if (head_dim or 0) * heads == width else head_dim,
            dropout=keys.get("attention_dropout", 0.0),
            **attention,
        ),
        feed_forward=feed_forward,
        norm=norm,
        positions=PositionConfig(
            kind="rotary",
            max_length=keys.get("max_position_embeddings", longest),
            rotary=read_rotary(keys, longest, base, scalings),
        ),
        head=BARE if is_bare else HeadConfig(),
        dropout=0.0,
        tie_embeddings=is_bare or is_tied,
        scale_embeddings=False,
        init="normal",
    )


def optional(keys: Keys, key: str, default: int | None) -> int | None:
    """Return a whole number; None where the value is null, `default` where the key is missing."""
    return default if key not in keys.values else keys.optional(key, int)


def gated(keys: Keys, width: int, activation: str = "silu", bias: bool = False) -> Any:
    """Read the gated feed-forward layer; `width` and `activation` are defaults."""
    return FeedForwardConfig(
        width=keys.get("intermediate_size", width),
        activation=keys.activation("hidden_act", activation),
        gated=True,
        bias=bias,
    )


def rms_norm(keys: Keys, epsilon: float = 1e-6) -> NormConfig:
    """Read an RMSNorm before each sublayer; `epsilon` is the default."""
    return NormConfig(kind="rmsnorm", position="pre", epsilon=keys.get("rms_norm_eps", epsilon))


def window(keys: Keys, default: int | None) -> int | None:
    """Read sliding_window, the number of visible tokens, as our window, which excludes a token."""
    size = optional(keys, "sliding_window", default)
    if size is not None and size < 1:
        raise keys.unsupported("sliding_window", size, "positive numbers")
    return None if size is None else size - 1


def sliding_window(config: ModelConfig) -> int | None:
    """Return the value of sliding_window for the window of a config."""
    return None if config.attention.window is None else config.attention.window + 1


def activation_name(config: ModelConfig) -> str:
    """Return the name of the activation; gelu_tanh has the name that these decoders use."""
    name = config.feed_forward.activation
    return "gelu_pytorch_tanh" if name == "gelu_tanh" else ACTIVATION_NAMES[name]


def decoder_values(config: ModelConfig, prefix: str) -> dict[str, Any]:
    """Return the values of config.json that the decoders share.

    The names of the classes are {prefix}Model and {prefix}ForCausalLM.
    """
    is_body = config.head.kind == "classifier" and config.head.outputs is None
    return {
        "architectures": [f"{prefix}{'Model' if is_body else 'ForCausalLM'}"],
        "vocab_size": vocab_size(config),
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.attention.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.feed_forward.width,
        "hidden_act": activation_name(config),
        "rms_norm_eps": config.norm.epsilon,
        "max_position_embeddings": config.positions.max_length,
        **rotary_values(config.positions.rotary),
        "attention_dropout": config.attention.dropout,
        "tie_word_embeddings": config.tie_embeddings and not is_body,
    }


KEYS_OF_FIELDS = {
    "model.vocab_size": "vocab_size",
    "model.width": "hidden_size",
    "model.layers": "num_hidden_layers",
    "model.attention.head_dim": "head_dim",
    "attention.heads": "num_attention_heads",
    "attention.kv_heads": "num_key_value_heads",
    "attention.head_dim": "head_dim",
    "attention.dropout": "attention_dropout",
    "feed_forward.width": "intermediate_size",
    "norm.epsilon": "rms_norm_eps",
    "positions.max_length": "max_position_embeddings",
    "positions.rotary.base": "rope_theta",
    "positions.rotary.factor": "factor",
    "positions.rotary.low_frequency_factor": "low_freq_factor",
    "low_frequency_factor": "low_freq_factor",
    "positions.rotary.high_frequency_factor": "high_freq_factor",
    "positions.rotary.original_length": "original_max_position_embeddings",
}


def decoder_family(model_type: str, prefix: str, **fields: Any) -> Family:
    """Return a family with LLaMA's names of tensors, where `fields` do not say otherwise."""
    common = Family(
        model_type=model_type,
        architecture="decoder_only",
        classes=(f"{prefix}ForCausalLM", f"{prefix}Model"),
        from_hf=fields["from_hf"],
        to_hf=fields["to_hf"],
        table=lambda config: TABLE,
        body_prefix="model.",
        body_modules=("embed_tokens", "layers", "norm"),
        keys_of_fields=KEYS_OF_FIELDS,
        unprefixed=(f"{prefix}Model",),
        tied={"model.embed_tokens.weight": ("lm_head.weight",)},
        ties_output=False,
        buffers={r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": are_frequencies},
        special_ids=("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    return replace(common, **fields)
