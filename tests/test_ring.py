"""Test the core ring on eight devices against dense on one device."""

import math
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from heedful.model import masks
from heedful.model.attention import AttentionCall
from heedful.model.attention.dense import dense
from heedful.model.attention.ring import Ring, ring
from heedful.model.config import ModelError
from heedful.model.masks import MaskNotSupported
from heedful.model.positions import PositionBias, alibi_slopes
from heedful.train.sharding import flax_rules

B, T, N, K, H = 2, 24, 6, 2, 5
SEQ_4 = {"data": 1, "fsdp": 1, "seq": 4, "tensor": 1}
EVERY = {"data": 2, "fsdp": 1, "seq": 2, "tensor": 2}
DOCUMENTS = masks.packed(
    jnp.array([[1] * 5 + [2] * 11 + [3] * 3 + [0] * 5, [0] * 4 + [1] * 20], jnp.int32)
)
ALIBI = PositionBias(jnp.asarray(alibi_slopes(N)))
T5 = PositionBias(
    jnp.asarray(np.random.default_rng(5).normal(size=(8, N)), jnp.float32),
    bidirectional=True,
    max_distance=11,
)
DROP = {"dropout_rate": 0.3, "dropout_key": jax.random.key(7)}
CASES = {  # mesh, mask, other arguments, number of keys
    "full": (SEQ_4, masks.full(), {}, T),
    "causal": (SEQ_4, masks.causal(), {"scale": 0.7}, T),
    "causal, packed, dropout": (SEQ_4, masks.causal() & DOCUMENTS, DROP, T),
    "packed": (EVERY, DOCUMENTS, {}, T),
    "window with dilation by head": (EVERY, masks.sliding(3, 2, [1, 1, 2, 1, 3, 2]), {}, T),
    "window and global tokens": (EVERY, masks.longformer(2, jnp.array([[0, 13], [9, -1]])), {}, T),
    "prefix, T5's bias": (EVERY, masks.prefix(jnp.array([7, 0])), {"bias": T5}, T),
    "causal, packed, bias, dropout": (
        EVERY,
        masks.causal() & DOCUMENTS,
        {**DROP, "bias": ALIBI},
        T,
    ),
    "cross": (
        EVERY,
        masks.cross(DOCUMENTS.q_segment_ids, jnp.array([[1] * 3 + [2] * 7, [2] * 10])),
        {},
        10,
    ),
}


def on_mesh(sizes: dict[str, int]):
    devices = jax.devices()[: math.prod(sizes.values())]
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices, axis_types=types)


def inputs(keys: int, dtype=jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, keys, K, H), (B, keys, K, H), (B, T, N, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def run(core, arrays, mask, sizes, bias=None, **options):
    """Return the output, and gradients for queries, keys, values and the bias."""

    @jax.jit
    def both(arrays, mask, values):
        def attend(q, k, v, values):
            own = None if bias is None else bias.replace(values=values)
            return core(AttentionCall(q, k, v, mask, own, **options))

        with nn.logical_axis_rules(flax_rules()):
            *arrays, g = arrays
            out, pull = jax.vjp(attend, *arrays, values)
            return (out, *pull(g))

    values = jnp.zeros(()) if bias is None else bias.values
    with jax.set_mesh(on_mesh(sizes)):
        return jax.device_get(both(arrays, mask, values))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, monkeypatch):
    if "packed" in name:  # A chunk has several blocks.
        monkeypatch.setattr(sys.modules["heedful.model.attention.ring"], "_block", lambda chunk: 3)
    sizes, mask, options, keys = CASES[name]
    arrays = inputs(keys)
    ours = run(ring, arrays, mask, sizes, **options)
    wanted = run(dense, arrays, mask, dict.fromkeys(SEQ_4, 1), **options)
    for x, y in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)
    empty = ~np.broadcast_to(np.asarray(mask.to_bool(T, keys)).any((1, 3)), (B, T))
    assert empty.any() == (mask.q_segment_ids is not None)
    assert not np.asarray(ours[0])[empty].any()
    assert not np.asarray(ours[1])[empty].any()


