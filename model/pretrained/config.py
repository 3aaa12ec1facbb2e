"""Our config to a config.json of transformers, and back."""

from collections.abc import Iterator, Mapping, Set
from dataclasses import fields, is_dataclass, replace
from typing import Any

from heedful.model.attention import INEXACT
from heedful.model.config import ModelConfig, ModelError
from heedful.model.pretrained.architecture import HuggingFace, Keys, vocab_size
from heedful.model.pretrained.bert import BERT
from heedful.model.pretrained.gpt2 import GPT2
from heedful.model.pretrained.layout import tensor_names
from heedful.model.pretrained.llama import LLAMA
from heedful.model.pretrained.longformer import LONGFORMER
from heedful.model.pretrained.marian import MARIAN
from heedful.model.pretrained.t5 import T5

KNOWN = {kind.model_type: kind for kind in (BERT, LONGFORMER, GPT2, LLAMA, T5, MARIAN)}


def architecture_of(keys: Keys) -> tuple[HuggingFace, str]:
    """The architecture and the name of the class that a config.json names."""
    keys.only("quantization_config", None)
    model_type = keys.values.get("model_type")
    if not isinstance(model_type, str) or model_type not in KNOWN:
        raise keys.unsupported("model_type", model_type, ", ".join(KNOWN))
    kind = KNOWN[model_type]
    classes = keys.values.get("architectures")
    if not isinstance(classes, list) or len(classes) != 1 or classes[0] not in kind.classes:
        raise keys.unsupported("architectures", classes, f"one of {', '.join(kind.classes)}")
    return kind, classes[0]


def config_from_hf(
    values: Mapping[str, Any], names: Set[str] = frozenset(), source: str = "config.json"
) -> ModelConfig:
    """Our config for the values of a config.json and a file with tensors of these names.

    Raises ModelError naming the key, its value and what is supported.
    """
    keys = Keys(values, source)
    kind, name = architecture_of(keys)
    return kind.config(keys, name, names)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The values of a config.json for the architecture that `config` is.

    Rates of dropout that it has no key for are left out. Raises ModelError naming the first field
    that does not fit the nearest architecture.
    """
    if config.lora.rank:
        raise ModelError(
            f"model.lora.rank = {config.lora.rank} cannot be exported: merge_lora comes first"
        )
    vocab_size(config)
    near: list[tuple[int, str]] = []
    for kind in KNOWN.values():
        if kind.architecture != config.architecture:
            continue
        try:
            values = {"model_type": kind.model_type, **kind.to_hf(config), "dtype": "float32"}
            keys = Keys(values)
            back = kind.from_hf(keys, architecture_of(keys)[1], tensor_names(kind, config))
        except ModelError as error:
            near.append((len(fields(config)), str(error)))
            continue
        differing = list(_differences(_function(config), _function(back), "model"))
        if not differing:
            return values
        name, value, there = differing[0]
        message = f"{name} = {value} cannot be exported: {kind.model_type} has {there}"
        near.append((len(differing), message))
    raise ModelError(min(near)[1])


ACTS_IN = {"max_length": "learned", "buckets": "relative", "max_distance": "relative"}
"""Fields of `positions`, and the kind of positions that they are for."""


def _function(config: ModelConfig) -> ModelConfig:
    """The config without what does not change the function that the parameters make."""
    head, positions, rotary = config.head, config.positions, config.positions.rotary
    if rotary.scaling != "llama3":
        rotary = _reset(rotary, "low_frequency_factor", "high_frequency_factor", "original_length")
    idle = [name for name, kind in ACTS_IN.items() if positions.kind != kind]
    if head.kind == "language_model":
        head = _reset(head, "outputs", "pooling", "pooler", "dropout")
    else:
        head = _reset(head, "transform", "bias", "scale", "dropout")
        config = _reset(config, "tie_embeddings")
    attention, cores = config.attention, ("core", "decoder_core", "cross_core")
    exact = [name for name in cores if getattr(attention, name) not in INEXACT]
    same_layers = config.encoder_layers == config.layers
    return replace(
        _reset(config, "lora", "dropout", "init", "dtype", "remat", "unroll"),
        encoder_layers=None if same_layers else config.encoder_layers,
        attention=replace(
            _reset(attention, *exact, "dropout"),
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            key_dim=config.key_dim,
        ),
        feed_forward=_reset(config.feed_forward, "dropout"),
        norm=_reset(config.norm, *(["bias"] if config.norm.kind == "rmsnorm" else [])),
        positions=replace(_reset(positions, *idle), rotary=rotary),
        head=head,
    )


def _reset(config: Any, *names: str) -> Any:
    """The config with these fields at their defaults."""
    default = type(config)()
    return replace(config, **{name: getattr(default, name) for name in names})


def _differences(ours: Any, theirs: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Fields that differ, in the order of the config, with both values."""
    for field in fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if is_dataclass(a):
            yield from _differences(a, b, f"{name}.{field.name}")
        elif a != b:
            yield f"{name}.{field.name}", a, b
