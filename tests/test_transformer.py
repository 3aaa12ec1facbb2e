"""Test whole models against a plain implementation in float64, and properties of all parts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import Plain
from tiny import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    PLACES,
    POSITIONS,
    PREFIX,
    SEGMENTS,
    SOURCE,
    SOURCE_PLACES,
    SOURCE_SEGMENTS,
    TOKENS,
    WIDTH,
    B,
    T,
    init,
    tiny,
)

from heedful.model.config import ModelError, RotaryConfig
from heedful.model.transformer import empty_cache

TYPES = np.random.default_rng(1).integers(0, 3, (B, T))

MODELS: dict[str, dict[str, Any]] = {
    "vaswani": {},
    "t5": {
        **POSITIONS["relative"],
        "norm_kind": "rmsnorm",
        "norm_position": "pre",
        "feed_forward_activation": "gelu_tanh",
        "feed_forward_gated": True,
        "feed_forward_bias": False,
        "attention_bias": False,
        "attention_scaled": False,
        "encoder_layers": 3,
        "head_scale": True,
        "scale_embeddings": False,
    },
    "marian": {"feed_forward_activation": "silu", "head_bias": True},
    "bert": {
        **POSITIONS["learned"],
        "architecture": "encoder_only",
        "type_vocab_size": 3,
        "norm_embeddings": True,
        "norm_epsilon": 0.01,
        "feed_forward_activation": "gelu",
        "head_transform": True,
        "head_bias": True,
        "attention_kv_heads": None,
        "scale_embeddings": False,
    },
    "narrow bert": {
        **POSITIONS["learned"],
        "architecture": "encoder_only",
        "embedding_width": 6,
        "type_vocab_size": 3,
        "norm_embeddings": True,
        "head_transform": True,
    },
    "narrow pair": {"embedding_width": 10, "tie_embeddings": False},
    "mpnet": {
        **POSITIONS["relative"],
        "positions_learned": True,
        "architecture": "encoder_only",
        "norm_embeddings": True,
        "attention_kv_heads": None,
    },
    "gpt": {
        **POSITIONS["learned"],
        "architecture": "decoder_only",
        "norm_position": "pre",
        "feed_forward_activation": "gelu_tanh",
        "type_vocab_size": 3,
    },
    "llama": {
        **POSITIONS["rotary"],
        "architecture": "decoder_only",
        "norm_kind": "rmsnorm",
        "norm_position": "pre",
        "feed_forward_activation": "silu",
        "feed_forward_gated": True,
        "tie_embeddings": False,
    },
    "bloom": {
        **POSITIONS["alibi"],
        "architecture": "decoder_only",
        "norm_embeddings": True,
        "norm_bias": False,
        "head_transform": True,
    },
    "rotary encoder": {
        "architecture": "encoder_only",
        "positions_kind": "rotary",
        "positions_rotary": RotaryConfig(base=7, scaling="linear", factor=3),
        "attention_head_dim": 10,
        "attention_kv_heads": 2,
        "attention_key_dim": 6,
    },
    "small keys": {"attention_key_dim": HEAD_DIM - 1},
    "alibi pair": {**POSITIONS["alibi"], "tie_embeddings": False, "norm_embeddings": True},
    "no norm": {"norm_kind": "none"},
    "no residuals": {"residuals": False, "norm_position": "pre"},
    "no positions": {**POSITIONS["none"], "architecture": "encoder_only"},
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_a_plain_implementation(name: str):
    config = tiny(**MODELS[name])
    model, params = init(config)
    arrays = [TOKENS]
    extra: dict[str, Any] = {"segment_ids": jnp.array(SEGMENTS), "positions": jnp.array(PLACES)}
    plain: dict[str, Any] = {}
    if config.architecture == "encoder_decoder":
        arrays.append(SOURCE)
        extra["encoder_segment_ids"] = jnp.array(SOURCE_SEGMENTS)
        extra["encoder_positions"] = jnp.array(SOURCE_PLACES)
        plain["source"] = np.asarray(SOURCE), SOURCE_SEGMENTS, SOURCE_PLACES
    if name == "bert":  # "gpt" gets no types, so that all types are 0.
        extra["type_ids"], plain["types"] = jnp.array(TYPES), TYPES
    if name == "bloom":
        extra["prefix_len"], plain["prefix"] = jnp.array(PREFIX), PREFIX
    logits = jax.jit(model.apply)({"params": params}, *arrays, **extra)
    assert logits.dtype == jnp.float32
    expected = Plain(config, params)(np.asarray(TOKENS), SEGMENTS, PLACES, **plain)
    # Without norms, logits are thousands, and they are sums of even larger numbers.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_computes_with_float32_parameters_to_float32_logits(tied: bool):
    logits = {}
    for dtype in ("float32", "bfloat16"):
        model, params = init(tiny("decoder_only", tie_embeddings=tied, dtype=dtype))
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        logits[dtype] = jax.jit(model.apply)({"params": params}, TOKENS)
    low = logits["bfloat16"]
    assert low.dtype == jnp.float32
    error = np.abs(low - logits["float32"]).max() / np.abs(logits["float32"]).max()
    assert 1e-5 < error < 0.05
    rounded = low.astype(jnp.bfloat16).astype(jnp.float32)
    assert (rounded != low).mean() > 0.9  # Logits are computed in float32, not converted to it.


def test_every_part_of_a_model_computes_in_bfloat16():
    for name in ("bert", "llama", "bloom"):
        config = tiny(**MODELS[name], dtype="bfloat16", lora_rank=2)
        model, params = init(config)
        apply = partial(model.apply, mutable="intermediates")
        logits, sown = jax.eval_shape(apply, {"params": params}, TOKENS)
        hidden = jax.tree.leaves(sown, is_leaf=lambda x: isinstance(x, tuple))[0][0]
        assert (logits.dtype, hidden.dtype) == (jnp.float32, jnp.bfloat16)


def test_a_cache_cannot_outgrow_learned_positions():
    config = tiny(**POSITIONS["learned"])
    shape = (LAYERS, B, KV_HEADS, 13, HEAD_DIM)
    assert empty_cache(config, B, 13).self_attention.k.shape == shape
    with pytest.raises(ModelError, match=r"17 positions.*max_length = 13"):
        empty_cache(config, B, 17)
    assert empty_cache(tiny(dtype="bfloat16"), B, 17).self_attention.v.dtype == jnp.bfloat16


def test_segments_are_refused_where_the_cache_has_none(unchecked):
    config = tiny("decoder_only")
    model, params = init(config)
    with pytest.raises(ValueError, match="describes 1 kv positions, there are 5"):
        model.apply(
            {"params": params},
            TOKENS[:, :1],
            segment_ids=jnp.array(SEGMENTS[:, :1]),
            cache=empty_cache(config, B, T),
            offset=0,
            method="decode",
        )


@pytest.mark.parametrize("architecture", ["decoder_only", "encoder_decoder"])
def test_an_offset_without_a_cache_is_refused(architecture: str):
    model, params = init(tiny(architecture))
    source = () if architecture == "decoder_only" else (jnp.zeros((B, T, WIDTH)),)
    with pytest.raises(ValueError, match="an offset need a cache"):
        model.apply({"params": params}, TOKENS, *source, offset=3, method="decode")


def test_types_are_refused_where_there_is_no_table():
    model, params = init(tiny("encoder_only"))
    with pytest.raises(ModelError, match=r"model\.type_vocab_size = 0, but type_ids"):
        jax.eval_shape(model.apply, {"params": params}, TOKENS, type_ids=jnp.array(TYPES))


@pytest.mark.parametrize("name", ["inputs", "positions", "type_ids"])
def test_ids_that_are_in_no_table_give_no_number(name: str):
    model, params = init(tiny("decoder_only", type_vocab_size=3, **POSITIONS["learned"]))
    given = {"inputs": TOKENS, "positions": jnp.array(PLACES), "type_ids": jnp.array(TYPES)}
    run = jax.jit(lambda given: model.apply({"params": params}, **given))
    expected = run(given)
    assert np.isfinite(expected).all()
    for wrong in (999, -1):
        spoilt = given[name].at[2, 3].set(wrong)
        logits = run(given | {name: spoilt})
        assert np.isnan(logits[2, 3:]).all()
        np.testing.assert_array_equal(logits[:2], expected[:2])
