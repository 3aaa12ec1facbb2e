"""The smallest models of each architecture of transformers, and their files."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import B, S, T, V, random_params

from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    ModelConfig,
    ModelError,
    NormConfig,
    PositionConfig,
    RotaryConfig,
)
from heedful.model.pretrained import write
from heedful.model.transformer import build

TOKENS, SOURCE = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
SPECIAL = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}

BERT = ModelConfig(
    architecture="encoder_only",
    vocab_size=V,
    width=15,
    layers=2,
    attention=AttentionConfig(heads=3),
    feed_forward=FeedForwardConfig(width=13, activation="gelu"),
    norm=NormConfig(epsilon=1e-12, embeddings=True),
    positions=PositionConfig(kind="learned", max_length=17),
    head=HeadConfig(transform=True, bias=True),
    type_vocab_size=2,
    scale_embeddings=False,
    init="normal",
)
LONGFORMER = replace(
    BERT,
    attention=AttentionConfig(
        core="longformer", heads=3, window=2, global_tokens=2, global_projections=True
    ),
)
GPT2 = ModelConfig(
    architecture="decoder_only",
    vocab_size=V,
    width=15,
    layers=3,
    attention=AttentionConfig(heads=3, dropout=0.2),
    feed_forward=FeedForwardConfig(width=13, activation="gelu_tanh"),
    norm=NormConfig(position="pre", epsilon=1e-5),
    positions=PositionConfig(kind="learned", max_length=17),
    scale_embeddings=False,
    init="scaled_normal",
)
LLAMA = ModelConfig(
    architecture="decoder_only",
    vocab_size=V,
    width=12,
    layers=2,
    attention=AttentionConfig(heads=6, kv_heads=3, head_dim=4, bias=False),
    feed_forward=FeedForwardConfig(width=13, activation="silu", gated=True, bias=False),
    norm=NormConfig(kind="rmsnorm", position="pre", epsilon=1e-5),
    positions=PositionConfig(kind="rotary", max_length=19, rotary=RotaryConfig(base=500.0)),
    dropout=0.0,
    tie_embeddings=False,
    scale_embeddings=False,
    init="normal",
)
T5 = ModelConfig(
    vocab_size=V,
    width=10,
    layers=2,
    encoder_layers=3,
    attention=AttentionConfig(heads=3, head_dim=7, bias=False, scaled=False, dropout=0.1),
    feed_forward=FeedForwardConfig(width=13, bias=False, dropout=0.1),
    norm=NormConfig(kind="rmsnorm", position="pre"),
    positions=PositionConfig(kind="relative", buckets=8, max_distance=5),
    head=HeadConfig(scale=True),
    scale_embeddings=False,
)
MARIAN = ModelConfig(
    vocab_size=V,
    width=10,
    layers=2,
    encoder_layers=3,
    attention=AttentionConfig(heads=5, dropout=0.3),
    feed_forward=FeedForwardConfig(width=13, activation="silu", dropout=0.4),
    norm=NormConfig(epsilon=1e-5),
    head=HeadConfig(bias=True),
)
WINDOWED = replace(LLAMA, attention=replace(LLAMA.attention, window=2))
STARCODER2 = replace(
    WINDOWED,
    attention=replace(WINDOWED.attention, bias=True),
    feed_forward=FeedForwardConfig(width=13, activation="gelu_tanh"),
    norm=NormConfig(position="pre", epsilon=1e-5),
)
OPT = replace(
    GPT2, attention=AttentionConfig(heads=3, bias=False), norm=NormConfig(epsilon=1e-5),
    feed_forward=FeedForwardConfig(width=13, bias=False), init="normal",
)  # fmt: skip
CLASSIFIER = HeadConfig(kind="classifier", outputs=7)
LLAMA3 = RotaryConfig(
    base=500.0,
    scaling="llama3",
    factor=3.0,
    low_frequency_factor=2.0,
    high_frequency_factor=5.0,
    original_length=40,
)
MODELS = {
    "BertForMaskedLM": BERT,
    "BertForSequenceClassification": replace(BERT, head=CLASSIFIER),
    "BertModel": replace(BERT, head=HeadConfig(kind="classifier")),
    "LongformerForMaskedLM": LONGFORMER,
    "LongformerForSequenceClassification": replace(LONGFORMER, head=CLASSIFIER),
    "LongformerModel": replace(LONGFORMER, head=HeadConfig(kind="classifier")),
    "GPT2LMHeadModel": GPT2,
    "GPT2LMHeadModel untied": replace(
        GPT2, tie_embeddings=False, attention=replace(GPT2.attention, scaled=False)
    ),
    "LlamaForCausalLM": LLAMA,
    "LlamaForCausalLM tied": replace(
        LLAMA, tie_embeddings=True, positions=replace(LLAMA.positions, rotary=LLAMA3)
    ),
    "LlamaModel": replace(
        LLAMA,
        tie_embeddings=True,
        head=HeadConfig(kind="classifier", pooling="last", pooler=False),
    ),
    "MistralForCausalLM": WINDOWED,
    "Starcoder2ForCausalLM": STARCODER2,
    "OPTForCausalLM": OPT,
    "T5ForConditionalGeneration": T5,
    "T5ForConditionalGeneration 1.1": replace(
        T5,
        feed_forward=replace(T5.feed_forward, activation="gelu_tanh", gated=True),
        head=HeadConfig(),
        tie_embeddings=False,
    ),
    "MarianMTModel": MARIAN,
    "MarianMTModel without bias": replace(MARIAN, head=HeadConfig(), scale_embeddings=False),
}


@cache
def random(config: ModelConfig, scale: float = 0.5) -> dict[str, Any]:
    """Return random parameters; those of a bare body do not include the classes."""
    is_body = config.head.kind == "classifier" and config.head.outputs is None
    full = replace(config, head=replace(config.head, outputs=1)) if is_body else config
    inputs = (TOKENS, SOURCE) if config.architecture == "encoder_decoder" else (TOKENS,)
    params = jax.tree.map(np.asarray, random_params(build(full), *inputs, scale=scale))
    if is_body:
        del params["head"]["classes"]
        params = {name: part for name, part in params.items() if part}
    return params


def export(folder: Path, name: str, **more: Any) -> Path:
    directory = folder / "export"
    arguments: dict[str, Any] = {"special": SPECIAL, **more}
    write(directory, MODELS[name], random(MODELS[name]), **arguments)
    return directory


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}


def refused(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(ModelError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def change(directory: Path, **values: Any) -> None:
    """Change config.json; a value of None removes the key."""
    path = directory / "config.json"
    changed = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))


def change_tensors(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
