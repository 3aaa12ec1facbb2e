"""BERT (arXiv:1810.04805): masked language model, classifier, or the bare encoder."""

from collections.abc import Set
from typing import Any

from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
    require,
)
from heedful.model.pretrained.family import (
    Family,
    default_labels,
    is_range,
    label_values,
    vocab_size,
)
from heedful.model.pretrained.keys import ACTIVATION_NAMES, Keys

TABLE = {
    "embedding": "bert.embeddings.word_embeddings",
    "inputs/positions": "bert.embeddings.position_embeddings",
    "inputs/types": "bert.embeddings.token_type_embeddings.weight",
    "inputs/norm": "bert.embeddings.LayerNorm",
    "encoder/blocks/self_attention/query": "bert.encoder.layer.{}.attention.self.query",
    "encoder/blocks/self_attention/key": "bert.encoder.layer.{}.attention.self.key",
    "encoder/blocks/self_attention/value": "bert.encoder.layer.{}.attention.self.value",
    "encoder/blocks/self_attention/out": "bert.encoder.layer.{}.attention.output.dense",
    "encoder/blocks/self_attention_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
    "encoder/blocks/feed_forward/up": "bert.encoder.layer.{}.intermediate.dense",
    "encoder/blocks/feed_forward/down": "bert.encoder.layer.{}.output.dense",
    "encoder/blocks/feed_forward_norm": "bert.encoder.layer.{}.output.LayerNorm",
    "head/transform": "cls.predictions.transform.dense",
    "head/norm": "cls.predictions.transform.LayerNorm",
    "head/bias": "cls.predictions.bias",
    "head/pooler": "bert.pooler.dense",
    "head/classes": "classifier",
}


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of a BERT checkpoint; `names` are the names of its tensors."""
    keys.only("is_decoder", False)
    keys.only("add_cross_attention", False)
    keys.only("position_embedding_type", "absolute")
    keys.only("tie_word_embeddings", True)
    dropout = keys.get("hidden_dropout_prob", 0.1)
    rate = keys.optional("classifier_dropout", float)  # Language models may have it, unused.
    if name in ("BertForMaskedLM", "BertForPreTraining"):
        head = HeadConfig(transform=True, bias=True)
    else:
        # The bare body is a classifier without classes.
        head = HeadConfig(
            kind="classifier",
            outputs=None if name == "BertModel" else keys.outputs(),
            pooler=name != "BertModel" or "bert.pooler.dense.weight" in names,
            dropout=dropout if rate is None else rate,
        )
    return ModelConfig(
        architecture="encoder_only",
        vocab_size=keys.get("vocab_size", 30522),
        width=keys.get("hidden_size", 768),
        layers=keys.get("num_hidden_layers", 12),
        attention=AttentionConfig(
            heads=keys.get("num_attention_heads", 12),
            dropout=keys.get("attention_probs_dropout_prob", 0.1),
        ),
        feed_forward=FeedForwardConfig(
            width=keys.get("intermediate_size", 3072),
            activation=keys.activation("hidden_act", "gelu"),
        ),
        norm=NormConfig(epsilon=keys.get("layer_norm_eps", 1e-12), embeddings=True),
        positions=PositionConfig(
            kind="learned", max_length=keys.get("max_position_embeddings", 512)
        ),
        head=head,
        type_vocab_size=keys.get("type_vocab_size", 2),
        dropout=dropout,
        scale_embeddings=False,
        init="normal",
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of a BERT checkpoint."""
    head = config.head
    if head.kind == "language_model":
        name = "BertForMaskedLM"
    else:
        require(
            head.pooler,
            "model.head.pooler = False cannot be exported, because a BERT classifier has a pooler: "
            "train a model with model.head.pooler True",
        )
        name = "BertModel" if head.outputs is None else "BertForSequenceClassification"
    labels = default_labels(head.outputs or 0) if head.kind == "classifier" else []
    return {
        "architectures": [name],
        "vocab_size": vocab_size(config),
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.attention.heads,
        "intermediate_size": config.feed_forward.width,
        "hidden_act": ACTIVATION_NAMES[config.feed_forward.activation],
        "max_position_embeddings": config.positions.max_length,
        "type_vocab_size": max(config.type_vocab_size, 1),
        "layer_norm_eps": config.norm.epsilon,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention.dropout,
        "classifier_dropout": head.dropout if head.kind == "classifier" else None,
        **(label_values(labels) if labels else {}),
    }


BERT = Family(
    model_type="bert",
    architecture="encoder_only",
    classes=(
        "BertModel",
        "BertForMaskedLM",
        "BertForPreTraining",
        "BertForSequenceClassification",
    ),
    from_hf=from_hf,
    to_hf=to_hf,
    table=lambda config: TABLE,
    body_prefix="bert.",
    body_modules=("embeddings", "encoder", "pooler"),
    # Keys of TensorFlow's files and of sentence-transformers.
    ignored_keys=frozenset(
        {
            "directionality",
            "is_causal",
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
            "sbert_ce_default_activation_function",
            "sentence_transformers",
        }
    ),
    keys_of_fields={
        "model.vocab_size": "vocab_size",
        "model.width": "hidden_size",
        "model.layers": "num_hidden_layers",
        "model.type_vocab_size": "type_vocab_size",
        "model.dropout": "hidden_dropout_prob",
        "attention.heads": "num_attention_heads",
        "attention.dropout": "attention_probs_dropout_prob",
        "feed_forward.width": "intermediate_size",
        "norm.epsilon": "layer_norm_eps",
        "positions.max_length": "max_position_embeddings",
        "head.outputs": "num_labels",
        "head.dropout": "classifier_dropout",
    },
    unprefixed=("BertModel",),
    tied={
        "bert.embeddings.word_embeddings.weight": ("cls.predictions.decoder.weight",),
        "cls.predictions.bias": ("cls.predictions.decoder.bias",),
    },
    buffers={r"bert\.embeddings\.position_ids": is_range},
    unused=r"bert\.pooler\..*",
    special_ids=("pad_token_id",),
)
