"""Whole models against a plain one in float64, and against their own other ways to run."""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import HEAD_DIM, HEADS, INNER, KV_HEADS, LAYERS, WIDTH, B, S, T, V, random_params, tiny

from model.config import AttentionConfig, ModelConfig, ModelError
from model.transformer import build, empty_cache

RNG = np.random.default_rng(0)
TOKENS = jnp.array(RNG.integers(0, V, (B, T)))
SOURCE = jnp.array(RNG.integers(0, V, (B, S)))
SOURCE_SEGMENTS = jnp.array((np.arange(S) < [[7], [4], [1]]).astype(int))
SEGMENTS = jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0], [1, 2, 3, 3, 3]])
CHANGED = {
    "norm_position": "pre",
    "norm_kind": "rmsnorm",
    "tie_embeddings": False,
    "scale_embeddings": False,
    "positions_kind": "learned",
    "positions_max_length": 13,
    "feed_forward_activation": "swiglu",
    "feed_forward_bias": False,
    "attention_bias": False,
    "attention_head_dim": 5,
    "encoder_layers": 3,
}


def init(config: ModelConfig) -> tuple[nn.Module, dict]:
    """A model and random parameters for it."""
    model = build(config)
    arrays = (TOKENS, SOURCE) if config.architecture == "encoder_decoder" else (TOKENS,)
    return model, random_params(model, *arrays)


