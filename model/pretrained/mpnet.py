"""MPNet (arXiv:2004.09297): learned positions and a relative bias, without token types."""

from collections.abc import Set
from dataclasses import replace
from typing import Any

from heedful.model.config import ModelConfig, PositionConfig
from heedful.model.pretrained.encoders import BODY, Encoder
from heedful.model.pretrained.keys import Keys
from heedful.model.pretrained.roberta import ROBERTA_ENCODER, roberta_family

BUCKETS = 32  # The code of transformers has this number, whatever config.json says.

ENCODER: Encoder = replace(
    ROBERTA_ENCODER,
    model_type="mpnet",
    name="MPNet",
    body="mpnet",
    pooler="mpnet.pooler.dense",
    inputs={
        **{path: name for path, name in BODY.items() if path != "inputs/types"},
        "encoder/relative_bias": "encoder.relative_attention_bias",
    },
    block={
        "self_attention/query": "attention.attn.q",
        "self_attention/key": "attention.attn.k",
        "self_attention/value": "attention.attn.v",
        "self_attention/out": "attention.attn.o",
        "self_attention_norm": "attention.LayerNorm",
        "feed_forward/up": "intermediate.dense",
        "feed_forward/down": "output.dense",
        "feed_forward_norm": "output.LayerNorm",
    },
    keys={"model.vocab_size": ("vocab_size", 30527), "model.type_vocab_size": ("", 0)},
    classifier_dropout=None,
)


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of an MPNet checkpoint; `names` are the names of its tensors."""
    keys.only("relative_attention_num_buckets", BUCKETS)
    config = ENCODER.from_hf(keys, name, names)
    positions = PositionConfig(
        kind="relative", learned=True, buckets=BUCKETS, max_length=config.positions.max_length
    )
    return replace(config, positions=positions)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of an MPNet checkpoint."""
    return ENCODER.to_hf(config) | {"relative_attention_num_buckets": BUCKETS}


MPNET = roberta_family(ENCODER, from_hf=from_hf, to_hf=to_hf)
