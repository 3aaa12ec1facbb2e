"""Test each key of a config.json, changed alone.

A key has the same effect as in transformers, or is refused by its name, or is on the list of keys
without effect. The keys are those of the classes of transformers' configs, and those that the code
of transformers reads.
"""

import copy
import dataclasses
import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peer
import pytest
from decoders import CASES as DECODERS
from peer import (
    REAL,
    SOURCE,
    SOURCE_REAL,
    TYPES,
    V,
    array,
    randomised,
    tensors,
    torch,
    transformers,
)
from safetensors.numpy import save_file
from transformers import (
    cache_utils,
    configuration_utils,
    masking_utils,
    modeling_rope_utils,
    modeling_utils,
)

from heedful.model.config import ModelConfig, ModelError
from heedful.model.pretrained import read
from heedful.model.pretrained.config import FAMILIES, _function, config_from_hf
from heedful.model.pretrained.generation_keys import GENERATION_KEYS
from heedful.model.pretrained.ignored_keys import FIXED, IGNORED
from heedful.model.transformer import build

torch.set_num_threads(1)
TOKENS = np.where(REAL, np.maximum(peer.TOKENS, 2), 1)  # 1 is the padding of Longformer
SHARED = (cache_utils, configuration_utils, masking_utils, modeling_rope_utils, modeling_utils)
ENCODER = {
    "vocab_size": V,
    "hidden_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 5,
    "intermediate_size": 31,
    "max_position_embeddings": 17,
    "type_vocab_size": 3,
    "num_labels": 7,
}
DISTILBERT = {
    "vocab_size": V,
    "dim": 20,
    "n_layers": 1,
    "n_heads": 5,
    "hidden_dim": 31,
    "max_position_embeddings": 17,
    "num_labels": 7,
}
MODELS: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": ENCODER,
    "BertForSequenceClassification": ENCODER,
    "RobertaForMaskedLM": ENCODER | {"pad_token_id": 1},
    "RobertaForSequenceClassification": ENCODER | {"pad_token_id": 1},
    "DistilBertForMaskedLM": DISTILBERT,
    "DistilBertForSequenceClassification": DISTILBERT,
    "MPNetForMaskedLM": {key: value for key, value in ENCODER.items() if "type" not in key},
    "ElectraForMaskedLM": ENCODER | {"embedding_size": 8},
    "ElectraForSequenceClassification": ENCODER | {"embedding_size": 8},
    "LongformerForSequenceClassification": ENCODER | {"attention_window": 4},
    "GPT2LMHeadModel": {
        "vocab_size": V,
        "n_embd": 20,
        "n_head": 5,
        "n_layer": 1,
        "n_positions": 17,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "LlamaForCausalLM": {
        "vocab_size": V,
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 31,
        "max_position_embeddings": 30,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 50.0,
            "factor": 3.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 40,
        },
    },
    "T5ForConditionalGeneration": {
        "vocab_size": V,
        "d_model": 20,
        "d_kv": 4,
        "d_ff": 31,
        "num_heads": 5,
        "num_layers": 1,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 6,
        "decoder_start_token_id": 0,
    },
    "MarianMTModel": {
        "vocab_size": V,
        "d_model": 20,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 5,
        "decoder_attention_heads": 5,
        "encoder_ffn_dim": 31,
        "decoder_ffn_dim": 31,
        "activation_function": "swish",
        "max_position_embeddings": 17,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 2,
    },
}
"""The smallest models; sizes have common divisors, so that each size can change alone."""
MODELS |= {name: cases[0] for name, cases in DECODERS.items()}

CHANGED: dict[str, list[Any]] = {
    "compile_config": [None],  # transformers takes an object that JSON cannot hold.
    "activation_function": ["relu", "tanh"],
    "attention_window": [6, [4, 6]],
    "dense_act_fn": ["silu", "tanh"],
    "dtype": ["bfloat16"],
    "attn_implementation": ["eager"],
    "cache_implementation": ["static"],
    "experts_implementation": ["eager"],
    "feed_forward_proj": ["gelu", "gated-gelu", "gated-relu", "gated-gelu_new", "gated-tanh"],
    "hidden_act": ["relu", "tanh"],
    "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "label2id": [{"a": 0}],
    "is_causal": [False],
    "layer_types": [["full_attention"], ["sliding_attention"]],
    "num_labels": [3],
    "per_layer_config": [{"0": {"intermediate_size": 29}}],
    "problem_type": ["single_label_classification", "multi_label_classification", "regression"],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 70.0},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 40},
    ],
    "summary_activation": ["tanh"],
    "torch_dtype": ["bfloat16"],
    # These sizes remain divisible.
    "activation": ["relu", "tanh"],
    "d_model": [30],
    "dim": [30],
    "head_dim": [8],
    "hidden_size": [30],
    "n_embd": [30],
    "n_inner": [29],
    "num_attention_heads": [4],
    "num_key_value_heads": [3],
    "relative_attention_num_buckets": [4],
}
for heads in (
    "decoder_attention_heads",
    "encoder_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
):
    CHANGED[heads] = CHANGED["num_attention_heads"]
ROPE = MODELS["LlamaForCausalLM"]["rope_parameters"]
CHANGED["rope_scaling"] = CHANGED["rope_parameters"] + [
    ROPE | {key: 2 * value} for key, value in ROPE.items() if key != "rope_type"
]
for name in ("attn_implementation", "experts_implementation"):
    CHANGED[f"_{name}"] = CHANGED[name]


def config_class(name: str) -> Any:
    return getattr(transformers, name).config_class


