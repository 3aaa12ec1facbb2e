"""Test the core splash, with interpreted kernels, against dense."""

import math
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from heedful.model import masks
from heedful.model.attention import AttentionCall
from heedful.model.attention.dense import dense
from heedful.model.attention.splash import splash
from heedful.model.config import ModelError
from heedful.model.masks import MaskNotSupported
from heedful.model.positions import PositionBias, alibi_slopes
from heedful.train.sharding import flax_rules

B, N, K, H = 2, 4, 2, 11


def segments(length: int, *cuts: int) -> jax.Array:
    """Return segments: a row of documents that end at `cuts`, and a row of padding."""
    row = np.zeros(length, np.int32)
    for cut in reversed(cuts):
        row[:cut] += 1
    return jnp.array([np.where(row == 0, 0, len(cuts) + 1 - row), np.zeros(length, np.int32)])


MASKS = {  # lengths of queries and keys, mask
    "full, no padding": (128, 256, masks.full()),
    "full, padded": (7, 131, masks.full()),
    "causal": (300, 300, masks.causal()),
    "causal, more queries": (137, 5, masks.causal()),
    "window of two sides": (131, 131, masks.sliding(3, 17)),
    "window, queries beyond the keys": (300, 7, masks.sliding(2, 0)),
    "packed": (137, 137, masks.packed(segments(137, 40, 41, 130))),
    "packed, causal, window": (
        300,
        300,
        masks.packed(segments(300, 40, 41, 290)) & masks.causal() & masks.sliding(31, 3),
    ),
    "cross, some see nothing": (
        13,
        129,
        masks.cross(segments(13, 3, 7, 11), segments(129, 80, 90)),
    ),
}


def inputs(queries: int, keys: int, dtype=jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (B, queries, N, H), (B, keys, K, H), (B, keys, K, H), (B, queries, N, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@partial(jax.jit, static_argnums=(0, 3))
def run(core, arrays, mask, scale=None):
    """Return the output and the gradients for queries, keys and values."""
    *arrays, g = arrays
    out, pull = jax.vjp(lambda *x: core(AttentionCall(*x, mask, scale=scale)), *arrays)
    return (out, *pull(g))


@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients(name: str, monkeypatch):
    # There are several blocks instead of one, so that some blocks are skipped.
    monkeypatch.setattr(sys.modules["heedful.model.attention.splash"], "_block", lambda length: 128)
    queries, keys, mask = MASKS[name]
    arrays = inputs(queries, keys)
    ours, wanted = (run(core, arrays, mask, 0.3) for core in (splash, dense))
    for x, y in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    empty = ~np.broadcast_to(np.asarray(mask.to_bool(queries, keys)).any(-1)[:, 0], (B, queries))
    assert empty.any() == (mask.q_segment_ids is not None or name.startswith("window, queries"))
    assert not np.asarray(ours[0])[empty].any()
    assert not np.asarray(ours[1])[empty].any()


def test_bfloat16_is_nearly_as_exact_as_dense():
    mask = MASKS["packed"][2] & masks.causal()
    exact = run(dense, inputs(137, 137), mask)
    arrays = inputs(137, 137, jnp.bfloat16)
    errors = []
    for core in (splash, dense):
        results = run(core, arrays, mask)
        assert all(x.dtype == jnp.bfloat16 for x in results)
        errors.append(
            [np.abs(x.astype(jnp.float32) - y).mean() for x, y in zip(results, exact, strict=True)]
        )
    # Multiplying q by the scale rounds q once more.
    assert (np.array(errors[0]) < 1.3 * np.array(errors[1])).all(), errors


ALIBI = PositionBias(jnp.asarray(alibi_slopes(N)))
REFUSED = {
    "bias": (masks.full(), {"bias": ALIBI}),
    "drop": (masks.full(), {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}),
    "prefix": (masks.prefix(jnp.array([1, 2])), {}),
    "dilation": (masks.sliding(2, 0, [1, 2, 1, 2]), {}),
    "global": (masks.longformer(2, jnp.array([[0]])), {}),
    "position 0": (masks.causal().at(3), {}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_other_masks_are_refused(words: str):
    mask, options = REFUSED[words]
    *arrays, _ = inputs(7, 7)
    with pytest.raises(MaskNotSupported, match=f"core 'splash' .*{words}"):
        splash(AttentionCall(*arrays, mask, **options))


def test_a_gpu_and_other_lengths_are_refused(monkeypatch):
    *arrays, _ = inputs(7, 7)
    with pytest.raises(ValueError, match="describes 137 q positions, there are 7"):
        splash(AttentionCall(*arrays, MASKS["packed"][2]))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ModelError, match="core splash needs a TPU, not gpu"):
        splash(AttentionCall(*arrays, masks.causal()))


def on_mesh(**sizes: int):
    """Return a mesh with axes of these sizes."""
    names = tuple(sizes)
    return jax.make_mesh(
        tuple(sizes.values()), names, devices=jax.devices()[: math.prod(sizes.values())],
        axis_types=(AxisType.Auto,) * len(names),
    )  # fmt: skip


def test_a_mesh_splits_rows_and_heads():
    queries, keys, mask = MASKS["packed"]
    arrays = inputs(queries, keys)
    wanted = run(splash, arrays, mask)

    @jax.jit
    def split(arrays, mask):
        with nn.logical_axis_rules(flax_rules()):
            return run.__wrapped__(splash, arrays, mask)

    with jax.set_mesh(on_mesh(data=2, fsdp=1, seq=1, tensor=2)):
        ours = split(arrays, mask)
        assert "shard_map" in str(jax.make_jaxpr(split)(arrays, mask))
    for x, y in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    with (
        jax.set_mesh(on_mesh(data=1, seq=2)),
        pytest.raises(ModelError, match=r"set train\.mesh\.seq to 1, or choose .* ring"),
    ):
        split.lower(arrays, mask)
