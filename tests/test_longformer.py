"""Test the core longformer: values and gradients against dense, memory and FLOPs."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heedful.model import masks
from heedful.model.attention import AttentionCall
from heedful.model.attention.dense import dense
from heedful.model.attention.longformer import longformer
from heedful.model.attention.rows import put_rows, take_rows
from heedful.model.masks import AttentionMask, MaskNotSupported
from heedful.model.positions import PositionBias, alibi_slopes

B, T, S, N, K, H = 2, 23, 29, 6, 3, 5
STEPS = (1, 1, 2, 3, 3, 2)  # Query heads with steps 2, 3 and 3, 2 share a key head.
# Global tokens: one occurs twice, and some are in the window of another one.
PLACES = jnp.array([[0, 5, 22, -1], [7, -1, 3, 7]])
OWN = np.array([[1] * 9 + [2] * 11 + [0] * 3, [0] * 2 + [1] * 4 + [3] * 17])
SEGMENTS = masks.packed(jnp.array(OWN))

MASKS: dict[str, AttentionMask] = {
    "sliding": masks.sliding(2, 3),
    "the query itself": masks.sliding(0, 0),
    "wider than the sequence": masks.sliding(100, 30),
    "causal": masks.causal() & masks.sliding(3, 3),
    "causal without a right end": masks.causal() & masks.sliding(3, None),
    "dilated": masks.sliding(2, 1, STEPS),
    "segments": masks.sliding(4, 4) & SEGMENTS,
    "prefix": masks.prefix(jnp.array([4, 9])) & masks.sliding(3, 2),
    "global": masks.longformer(2, PLACES),
    "one global": masks.longformer(3, jnp.array([[0]])),
    "global, dilated, packed": masks.longformer(2, PLACES, STEPS) & SEGMENTS,
    "global and causal": masks.longformer(2, PLACES, STEPS) & masks.causal(),
    "at an offset": (masks.causal() & masks.sliding(4, 4)).at(3),
    "wider, at an offset": (masks.longformer(90, PLACES, STEPS) & masks.causal()).at(
        jnp.array([6, 1])
    ),
    "at each row's offset": (masks.longformer(2, PLACES, STEPS) & masks.causal()).at(
        jnp.array([6, 1])
    ),
}
BIASES: dict[str, PositionBias] = {
    "alibi": PositionBias(jnp.asarray(alibi_slopes(N))),
    "relative": PositionBias(
        jnp.float32(np.random.default_rng(3).normal(size=(8, N))),
        bidirectional=True,
        max_distance=7,
    ),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Set a block size that gives several blocks, the last one incomplete."""
    monkeypatch.setattr(importlib.import_module("heedful.model.attention.longformer"), "BLOCK", 4)


def arrays(dtype: Any = jnp.float32, q_length: int = T, kv_length: int = T) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(B, q_length, N, H), *[(B, kv_length, K, H)] * 2, (B, q_length, N, H)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def results(core, mask: AttentionMask, inputs, bias: PositionBias | None = None, **options: Any):
    """Return the output, and gradients for queries, keys, values and the bias."""
    *qkv, g = inputs

    @jax.jit
    def run(qkv, values):
        def attend(q, k, v, values):
            own = None if bias is None else bias.replace(values=values, q_offset=mask.q_offset)
            return core(AttentionCall(q, k, v, mask, own, **options))

        out, pull = jax.vjp(attend, *qkv, values)
        return out, *pull(g)

    return run(qkv, None if bias is None else bias.values)


def assert_equal_to_dense(mask: AttentionMask, inputs, **options: Any) -> None:
    expected, found = (
        results(dense, mask, inputs, **options),
        results(longformer, mask, inputs, **options),
    )
    for name, x, y in zip(("y", "dq", "dk", "dv", "dbias"), found, expected, strict=True):
        if y is not None:
            size = max(1.0, float(jnp.abs(y).max()))
            np.testing.assert_allclose(x, y, atol=3e-6 * size, err_msg=name)


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_with_a_window(name: str):
    lengths = {
        "at an offset": (7, S),
        "wider, at an offset": (3, S),
        "at each row's offset": (11, T),
        "sliding": (T, S),
    }
    assert_equal_to_dense(MASKS[name], arrays(jnp.float32, *lengths.get(name, (T, T))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("global, dilated, packed", "relative"),
        ("at each row's offset", "alibi"),
        ("wider, at an offset", "alibi"),
    ],
)
def test_biases_dropout_and_scale(name: str, bias: str):
    options: dict[str, Any] = {"scale": 0.7, "dropout_rate": 0.3, "dropout_key": jax.random.key(1)}
    assert_equal_to_dense(MASKS[name], arrays(), bias=BIASES[bias], **options)


