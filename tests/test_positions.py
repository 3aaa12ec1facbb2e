"""Test positions: sinusoids, rotations and biases against the formulas of the papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from tiny import HEADS, POSITIONS, WIDTH, tiny

from heedful.model.config import ModelError, RotaryConfig
from heedful.model.positions import (
    PositionBias,
    PositionEmbedding,
    alibi_slopes,
    relative_buckets,
    rotary_frequencies,
    rotation,
    sinusoidal,
)


@pytest.mark.parametrize("width", [WIDTH, 512])
def test_sinusoidal_is_the_formula_of_the_paper(width: int):
    # arXiv:1706.03762 §3.5: PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(same).
    positions = np.array([[*range(1030), 500], [*range(16_000, 17_029), 123_456, (1 << 20) - 1]])
    angles = positions[..., None] / 10_000 ** (2 * np.arange(width // 2) / width)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    table = np.asarray(jax.jit(sinusoidal, static_argnums=1)(jnp.array(positions), width))
    np.testing.assert_array_equal(table[0, :1024], np.float32(expected[0, :1024]))
    np.testing.assert_allclose(table, expected, rtol=0, atol=2e-7)
    assert np.abs(table).max() <= 1
    beyond = np.asarray(sinusoidal(jnp.array([[-1, 1 << 20]]), width))
    assert np.isnan(beyond).all()


def test_learned_positions_are_rows_of_a_table_that_ends():
    module = PositionEmbedding(tiny(positions_kind="learned", positions_max_length=5))
    positions = jnp.array([[4, 0, 2]])
    params = module.init(jax.random.key(0), positions)
    table = np.asarray(params["params"]["table"].value)  # type: ignore[union-attr]
    assert table.shape == (5, WIDTH)
    np.testing.assert_array_equal(module.apply(params, positions)[0], table[[4, 0, 2]])  # type: ignore
    with pytest.raises(ModelError, match=r"7 tokens .*max_length = 5"):
        module.apply(params, jnp.zeros((3, 7), jnp.int32))


@pytest.mark.parametrize("kind", ["none", "rotary", "alibi", "relative"])
def test_nothing_is_added_to_embeddings_by_other_kinds(kind: str):
    module = PositionEmbedding(tiny(**POSITIONS[kind]))
    assert module.apply({}, jnp.zeros((3, 5), jnp.int32)) == 0.0


# Rotary -----------------------------------------------------------------------------------------

SCALINGS = {
    "none": RotaryConfig(base=500_000),
    "linear": RotaryConfig(scaling="linear", factor=2.5),
    # The config of LLaMA 3.1, and one in which all but two wavelengths are between the two bounds.
    "llama3": RotaryConfig(base=500_000, scaling="llama3", factor=8),
    "llama3 between": RotaryConfig(
        base=100,
        scaling="llama3",
        factor=32,
        low_frequency_factor=1.5,
        high_frequency_factor=80,
        original_length=512,
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_frequencies(name: str):
    config = SCALINGS[name]
    frequencies = rotary_frequencies(26, config)
    assert frequencies.dtype == np.float32
    expected = [plain.rotary_frequency(i, 26, config) for i in range(13)]
    np.testing.assert_allclose(frequencies, expected, rtol=1e-5)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    config = SCALINGS["llama3"]
    ratio = rotary_frequencies(128, RotaryConfig(base=500_000)) / rotary_frequencies(128, config)
    assert (np.diff(ratio) >= 0).all()
    wavelengths = 2 * math.pi * 500_000 ** (np.arange(64) / 64)
    np.testing.assert_array_equal(ratio == 1, wavelengths < 8192 / 4)
    np.testing.assert_allclose(ratio[wavelengths > 8192], 8, rtol=1e-6)


def test_rotary_turns_pairs_by_their_angle():
    config = RotaryConfig(base=50)
    positions = np.array([[0, 1, 2, 17, 3], [1000, 4, 0, 7, 5]])
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 14))
    turned = rotation(jnp.array(positions), 14, config)(jnp.float32(x))
    np.testing.assert_allclose(turned, plain.turn(x, positions, config), atol=2e-4)
    np.testing.assert_array_equal(turned[0, 0], jnp.float32(x)[0, 0])  # Position 0 is not rotated.
    assert rotation(jnp.array(positions), 14, config)(jnp.bfloat16(x)).dtype == jnp.bfloat16


def test_rotary_scores_depend_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.float32(np.tile(rng.normal(size=14), (1, 3, 1, 1))) for _ in range(2))
    config = RotaryConfig(base=50)

    def score(q_at: int, k_at: int) -> float:
        where = jnp.array([[q_at, k_at, 0]])
        turned = rotation(where, 14, config)
        return float(jnp.sum(turned(q)[0, 0] * turned(k)[0, 1]))

    for distance in (-11, 0, 1, 5):
        scores = [score(at, at - distance) for at in (11, 12, 60, 200)]
        np.testing.assert_allclose(scores, scores[0], atol=1e-4)
    assert abs(score(11, 10) - score(11, 12)) > 0.1  # The sign of a distance matters.


# Biases by distance -----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 16, 20])
def test_alibi_slopes(heads: int):
    slopes = alibi_slopes(heads)
    assert slopes.dtype == np.float32
    np.testing.assert_allclose(slopes, plain.alibi_slopes(heads), rtol=1e-6)


def test_alibi_slopes_as_the_paper_prints_them():
    np.testing.assert_array_equal(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    # 16 heads also have the geometric means of neighbours, and of 1 and the first slope. 12 heads
    # have the first 4 of these means.
    np.testing.assert_allclose(alibi_slopes(16), [2 ** (-i / 2) for i in range(1, 17)], rtol=1e-6)
    assert alibi_slopes(12)[8:].tolist() == alibi_slopes(16)[:8:2].tolist()
    assert alibi_slopes(12)[:8].tolist() == alibi_slopes(8).tolist()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 5), (12, 50), (64, 1000)])
def test_relative_buckets(buckets: int, max_distance: int, bidirectional: bool):
    # Powers of two are bounds between buckets: a logarithm that is rounded down would move them.
    distances = np.arange(-1100, 1101)
    expected = [
        plain.relative_bucket(int(d), buckets, max_distance, bidirectional) for d in distances
    ]
    args = buckets, max_distance, bidirectional
    for run in (relative_buckets, jax.jit(relative_buckets, static_argnums=(1, 2, 3))):
        np.testing.assert_array_equal(run(jnp.array(distances), *args), expected)


def test_relative_buckets_as_t5_has_them():
    near = relative_buckets(jnp.arange(-9, 10), 32, 128, True)
    assert near.tolist() == [8, 8, 7, 6, 5, 4, 3, 2, 1, 0, *range(17, 24), 24, 24]


@pytest.mark.parametrize(
    ("kind", "offset"),
    [
        ("alibi", None),
        ("alibi", [4, 0, 9]),
        ("causal", 4),
        ("causal", [4, 0, 9]),
        ("bidirectional", None),
    ],
)
def test_tiles_of_a_bias_are_parts_of_the_whole(kind: str, offset: int | list[int] | None):
    table = np.random.default_rng(0).normal(size=(8, HEADS))
    starts = np.atleast_1d(offset or 0)
    distances = np.arange(13) - (starts[:, None, None] + np.arange(5)[:, None])
    if kind == "alibi":
        bias = PositionBias(jnp.array(alibi_slopes(HEADS)))
        slopes = np.array(plain.alibi_slopes(HEADS))
        expected = -slopes[:, None, None] * np.abs(distances)[:, None]
    else:
        both = kind == "bidirectional"
        bias = PositionBias(jnp.float32(table), bidirectional=both, max_distance=7)
        buckets = np.vectorize(lambda d: plain.relative_bucket(int(d), 8, 7, both))(distances)
        expected = np.moveaxis(table[buckets], -1, 1)
    bias = bias.replace(q_offset=None if offset is None else jnp.array(offset))  # type: ignore
    whole = bias.tile(jnp.arange(5), jnp.arange(13))
    np.testing.assert_allclose(whole, expected, rtol=1e-6)
    rows, columns = np.array([3, 1]), np.array([12, 0, 7])
    part = bias.tile(jnp.array(rows), jnp.array(columns))
    np.testing.assert_array_equal(part, whole[:, :, rows][..., columns])
