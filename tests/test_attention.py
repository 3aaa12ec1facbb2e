"""Test dense attention against loops in float64; other tests compare each core with dense."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from heedful.model import masks
from heedful.model.attention import CORES, AttentionCall, choose
from heedful.model.attention.dense import attention_weights, dense
from heedful.model.ops.dropout import dropout, keep, keep_at, mix
from heedful.model.positions import PositionBias

B, T, S, N, K, H = 2, 5, 7, 6, 3, 11

SEGMENTS = (
    jnp.array([[1, 1, 2, 2, 3], [0, 1, 1, 1, 1]]),  # No key has segment 3; 0 is padding.
    jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 0]]),
)
MASKS = {
    "full": masks.full(),
    "causal": masks.causal(),
    "causal at each row's offset": masks.causal().at(jnp.array([1, 2])),
    "prefix and window": masks.prefix(jnp.array([2, 4])) & masks.sliding(1, 3),
    "segments with empty rows": masks.cross(*SEGMENTS),
}


@struct.dataclass
class Given(PositionBias):
    """A bias with the given values [b, N, T, S]; `tile` returns a part of them."""

    def tile(self, q_index, kv_index):
        return self.values[:, :, q_index][..., kv_index]


def naive(q, k, v, allowed, bias, scale: float | None = None) -> np.ndarray:
    """Compute attention one query, one head and one key at a time."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, n in np.ndindex(*q.shape[:3]):
        head = n // (q.shape[2] // k.shape[2])
        seen = [s for s in range(k.shape[1]) if allowed[b, t, s]]
        scores = [scale * sum(q[b, t, n] * k[b, s, head]) + bias[b, n, t, s] for s in seen]
        total = sum(math.exp(score) for score in scores)
        for s, score in zip(seen, scores, strict=True):
            out[b, t, n] += math.exp(score) / total * v[b, s, head]
    return out


def inputs(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, N, T, S)
    return tuple(rng.normal(size=shape) for shape in shapes)


def as_array(mask: masks.AttentionMask) -> np.ndarray:
    return np.broadcast_to(mask.to_bool(T, S)[:, 0], (B, T, S))


@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients(name: str):
    mask, allowed = MASKS[name], as_array(MASKS[name])
    scale = {"causal": 1.0, "prefix and window": 0.7}.get(name)
    arrays = inputs()
    out, pull = jax.vjp(
        lambda q, k, v, bias: dense(AttentionCall(q, k, v, mask, Given(bias), scale)),
        *map(jnp.float32, arrays),
    )
    np.testing.assert_allclose(
        out, naive(*arrays[:3], allowed=allowed, bias=arrays[3], scale=scale), atol=4e-6
    )

    # Gradients of <g, out> along random directions, by central differences in float64.
    g = np.random.default_rng(1).normal(size=out.shape)
    gradients = pull(jnp.float32(g))
    directions = inputs(seed=2)
    for i, (gradient, direction) in enumerate(zip(gradients, directions, strict=True)):
        ends = []
        for sign in (1, -1):
            moved = list(arrays)
            moved[i] = arrays[i] + sign * 1e-5 * direction
            ends.append(np.sum(g * naive(*moved[:3], allowed=allowed, bias=moved[3], scale=scale)))
        expected = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), expected, atol=1e-4)


