"""Convert our config to a config.json of transformers, and back."""

from collections.abc import Iterator, Mapping, Set
from dataclasses import fields, is_dataclass, replace
from typing import Any

from heedful.model.attention import spec_of
from heedful.model.config import ModelConfig, ModelError
from heedful.model.pretrained.bert import BERT
from heedful.model.pretrained.distilbert import DISTILBERT
from heedful.model.pretrained.electra import ELECTRA
from heedful.model.pretrained.family import Family, vocab_size
from heedful.model.pretrained.gemma import GEMMA
from heedful.model.pretrained.gpt2 import GPT2
from heedful.model.pretrained.keys import Keys
from heedful.model.pretrained.layout import tensor_names
from heedful.model.pretrained.llama import LLAMA
from heedful.model.pretrained.longformer import LONGFORMER
from heedful.model.pretrained.marian import MARIAN
from heedful.model.pretrained.mistral import MISTRAL
from heedful.model.pretrained.mpnet import MPNET
from heedful.model.pretrained.opt import OPT
from heedful.model.pretrained.phi3 import PHI3
from heedful.model.pretrained.roberta import ROBERTA, XLM_ROBERTA
from heedful.model.pretrained.starcoder2 import STARCODER2
from heedful.model.pretrained.t5 import T5

ENCODERS = (BERT, ROBERTA, XLM_ROBERTA, DISTILBERT, MPNET, ELECTRA, LONGFORMER)
DECODERS = (GPT2, LLAMA, MISTRAL, STARCODER2, GEMMA, PHI3, OPT)
ENCODER_DECODERS = (T5, MARIAN)
FAMILIES = {family.model_type: family for family in (*ENCODERS, *DECODERS, *ENCODER_DECODERS)}


def family_of(keys: Keys) -> tuple[Family, str]:
    """Return the family and the name of the class that a config.json names."""
    keys.only("quantization_config", None)
    model_type = keys.values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise keys.unsupported("model_type", model_type, ", ".join(FAMILIES))
    family = FAMILIES[model_type]
    classes = keys.values.get("architectures")
    if not isinstance(classes, list) or len(classes) != 1 or classes[0] not in family.classes:
        raise keys.unsupported("architectures", classes, f"one of {', '.join(family.classes)}")
    return family, classes[0]


def config_from_hf(
    values: Mapping[str, Any], names: Set[str] = frozenset(), source: str = "config.json"
) -> ModelConfig:
    """Return our config for the values of a config.json.

    `names` are the names of the tensors in the file, which show if a head, a pooler or an output
    matrix exists. `source` is the name of config.json in errors. Raises ModelError, which names the
    key, its value and the supported values.
    """
    keys = Keys(values, source)
    family, name = family_of(keys)
    return family.config(keys, name, names)


def config_to_hf(config: ModelConfig, model_type: str = "") -> dict[str, Any]:
    """Return the values of a config.json that describe the model of `config`.

    The family `model_type` is preferred to others that can express the config. Dropout rates that
    have no key are left out. Raises ModelError if no family can express the config; the error names
    the first field that the nearest family cannot express.
    """
    if config.lora.rank:
        raise ModelError(
            f"model.lora.rank = {config.lora.rank} cannot be exported: call merge_lora first"
        )
    vocab_size(config)
    problems: list[tuple[int, str]] = []  # Number of fields that differ, and message.
    for family in sorted(FAMILIES.values(), key=lambda one: one.model_type != model_type):
        if family.architecture != config.architecture:
            continue
        try:
            values = {"model_type": family.model_type, **family.to_hf(config), "dtype": "float32"}
            keys = Keys(values)
            reread = family.from_hf(keys, family_of(keys)[1], tensor_names(family, config))
        except ModelError as error:
            problems.append((len(fields(config)), str(error)))
            continue
        differing = list(_differences(_function(config), _function(reread), "model"))
        if not differing:
            return values
        name, value, supported = differing[0]
        message = (
            f"{name} = {value} cannot be exported: {family.model_type} has {supported}; train a "
            "model with this value"
        )
        problems.append((len(differing), message))
    raise ModelError(min(problems)[1])


OF_RELATIVE = ("buckets", "max_distance")
"""Fields of `positions` that act with relative positions only."""


def _function(config: ModelConfig) -> ModelConfig:
    """Return the config with all fields that do not change the outputs set to their defaults.

    Two configs with the same result compute the same logits from the same parameters.
    """
    head, positions, rotary = config.head, config.positions, config.positions.rotary
    if rotary.scaling != "llama3":
        rotary = _reset(rotary, "low_frequency_factor", "high_frequency_factor", "original_length")
    unused = [] if positions.kind == "relative" else list(OF_RELATIVE)
    unused += [] if positions.has_table else ["max_length"]
    if head.kind == "language_model":
        head = _reset(head, "outputs", "pooling", "pooler", "pooler_activation", "dropout")
    else:
        head = _reset(head, "transform", "bias", "scale", "dropout")
        config = _reset(config, "tie_embeddings")
    attention, cores = config.attention, ("core", "decoder_core", "cross_core")
    exact = [name for name in cores if spec_of(getattr(attention, name) or "auto").is_exact]
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
        positions=replace(_reset(positions, *unused), rotary=rotary),
        head=head,
    )


def _reset(config: Any, *names: str) -> Any:
    """Return the config with these fields at their defaults."""
    default = type(config)()
    return replace(config, **{name: getattr(default, name) for name in names})


def _differences(one: Any, two: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value in `one`, value in `two`) of each field that differs."""
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if is_dataclass(a):
            yield from _differences(a, b, f"{name}.{field.name}")
        elif a != b:
            yield f"{name}.{field.name}", a, b
