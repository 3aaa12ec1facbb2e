"""LLaMA (arXiv:2302.13971), versions 1 to 3."""

from collections.abc import Set
from typing import Any

import numpy as np

from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
    RotaryConfig,
    require,
)
from heedful.model.positions import rotary_frequencies
from heedful.model.pretrained.family import Family, is_close, vocab_size
from heedful.model.pretrained.keys import ACTIVATION_NAMES, Keys

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


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of a LLaMA checkpoint; `names` are the names of its tensors."""
    heads, width = keys.get("num_attention_heads", 32), keys.get("hidden_size", 4096)
    layers, types = keys.get("num_hidden_layers", 32), keys.value("layer_types")
    is_full = isinstance(types, list) and all(x == "full_attention" for x in types)
    if types is not None and not (is_full and len(types) == layers):
        raise keys.unsupported("layer_types", types, f"full_attention for each of {layers} layers")
    keys.only("rope_interleaved", False)
    kv_heads, head_dim = (keys.optional(k, int) for k in ("num_key_value_heads", "head_dim"))
    # The bare body is a classifier without classes.
    is_bare = name == "LlamaModel"
    body = HeadConfig(kind="classifier", pooling="last", pooler=False)
    is_tied = keys.get("tie_word_embeddings", False) and "lm_head.weight" not in names
    return ModelConfig(
        architecture="decoder_only",
        vocab_size=keys.get("vocab_size", 32000),
        width=width,
        layers=layers,
        attention=AttentionConfig(
            heads=heads,
            kv_heads=None if kv_heads == heads else kv_heads,
            head_dim=None if (head_dim or 0) * heads == width else head_dim,
            bias=keys.get("attention_bias", False),
            dropout=keys.get("attention_dropout", 0.0),
        ),
        feed_forward=FeedForwardConfig(
            width=keys.get("intermediate_size", 11008),
            activation=keys.activation("hidden_act", "silu"),
            gated=True,
            bias=keys.get("mlp_bias", False),
        ),
        norm=NormConfig(kind="rmsnorm", position="pre", epsilon=keys.get("rms_norm_eps", 1e-6)),
        positions=PositionConfig(
            kind="rotary",
            max_length=keys.get("max_position_embeddings", 2048),
            rotary=_rotary(keys),
        ),
        head=body if is_bare else HeadConfig(),
        dropout=0.0,
        tie_embeddings=is_bare or is_tied,
        scale_embeddings=False,
        init="normal",
    )


SCALINGS = frozenset({"factor", "low_freq_factor", "high_freq_factor"})
"""Keys of rope_scaling that only some types of scaling have."""


def _rotary(keys: Keys) -> RotaryConfig:
    """Read `rope_theta` and `rope_scaling`, or `rope_parameters` (transformers 5)."""
    given = {key: keys.value(key) for key in ("rope_parameters", "rope_scaling")}
    key = "rope_scaling" if given["rope_scaling"] else "rope_parameters"
    values = given[key] or {}
    if not isinstance(values, dict):
        raise keys.unsupported(key, values, "an object")
    rope = Keys(values, f"{key} in {keys.name}")
    base = rope.get("rope_theta", keys.get("rope_theta", 10_000.0))
    for where in (keys, rope):
        where.only("partial_rotary_factor", 1.0)
    # As in transformers, the key outside of the object overrides the key in it.
    longest = keys.get("max_position_embeddings", 2048)
    length = rope.get("original_max_position_embeddings", longest)
    length = keys.get("original_max_position_embeddings", length)
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope.refuse_others(SCALINGS, {})
    if kind not in ("default", "linear", "llama3"):
        raise rope.unsupported("rope_type", kind, "default, linear or llama3")
    factor = 1.0 if kind == "default" else rope.required("factor", float)
    if factor == 1:  # No scaling.
        return RotaryConfig(base=base)
    if kind == "linear":
        return RotaryConfig(base=base, scaling="linear", factor=factor)
    return RotaryConfig(
        base=base,
        scaling="llama3",
        factor=factor,
        low_frequency_factor=rope.required("low_freq_factor", float),
        high_frequency_factor=rope.required("high_freq_factor", float),
        original_length=length,
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of a LLaMA checkpoint."""
    heads, rotary = config.attention.heads, config.positions.rotary
    require(
        config.width % heads == 0,
        f"model.attention.heads = {heads} cannot be exported: in transformers' LLaMA, the number "
        f"of heads must divide model.width = {config.width}; train a model with such sizes",
    )
    scaling: dict[str, Any] = {"rope_type": rotary.scaling, "factor": rotary.factor}
    if rotary.scaling == "llama3":
        scaling["low_freq_factor"] = rotary.low_frequency_factor
        scaling["high_freq_factor"] = rotary.high_frequency_factor
        scaling["original_max_position_embeddings"] = rotary.original_length
    is_body = config.head.kind == "classifier" and config.head.outputs is None
    return {
        "architectures": ["LlamaModel" if is_body else "LlamaForCausalLM"],
        "vocab_size": vocab_size(config),
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.feed_forward.width,
        "hidden_act": ACTIVATION_NAMES[config.feed_forward.activation],
        "attention_bias": config.attention.bias,
        "mlp_bias": config.feed_forward.bias,
        "rms_norm_eps": config.norm.epsilon,
        "max_position_embeddings": config.positions.max_length,
        # Versions of transformers before and after 5 read these two keys.
        "rope_theta": rotary.base,
        "rope_scaling": None if rotary.scaling == "none" else scaling,
        "attention_dropout": config.attention.dropout,
        "tie_word_embeddings": config.tie_embeddings and not is_body,
    }


def _are_frequencies(values: np.ndarray, config: ModelConfig) -> bool:
    """Return True for the rotary frequencies, scaled or (in older files) unscaled."""
    rotary = config.positions.rotary
    return any(
        is_close(values, rotary_frequencies(config.head_dim, each))
        for each in (rotary, RotaryConfig(base=rotary.base))
    )


LLAMA = Family(
    model_type="llama",
    architecture="decoder_only",
    classes=("LlamaForCausalLM", "LlamaModel"),
    from_hf=from_hf,
    to_hf=to_hf,
    table=lambda config: TABLE,
    body_prefix="model.",
    body_modules=("embed_tokens", "layers", "norm"),
    ignored_keys=frozenset(
        {
            "is_decoder",
            "max_sequence_length",
            "pretraining_tp",
            "unsloth_fixed",
            "unsloth_version",
        }
    ),
    keys_of_fields={
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
    },
    unprefixed=("LlamaModel",),
    tied={"model.embed_tokens.weight": ("lm_head.weight",)},
    ties_output=False,
    buffers={r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": _are_frequencies},
    special_ids=("bos_token_id", "eos_token_id", "pad_token_id"),
)
