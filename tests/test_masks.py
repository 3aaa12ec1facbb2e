"""Test masks against a predicate that loops over single pairs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from heedful.model import masks
from heedful.model.masks import AttentionMask

B, T, S, HEADS = 3, 5, 7, 2

# The facts of a mask as plain values; the naive predicate and the builders get the same facts.
Facts = dict[str, Any]


def naive(facts: Facts, b: int, n: int, i: int, j: int) -> bool:
    """Return True if head n of query row i in batch row b may look at key j."""
    offset = facts.get("offset", [0] * B)[b]
    p = i + offset
    if facts.get("causal") and j > p:
        return False
    if "prefix" in facts and j > p and j >= facts["prefix"][b]:
        return False
    if "window" in facts:
        left, right = facts["window"]
        places = facts.get("global", [[]] * B)[b]
        step = facts.get("dilation", [1] * HEADS)[n]
        near = (left is None or p - j <= left * step) and (right is None or j - p <= right * step)
        near = near and (p - j) % step == 0
        if not (near or p in places or j in places):
            return False
    if "segments" in facts:
        own, theirs = facts["segments"]
        if own[b][i] == 0 or own[b][i] != theirs[b][j]:
            return False
    return True


def naive_array(facts: Facts, q_length: int = T, kv_length: int = S) -> np.ndarray:
    allowed = np.zeros((B, HEADS, q_length, kv_length), bool)
    for place in np.ndindex(*allowed.shape):
        allowed[place] = naive(facts, *place)
    return allowed


def build(facts: Facts) -> AttentionMask:
    parts = []
    if facts.get("causal"):
        parts.append(masks.causal())
    if "prefix" in facts:
        parts.append(masks.prefix(jnp.array(facts["prefix"])))
    if "window" in facts:
        parts.append(masks.sliding(*facts["window"], facts.get("dilation")))
        if "global" in facts:
            parts[-1] = parts[-1].replace(global_index=jnp.array(facts["global"]))
    if "segments" in facts:
        parts.append(masks.cross(*(jnp.array(ids) for ids in facts["segments"])))
    mask = masks.all_of(parts)
    if "offset" in facts:
        offsets = facts["offset"]
        same = len(set(offsets)) == 1
        mask = mask.at(offsets[0] if same else jnp.array(offsets))
    return mask


def as_array(mask: AttentionMask, q_length: int = T, kv_length: int = S) -> np.ndarray:
    shape = (B, HEADS, q_length, kv_length)
    return np.broadcast_to(mask.to_bool(q_length, kv_length), shape)


sides = st.none() | st.integers(0, S)
ids = st.integers(0, 3)
rows = lambda n: st.lists(st.lists(ids, min_size=n, max_size=n), min_size=B, max_size=B)  # noqa: E731
facts_without_offset = st.fixed_dictionaries(
    {},
    optional={
        "causal": st.just(True),
        "prefix": st.lists(st.integers(0, S + 1), min_size=B, max_size=B),
        "window": st.tuples(sides, sides),
        "dilation": st.lists(st.integers(1, 3), min_size=HEADS, max_size=HEADS),
        "global": st.lists(
            st.lists(st.integers(-1, S), min_size=2, max_size=2), min_size=B, max_size=B
        ),
        "segments": st.tuples(rows(T), rows(S)),
    },
)
some_offset = st.integers(0, 3).map(lambda n: [n] * B) | st.lists(
    st.integers(0, 3), min_size=B, max_size=B
)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(facts=facts_without_offset, offset=st.none() | some_offset, data=st.data())
def test_a_mask_says_what_its_builders_say_and_tiles_are_its_parts(facts, offset, data):
    if offset is not None:
        facts["offset"] = offset
    mask, expected = build(facts), naive_array(facts)
    np.testing.assert_array_equal(as_array(mask), expected)
    q_index = np.array(data.draw(st.lists(st.integers(0, T - 1), min_size=2, max_size=2)))
    kv_index = np.array(data.draw(st.lists(st.integers(0, S - 1), min_size=3, max_size=3)))
    tile = mask.tile(jnp.array(q_index), jnp.array(kv_index))
    part = expected[:, :, q_index][..., kv_index]
    np.testing.assert_array_equal(np.broadcast_to(tile, part.shape), part)
    for q_size, kv_size in ((2, 3), (5, 1), (1, 7)):
        shape = (B, -(-T // q_size), -(-S // kv_size))
        some, every = (np.broadcast_to(x, shape) for x in mask.blocks(T, S, q_size, kv_size))
        for b, i, j in np.ndindex(shape):
            block = expected[b, :, i * q_size : (i + 1) * q_size, j * kv_size : (j + 1) * kv_size]
            assert some[b, i, j] or not block.any()
            assert block.all() or not every[b, i, j]


def test_blocks_that_need_no_work_are_found():
    """Results for blocks of one query and one key are exact; larger blocks are checked by hand."""
    segments = [[1, 1, 2, 2, 0, 0, 0]] * B
    own = jnp.array(segments)
    for mask in (
        masks.causal(),
        masks.causal().at(jnp.array([0, 1, 2])),
        masks.prefix(jnp.array([0, 3, 5])),
        masks.sliding(1, 2) & masks.packed(own),
        masks.longformer(1, jnp.array([[0], [2], [-1]])),
        masks.causal() & masks.packed(own),
    ):
        exact = as_array(mask, S, S)[:, 0]
        some, every = (np.broadcast_to(x, exact.shape) for x in mask.blocks(S, S, 1, 1))
        np.testing.assert_array_equal(some, exact)
        if mask.global_index is None:
            np.testing.assert_array_equal(every, exact)
    some, every = masks.causal().blocks(S, S, 3, 2)
    np.testing.assert_array_equal(some[0], [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(every[0], [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])


@settings(max_examples=50, deadline=None)
@given(first=facts_without_offset, second=facts_without_offset)
@example(first={"prefix": [0, 3, 5]}, second={"prefix": [2, 1, 7]})
def test_and_allows_what_both_allow(first, second):
    # Other tests check the facts that two windows cannot combine, or that only one mask may have.
    second = {name: value for name, value in second.items() if name not in ("dilation", "global")}
    if "window" in second:
        first = {name: value for name, value in first.items() if name not in ("dilation", "global")}
    a, b = build(first), build(second)
    expected = naive_array(first) & naive_array(second)
    np.testing.assert_array_equal(as_array(a & b), expected)
    np.testing.assert_array_equal(as_array(b & a), expected)


def test_builders():
    lengths = [0, 3, 7]
    segments = [[1, 1, 2, 2, 2, 0, 0], [1, 2, 3, 3, 0, 0, 0], [5, 5, 5, 5, 5, 5, 9]]
    places = [[0, -1], [0, 1], [2, 0]]
    real = [[int(j < n) for j in range(S)] for n in lengths]
    cases = [
        (masks.full(), {}),
        (masks.causal(), {"causal": True}),
        (masks.prefix(jnp.array(lengths)), {"prefix": lengths}),
        (masks.padding(jnp.array(lengths), S), {"segments": (real, real)}),
        (masks.packed(jnp.array(segments)), {"segments": (segments, segments)}),
        (masks.sliding(2, None), {"window": (2, None)}),
        (masks.sliding(0, 1), {"window": (0, 1)}),
        (masks.longformer(1, jnp.array(places)), {"window": (1, 1), "global": places}),
        (masks.sliding(1, 2, (3, 1)), {"window": (1, 2), "dilation": (3, 1)}),
        (masks.sliding(1, 2, (1, 1)), {"window": (1, 2)}),
    ]
    for mask, facts in cases:
        np.testing.assert_array_equal(as_array(mask, S, S), naive_array(facts, S, S))
        assert mask.is_full == (facts == {})


def test_global_tokens_combine_with_everything_but_another_window():
    places = [[0]] * B
    wide = masks.longformer(2, jnp.array(places))
    facts = {"window": (2, 2), "global": places}
    segments = [[1, 1, 1, 2, 2, 2, 0]] * B
    for other, extra in (
        (masks.causal(), {"causal": True}),
        (masks.packed(jnp.array(segments)), {"segments": (segments, segments)}),
        (masks.sliding(1, 2), {"window": (1, 2), "global": [[]] * B}),
    ):
        expected = naive_array(facts, S, S) & naive_array(extra, S, S)
        np.testing.assert_array_equal(as_array(wide & other, S, S), expected)
        np.testing.assert_array_equal(as_array(other & wide, S, S), expected)
    for other in (masks.sliding(3, 0), masks.longformer(1, jnp.array(places))):
        for pair in ((wide, other), (other, wide)):
            with pytest.raises(ValueError, match="global tokens"):
                pair[0] & pair[1]
    for pair in (
        (masks.sliding(1, 1, (1, 2)), masks.sliding(1, 1)),
        (wide, masks.sliding(2, 2, (2, 2))),
    ):
        with pytest.raises(ValueError, match="dilation"):
            pair[0] & pair[1]


def test_an_offset_moves_no_mask_that_was_built_without_it():
    offset = jnp.array(2)
    segments = jnp.ones((B, T), jnp.int32)
    for other in (masks.sliding(1, 0), masks.causal().at(3)):
        for pair in ((masks.causal().at(offset), other), (other, masks.causal().at(offset))):
            with pytest.raises(ValueError, match="two positions"):
                pair[0] & pair[1]
    # These two masks have the same offset, and segments have no offset.
    both = masks.causal().at(offset) & masks.sliding(1, 0).at(offset)
    both = both & masks.cross(segments, jnp.ones((B, S), jnp.int32))
    facts = {"causal": True, "window": (1, 0), "offset": [2] * B}
    np.testing.assert_array_equal(as_array(both), naive_array(facts))


def test_bad_shapes_are_refused(unchecked):
    ids = jnp.ones((B, T), jnp.int32)
    with pytest.raises(ValueError, match=r"\[B\], not float32"):
        masks.prefix(jnp.ones(B))
    with pytest.raises(ValueError, match="prefix lengths"):
        masks.prefix(jnp.ones((B, 1), jnp.int32))
    with pytest.raises(ValueError, match="padding lengths"):
        masks.padding(jnp.int32(3), T)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        masks.packed(ids[0])
    with pytest.raises(ValueError, match="-1"):
        masks.sliding(-1, 0)
    with pytest.raises(ValueError, match=r"\[B, g\], not bool"):
        masks.longformer(1, ids > 0)
    for steps in ((), (1, 0)):
        with pytest.raises(ValueError, match="dilation needs steps"):
            masks.sliding(1, 1, steps)
    for ask in (masks.packed(ids).to_bool, partial(masks.packed(ids).blocks, q_size=2, kv_size=3)):
        with pytest.raises(ValueError, match="describes 5 kv positions, there are 7"):
            ask(T, S)
        with pytest.raises(ValueError, match="describes 5 q positions, there are 3"):
            ask(3, T)


def test_a_mask_takes_memory_linear_in_its_length():
    length = 1009

    @jax.jit
    def everything(lengths, ids):
        mask = masks.prefix(lengths) & masks.packed(ids) & masks.padding(lengths, length)
        return mask & masks.longformer(3, ids[:, :2])

    shapes = jax.ShapeDtypeStruct((B,), jnp.int32), jax.ShapeDtypeStruct((B, length), jnp.int32)
    mask = jax.eval_shape(everything, *shapes)
    leaves = jax.tree.leaves(mask)
    assert len(leaves) == 4
    assert all(leaf.size <= B * length for leaf in leaves)
    assert (mask.causal, mask.window) == (True, (3, 3))  # static facts, which jit preserves
