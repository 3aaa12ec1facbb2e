"""Test the parts of a block against numpy in float64."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import ACTIVATIONS
from tiny import HEAD_DIM, HEADS, INNER, KV_HEADS, WIDTH, B, S, T, V, tiny

from heedful.model import masks
from heedful.model.activations import gelu, gelu_tanh
from heedful.model.cache import KVCache, new_cache
from heedful.model.config import ModelError
from heedful.model.layers import Dropout, Embedding, FeedForward, Norm, normalise
from heedful.model.linear import Linear, split_kernels
from heedful.model.multi_head_attention import MultiHeadAttention
from heedful.model.ops.products import MAX_ROWS_TRANSPOSED, matmul
from heedful.model.transformer import decoder_mask


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def params_of(module: nn.Module, *args, **kwargs) -> dict:
    """Return parameters without axis names, all drawn at random, so that none is 0 or 1."""
    init = partial(module.init, **kwargs)
    params = nn.unbox(jax.eval_shape(init, jax.random.key(0), *args))["params"]
    leaves, tree = jax.tree.flatten(params)
    leaves = [jnp.float32(random(*x.shape, seed=i)) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, leaves)


def apply(module: nn.Module, params: dict, *args, **kwargs):
    """Apply a module in one compiled program, which is faster than single operations."""
    return jax.jit(partial(module.apply, **kwargs))({"params": params}, *args)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ({"embed": 101}, {"heads": 7, "head_dim": 13}),
        ({"heads": 7, "head_dim": 13}, {"embed": 101}),
        ({"embed": 101}, {"mlp": 211}),
    ],
)
def test_linear_starts_within_the_glorot_bound_of_its_true_fans(inputs, outputs):
    x = jnp.float32(random(3, 5, *inputs.values()))
    module = Linear(tiny(), inputs, outputs, use_bias=True, gain=0.3)
    params = nn.unbox(module.init(jax.random.key(0, impl="rbg"), x))["params"]
    fan_in, fan_out = math.prod(inputs.values()), math.prod(outputs.values())
    # The distribution is uniform in +-sqrt(6 / (fan_in + fan_out)): Glorot and Bengio 2010, eq. 16.
    bound = 0.3 * math.sqrt(6 / (fan_in + fan_out))
    kernel = np.asarray(params["kernel"])
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    assert kernel.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not np.asarray(params["bias"]).any()
    params["bias"] = jnp.float32(random(*outputs.values()))
    expected = np.tensordot(x, kernel, len(inputs)) + params["bias"]
    np.testing.assert_allclose(apply(module, params, x), expected, atol=1e-4)


def test_the_gradient_of_a_bias_is_summed_up_in_float32():
    config = tiny(dtype="bfloat16")
    module = Linear(config, {"embed": 3}, {"heads": 2, "head_dim": 5}, use_bias=True)
    x = jnp.float32(random(7, 1009, 3))
    g = jnp.asarray(np.abs(random(7, 1009, 2, 5)), jnp.bfloat16)
    params = params_of(module, x)
    _, pull = jax.vjp(lambda params: apply(module, params, x), params)
    # In bfloat16 a sum of thousands of numbers stops growing when the next number is too small.
    expected = np.float64(g).sum((0, 1))
    np.testing.assert_allclose(pull(g)[0]["bias"], expected, rtol=1e-5)


def test_matmul_has_the_gradients_of_a_dot_product():
    x, kernel = jnp.float32(random(3, 5, 7)), jnp.float32(random(7, 2, 11))
    g = jnp.float32(random(3, 5, 22, seed=1))
    out, pull = jax.vjp(matmul, x, kernel)
    expected, expected_pull = jax.vjp(lambda x, k: jnp.dot(x, k.reshape(7, 22)), x, kernel)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    for ours, theirs in zip(pull(g), expected_pull(g), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert kept_by(pull) == [(3, 5, 7), (7, 2, 11)]  # A reshaped kernel would be a copy.


@pytest.mark.parametrize("length", [MAX_ROWS_TRANSPOSED // 2, MAX_ROWS_TRANSPOSED // 2 + 1])
def test_transposed_kernels_give_the_same(length: int):
    module = Linear(tiny(), {"embed": 7}, {"heads": 3, "head_dim": 5}, use_bias=True)
    x = jnp.float32(random(2, length, 7))
    params = nn.unbox(module.init(jax.random.key(0), x))["params"]
    stacked = {"query": jax.tree.map(lambda x: x[None], params)}
    kept, transposed = (jax.tree.map(lambda x: x[0], part) for part in split_kernels(stacked))
    assert transposed["query"]["transposed"].shape == (15, 7)
    assert kept["query"].keys() == {"bias"}  # no second copy of the kernel
    y = module.apply({"params": kept["query"], "decode": transposed["query"]}, x)
    expected = np.tensordot(x, params["kernel"], 1) + params["bias"]
    np.testing.assert_allclose(y, expected, atol=1e-5)


def kept_by(pull) -> list[tuple[int, ...]]:
    """Return the shapes of the arrays that a backward pass keeps."""
    return [np.shape(x) for x in jax.tree.leaves(pull) if np.size(x) > 1]


@pytest.mark.parametrize("kind", ["layernorm", "layernorm without bias", "rmsnorm"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm(kind: str, dtype):
    # With a large mean, statistics in bfloat16 are useless; those in float32 are right.
    x = jnp.asarray(random(B, T, WIDTH) + 30, dtype)
    name, has_bias = kind.split()[0], kind == "layernorm"
    # rmsnorm has no bias for any value of norm.bias.
    module = Norm(tiny(norm_kind=name, norm_epsilon=0.1, norm_bias=has_bias or name == "rmsnorm"))
    params = params_of(module, x)
    y = np.float64(x)
    if name == "layernorm":
        y = y - y.mean(-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 0.1) * params["scale"]
    y = y + params.get("bias", 0.0)
    out = apply(module, params, x)
    assert out.dtype == dtype
    assert params.keys() == ({"scale", "bias"} if has_bias else {"scale"})
    np.testing.assert_allclose(
        np.float64(out), y, rtol=1e-5 if dtype == jnp.float32 else 8e-3, atol=1e-5
    )


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_norm_has_the_gradient_of_its_formula(centred: bool, has_bias: bool):
    x, g = jnp.float32(random(B, T, WIDTH) + 3), jnp.float32(random(B, T, WIDTH, seed=1))
    scale, bias = jnp.float32(random(2, WIDTH, seed=2))
    weights = (scale, bias) if has_bias else (scale, None)

    def formula(x, scale, bias):
        y = x - jnp.mean(x, -1, keepdims=True) if centred else x
        y = y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + 0.1) * scale
        return y if bias is None else y + bias

    _, pull = jax.vjp(lambda *given: normalise(*given, centred, 0.1), x, *weights)
    _, expected = jax.vjp(formula, x, *weights)
    for ours, theirs in zip(jax.tree.leaves(pull(g)), jax.tree.leaves(expected(g)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert kept_by(pull).count(x.shape) == 1


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward(activation: str, gated: bool):
    x = random(B, T, WIDTH)
    module = FeedForward(tiny(feed_forward_activation=activation, feed_forward_gated=gated))
    params = params_of(module, jnp.float32(x))

    def linear(name, x):
        return x @ np.float64(params[name]["kernel"]) + np.float64(params[name]["bias"])

    bend = ACTIVATIONS[activation]
    # arXiv:2002.05202 §2: (activation(x W) * x V) W2
    h = bend(linear("gate", x)) * linear("up", x) if gated else bend(linear("up", x))
    assert params["up"]["kernel"].shape == (WIDTH, INNER)
    out = apply(module, params, jnp.float32(x))
    # The two forms of gelu differ by up to 5e-4: the tolerance must be smaller.
    np.testing.assert_allclose(out, linear("down", h), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(("name", "function"), [("gelu", gelu), ("gelu_tanh", gelu_tanh)])
def test_gelu_has_its_derivative(name: str, function):
    x = np.linspace(-9, 9, 1009)
    wanted = (ACTIVATIONS[name](x + 1e-5) - ACTIVATIONS[name](x - 1e-5)) / 2e-5
    # 1 - tanh^2, which x multiplies, loses digits where |x| is about 4, and where it is about 7, as
    # tanh may end one rounding below 1.
    atol = {"gelu": 2e-6, "gelu_tanh": 1e-5}[name]
    np.testing.assert_allclose(jax.vmap(jax.grad(function))(jnp.float32(x)), wanted, atol=atol)


@pytest.mark.parametrize(("name", "function"), [("gelu", gelu), ("gelu_tanh", gelu_tanh)])
def test_gelu_of_bfloat16_is_rounded_once(name: str, function):
    x = jnp.asarray(np.linspace(-4, 4, 1009), jnp.bfloat16)
    wide = np.float64(x)
    slope = (ACTIVATIONS[name](wide + 1e-5) - ACTIVATIONS[name](wide - 1e-5)) / 2e-5
    for ours, wanted in (
        (function(x), ACTIVATIONS[name](wide)),
        (jax.vmap(jax.grad(function))(x), slope),
    ):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float64(ours), wanted, rtol=2**-8, atol=5e-6)


def test_dropout_in_training_only():
    x = jnp.ones((31, 37, 41))
    module = Dropout(0.25)
    key = {"dropout": jax.random.key(0)}
    np.testing.assert_array_equal(module.apply({}, x, True, rngs=key), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, False), x)
    y = np.asarray(module.apply({}, x, False, rngs=key))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert (y == 0).mean() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / y.size))


def test_attention_shares_each_key_head_among_consecutive_query_heads():
    x, context = jnp.float32(random(B, T, WIDTH)), jnp.float32(random(B, S, WIDTH, seed=1))
    grouped = MultiHeadAttention(tiny(), site="cross")
    params = params_of(grouped, x, context, masks.causal())
    assert params["query"]["kernel"].shape == (WIDTH, HEADS, HEAD_DIM)
    assert params["key"]["kernel"].shape == (WIDTH, KV_HEADS, HEAD_DIM)
    repeated = dict(params)
    for name in ("key", "value"):
        repeated[name] = {
            "kernel": jnp.repeat(params[name]["kernel"], HEADS // KV_HEADS, axis=1),
            "bias": jnp.repeat(params[name]["bias"], HEADS // KV_HEADS, axis=0),
        }
    whole = MultiHeadAttention(tiny(attention_kv_heads=None), site="cross")
    out, _ = apply(grouped, params, x, context, masks.causal())
    expected, _ = apply(whole, repeated, x, context, masks.causal())
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_sown_weights_are_those_that_were_used():
    x, context = jnp.float32(random(B, T, WIDTH)), jnp.float32(random(B, S, WIDTH, seed=1))
    segments = jnp.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1], [2, 0, 3, 4, 0]])
    source_segments = jnp.array(
        [[1, 2, 2, 2, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0], [5, 2, 2, 3, 0, 0, 3]]
    )
    mask = masks.cross(segments, source_segments)
    module = MultiHeadAttention(tiny(attention_scaled=False, attention_dropout=0.5), site="cross")
    params = params_of(module, x, context, mask)
    (y, _), sown = apply(module, params, x, context, mask, mutable="intermediates")
    (weights,) = sown["intermediates"]["weights"]
    assert weights.shape == (B, HEADS, T, S)
    sees = np.asarray(mask.to_bool(T, S)[:, 0].any(-1))
    assert (~sees).sum() == 4
    np.testing.assert_allclose(weights.sum(-1), np.repeat(sees[:, None], HEADS, 1), atol=1e-6)
    v = np.tensordot(context, params["value"]["kernel"], 1) + params["value"]["bias"]
    mixed = np.einsum("bnts,bsnh->btnh", weights, v.repeat(HEADS // KV_HEADS, axis=2))
    expected = np.tensordot(mixed, params["out"]["kernel"], 2) + params["out"]["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    # The recorded weights are without dropout in training too, as dropout is noise to a reader.
    training = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
    (loud, _), sown = apply(module, params, x, context, mask, mutable="intermediates", **training)
    np.testing.assert_array_equal(sown["intermediates"]["weights"][0], weights)
    assert (loud != y)[sees].all()


def project(params: dict, name: str, x: np.ndarray) -> np.ndarray:
    """Project x to heads [B, T, N, H]; each key head is repeated for its query heads."""
    y = np.tensordot(x, np.float64(params[name]["kernel"]), 1) + np.float64(params[name]["bias"])
    return y.repeat(HEADS // y.shape[2], axis=2)


@pytest.mark.parametrize("core", ["dense", "longformer"])
def test_global_tokens_look_through_projections_of_their_own(core: str):
    x = random(B, T, WIDTH)
    segments = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    # Row 1 has a global token in padding and -1, which is no token; row 2 has one token twice.
    places = [[0, 3, 1], [4, -1, 2], [2, 0, 2]]
    mask = masks.longformer(1, jnp.array(places)) & masks.packed(jnp.array(segments))
    options = {"window": 1, "global_tokens": 3, "global_projections": True, "core": core}
    config = tiny("encoder_only", **{f"attention_{name}": x for name, x in options.items()})
    module = MultiHeadAttention(config)
    params = params_of(module, jnp.float32(x), None, mask)
    (y, _), sown = apply(module, params, jnp.float32(x), None, mask, mutable="intermediates")

    weights = np.zeros((B, HEADS, T, T))
    mixed = np.zeros((B, T, HEADS, HEAD_DIM))
    for b, t in np.ndindex(B, T):
        is_global = t in places[b]
        prefix = "global_" if is_global else ""
        q, k, v = (project(params, prefix + name, x)[b] for name in ("query", "key", "value"))
        for s in range(T):
            near = abs(t - s) <= 1 or s in places[b] or is_global
            if near and segments[b, t] == segments[b, s] != 0:
                weights[b, :, t, s] = np.exp((q[t] * k[s]).sum(-1) / math.sqrt(HEAD_DIM))
        weights[b, :, t] /= np.maximum(weights[b, :, t].sum(-1, keepdims=True), 1e-300)
        mixed[b, t] = np.einsum("ns,snh->nh", weights[b, :, t], v)
    np.testing.assert_allclose(sown["intermediates"]["weights"][0], weights, atol=1e-5)
    expected = np.tensordot(mixed, params["out"]["kernel"], 2) + params["out"]["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert not np.asarray(mixed[1, 4]).any()  # This global token is padding.


def test_global_projections_need_what_they_are_for():
    options: dict = {
        "attention_window": 1,
        "attention_global_tokens": 1,
        "attention_global_projections": True,
    }
    with pytest.raises(ModelError, match=r"positions\.kind alibi"):
        tiny("encoder_only", positions_kind="alibi", **options)
    module = MultiHeadAttention(tiny("encoder_only", **options))
    x, one = jnp.float32(random(B, T, WIDTH)), jnp.array([[0]])
    for mask in (masks.sliding(1, 1), masks.longformer(1, one) & masks.causal()):
        with pytest.raises(masks.MaskNotSupported, match="neither causality nor a bias"):
            module.init(jax.random.key(0), x, None, mask)


@pytest.mark.parametrize("per_row", [False, True])
def test_a_cache_gives_what_the_whole_sequence_gives(per_row: bool):
    x = jnp.float32(random(B, T, WIDTH))
    module = MultiHeadAttention(tiny())
    params = params_of(module, x, None, masks.causal())
    expected, _ = apply(module, params, x, None, masks.causal())
    cache = KVCache.zeros(tiny(), B, S)  # longer than needed; no query sees the unused end
    cache = jax.tree.map(lambda x: x + 1e3, cache)
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        offset = jnp.full(B, start) if per_row else jnp.int32(start)
        mask = masks.causal().at(offset)
        out, cache = apply(module, params, x[:, start:stop], None, mask, cache=cache)
        np.testing.assert_allclose(out, expected[:, start:stop], rtol=1e-4, atol=1e-5)


def test_weights_with_a_cache_are_refused():
    x = jnp.float32(random(B, 2, WIDTH))
    mask = masks.causal().at(3)
    module = MultiHeadAttention(tiny())
    params = params_of(module, x, None, mask)
    seen = {"cache": KVCache.zeros(tiny(), B, S), "mutable": "intermediates"}
    with pytest.raises(ValueError, match=r"not available .* with a cache.*without a cache"):
        apply(module, params, x, None, mask, **seen)


@pytest.mark.parametrize(("window", "expected"), [(None, S), (4, 4 + 2)])
def test_auto_chooses_by_the_keys_of_the_cache(window: int | None, expected: int, monkeypatch):
    chosen = []
    spy = lambda *given: chosen.append(given) or ("dense", "")  # noqa: E731
    monkeypatch.setattr("heedful.model.attention.choose", spy)
    config = tiny("decoder_only", attention_window=window)
    x, mask = jnp.float32(random(B, 2, WIDTH)), decoder_mask(config, None, offset=0)
    module = MultiHeadAttention(config)
    params = params_of(module, x, None, mask)
    apply(module, params, x, None, mask, cache=new_cache(config, B, S))
    assert chosen[-1] == ("auto", "cpu", expected, 2, 1)


def test_cache_rows_at_their_own_positions():
    cache = KVCache.zeros(tiny(), B, S)
    new = jnp.float32(random(B, 2, KV_HEADS, HEAD_DIM))
    starts = [0, 5, 3]
    written = cache.write(new, 2 * new, jnp.array(starts))
    expected = np.zeros(cache.k.shape)
    for b, start in enumerate(starts):
        expected[b, :, start : start + 2] = new[b].swapaxes(0, 1)
    np.testing.assert_allclose(written.k, expected, rtol=1e-6)
    np.testing.assert_allclose(written.v, 2 * expected, rtol=1e-6)


def test_attention_says_what_it_lacks():
    x = jnp.float32(random(B, T, WIDTH))
    cross = MultiHeadAttention(tiny(), site="cross")
    with pytest.raises(ValueError, match="needs a context"):
        apply(cross, params_of(cross, x, x, masks.full()), x, None, masks.full())
    module = MultiHeadAttention(tiny())
    params = params_of(module, x, None, masks.causal())
    with pytest.raises(ValueError, match=r"\.at\(t\)"):
        apply(module, params, x, None, masks.causal(), cache=KVCache.zeros(tiny(), B, S))


@pytest.mark.parametrize("scale", [False, True])
def test_embedding_and_its_logits(scale: bool):
    tokens = jnp.array([[1, 10, 3]])
    module = Embedding(tiny(scale_embeddings=scale))
    params = params_of(module, tokens)
    table = np.asarray(params["table"], np.float64)
    assert table.shape == (V, WIDTH)
    factor = math.sqrt(WIDTH) if scale else 1.0
    expected = table[[1, 10, 3]] * factor
    np.testing.assert_allclose(apply(module, params, tokens)[0], expected, rtol=1e-6)
    x = random(1, 3, WIDTH)
    logits = apply(module, params, jnp.float32(x), method="logits")
    np.testing.assert_allclose(logits, x @ table.T, atol=1e-5)
