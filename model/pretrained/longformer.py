"""Longformer (arXiv:2004.05150): masked language model, classifier, or the bare encoder.

In transformers, each call chooses its global tokens. Here, the first tokens of each row are global;
the key "global_tokens" of config.json gives their number, by default one, as in the classifier of
transformers.
"""

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

PADDING = 1  # Id of the padding token; the position table begins with PADDING + 1 unused rows.

BODY = {
    "embedding": "longformer.embeddings.word_embeddings",
    "inputs/positions": "longformer.embeddings.position_embeddings",
    "inputs/types": "longformer.embeddings.token_type_embeddings.weight",
    "inputs/norm": "longformer.embeddings.LayerNorm",
    **{
        f"encoder/blocks/{path}": f"longformer.encoder.layer.{{}}.{name}"
        for path, name in {
            "self_attention/query": "attention.self.query",
            "self_attention/key": "attention.self.key",
            "self_attention/value": "attention.self.value",
            "self_attention/global_query": "attention.self.query_global",
            "self_attention/global_key": "attention.self.key_global",
            "self_attention/global_value": "attention.self.value_global",
            "self_attention/out": "attention.output.dense",
            "self_attention_norm": "attention.output.LayerNorm",
            "feed_forward/up": "intermediate.dense",
            "feed_forward/down": "output.dense",
            "feed_forward_norm": "output.LayerNorm",
        }.items()
    },
}
LANGUAGE_MODEL = {
    "head/transform": "lm_head.dense",
    "head/norm": "lm_head.layer_norm",
    "head/bias": "lm_head.bias",
}
CLASSIFIER = {"head/pooler": "classifier.dense", "head/classes": "classifier.out_proj"}
POOLER = {"head/pooler": "longformer.pooler.dense"}


def table(config: ModelConfig) -> dict[str, str]:
    """Return {path of our module or parameter: its name in the file}."""
    if config.head.kind == "language_model":
        return BODY | LANGUAGE_MODEL
    return BODY | (POOLER if config.head.outputs is None else CLASSIFIER)


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of a Longformer checkpoint; `names` are the names of its tensors."""
    keys.only("pad_token_id", PADDING)
    keys.only("tie_word_embeddings", True)
    keys.only("attention_mode", "longformer")
    keys.only("ignore_attention_mask", False)
    dropout = keys.get("hidden_dropout_prob", 0.1)
    activation = keys.activation("hidden_act", "gelu")
    if name == "LongformerForMaskedLM":
        keys.only("hidden_act", "gelu")  # The head uses gelu with any hidden_act.
        head = HeadConfig(transform=True, bias=True)
    else:
        is_body = name == "LongformerModel"
        head = HeadConfig(
            kind="classifier",
            outputs=None if is_body else keys.outputs(),
            pooler=not is_body or "longformer.pooler.dense.weight" in names,
            dropout=dropout,
        )
    return ModelConfig(
        architecture="encoder_only",
        vocab_size=keys.get("vocab_size", 30522),
        width=keys.get("hidden_size", 768),
        layers=keys.get("num_hidden_layers", 12),
        attention=AttentionConfig(
            core="longformer",
            window=_window(keys),
            global_tokens=keys.get("global_tokens", 1),
            global_projections=True,
            heads=keys.get("num_attention_heads", 12),
            dropout=keys.get("attention_probs_dropout_prob", 0.1),
        ),
        feed_forward=FeedForwardConfig(
            width=keys.get("intermediate_size", 3072), activation=activation
        ),
        norm=NormConfig(epsilon=keys.get("layer_norm_eps", 1e-12), embeddings=True),
        positions=PositionConfig(
            kind="learned", max_length=keys.get("max_position_embeddings", 512) - PADDING - 1
        ),
        head=head,
        type_vocab_size=keys.get("type_vocab_size", 2),
        dropout=dropout,
        scale_embeddings=False,
        init="normal",
    )


def _window(keys: Keys) -> int:
    """Return the number of positions on each side; attention_window counts both sides."""
    value = keys.value("attention_window", 512)
    windows = value if isinstance(value, list) else [value]
    if len(set(windows)) != 1 or not isinstance(windows[0], int) or windows[0] % 2:
        raise keys.unsupported("attention_window", value, "one even number for all layers")
    return windows[0] // 2


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of a Longformer checkpoint."""
    head, attention = config.head, config.attention
    if head.kind == "language_model":
        name = "LongformerForMaskedLM"
    else:
        require(
            head.pooler,
            "model.head.pooler = False cannot be exported, because a Longformer classifier has a "
            "pooler: train a model with model.head.pooler True",
        )
        name = "LongformerModel" if head.outputs is None else "LongformerForSequenceClassification"
    labels = default_labels(head.outputs or 0) if head.kind == "classifier" else []
    return {
        "architectures": [name],
        "vocab_size": vocab_size(config),
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": attention.heads,
        "attention_window": [2 * (attention.window or 256)] * config.layers,
        "global_tokens": attention.global_tokens,
        "intermediate_size": config.feed_forward.width,
        "hidden_act": ACTIVATION_NAMES[config.feed_forward.activation],
        "max_position_embeddings": config.positions.max_length + PADDING + 1,
        "type_vocab_size": max(config.type_vocab_size, 1),
        "layer_norm_eps": config.norm.epsilon,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": attention.dropout,
        "pad_token_id": PADDING,
        **(label_values(labels) if labels else {}),
    }


LONGFORMER = Family(
    model_type="longformer",
    architecture="encoder_only",
    classes=("LongformerModel", "LongformerForMaskedLM", "LongformerForSequenceClassification"),
    from_hf=from_hf,
    to_hf=to_hf,
    table=table,
    body_prefix="longformer.",
    body_modules=("embeddings", "encoder", "pooler"),
    ignored_keys=frozenset({"is_causal", "onnx_export"}),
    keys_of_fields={
        "model.vocab_size": "vocab_size",
        "model.width": "hidden_size",
        "model.layers": "num_hidden_layers",
        "model.type_vocab_size": "type_vocab_size",
        "model.dropout": "hidden_dropout_prob",
        "attention.heads": "num_attention_heads",
        "attention.dropout": "attention_probs_dropout_prob",
        "attention.window": "attention_window",
        "attention.global_tokens": "global_tokens",
        "feed_forward.width": "intermediate_size",
        "norm.epsilon": "layer_norm_eps",
        "positions.max_length": "max_position_embeddings",
        "head.outputs": "num_labels",
        "head.dropout": "hidden_dropout_prob",
    },
    unprefixed=("LongformerModel",),
    skipped_rows={"inputs/positions/table": PADDING + 1},
    tied={
        "longformer.embeddings.word_embeddings.weight": ("lm_head.decoder.weight",),
        "lm_head.bias": ("lm_head.decoder.bias",),
    },
    buffers={r"longformer\.embeddings\.position_ids": is_range},
    unused=r"longformer\.pooler\..*",
    fixed_ids={"pad_token_id": PADDING},
)
