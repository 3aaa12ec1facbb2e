"""Test flash against dense: the same numbers in blocks, without an array of T * S elements."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from test_attention import Given
from test_masks import HEADS, B, S, T, build, facts_without_offset, some_offset

from heedful.model import masks
from heedful.model.attention import AttentionCall
from heedful.model.attention.dense import dense
from heedful.model.attention.flash import TILE, flash
from heedful.model.positions import PositionBias
from heedful.train.config import MeshConfig
from heedful.train.sharding import make_mesh

H = 3
BIASES = {
    "none": None,
    "alibi": PositionBias(jnp.array([0.5, 0.25])),
    "relative": PositionBias(
        jnp.arange(16.0).reshape(8, 2) / 7, bidirectional=True, max_distance=5
    ),
}


def draw(*shapes: tuple[int, ...], dtype: Any = jnp.float32, seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def value_and_gradients(core, q, k, v, g, mask, bias=None, **options) -> tuple[jax.Array, ...]:
    """Return the output, and gradients of <g, output> for q, k, v and the values of the bias."""

    @jax.jit
    def run(q, k, v, g, mask, bias):
        def attend(q, k, v, values):
            given = None if bias is None else bias.replace(values=values)
            return core(AttentionCall(q, k, v, mask, given, **options))

        out, pull = jax.vjp(attend, q, k, v, None if bias is None else bias.values)
        return out, *(x for x in pull(g) if x is not None)

    return run(q, k, v, g, mask, bias)


def assert_close(actual, expected, tolerance: float = 2e-6) -> None:
    """Compare arrays relative to their largest magnitude, which bounds the rounding of sums.

    The unit is at least 1, the size of the terms: the terms cancel in the gradient of a query
    that sees one key.
    """
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1.0))


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    facts=facts_without_offset,
    offset=st.none() | some_offset,
    kv_heads=st.sampled_from([1, HEADS]),
    bias=st.sampled_from(list(BIASES)),
    rate=st.sampled_from([0.0, 0.4]),
    blocks=st.sampled_from([(2, 3), (3, 2), (1, 7), (5, 4), (None, None)]),
)
@example({"causal": True}, [2, 0, 1], 1, "relative", 0.4, (2, 3))
@example({"window": (1, 2), "dilation": [1, 2], "global": [[3, -1]] * B}, None, 1, "alibi", 0.4,
         (3, 2))  # fmt: skip
@example({"segments": ([[0] * T] * B, [[1] * S] * B)}, None, 2, "relative", 0.0, (2, 3))
def test_equals_dense(facts, offset, kv_heads, bias, rate, blocks):
    if offset is not None:
        facts["offset"] = offset
    mask = build(facts)
    given_bias = BIASES[bias]
    if given_bias is not None:
        given_bias = given_bias.replace(q_offset=mask.q_offset)  # type: ignore[attr-defined]
    arrays = draw((B, T, HEADS, H), (B, S, kv_heads, H), (B, S, kv_heads, H), (B, T, HEADS, H))
    options = {"dropout_rate": rate, "dropout_key": jax.random.key(1), "scale": 0.7}
    cut = partial(flash, q_block=blocks[0], kv_block=blocks[1])
    assert_close(
        value_and_gradients(cut, *arrays, mask, given_bias, **options),
        value_and_gradients(dense, *arrays, mask, given_bias, **options),
    )


@pytest.mark.parametrize("length", [1, 13])
def test_a_chunk_of_new_queries_and_a_bias_of_any_values(length: int):
    q, k, v, g = draw((B, length, 6, H), (B, 17, 3, H), (B, 17, 3, H), (B, length, 6, H))
    mask = masks.causal().at(jnp.array([3, 16, 0]))
    for rows in (1, B):
        bias = Given(draw((rows, 6, length, 17), seed=1)[0])
        assert_close(
            value_and_gradients(partial(flash, q_block=13, kv_block=17), q, k, v, g, mask, bias),
            value_and_gradients(dense, q, k, v, g, mask, bias),
        )


def exact(q, k, v, g, mask) -> list[np.ndarray]:
    """Compute output and gradients in float64 by the formula."""
    q, k, v, g = (np.float64(x) for x in (q, k, v, g))
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat(groups, axis=2) for x in (k, v))
    scale = q.shape[3] ** -0.5
    allowed = np.asarray(mask.to_bool(q.shape[1], k.shape[1]))
    scores = np.where(allowed, scale * np.einsum("btnh,bsnh->bnts", q, k), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = np.einsum("btnh,bsnh->bnts", g, v)
    dscores = scale * weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    dk = np.einsum("bnts,btnh->bsnh", dscores, q)
    dv = np.einsum("bnts,btnh->bsnh", weights, g)
    grouped = [x.reshape(*x.shape[:2], -1, groups, x.shape[3]).sum(3) for x in (dk, dv)]
    out = np.einsum("bnts,bsnh->btnh", weights, v)
    return [out, np.einsum("bnts,bsnh->btnh", dscores, k), *grouped]


def test_bfloat16_is_no_less_exact_than_dense():
    N, K, length = 4, 2, 67
    shapes = (B, length, N, 16), (B, length, K, 16), (B, length, K, 16), (B, length, N, 16)
    arrays = draw(*shapes, dtype=jnp.bfloat16)
    for mask in (masks.full(), masks.causal()):
        expected = exact(*arrays, mask)
        ours = value_and_gradients(partial(flash, q_block=16, kv_block=32), *arrays, mask)
        theirs = value_and_gradients(dense, *arrays, mask)
        for x, y, right in zip(ours, theirs, expected, strict=True):
            assert x.dtype == jnp.bfloat16
            error, allowed = (np.abs(np.float64(z) - right) for z in (x, y))
            assert error.max() <= allowed.max()
            assert np.square(error).mean() <= np.square(allowed).mean()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_query_that_sees_nothing_gives_zero_and_gets_zero(dtype):
    q, k, v, g = draw((2, 5, 6, H), (2, 7, 3, H), (2, 7, 3, H), (2, 5, 6, H), dtype=dtype)
    segments = jnp.array([[1, 1, 2, 2, 3], [0, 1, 1, 1, 1]])  # No key has 3; 0 is padding.
    others = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    for own, theirs in ((segments, others), (0 * segments, others)):
        mask = masks.cross(own, theirs)
        seen = np.asarray(mask.to_bool(5, 7))[:, 0]
        for blocks in ((2, 3), (None, None)):
            cut = partial(flash, q_block=blocks[0], kv_block=blocks[1])
            out, dq, dk, dv = value_and_gradients(cut, q, k, v, g, mask)
            for x in (out, dq, dk, dv):
                assert np.isfinite(np.float32(x)).all()
            for x, some in ((out, seen.any(-1)), (dq, seen.any(-1)), (dk, seen.any(1))):
                assert not np.asarray(x)[~some].any()
            assert not np.asarray(dv)[~seen.any(1)].any()
            assert np.asarray(out)[seen.any(-1)].all()


def test_neither_temptation_nor_size_changes_the_result():
    q, k, v, g = draw((2, 13, 2, H), (2, 13, 2, H), (2, 13, 2, H), (2, 13, 2, H))
    cut = partial(flash, q_block=4, kv_block=5)
    calm = jnp.zeros((1, 2, 13, 13))
    tempting = jnp.where(masks.causal().to_bool(13, 13), calm, 1e30)
    for x, y in zip(
        value_and_gradients(cut, q, k, v, g, masks.causal(), Given(tempting)),
        value_and_gradients(cut, q, k, v, g, masks.causal(), Given(calm)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    huge = value_and_gradients(cut, 1e9 * q, 1e9 * k, v, g, masks.causal())
    assert all(np.isfinite(x).all() for x in huge)
    np.testing.assert_array_equal(
        huge[0], dense(AttentionCall(1e9 * q, 1e9 * k, v, masks.causal()))
    )


@pytest.mark.parametrize("held", quick.only([2], [1, 2, 4]))
def test_rows_in_turn_equal_rows_together(held: int, monkeypatch):
    arrays = draw((6, 13, 4, H), (6, 13, 2, H), (6, 13, 2, H), (6, 13, 4, H))
    ids = jnp.array([[1] * 4 + [2] * 9, [1] * 13, [3] * 13, [0] * 13, [1] * 12 + [2], [4] * 13])
    starts = jnp.arange(6) % 4
    packed = masks.causal() & masks.packed(ids)
    options = {"dropout_rate": 0.3, "dropout_key": jax.random.key(2)}
    cut = partial(flash, q_block=4, kv_block=5)
    for mask, bias in (
        (packed, BIASES["relative"].replace(values=draw((8, 4))[0])),  # type: ignore[attr-defined]
        (masks.causal().at(starts), Given(draw((6, 4, 13, 13), seed=1)[0])),
    ):
        together = value_and_gradients(cut, *arrays, mask, bias, **options)
        with monkeypatch.context() as patch:
            patch.setitem(TILE, "cpu", held * 2 * 4 * 5)
            in_turn = value_and_gradients(cut, *arrays, mask, bias, **options)
        assert_close(in_turn, together)


def test_blocks_that_the_mask_excludes_are_not_visited():
    """Keys that no query sees are NaN here: a visit would multiply NaN by 0, which gives NaN."""
    length, block = 24, 4
    arrays = draw(*[(1, length, 2, H)] * 4)
    cut = partial(flash, q_block=block, kv_block=block)
    mask = masks.sliding(3, 0) & masks.packed(jnp.repeat(jnp.arange(1, 4), 8)[None])
    expected = value_and_gradients(cut, *arrays, mask)
    spoilt = [x.at[:, 16:].set(jnp.nan) for x in arrays]
    for x, y in zip(value_and_gradients(cut, *spoilt, mask), expected, strict=True):
        np.testing.assert_array_equal(x[:, :16], y[:, :16])


def test_jacobians():
    q, k, v = draw((1, 5, 2, H), (1, 7, 1, H), (1, 7, 1, H))
    mask = masks.causal().at(2)
    bias = BIASES["relative"]

    def jacobian(core):
        def attend(q, k, v, bias):
            return core(AttentionCall(q, k, v, mask, bias))[0, :, 1]

        *rest, of_bias = jax.jit(jax.jacrev(attend, argnums=(0, 1, 2, 3)))(q, k, v, bias)
        return *rest, of_bias.values

    assert_close(jacobian(partial(flash, q_block=2, kv_block=3)), jacobian(dense))


@pytest.mark.slow
def test_memory_is_linear_in_the_length():
    def memory(core, length: int) -> int:
        def gradient(q, k, v):
            return jax.grad(
                lambda *x: core(AttentionCall(*x, masks.causal())).sum(), argnums=(0, 1, 2)
            )(q, k, v)

        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        compiled: Any = jax.jit(gradient).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(flash, 32768) < 2.1 * memory(flash, 16384)
    assert memory(dense, 2048) > 3.5 * memory(dense, 1024)
    assert memory(flash, 16384) < memory(dense, 2048)


def test_eight_devices_equal_one():
    arrays = draw((4, 13, 4, H), (4, 13, 2, H), (4, 13, 2, H), (4, 13, 4, H))
    mask = masks.causal() & masks.packed(
        jnp.array([[1] * 4 + [2] * 9, [1] * 13, [3] * 13, [1] * 13])
    )
    bias = BIASES["relative"].replace(values=draw((8, 4))[0])  # type: ignore[attr-defined]
    options = {"dropout_rate": 0.3, "dropout_key": jax.random.key(2)}
    cut = partial(flash, q_block=4, kv_block=5)
    expected = value_and_gradients(cut, *arrays, mask, bias, **options)
    mesh = make_mesh(MeshConfig(data=4, tensor=2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        spread = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
        arrays = [jax.device_put(x, spread) for x in arrays]
        result = value_and_gradients(cut, *arrays, mask, bias, **options)
        assert result[0].sharding.is_equivalent_to(spread, 4)
    assert_close(result, expected)


def test_what_does_not_fit_is_refused(unchecked):
    q, k, v = draw((1, 5, 6, H), (1, 7, 3, H), (1, 7, 3, H))
    for arrays in ((q[:, :, :5], k, v), (q, k[:, :-1], v), (q[..., :-1], k, v)):
        with pytest.raises(ValueError, match="shapes do not fit"):
            flash(AttentionCall(*arrays, masks.full()))
    with pytest.raises(ValueError, match=r"rate 0\.3 needs a key"):
        flash(AttentionCall(q, k, v, masks.full(), dropout_rate=0.3))
    with pytest.raises(ValueError, match="describes 5 kv positions, there are 7"):
        flash(AttentionCall(q, k, v, masks.packed(jnp.ones((1, 5), jnp.int32))))
