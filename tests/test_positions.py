"""Position signals against the formula of the paper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import WIDTH, tiny

from model.config import ModelError
from model.positions import PositionEmbedding, sinusoidal


def test_sinusoidal_is_the_formula_of_the_paper():
    positions = jnp.array([[0, 1, 2, 3, 500], [7, 0, 7, 4999, 1]])
    table = np.asarray(sinusoidal(positions, WIDTH))
    # arXiv:1706.03762 §3.5: PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(same).
    for b, t in np.ndindex(*positions.shape):
        for i in range(WIDTH // 2):
            angle = int(positions[b, t]) / 10000 ** (2 * i / WIDTH)
            assert table[b, t, i] == pytest.approx(math.sin(angle), abs=1e-3)
            assert table[b, t, WIDTH // 2 + i] == pytest.approx(math.cos(angle), abs=1e-3)
    assert np.abs(table[0, :4]).max() <= 1


def test_learned_positions_are_rows_of_a_table_that_ends():
    module = PositionEmbedding(tiny(positions_kind="learned", positions_max_length=5))
    positions = jnp.array([[4, 0, 2]])
    params = module.init(jax.random.key(0), positions)
    table = np.asarray(params["params"]["table"].value)  # type: ignore[union-attr]
    assert table.shape == (5, WIDTH)
    np.testing.assert_array_equal(module.apply(params, positions)[0], table[[4, 0, 2]])  # type: ignore
    with pytest.raises(ModelError, match=r"7 tokens .*max_length = 5"):
        module.apply(params, jnp.zeros((3, 7), jnp.int32))


def test_no_positions():
    module = PositionEmbedding(tiny(positions_kind="none"))
    assert module.apply({}, jnp.zeros((3, 5), jnp.int32)) == 0.0
