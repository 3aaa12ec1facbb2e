"""ELECTRA (arXiv:2003.10555): generator, classifier, or the body of the discriminator.

The embeddings may be narrower than the body. The head that tells replaced tokens is left out.
"""

from collections.abc import Set
from dataclasses import replace
from typing import Any

from heedful.model.config import ModelConfig
from heedful.model.pretrained.encoders import BODY, Encoder
from heedful.model.pretrained.keys import Keys

ENCODER = Encoder(
    model_type="electra",
    name="Electra",
    body="electra",
    classes={
        "Model": "body",
        "ForPreTraining": "body",
        "ForMaskedLM": "language_model",
        "ForSequenceClassification": "classifier",
    },
    language_model={
        "head/transform": "generator_predictions.dense",
        "head/norm": "generator_predictions.LayerNorm",
        "head/bias": "generator_lm_head.bias",
    },
    classifier={"head/pooler": "classifier.dense", "head/classes": "classifier.out_proj"},
    inputs=BODY | {"inputs/projection": "embeddings_project"},
    keys={
        "model.width": ("hidden_size", 256),
        "attention.heads": ("num_attention_heads", 4),
        "feed_forward.width": ("intermediate_size", 1024),
    },
    head_activation="gelu",
    pooler_activation="gelu",
)


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of an ELECTRA checkpoint; `names` are the names of its tensors."""
    config, width = ENCODER.from_hf(keys, name, names), keys.get("embedding_size", 128)
    return replace(config, embedding_width=None if width == config.width else width)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of an ELECTRA checkpoint."""
    return ENCODER.to_hf(config) | {"embedding_size": config.input_width}


ELECTRA = ENCODER.family(
    from_hf=from_hf,
    to_hf=to_hf,
    body_modules=("embeddings", "embeddings_project", "encoder"),
    tied={"electra.embeddings.word_embeddings.weight": ("generator_lm_head.weight",)},
    # The keys of a head for multiple choice.
    ignored_keys=frozenset(
        {
            "is_causal",
            "summary_activation",
            "summary_first_dropout",
            "summary_last_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        }
    ),
)