def test_more_queries_than_keys():
    assert_equal_to_dense(masks.sliding(3, 2), arrays(jnp.float32, S, 7))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_query_that_sees_nothing_gives_zero_and_gets_zero(dtype):
    mask = MASKS["global, dilated, packed"]
    out, dq, dk, dv, _ = results(longformer, mask, arrays(dtype))
    empty = np.array(OWN) == 0
    for x in (out, dq, dk, dv):
        assert x.dtype == dtype
        assert np.isfinite(np.float32(x)).all()
        assert not np.asarray(x[empty]).any()
        assert np.asarray(x[~empty]).any()
    if dtype == jnp.bfloat16:
        exact = results(dense, mask, [jnp.float32(x) for x in arrays(dtype)])
        for x, y in zip((out, dq, dk, dv), exact, strict=False):
            np.testing.assert_allclose(np.float32(x), y, atol=0.02 * float(jnp.abs(y).max()))


def test_memory_and_arithmetic_grow_with_the_length_alone(monkeypatch):
    # If the length doubles, memory and FLOPs that the compiler counts must double; those of dense
    # would grow fourfold.
    monkeypatch.setattr(importlib.import_module("heedful.model.attention.longformer"), "BLOCK", 16)
    mask = masks.longformer(16, jnp.arange(2)[None])
    used = []
    for length in (512, 1024, 2048):
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        run = jax.value_and_grad(
            lambda q, k, v: longformer(AttentionCall(q, k, v, mask)).sum(), (0, 1, 2)
        )
        used.append(jax.jit(run).lower(*[shape] * 3).compile().memory_analysis())
    sizes = np.array([x.temp_size_in_bytes for x in used])
    assert sizes[2] - sizes[1] < 2.1 * (sizes[1] - sizes[0])
    scores = 2048 * 2048 * 2 * 4
    assert sizes[2] < scores / 10


def test_a_window_costs_no_more_than_the_keys_of_a_cache():
    mask = masks.causal() & masks.sliding(1_000_000, 0)

    def flops(T: int, S: int) -> float:
        q, kv = (jax.ShapeDtypeStruct((1, n, 2, 8), jnp.float32) for n in (T, S))
        run = jax.jit(lambda q, k, v, start: longformer(AttentionCall(q, k, v, mask.at(start))))
        compiled: Any = run.lower(q, kv, kv, jnp.int32(0)).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(1, 32) < 100 * 32 * 2 * 8
    assert flops(8, 32) < 100 * 8 * 32 * 2 * 8


def test_what_it_cannot_express_is_refused():
    q, k, v, _ = arrays()
    for mask in (masks.full(), masks.causal(), masks.sliding(3, None), SEGMENTS):
        with pytest.raises(MaskNotSupported, match=r"set model\.attention\.window.*cross_core"):
            longformer(AttentionCall(q, k, v, mask))
    with pytest.raises(ValueError, match="describes 23 q positions, there are 22"):
        longformer(AttentionCall(q[:, 1:], k, v, MASKS["segments"]))
    with pytest.raises(ValueError, match="needs a key"):
        longformer(AttentionCall(q, k, v, MASKS["sliding"], dropout_rate=0.1))


def test_rows_by_index():
    x, rows = jnp.arange(12.0).reshape(2, 6), jnp.array([[4, 0, -1], [5, 7, 2]])
    np.testing.assert_array_equal(take_rows(x, rows), [[4, 0, 0], [11, 11, 8]])
    new = -1 - jnp.arange(6.0).reshape(2, 3)
    expected = [[-2, 1, 2, 3, -1, 5], [6, 7, -6, 9, 10, -4]]
    np.testing.assert_array_equal(put_rows(x, rows, new), expected)
    np.testing.assert_array_equal(take_rows(x, rows[:1])[1], [10, 6, 6])