class Plain:
    """The same Transformer, written without sharing anything with it but the parameters."""

    def __init__(self, config: ModelConfig, params: dict):
        self.config = config
        self.params = jax.tree.map(np.float64, params)

    def norm(self, p: dict, x: np.ndarray) -> np.ndarray:
        if "bias" in p:
            x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p.get("bias", 0)

    def attention(self, p: dict, x, context, allowed) -> np.ndarray:
        def project(name, x):
            return np.tensordot(x, p[name]["kernel"], 1) + p[name].get("bias", 0)

        q, k, v = project("query", x), project("key", context), project("value", context)
        k, v = (np.repeat(z, q.shape[2] // k.shape[2], axis=2) for z in (k, v))
        scores = np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
        weights = np.exp(scores) * allowed[:, None]
        total = weights.sum(-1, keepdims=True)
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        y = np.einsum("bnts,bsnh->btnh", weights, v)
        return np.tensordot(y, p["out"]["kernel"], 2) + p["out"].get("bias", 0)

    def feed_forward(self, p: dict, x: np.ndarray) -> np.ndarray:
        h = x @ p["up"]["kernel"] + p["up"].get("bias", 0)
        if "gate" in p:
            gate = x @ p["gate"]["kernel"] + p["gate"].get("bias", 0)
            h = h * gate / (1 + np.exp(-gate))
        else:
            h = np.maximum(h, 0)
        return h @ p["down"]["kernel"] + p["down"].get("bias", 0)

    def stack(self, p: dict, x, allowed, context=None, cross_allowed=None) -> np.ndarray:
        for layer in range(p["blocks"]["self_attention_norm"]["scale"].shape[0]):
            block = jax.tree.map(lambda z: z[layer], p["blocks"])  # noqa: B023
            sublayers: dict[str, Any] = {
                "self_attention": lambda p, x: self.attention(p, x, x, allowed),
                "cross_attention": lambda p, x: self.attention(p, x, context, cross_allowed),
                "feed_forward": self.feed_forward,
            }
            for name, sublayer in sublayers.items():
                if name not in block:
                    continue
                norm = partial(self.norm, block[f"{name}_norm"])
                if self.config.norm.position == "pre":
                    x = x + sublayer(block[name], norm(x))
                else:
                    x = norm(x + sublayer(block[name], x))
        return self.norm(p["norm"], x) if "norm" in p else x

    def embed(self, inputs_name: str, tokens, positions) -> np.ndarray:
        x = self.params["embedding"]["table"][tokens]
        if self.config.scale_embeddings:
            x = x * math.sqrt(x.shape[-1])
        if self.config.positions.kind == "learned":
            return x + self.params[inputs_name]["positions"]["table"][positions]
        half = np.arange(x.shape[-1] // 2)
        angles = positions[..., None] / 10000 ** (2 * half / x.shape[-1])
        return x + np.concatenate([np.sin(angles), np.cos(angles)], -1)

    def logits(self, x: np.ndarray) -> np.ndarray:
        if self.config.tie_embeddings:
            return x @ self.params["embedding"]["table"].T
        return x @ self.params["head"]["kernel"]

    def __call__(self, tokens, segments, positions, source=None, source_segments=None):
        def meet(a, b):
            return (a[:, :, None] == b[:, None, :]) & (b[:, None, :] != 0)

        allowed = meet(segments, segments)
        if self.config.architecture == "encoder_only":
            x = self.embed("inputs", tokens, positions)
            return self.logits(self.stack(self.params["encoder"], x, allowed))
        allowed &= np.tri(tokens.shape[1], dtype=bool)
        if self.config.architecture == "decoder_only":
            x = self.embed("inputs", tokens, positions)
            return self.logits(self.stack(self.params["decoder"], x, allowed))
        places = np.broadcast_to(np.arange(source.shape[1]), source.shape)
        encoded = self.stack(
            self.params["encoder"],
            self.embed("encoder_inputs", source, places),
            meet(source_segments, source_segments),
        )
        x = self.embed("decoder_inputs", tokens, positions)
        cross = meet(segments, source_segments)
        return self.logits(self.stack(self.params["decoder"], x, allowed, encoded, cross))


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny(**CHANGED),
        tiny("decoder_only", **(CHANGED | {"encoder_layers": None})),
        tiny("decoder_only"),
        tiny("encoder_only"),
    ],
    ids=["encoder_decoder", "encoder_decoder changed", "decoder changed", "decoder", "encoder"],
)
def test_logits_are_those_of_a_plain_implementation(config: ModelConfig):
    model, params = init(config)
    positions = np.array([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    arrays = [TOKENS]
    extra: dict[str, Any] = {"segment_ids": SEGMENTS, "positions": jnp.array(positions)}
    plain = [np.asarray(TOKENS), np.asarray(SEGMENTS), positions]
    if config.architecture == "encoder_decoder":
        arrays.append(SOURCE)
        extra["encoder_segment_ids"] = SOURCE_SEGMENTS
        plain += [np.asarray(SOURCE), np.asarray(SOURCE_SEGMENTS)]
    logits = jax.jit(model.apply)({"params": params}, *arrays, **extra)
    assert logits.dtype == jnp.float32
    expected = Plain(config, params)(*plain)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only", "encoder_only"])
def test_number_of_parameters(architecture: str, changed: bool):
    changes = CHANGED | ({} if architecture == "encoder_decoder" else {"encoder_layers": None})
    _, params = init(tiny(architecture, **(changes if changed else {})))
    D, N, K, F = WIDTH, HEADS, KV_HEADS, INNER
    H = 5 if changed else HEAD_DIM
    norm = D if changed else 2 * D
    attention = D * N * H + 2 * D * K * H + N * H * D
    attention += 0 if changed else N * H + 2 * K * H + D
    feed_forward = 3 * D * F if changed else 2 * D * F + F + D
    encoder_block = attention + feed_forward + 2 * norm
    decoder_block = encoder_block + attention + norm
    last_norm = norm if changed else 0
    tables = V * D + (D * V if changed else 0)
    positions = 13 * D if changed else 0
    if architecture == "encoder_decoder":
        encoder_layers = 3 if changed else LAYERS
        expected = encoder_layers * encoder_block + LAYERS * decoder_block
        expected += 2 * last_norm + 2 * positions + tables
    else:
        expected = LAYERS * encoder_block + last_norm + positions + tables
    assert sum(x.size for x in jax.tree.leaves(params)) == expected


def test_the_base_model_of_the_paper_has_its_size():
    config = ModelConfig(vocab_size=37_000, attention=AttentionConfig(heads=8))
    arrays = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(build(config).init, jax.random.key(0), *arrays)
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == pytest.approx(65e6, rel=0.04)  # arXiv:1706.03762 table 3


def test_remat_and_unroll_change_no_value_and_no_gradient():
    def value_and_gradient(**changes):
        rates = {"dropout": 0.2, "attention_dropout": 0.3, "feed_forward_dropout": 0.4}
        model, params = init(tiny("decoder_only", **rates, **changes))

        @jax.jit
        @jax.value_and_grad
        def loss(params):
            rngs = {"dropout": jax.random.key(3)}
            logits = model.apply({"params": params}, TOKENS, deterministic=False, rngs=rngs)
            return jnp.sum(jnp.sin(logits))

        return loss(params)

    value, gradient = value_and_gradient()
    other_value, other_gradient = value_and_gradient(remat=True, unroll=2)
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), other_gradient, gradient
    )


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
    assert (rounded != low).mean() > 0.9  # they were float32 all along, not converted at the end


def test_an_encoder_decoder_decodes_with_a_cache_as_it_was_taught():
    config = tiny()
    model, params = init(config)

    @partial(jax.jit, static_argnames="method")
    def run(*args, **kwargs):
        return model.apply({"params": params}, *args, **kwargs)

    expected = run(TOKENS, SOURCE, encoder_segment_ids=SOURCE_SEGMENTS)
    encoded = run(SOURCE, SOURCE_SEGMENTS, method="encode")
    cache = empty_cache(config, B, T + 2)
    for t in range(T):
        logits, cache = run(
            TOKENS[:, t : t + 1],
            encoded if t == 0 else None,
            SOURCE_SEGMENTS,
            cache=cache,
            offset=jnp.int32(t),
            method="decode",
        )
        np.testing.assert_allclose(logits[:, 0], expected[:, t], rtol=1e-4, atol=1e-4)


def test_a_decoder_decodes_with_a_cache_as_it_was_taught():
    config = tiny("decoder_only", positions_kind="learned", positions_max_length=13)
    model, params = init(config)
    run = jax.jit(partial(model.apply, {"params": params}), static_argnames="method")
    expected = run(TOKENS)
    # A prompt of two tokens at once, then each row at a place of its own.
    logits, cache = run(
        TOKENS[:, :2], cache=empty_cache(config, B, T), offset=jnp.int32(0), method="decode"
    )
    np.testing.assert_allclose(logits, expected[:, :2], rtol=1e-4, atol=1e-4)
    rows = np.arange(B)
    places = np.array([2, 1, 0])  # rows 1 and 2 go back and write again
    for _ in range(3):
        logits, cache = run(
            TOKENS[rows, places][:, None], cache=cache, offset=jnp.array(places), method="decode"
        )
        np.testing.assert_allclose(logits[:, 0], expected[rows, places], rtol=1e-4, atol=1e-4)
        places = places + 1


def test_a_cache_cannot_outgrow_learned_positions():
    config = tiny(positions_kind="learned", positions_max_length=13)
    shape = (LAYERS, B, 13, KV_HEADS, HEAD_DIM)
    assert empty_cache(config, B, 13).self_attention.k.shape == shape
    with pytest.raises(ModelError, match=r"17 positions.*max_length is 13"):
        empty_cache(config, B, 17)
    assert empty_cache(tiny(dtype="bfloat16"), B, 17).self_attention.v.dtype == jnp.bfloat16


def test_segments_are_refused_where_the_cache_has_none(unchecked):
    config = tiny("decoder_only")
    model, params = init(config)
    with pytest.raises(ValueError, match="describes 1 kv positions, there are 5"):
        model.apply(
            {"params": params},
            TOKENS[:, :1],
            segment_ids=SEGMENTS[:, :1],
            cache=empty_cache(config, B, T),
            offset=0,
            method="decode",
        )


def test_dropout_acts_at_each_place_in_training_only():
    places = ("dropout", "attention_dropout", "feed_forward_dropout")
    model, params = init(tiny("decoder_only", **dict.fromkeys(places, 0.5)))
    quiet = jax.jit(model.apply)({"params": params}, TOKENS)
    with pytest.raises(Exception, match="dropout"):  # a key is needed in training
        model.apply({"params": params}, TOKENS, deterministic=False)
    never, _ = init(tiny("decoder_only"))
    np.testing.assert_array_equal(jax.jit(never.apply)({"params": params}, TOKENS), quiet)
    for place in places:
        model, _ = init(tiny("decoder_only", **{place: 0.5}))

        @jax.jit
        def train(key, model=model):
            rngs = {"dropout": key}
            return model.apply({"params": params}, TOKENS, deterministic=False, rngs=rngs)

        loud = train(jax.random.key(0))
        np.testing.assert_array_equal(train(jax.random.key(0)), loud)
        # The last position sees enough weights and activations for some to be dropped.
        for other in (quiet, train(jax.random.key(1))):
            assert (np.abs(loud - other).max(-1)[:, -1] > 1e-3).all()


def test_layers_drop_different_elements():
    # Two blocks of which each adds 1 to everything, and so 1 / (1 - rate) or 0 in training.
    config = tiny("decoder_only", dropout=0.5, norm_position="pre", positions_kind="none")
    model, params = init(config)
    params = jax.tree.map(jnp.zeros_like, params)
    params["decoder"]["blocks"]["feed_forward"]["down"]["bias"] += 1.0
    before_last_norm = []

    def record(next_function, args, kwargs, context):
        if context.module.name == "norm" and context.method_name == "__call__":
            before_last_norm.append(np.asarray(args[0]))
        return next_function(*args, **kwargs)

    with nn.intercept_methods(record):
        rngs = {"dropout": jax.random.key(0)}
        model.apply({"params": params}, TOKENS, deterministic=False, rngs=rngs)
    (added,) = before_last_norm
    shares = [(added == value).mean() for value in (0, 2, 4)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.15)  # 1/2, 0, 1/2 if they agreed
