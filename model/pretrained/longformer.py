"""Longformer (arXiv:2004.05150): masked language model, classifier, or the bare encoder.

In transformers, each call chooses its global tokens. Here, the first tokens of each row are global;
the key "global_tokens" of config.json gives their number, by default one, as in the classifier of
transformers.
"""

from collections.abc import Set
from dataclasses import replace
from typing import Any

from heedful.model.config import ModelConfig
from heedful.model.pretrained.encoders import BLOCK, KEYS
from heedful.model.pretrained.keys import Keys
from heedful.model.pretrained.roberta import ROBERTA_ENCODER, roberta_family

ENCODER = replace(
    ROBERTA_ENCODER,
    model_type="longformer",
    name="Longformer",
    body="longformer",
    pooler="longformer.pooler.dense",
    keys={},
    classifier_dropout=None,
    block=BLOCK
    | {
        f"self_attention/global_{name}": f"attention.self.{name}_global"
        for name in ("query", "key", "value")
    },
)


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of a Longformer checkpoint; `names` are the names of its tensors."""
    keys.only("attention_mode", "longformer")
    keys.only("ignore_attention_mask", False)
    config = ENCODER.from_hf(keys, name, names)
    attention = replace(
        config.attention,
        core="longformer",
        window=_window(keys),
        global_tokens=keys.get("global_tokens", 1),
        global_projections=True,
    )
    return replace(config, attention=attention)


def _window(keys: Keys) -> int:
    """Return the number of positions on each side; attention_window counts both sides."""
    value = keys.value("attention_window", 512)
    windows = value if isinstance(value, list) else [value]
    if len(set(windows)) != 1 or not isinstance(windows[0], int) or windows[0] % 2:
        raise keys.unsupported("attention_window", value, "one even number for all layers")
    return windows[0] // 2


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of a Longformer checkpoint."""
    return ENCODER.to_hf(config) | {
        "attention_window": [2 * (config.attention.window or 256)] * config.layers,
        "global_tokens": config.attention.global_tokens,
    }


LONGFORMER = roberta_family(
    ENCODER,
    from_hf=from_hf,
    to_hf=to_hf,
    ignored_keys=frozenset({"is_causal", "onnx_export"}),
    keys_of_fields={
        **{name: key for name, (key, _) in KEYS.items()},
        "attention.window": "attention_window",
        "attention.global_tokens": "global_tokens",
        "head.outputs": "num_labels",
        "head.dropout": "hidden_dropout_prob",
    },
)
