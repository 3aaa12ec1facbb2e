"""OPT (arXiv:2205.01068): learned positions, ReLU, biases."""

from collections.abc import Set
from typing import Any

from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
)
from heedful.model.pretrained.decoder import BARE, decoder_family
from heedful.model.pretrained.family import vocab_size
from heedful.model.pretrained.keys import ACTIVATION_NAMES, Keys

LAYER = "model.decoder.layers.{}"
TABLE = {
    "embedding": "model.decoder.embed_tokens",
    "inputs/positions": "model.decoder.embed_positions",
    "decoder/blocks/self_attention_norm": f"{LAYER}.self_attn_layer_norm",
    "decoder/blocks/self_attention/query": f"{LAYER}.self_attn.q_proj",
    "decoder/blocks/self_attention/key": f"{LAYER}.self_attn.k_proj",
    "decoder/blocks/self_attention/value": f"{LAYER}.self_attn.v_proj",
    "decoder/blocks/self_attention/out": f"{LAYER}.self_attn.out_proj",
    "decoder/blocks/feed_forward_norm": f"{LAYER}.final_layer_norm",
    "decoder/blocks/feed_forward/up": f"{LAYER}.fc1",
    "decoder/blocks/feed_forward/down": f"{LAYER}.fc2",
    "decoder/norm": "model.decoder.final_layer_norm",
    "head/kernel": "lm_head.weight",
}
SKIPPED_ROWS = 2
"""First rows of the position table, which transformers' OPT never looks up."""


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of an OPT checkpoint; `names` are the names of its tensors."""
    width, bias = keys.get("hidden_size", 768), keys.get("enable_bias", True)
    keys.only("word_embed_proj_dim", width, None)
    keys.only("_remove_final_layer_norm", False)
    keys.only("layer_norm_elementwise_affine", True)
    is_bare = name == "OPTModel"
    is_tied = keys.get("tie_word_embeddings", True) and "lm_head.weight" not in names
    return ModelConfig(
        architecture="decoder_only",
        vocab_size=keys.get("vocab_size", 50272),
        width=width,
        layers=keys.get("num_hidden_layers", 12),
        attention=AttentionConfig(
            heads=keys.get("num_attention_heads", 12),
            bias=bias,
            dropout=keys.get("attention_dropout", 0.0),
        ),
        feed_forward=FeedForwardConfig(
            width=keys.get("ffn_dim", 3072),
            activation=keys.activation("activation_function", "relu"),
            bias=bias,
        ),
        norm=NormConfig(
            position="pre" if keys.get("do_layer_norm_before", True) else "post", epsilon=1e-5
        ),
        positions=PositionConfig(
            kind="learned", max_length=keys.get("max_position_embeddings", 2048)
        ),
        head=BARE if is_bare else HeadConfig(),
        dropout=keys.get("dropout", 0.1),
        tie_embeddings=is_bare or is_tied,
        scale_embeddings=False,
        init="normal",
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of an OPT checkpoint."""
    is_body = config.head.kind == "classifier" and config.head.outputs is None
    return {
        "architectures": ["OPTModel" if is_body else "OPTForCausalLM"],
        "vocab_size": vocab_size(config),
        "hidden_size": config.width,
        "word_embed_proj_dim": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.attention.heads,
        "ffn_dim": config.feed_forward.width,
        "activation_function": ACTIVATION_NAMES[config.feed_forward.activation],
        "enable_bias": config.attention.bias,
        "do_layer_norm_before": config.norm.position == "pre",
        "max_position_embeddings": config.positions.max_length,
        "dropout": config.dropout,
        "attention_dropout": config.attention.dropout,
        "tie_word_embeddings": config.tie_embeddings and not is_body,
    }


OPT = decoder_family(
    "opt",
    "OPT",
    from_hf=from_hf,
    to_hf=to_hf,
    table=lambda config: TABLE,
    body_modules=("decoder",),
    skipped_rows={"inputs/positions/table": SKIPPED_ROWS},
    tied={"model.decoder.embed_tokens.weight": ("lm_head.weight",)},
    ties_output=True,
    buffers={},
    ignored_keys=frozenset({"activation_dropout", "layerdrop"}),
    keys_of_fields={
        "model.vocab_size": "vocab_size",
        "model.width": "hidden_size",
        "model.layers": "num_hidden_layers",
        "model.dropout": "dropout",
        "attention.heads": "num_attention_heads",
        "attention.dropout": "attention_dropout",
        "feed_forward.width": "ffn_dim",
        "positions.max_length": "max_position_embeddings",
    },
)
