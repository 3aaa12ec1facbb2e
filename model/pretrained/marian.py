"""Marian (arXiv:1804.00344): the original Transformer, for translation."""

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
)
from heedful.model.positions import sinusoids
from heedful.model.pretrained.family import Family, is_close, vocab_size
from heedful.model.pretrained.keys import ACTIVATION_NAMES, Keys

ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


def _table() -> dict[str, str]:
    table = {"embedding": "model.shared", "head/bias": "final_logits_bias"}
    for stack in ("encoder", "decoder"):
        block, layer = f"{stack}/blocks", f"model.{stack}.layers.{{}}"
        sublayers = {"self_attention": "self_attn"}
        if stack == "decoder":
            sublayers["cross_attention"] = "encoder_attn"
        for sublayer, module in sublayers.items():
            for name, projection in ATTENTION.items():
                table[f"{block}/{sublayer}/{name}"] = f"{layer}.{module}.{projection}"
            table[f"{block}/{sublayer}_norm"] = f"{layer}.{module}_layer_norm"
        table[f"{block}/feed_forward/up"] = f"{layer}.fc1"
        table[f"{block}/feed_forward/down"] = f"{layer}.fc2"
        table[f"{block}/feed_forward_norm"] = f"{layer}.final_layer_norm"
    return table


TABLE = _table()


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of a Marian checkpoint; `names` are the names of its tensors."""
    for key in ("normalize_before", "normalize_embedding", "add_final_layer_norm", "is_decoder"):
        keys.only(key, False)
    for key in ("static_position_embeddings", "share_encoder_decoder_embeddings"):
        keys.only(key, True)
    keys.only("tie_word_embeddings", True)
    keys.only("is_encoder_decoder", True)
    keys.only("do_blenderbot_90_layernorm", False)
    for key in ("encoder_layerdrop", "decoder_layerdrop"):
        keys.only(key, 0.0)
    vocabulary = keys.get("vocab_size", 58101)
    if keys.optional("decoder_vocab_size", int) is not None:
        keys.same("decoder_vocab_size", "vocab_size", vocabulary)
    # Blocks of the encoder and of the decoder must be equal.
    heads = keys.same("encoder_attention_heads", "decoder_attention_heads", 16)
    inner = keys.same("encoder_ffn_dim", "decoder_ffn_dim", 4096)
    layers, encoder_layers = keys.get("decoder_layers", 12), keys.get("encoder_layers", 12)
    return ModelConfig(
        architecture="encoder_decoder",
        vocab_size=vocabulary,
        width=keys.get("d_model", 1024),
        layers=layers,
        encoder_layers=None if encoder_layers == layers else encoder_layers,
        attention=AttentionConfig(heads=heads, dropout=keys.get("attention_dropout", 0.0)),
        feed_forward=FeedForwardConfig(
            width=inner,
            activation=keys.activation("activation_function", "gelu"),
            dropout=keys.get("activation_dropout", 0.0),
        ),
        norm=NormConfig(epsilon=1e-5),  # The default of torch; no key changes it.
        positions=PositionConfig(
            kind="sinusoidal", max_length=keys.get("max_position_embeddings", 1024)
        ),
        head=HeadConfig(bias="final_logits_bias" in names),
        dropout=keys.get("dropout", 0.1),
        scale_embeddings=keys.get("scale_embedding", False),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of a Marian checkpoint."""
    heads, inner = config.attention.heads, config.feed_forward.width
    return {
        "architectures": ["MarianMTModel"],
        "is_encoder_decoder": True,
        "vocab_size": vocab_size(config),
        "decoder_vocab_size": vocab_size(config),
        "d_model": config.width,
        "encoder_layers": config.encoder_layers or config.layers,
        "decoder_layers": config.layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": inner,
        "decoder_ffn_dim": inner,
        "activation_function": ACTIVATION_NAMES[config.feed_forward.activation],
        "max_position_embeddings": config.positions.max_length,
        "scale_embedding": config.scale_embeddings,
        "static_position_embeddings": True,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
        "dropout": config.dropout,
        "attention_dropout": config.attention.dropout,
        "activation_dropout": config.feed_forward.dropout,
    }


def _are_sinusoids(values: np.ndarray, config: ModelConfig) -> bool:
    positions = np.arange(config.positions.max_length)
    return is_close(values, sinusoids(positions, config.width))


MARIAN = Family(
    model_type="marian",
    architecture="encoder_decoder",
    classes=("MarianMTModel", "MarianModel"),
    from_hf=from_hf,
    to_hf=to_hf,
    table=lambda config: TABLE,
    body_prefix="model.",
    body_modules=("shared", "encoder", "decoder"),
    aliases={
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    },
    ignored_keys=frozenset(
        {
            "add_bias_logits",
            "classif_dropout",
            "classifier_dropout",
            "extra_pos_embeddings",
            "save_step",
        }
    ),
    keys_of_fields={
        "model.vocab_size": "vocab_size",
        "model.width": "d_model",
        "model.layers": "decoder_layers",
        "model.encoder_layers": "encoder_layers",
        "model.dropout": "dropout",
        "attention.heads": "decoder_attention_heads",
        "attention.dropout": "attention_dropout",
        "feed_forward.width": "decoder_ffn_dim",
        "feed_forward.dropout": "activation_dropout",
        "norm.epsilon": "layer_norm_epsilon",
        "positions.max_length": "max_position_embeddings",
    },
    tied={
        "model.shared.weight": (
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "lm_head.weight",
        )
    },
    buffers={r"model\.(en|de)coder\.embed_positions\.weight": _are_sinusoids},
    special_ids=(
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "decoder_start_token_id",
        "forced_eos_token_id",
    ),
    required_ids=("decoder_start_token_id",),
)