@cache
def keys_of(name: str) -> list[str]:
    """Return keys of a model: of the class of its config, of its code, and of our lists."""
    cls = config_class(name)
    properties = [n for c in cls.__mro__ for n, x in vars(c).items() if isinstance(x, property)]
    found = {
        *cls().to_dict(),
        *(field.name for field in dataclasses.fields(cls)),
        *cls.attribute_map,
        *properties,
        *transformers.GenerationConfig._get_default_generation_params(),
        *lists(cls.model_type),
        *FIXED,
    }
    model = inspect.getmodule(getattr(transformers, name))
    for module in (inspect.getmodule(cls), model, *SHARED):
        source = inspect.getsource(module)  # type: ignore[arg-type]
        found |= set(re.findall(r'(?:get|has)attr\((?:\w+\.)?(?:\w*config|self), "(\w+)"', source))
    for module in (configuration_utils, modeling_rope_utils):
        found |= set(re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', inspect.getsource(module)))
    found |= set(re.findall(r"\bconfig\.(\w+)", inspect.getsource(model)))  # type: ignore[arg-type]
    found -= {"return_dict"}  # Without it some models of transformers fail.
    return sorted(key for key in found if not callable(getattr(cls, key, None)))


def lists(model_type: str) -> frozenset[str]:
    return IGNORED | GENERATION_KEYS | FAMILIES[model_type].ignored_keys


def changed(name: str, key: str) -> list[Any]:
    """Return other values for a key than the model has."""
    if key in CHANGED:
        return CHANGED[key]
    value = getattr(base(name).config, key, FIXED.get(key))
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [value + 0.25]
    return ["other"] if isinstance(value, str) else [3]


@dataclasses.dataclass
class Base:
    config: Any
    values: dict[str, Any]
    state: dict[str, np.ndarray]
    logits: np.ndarray
    ours: ModelConfig


@cache
def base(name: str) -> Base:
    config = config_class(name)(**MODELS[name])
    values = json.loads(config.to_json_string(use_diff=True)) | {"architectures": [name]}
    model = randomised(getattr(transformers, name)(config))
    # These keys would win over T5's feed_forward_proj and differ from OPT's hidden_size.
    for key in ("dense_act_fn", "is_gated_act", "word_embed_proj_dim"):
        values.pop(key, None)
    state, logits = state_of(model), scores(model)
    return Base(config, values, state, logits, config_from_hf(values, state.keys()))


def state_of(model: Any) -> dict[str, np.ndarray]:
    """Return the tensors of a model, each under one name."""
    found = {x.data_ptr(): name for name, x in reversed(model.state_dict().items())}
    return {name: array(model.state_dict()[name]).copy() for name in found.values()}


def is_equal(state: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return state.keys() == other.keys() and all(np.array_equal(state[n], other[n]) for n in state)


def scores(model: Any) -> np.ndarray:
    """Return the outputs of a model of transformers where no token is padding."""
    inputs = dict(input_ids=TOKENS, attention_mask=REAL)
    if model.config.is_encoder_decoder:
        inputs = dict(
            input_ids=SOURCE,
            attention_mask=SOURCE_REAL,
            decoder_input_ids=TOKENS,
            decoder_attention_mask=REAL,
        )
    elif hasattr(model.config, "type_vocab_size"):
        inputs["token_type_ids"] = TYPES
    if model.config.model_type == "longformer":
        inputs["global_attention_mask"] = np.arange(TOKENS.shape[1]) < np.ones((len(TOKENS), 1))
    with torch.no_grad():
        out = model(**tensors(**inputs))
    logits = array(out[0] if isinstance(out, tuple) else out.logits)
    return logits[REAL.astype(bool)] if logits.ndim == 3 else logits


def our_scores(directory: Path) -> np.ndarray:
    found = read(directory)
    arrays = [TOKENS]
    named: dict[str, Any] = {"segment_ids": REAL}
    if found.config.architecture == "encoder_decoder":
        arrays.append(SOURCE)
        named["encoder_segment_ids"] = SOURCE_REAL
    if found.config.type_vocab_size:
        named["type_ids"] = TYPES
    args, kwargs = jax.tree.map(jnp.asarray, (arrays, named))
    logits = np.asarray(
        jax.jit(build(found.config).apply)({"params": found.params}, *args, **kwargs)
    )
    return logits[REAL.astype(bool)] if logits.ndim == 3 else logits


def outcome(name: str, key: str, value: Any, directory: Path) -> str:
    """Return the effect of a value: "refused", "idle" or "followed"."""
    values, was = base(name).values | {key: copy.deepcopy(value)}, base(name)
    try:
        ours = config_from_hf(values, was.state.keys())
    except ModelError as error:
        assert re.search(rf'"{key}"|^{key} in config.json', str(error))
        return "refused"
    theirs = getattr(transformers, name)(config_class(name).from_dict(copy.deepcopy(values)))
    theirs = randomised(theirs)
    state, expected = state_of(theirs), scores(theirs)
    if _function(ours) == _function(was.ours) and is_equal(state, was.state):
        largest = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(expected, was.logits, atol=1e-6 * largest)
        return "idle"
    assert key not in lists(was.config.model_type) - {"id2label"}  # Classifiers follow id2label.
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(values))
    save_file(state, directory / "model.safetensors")
    np.testing.assert_allclose(our_scores(directory), expected, atol=1e-4)
    return "followed"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", MODELS)
def test_unchanged(name: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(base(name).values))
    save_file(base(name).state, tmp_path / "model.safetensors")
    np.testing.assert_allclose(our_scores(tmp_path), base(name).logits, atol=1e-4)


CASES = [(name, key) for name in MODELS for key in keys_of(name)]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("name", "key"), CASES)
def test_each_key(name: str, key: str, tmp_path: Path):
    for i, value in enumerate(changed(name, key)):
        result = outcome(name, key, value, tmp_path / str(i))
        print(f"{name} {key} = {value!r}: {result}")