def test_bfloat16_is_nearly_as_exact_as_dense():
    mask = masks.causal() & DOCUMENTS
    exact = run(dense, inputs(T), mask, dict.fromkeys(SEQ_4, 1))
    errors = []
    for core, sizes in ((ring, SEQ_4), (dense, dict.fromkeys(SEQ_4, 1))):
        results = run(core, inputs(T, jnp.bfloat16), mask, sizes)[:4]
        assert all(x.dtype == jnp.bfloat16 for x in results)
        errors.append(
            [np.abs(np.float32(x) - y).mean() for x, y in zip(results, exact, strict=False)]
        )
    # The backward pass starts from the rounded output.
    assert (np.array(errors[0]) <= 1.2 * np.array(errors[1])).all(), errors


def test_a_causal_mask_gives_every_device_the_same_work():
    """The test counts tiles that are not empty: each of 4 devices has 9 of the 8 x 8 tiles."""
    layout = Ring((), ("seq",), (), 4, (B, K, N // K, T, T), 1.0, 0.0, is_balanced=True)
    chunk = T // 8
    seen = np.asarray(masks.causal().to_bool(T, T))[0, 0]
    places = [np.asarray(layout.index(jnp.int32(device), T // 4)) for device in range(4)]
    assert sorted(np.concatenate(places)) == list(range(T))
    work = [
        sum(
            seen[np.ix_(rows, range(start, start + chunk))].any()
            for rows in np.split(mine, 2)
            for start in range(0, T, chunk)
        )
        for mine in places
    ]
    assert work == [9] * 4


def test_a_mesh_or_a_length_that_does_not_fit_is_refused():
    *arrays, _ = inputs(T)
    with pytest.raises(ModelError, match=r"core ring .* set train\.mesh\.seq to at least 2"):
        ring(AttentionCall(*arrays, masks.causal()))
    with pytest.raises(MaskNotSupported, match=r"core 'ring' .* does not support a cache"):
        ring(AttentionCall(*arrays, masks.causal().at(3)))
    cases = [
        ([x[:, :20] for x in arrays], masks.causal(), "queries into 8 parts, but 20 is no"),
        ([arrays[0][:, :22], *arrays[1:]], masks.full(), "queries into 4 parts, but 22 is no"),
        ([arrays[0], *(x[:, :22] for x in arrays[1:])], masks.full(), "keys into 4 parts, but 22"),
    ]
    with jax.set_mesh(on_mesh(SEQ_4)), nn.logical_axis_rules(flax_rules()):
        for arrays, mask, words in cases:
            with pytest.raises(ModelError, match=f"core ring cuts {words}"):
                jax.eval_shape(lambda *x: ring(AttentionCall(*x, mask)), *arrays)  # noqa: B023
        with pytest.raises(ValueError, match="describes 24 q positions, there are 20"):
            jax.eval_shape(lambda *x: ring(AttentionCall(*x, DOCUMENTS)), *cases[0][0])
    thirds = on_mesh({**EVERY, "data": 1, "tensor": 3})
    with (
        jax.set_mesh(thirds),
        nn.logical_axis_rules(flax_rules()),
        pytest.raises(ModelError, match="heads into 3 parts, but 2 is no multiple of 3"),
    ):
        jax.eval_shape(lambda *x: ring(AttentionCall(*x, masks.full())), *inputs(T)[:3])


def test_no_array_is_as_long_as_the_sequence():
    """The test reads one device's program: forward and backward through layers with one mask."""
    length, devices, heads, block = 4096, 8, 2, 256
    mesh = on_mesh({**SEQ_4, "seq": devices})

    def loss(q, k, v):
        with nn.logical_axis_rules(flax_rules()):
            layer = lambda q, _: (ring(AttentionCall(q, k, v, masks.causal())), None)  # noqa: E731
            return jax.lax.scan(layer, q, length=2)[0].sum()

    sharding = NamedSharding(mesh, PartitionSpec(None, "seq"))
    array = jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32, sharding=sharding)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(array, array, array).compile()
    text = compiled.as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text
    found = re.findall(r"(?:f32|pred)\[([\d,]+)\]", text)
    shapes = [[int(size) for size in shape.split(",")] for shape in found]
    assert max(map(max, shapes)) <= length // devices
    assert max(map(math.prod, shapes)) <= heads * block**2  # one tile, not all tiles