def test_weights_are_what_the_values_are_mixed_with():
    q, k, _, bias = inputs()
    mask = MASKS["segments with empty rows"]
    given = Given(jnp.float32(bias[:1]))  # one bias for all rows
    q32, k32 = jnp.float32(q), jnp.float32(k)
    weights = attention_weights(AttentionCall(q32, k32, k32, mask, given, 0.3))
    assert weights.shape == (B, K, N // K, T, S)
    # The value of each key is a one-hot vector, so that the output is the weights.
    names = np.broadcast_to(np.eye(S)[:, None], (B, S, K, S))
    mixed = naive(q, k, names, as_array(mask), bias[:1].repeat(B, 0), 0.3)
    np.testing.assert_allclose(weights.reshape(B, N, T, S), np.swapaxes(mixed, 1, 2), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_query_that_sees_nothing_gives_zero_and_gets_zero(dtype):
    q, k, v, _ = (jnp.asarray(x, dtype) for x in inputs())
    mask = MASKS["segments with empty rows"]
    empty = ~as_array(mask).any(-1)
    unseen = ~as_array(mask).any(1)
    assert empty.sum() == 2
    assert unseen.sum() == 3
    out, pull = jax.vjp(lambda q, k, v: dense(AttentionCall(q, k, v, mask)), q, k, v)
    dq, dk, dv = pull(jnp.ones_like(out) * 3)
    for x in (out, dq, dk, dv):
        assert x.dtype == dtype
        assert np.isfinite(np.float32(x)).all()
    assert not np.asarray(out[empty]).any()
    assert not np.asarray(dq[empty]).any()
    assert not np.asarray(dk[unseen]).any()
    assert not np.asarray(dv[unseen]).any()
    assert np.asarray(out[~empty]).all()
    # Output and gradients are 0 too if the mask allows no pair at all.
    nothing = masks.cross(jnp.zeros((B, T), jnp.int32), SEGMENTS[1])
    out, pull = jax.vjp(lambda q, k, v: dense(AttentionCall(q, k, v, nothing)), q, k, v)
    assert not any(np.asarray(x).any() for x in (out, *pull(jnp.ones_like(out))))


def test_a_masked_key_cannot_be_learned_around():
    q, k, v, bias = map(jnp.float32, inputs())
    mask = masks.causal() & masks.cross(jnp.ones((B, T), jnp.int32), SEGMENTS[1])
    allowed = as_array(mask)
    out = dense(AttentionCall(q, k, v, mask, Given(bias)))
    tempting = jnp.where(allowed[:, None], bias, 1e30)
    np.testing.assert_array_equal(dense(AttentionCall(q, k, v, mask, Given(tempting))), out)
    unseen = jnp.array(~allowed.any(1))[:, :, None, None]
    k, v = jnp.where(unseen, 1e15 * k, k), jnp.where(unseen, 1e15, v)
    np.testing.assert_array_equal(dense(AttentionCall(q, k, v, mask, Given(bias))), out)
    # A large negative bias on all allowed keys does not make the masked keys visible either.
    sunk = jnp.where(allowed[:, None], bias - 1e6, 0)
    np.testing.assert_allclose(dense(AttentionCall(q, k, v, mask, Given(sunk))), out, atol=0.3)


@pytest.mark.parametrize("name", ["full", "causal"])
def test_huge_scores_do_not_overflow(name: str):
    q, k, v, _ = map(jnp.float32, inputs())
    out, pull = jax.vjp(lambda q, k: dense(AttentionCall(1e9 * q, 1e9 * k, v, MASKS[name])), q, k)
    scores = np.einsum("btngh,bsnh->btngs", q.reshape(B, T, K, N // K, H), k)
    scores = np.where(as_array(MASKS[name])[:, :, None, None], scores, -np.inf)
    winner = np.argmax(scores, -1)  # The softmax of huge scores selects the largest score.
    expected = np.asarray(v)[np.arange(B)[:, None, None, None], winner, np.arange(K)[:, None]]
    np.testing.assert_array_equal(out, expected.reshape(out.shape))
    assert all(np.isfinite(x).all() for x in pull(out))


def test_bfloat16_computes_its_softmax_in_float32():
    # Scores are near 30. Rounding them to bfloat16 would change scores and weights by up to 0.06.
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(3 * rng.normal(size=(1, n, 1, 16)), jnp.bfloat16) for n in (3, S, S))
    for mask in (masks.full(), masks.sliding(1, 2)):
        out = dense(AttentionCall(q, k, v, mask))
        assert out.dtype == jnp.bfloat16
        allowed = np.broadcast_to(mask.to_bool(3, S)[:, 0], (1, 3, S))
        expected = naive(
            *(np.float64(x) for x in (q, k, v)), allowed=allowed, bias=np.zeros((1, 1, 3, S))
        )
        np.testing.assert_allclose(np.float64(out), expected, atol=0.03)


def test_dropout_of_weights():
    q, k, v, _ = map(jnp.float32, inputs())
    attend = lambda **drop: dense(AttentionCall(q, k, v, masks.causal(), **drop))  # noqa: E731
    key = jax.random.key(0)
    np.testing.assert_array_equal(attend(dropout_rate=0.0, dropout_key=key), attend())
    with pytest.raises(ValueError, match=r"rate 0\.3 needs a key"):
        attend(dropout_rate=0.3)
    keys = jax.random.split(key, 2000)
    samples = jax.vmap(lambda key: attend(dropout_rate=0.3, dropout_key=key))(keys)
    error = samples.std(0) / math.sqrt(len(keys))
    assert (jnp.abs(samples.mean(0) - attend()) < 5 * error).all()
    # The first query sees one key, whose weight is either dropped or divided by 0.7.
    assert set(np.unique(np.round(samples[:, :, 0] / attend()[:, 0], 3))) == {
        0.0,
        np.float32(1.429),
    }


def test_kept_elements_are_independent_of_key_and_place():
    rate, shape = 0.3, (31, 37, 41)
    # Two of these random keys share either one word or the sum of both words.
    words = jnp.array([(0, 1), (1, 1), (1, 0)], jnp.uint32)
    kept = [np.asarray(keep(each, shape, rate), float) - (1 - rate) for each in words]
    variance = rate * (1 - rate)
    noise = 5 / math.sqrt(kept[0].size)
    for x in kept:
        assert abs(x.mean()) < noise
        for axis in range(3):  # Neighbours are independent.
            along = np.moveaxis(x, axis, 0)
            assert abs((along[1:] * along[:-1]).mean()) / variance < noise
            assert abs(x.mean(axis)).max() < 6 * math.sqrt(variance / shape[axis])
    assert abs((kept[0] * kept[1]).mean()) / variance < noise
    assert abs((kept[1] * kept[2]).mean()) / variance < noise
    assert abs((kept[2] * kept[0]).mean()) / variance < noise
    np.testing.assert_array_equal(keep(words[2], shape, rate), kept[2] > 0)
    x, key = jnp.full(shape, 2.0), jax.random.wrap_key_data(words[0])
    np.testing.assert_allclose(dropout(x, rate, key), np.where(kept[0] > 0, 2 / 0.7, 0), rtol=1e-6)


def test_keys_of_the_kind_of_tpus_drop_too():
    x = jnp.ones((31, 997))
    one, same, other = (
        dropout(x, 0.25, jax.random.fold_in(jax.random.key(0, impl="rbg"), i)) for i in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    for dropped in (one, other):
        assert abs(jnp.mean(dropped == 0) - 0.25) < 5 * (0.25 * 0.75 / x.size) ** 0.5
    assert abs(jnp.mean((one == 0) & (other == 0)) - 0.25**2) < 5 * 0.25 / x.size**0.5


def test_an_element_is_kept_by_its_place_among_all():
    shape, words = (3, 5, 7), jnp.array([11, 13], jnp.uint32)
    hashed = mix(mix(jnp.arange(105, dtype=jnp.uint32).reshape(shape) ^ words[0]) ^ words[1])
    kept = keep(words, shape, 0.25)
    np.testing.assert_array_equal(kept, hashed >= 2**30)


@pytest.mark.parametrize("shape", [(128, 16, 1, 2048, 2048), (3, 2**16, 2**16)])
def test_rows_of_arrays_of_more_than_32_bits_are_dropped_apart(shape: tuple[int, ...]):
    key = jax.random.key_data(jax.random.key(0))
    zero, columns = np.zeros(1, int), np.arange(2048)
    kept = []
    # Consecutive rows of this loop are 2^32 elements apart.
    for row in range(0, shape[0], 2**32 // math.prod(shape[1:])):
        index = np.array([row]), *[zero] * (len(shape) - 2), columns
        kept.append(np.asarray(keep_at(key, index, shape, 0.5)) - 0.5)
    assert len(kept) > 1
    for i, x in enumerate(kept):
        assert abs(x.mean()) < 5 * 0.5 / math.sqrt(2048)
        for y in kept[:i]:
            assert abs((x * y).mean()) < 5 * 0.25 / math.sqrt(2048)


def test_shapes_that_do_not_fit_are_refused(unchecked):
    q, k, v, _ = map(jnp.float32, inputs())
    wrong = (
        (q[:, :, :5], k, v),  # 5 query heads for 3 key heads
        (q, k[:, :-1], v),
        (q[:1], k, v),
        (q[..., :-1], k, v),
        (q, k[:, :, :2], v),
    )
    for arrays in wrong:
        with pytest.raises(ValueError, match="shapes do not fit"):
            dense(AttentionCall(*arrays, masks.full()))
    with pytest.raises(ValueError, match="describes 5 kv positions, there are 7"):
        dense(AttentionCall(q, k, v, masks.packed(SEGMENTS[0])))


def test_choice_of_a_core():
    for platform in ("cpu", "gpu", "tpu"):
        for length in (7, 512):
            name, reason = choose("auto", platform, length)
            assert name in CORES
            assert platform in reason
    assert choose("auto", "cpu", 511)[0] == "dense"
    assert choose("auto", "cpu", 512)[0] == "flash"
    assert choose("auto", "cpu", 4096, queries=1)[0] == "dense"  # one query: decoding
    assert choose("auto", "cpu", 512, shards=2)[0] == "dense"  # flash would all-gather the sequence
    assert choose("dense", "cpu", 512) == ("dense", "chosen by model.attention.core")
