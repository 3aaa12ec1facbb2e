"""GPT-2 (Radford et al. 2019): a language model."""

from collections.abc import Set
from typing import Any

import numpy as np

from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
)
from heedful.model.pretrained.family import Family, vocab_size
from heedful.model.pretrained.keys import ACTIVATION_NAMES, Keys

TABLE = {
    "embedding": "transformer.wte",
    "inputs/positions": "transformer.wpe",
    "decoder/blocks/self_attention_norm": "transformer.h.{}.ln_1",
    "decoder/blocks/self_attention/query": "transformer.h.{}.attn.c_attn",
    "decoder/blocks/self_attention/key": "transformer.h.{}.attn.c_attn",
    "decoder/blocks/self_attention/value": "transformer.h.{}.attn.c_attn",
    "decoder/blocks/self_attention/out": "transformer.h.{}.attn.c_proj",
    "decoder/blocks/feed_forward_norm": "transformer.h.{}.ln_2",
    "decoder/blocks/feed_forward/up": "transformer.h.{}.mlp.c_fc",
    "decoder/blocks/feed_forward/down": "transformer.h.{}.mlp.c_proj",
    "decoder/norm": "transformer.ln_f",
    "head/kernel": "lm_head.weight",
}


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of a GPT-2 checkpoint; `names` are the names of its tensors."""
    keys.only("add_cross_attention", False)
    keys.only("scale_attn_by_inverse_layer_idx", False)
    dropout = keys.same("embd_pdrop", "resid_pdrop", 0.1)
    width, inner = keys.get("n_embd", 768), keys.optional("n_inner", int)
    return ModelConfig(
        architecture="decoder_only",
        vocab_size=keys.get("vocab_size", 50257),
        width=width,
        layers=keys.get("n_layer", 12),
        attention=AttentionConfig(
            heads=keys.get("n_head", 12),
            scaled=keys.get("scale_attn_weights", True),
            dropout=keys.get("attn_pdrop", 0.1),
        ),
        feed_forward=FeedForwardConfig(
            width=4 * width if inner is None else inner,
            activation=keys.activation("activation_function", "gelu_new"),
        ),
        norm=NormConfig(position="pre", epsilon=keys.get("layer_norm_epsilon", 1e-5)),
        positions=PositionConfig(kind="learned", max_length=keys.get("n_positions", 1024)),
        dropout=dropout,
        tie_embeddings=keys.get("tie_word_embeddings", True) and "lm_head.weight" not in names,
        scale_embeddings=False,
        init="scaled_normal",
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of a GPT-2 checkpoint."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocab_size(config),
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.attention.heads,
        "n_inner": config.feed_forward.width,
        "n_positions": config.positions.max_length,
        "activation_function": ACTIVATION_NAMES[config.feed_forward.activation],
        "layer_norm_epsilon": config.norm.epsilon,
        "scale_attn_weights": config.attention.scaled,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention.dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _is_causal_mask(values: np.ndarray, config: ModelConfig) -> bool:
    length = values.shape[-1] if values.ndim else 0
    return np.array_equal(values, np.tril(np.ones((1, 1, length, length))))


def _is_minus_infinity(values: np.ndarray, config: ModelConfig) -> bool:
    return bool((values < -9_000).all())  # The first release has -1e4.


GPT2 = Family(
    model_type="gpt2",
    architecture="decoder_only",
    classes=("GPT2LMHeadModel", "GPT2Model"),
    from_hf=from_hf,
    to_hf=to_hf,
    table=lambda config: TABLE,
    body_prefix="transformer.",
    body_modules=("wte", "wpe", "h", "ln_f"),
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    ignored_keys=frozenset(
        {
            "is_decoder",
            "n_ctx",
            "reorder_and_upcast_attn",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        }
    ),
    keys_of_fields={
        "model.vocab_size": "vocab_size",
        "model.width": "n_embd",
        "model.layers": "n_layer",
        "model.dropout": "resid_pdrop",
        "attention.heads": "n_head",
        "attention.dropout": "attn_pdrop",
        "feed_forward.width": "n_inner",
        "norm.epsilon": "layer_norm_epsilon",
        "positions.max_length": "n_positions",
    },
    conv1d=True,
    tied={"transformer.wte.weight": ("lm_head.weight",)},
    buffers={
        r"transformer\.h\.\d+\.attn\.bias": _is_causal_mask,
        r"transformer\.h\.\d+\.attn\.masked_bias": _is_minus_infinity,
    },
    special_ids=("bos_token_id", "eos_token_id", "pad_token_id"),
)
