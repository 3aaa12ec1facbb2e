"""RoBERTa (arXiv:1907.11692), and XLM-RoBERTa (arXiv:1911.02116), which has its own names only."""

from dataclasses import replace

from heedful.model.pretrained.encoders import Encoder
from heedful.model.pretrained.family import Family

PADDING = 1

ROBERTA_ENCODER = Encoder(
    model_type="roberta",
    name="Roberta",
    body="roberta",
    classes={
        "Model": "body",
        "ForMaskedLM": "language_model",
        "ForSequenceClassification": "classifier",
    },
    language_model={
        "head/transform": "lm_head.dense",
        "head/norm": "lm_head.layer_norm",
        "head/bias": "lm_head.bias",
    },
    classifier={"head/pooler": "classifier.dense", "head/classes": "classifier.out_proj"},
    pooler="roberta.pooler.dense",
    keys={"model.vocab_size": ("vocab_size", 50265)},
    padding=PADDING,
    head_activation="gelu",
)


def roberta_family(encoder: Encoder, **more) -> Family:
    """Return a family with the head of RoBERTa's masked language model."""
    return encoder.family(
        tied={
            f"{encoder.body}.embeddings.word_embeddings.weight": ("lm_head.decoder.weight",),
            "lm_head.bias": ("lm_head.decoder.bias",),
        },
        **more,
    )


ROBERTA = roberta_family(ROBERTA_ENCODER, ignored_keys=frozenset({"is_causal"}))
XLM_ROBERTA = roberta_family(
    replace(
        ROBERTA_ENCODER,
        model_type="xlm-roberta",
        name="XLMRoberta",
        keys={},
    ),
    ignored_keys=frozenset({"is_causal"}),
)
