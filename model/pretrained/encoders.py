"""The parts that BERT and its descendants share: keys, names of tensors, and classes."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Literal

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

BODY = {
    "embedding": "embeddings.word_embeddings",
    "inputs/positions": "embeddings.position_embeddings",
    "inputs/types": "embeddings.token_type_embeddings.weight",
    "inputs/norm": "embeddings.LayerNorm",
}
BLOCK = {
    "self_attention/query": "attention.self.query",
    "self_attention/key": "attention.self.key",
    "self_attention/value": "attention.self.value",
    "self_attention/out": "attention.output.dense",
    "self_attention_norm": "attention.output.LayerNorm",
    "feed_forward/up": "intermediate.dense",
    "feed_forward/down": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
"""BERT's names of our modules outside and inside of a block, below the module of the body."""

KEYS: dict[str, tuple[str, Any]] = {
    "model.vocab_size": ("vocab_size", 30522),
    "model.width": ("hidden_size", 768),
    "model.layers": ("num_hidden_layers", 12),
    "model.type_vocab_size": ("type_vocab_size", 2),
    "model.dropout": ("hidden_dropout_prob", 0.1),
    "attention.heads": ("num_attention_heads", 12),
    "attention.dropout": ("attention_probs_dropout_prob", 0.1),
    "feed_forward.width": ("intermediate_size", 3072),
    "feed_forward.activation": ("hidden_act", "gelu"),
    "norm.epsilon": ("layer_norm_eps", 1e-12),
    "positions.max_length": ("max_position_embeddings", 512),
}
"""{our field: (BERT's key, its default)}."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A family of encoders, as far as it differs from BERT."""

    model_type: str
    name: str
    """First part of the names of classes: Bert."""
    body: str
    """Module of the body."""
    classes: Mapping[str, Literal["body", "language_model", "classifier"]]
    """{last part of the name of a class: its head}. Exports use the first name of each head."""
    language_model: Mapping[str, str]
    classifier: Mapping[str, str]
    """Names of the modules of the two heads."""
    pooler: str | None = None
    """Name of the pooler in files of the bare body; None: the body has no pooler."""
    inputs: Mapping[str, str] = field(default_factory=lambda: BODY)
    block: Mapping[str, str] = field(default_factory=lambda: BLOCK)
    layer: str = "encoder.layer.{}"
    """Names of the modules of the body."""
    keys: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    """Keys and defaults other than BERT's; a key "" is missing, and its value is the default."""
    classifier_dropout: tuple[str, float] | None = ("classifier_dropout", -1.0)
    """Key and default of the head's dropout rate; the default -1 and None: as in the body."""
    padding: int | None = None
    """Id of padding; the table of positions begins with padding + 1 rows that are never used."""
    head_activation: str | None = None
    """Activation of the language model's head; None: that of the blocks."""
    pooler_activation: Literal["tanh", "relu", "gelu"] = "tanh"

    def value(self, keys: Keys, name: str) -> Any:
        key, default = self.entry(name)
        return keys.get(key, default) if key else default

    @property
    def skipped(self) -> int:
        return 0 if self.padding is None else self.padding + 1

    def table(self, config: ModelConfig) -> dict[str, str]:
        """Return {path of our module or parameter: its name in the file}."""
        body = dict(self.inputs) | {
            f"encoder/blocks/{p}": f"{self.layer}.{n}" for p, n in self.block.items()
        }
        table = {path: f"{self.body}.{name}" for path, name in body.items()}
        if config.head.kind == "language_model":
            return table | dict(self.language_model)
        if config.head.outputs is not None:
            return table | dict(self.classifier)
        return table | ({"head/pooler": self.pooler} if self.pooler else {})

    def from_hf(self, keys: Keys, name: str, names: Set[str]) -> ModelConfig:
        """Translate the config of a checkpoint; `names` are the names of its tensors."""
        keys.only("is_decoder", False)
        keys.only("add_cross_attention", False)
        keys.only("position_embedding_type", "absolute")
        keys.only("tie_word_embeddings", True)
        if self.padding is not None:
            keys.only("pad_token_id", self.padding)
        value = lambda name: self.value(keys, name)  # noqa: E731
        width, dropout = value("model.width"), value("model.dropout")
        activation = keys.activation(*self.entry("feed_forward.activation"))
        return ModelConfig(
            architecture="encoder_only",
            vocab_size=value("model.vocab_size"),
            width=width,
            layers=value("model.layers"),
            attention=AttentionConfig(
                heads=value("attention.heads"), dropout=value("attention.dropout")
            ),
            feed_forward=FeedForwardConfig(
                width=value("feed_forward.width"), activation=activation
            ),
            norm=NormConfig(epsilon=value("norm.epsilon"), embeddings=True),
            positions=PositionConfig(
                kind="learned", max_length=value("positions.max_length") - self.skipped
            ),
            head=self.head(keys, name, names, dropout),
            type_vocab_size=value("model.type_vocab_size"),
            dropout=dropout,
            scale_embeddings=False,
            init="normal",
        )

    def head(self, keys: Keys, name: str, names: Set[str], dropout: float) -> HeadConfig:
        """Return the head of a class; the bare body is a classifier without classes."""
        rate = dropout
        if self.classifier_dropout is not None:  # Language models may have the key, unused.
            key, default = self.classifier_dropout
            rate = keys.optional(key, float)
            rate = (dropout if default < 0 else default) if rate is None else rate
        kind = self.classes[name.removeprefix(self.name)]
        if kind == "language_model":
            if self.head_activation is not None:
                keys.only(self.key("feed_forward.activation"), self.head_activation)
            return HeadConfig(transform=True, bias=True)
        is_body = kind == "body"
        has_pooler = not is_body or (self.pooler is not None and f"{self.pooler}.weight" in names)
        return HeadConfig(
            kind="classifier",
            outputs=None if is_body else keys.outputs(),
            pooler=has_pooler,
            pooler_activation=self.pooler_activation if has_pooler and not is_body else "tanh",
            dropout=rate,
        )

    def entry(self, name: str) -> tuple[str, Any]:
        """Return key and default of one of our fields."""
        return self.keys.get(name, KEYS[name])

    def key(self, name: str) -> str:
        return self.entry(name)[0]

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Translate a config to the config.json of a checkpoint."""
        head, kind = config.head, config.head.kind
        if kind == "classifier" and head.outputs is None:
            kind = "body"
        require(
            kind == "language_model" or head.pooler or not (self.pooler or kind == "classifier"),
            f"model.head.pooler = False cannot be exported, because a {self.model_type} classifier "
            "has a pooler: train a model with model.head.pooler True",
        )
        last = next(name for name, head in self.classes.items() if head == kind)
        labels = default_labels(head.outputs or 0) if kind == "classifier" else []
        values = {
            "model.vocab_size": vocab_size(config),
            "model.width": config.width,
            "model.layers": config.layers,
            "model.type_vocab_size": max(config.type_vocab_size, 1),
            "model.dropout": config.dropout,
            "attention.heads": config.attention.heads,
            "attention.dropout": config.attention.dropout,
            "feed_forward.width": config.feed_forward.width,
            "feed_forward.activation": ACTIVATION_NAMES[config.feed_forward.activation],
            "norm.epsilon": config.norm.epsilon,
            "positions.max_length": config.positions.max_length + self.skipped,
        }
        named = {self.key(name): value for name, value in values.items() if self.key(name)}
        if self.classifier_dropout is not None:
            key, default = self.classifier_dropout
            missing = None if default < 0 else default
            named[key] = head.dropout if head.kind == "classifier" else missing
        if self.padding is not None:
            named["pad_token_id"] = self.padding
        named_labels = label_values(labels) if labels else {}
        return {"architectures": [self.name + last], **named, **named_labels}

    def family(self, **more: Any) -> Family:
        """Return the family; `more` are fields of Family."""
        fields = {name: self.key(name) for name in KEYS if self.key(name)}
        dropout = self.classifier_dropout[0] if self.classifier_dropout else fields["model.dropout"]
        fixed = {} if self.padding is None else {"pad_token_id": self.padding}
        values: dict[str, Any] = {
            "model_type": self.model_type,
            "architecture": "encoder_only",
            "classes": tuple(self.name + last for last in self.classes),
            "from_hf": self.from_hf,
            "to_hf": self.to_hf,
            "table": self.table,
            "body_prefix": f"{self.body}.",
            "body_modules": ("embeddings", self.layer.split(".")[0], "pooler"),
            "keys_of_fields": fields | {"head.outputs": "num_labels", "head.dropout": dropout},
            "unprefixed": tuple(
                self.name + n for n, kind in self.classes.items() if kind == "body"
            ),
            "buffers": {rf"{self.body}\.embeddings\.position_ids": is_range},
            "unused": rf"{self.body}\.pooler\..*",
            "special_ids": ("pad_token_id",) if self.padding is None else (),
            "fixed_ids": fixed,
            "skipped_rows": {"inputs/positions/table": self.skipped} if self.skipped else {},
        }
        return Family(**values | more)
