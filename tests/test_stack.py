"""Test stacks of blocks: decoding with a cache, intermediate values and training."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax.traverse_util import flatten_dict
from plain import Plain
from tiny import (
    HEADS,
    LAYERS,
    POSITIONS,
    PREFIX,
    SEGMENTS,
    SOURCE,
    SOURCE_SEGMENTS,
    TOKENS,
    WIDTH,
    B,
    S,
    T,
    init,
    tiny,
)

from heedful.model.stack import KEPT
from heedful.model.transformer import build, empty_cache

close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


# With a cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "core"),
    quick.only(
        [("rotary", "dense"), ("relative", "flash")],
        [(kind, "dense") for kind in POSITIONS]
        + [(kind, "flash") for kind in ("rotary", "alibi", "relative")],  # The core gets positions.
    ),
)
def test_a_decoder_decodes_with_a_cache_as_it_was_taught(kind: str, core: str):
    config = tiny("decoder_only", attention_core=core, **POSITIONS[kind])
    model, params = init(config)
    rows = np.arange(B)[:, None]
    # Chunks of columns per row: first all rows are at the same position. Then each row has its own
    # position, and some rows write a position again. The last chunk has single tokens.
    chunks = [
        (0, np.array([[0, 1]] * B)),
        ([2, 1, 0], np.array([[2, 3], [1, 2], [0, 1]])),
        ([4, 3, 2], np.array([[4], [3], [2]])),
    ]

    @jax.jit
    def run(params):
        decode = partial(model.apply, {"params": params}, method="decode")
        cache, by_chunks = empty_cache(config, B, T + 2), []
        for offset, columns in chunks:
            logits, cache = decode(TOKENS[rows, columns], cache=cache, offset=jnp.array(offset))
            by_chunks.append(logits)

        def step(cache, t):
            token = jax.lax.dynamic_slice_in_dim(TOKENS, t, 1, axis=1)
            logits, cache = decode(token, cache=cache, offset=t)
            return cache, logits[:, 0]

        _, one_by_one = jax.lax.scan(step, empty_cache(config, B, T), jnp.arange(T))
        whole = model.apply({"params": params}, TOKENS)
        return whole, by_chunks, jnp.swapaxes(one_by_one, 0, 1)

    whole, by_chunks, one_by_one = run(params)
    close(one_by_one, whole)
    for (_, columns), logits in zip(chunks, by_chunks, strict=True):
        close(logits, whole[rows, columns])


def test_a_prefix_is_read_into_the_cache_as_one_chunk():
    config = tiny("decoder_only", **POSITIONS["relative"])
    model, params = init(config)
    run = jax.jit(partial(model.apply, {"params": params}), static_argnames="method")
    whole = run(TOKENS, prefix_len=jnp.array(PREFIX))
    start = {"cache": empty_cache(config, B, T), "offset": 0, "prefix_len": jnp.array(PREFIX)}
    logits, cache = run(TOKENS[:, :3], **start, method="decode")
    close(logits, whole[:, :3])
    logits, _ = run(TOKENS[:, 3:], cache=cache, offset=3, method="decode")
    close(logits, whole[:, 3:])


def test_an_encoder_decoder_decodes_with_a_cache_as_it_was_taught():
    config = tiny(**POSITIONS["relative"])  # Both stacks have them; others: test_decoding.
    model, params = init(config)
    real = jnp.array(np.minimum(SOURCE_SEGMENTS, 1))

    @jax.jit
    def run(params):
        whole = model.apply({"params": params}, TOKENS, SOURCE, encoder_segment_ids=real)
        encoded = model.apply({"params": params}, SOURCE, real, method="encode")
        decode = partial(model.apply, {"params": params}, method="decode")
        first = {"cache": empty_cache(config, B, T + 2), "offset": jnp.int32(0)}
        logits, cache = decode(TOKENS[:, :2], encoded, real, **first)

        def step(cache, t):  # The cache holds keys and values of the source.
            token = jax.lax.dynamic_slice_in_dim(TOKENS, t, 1, axis=1)
            logits, cache = decode(token, None, real, cache=cache, offset=t)
            return cache, logits[:, 0]

        _, rest = jax.lax.scan(step, cache, jnp.arange(2, T))
        return whole, jnp.concatenate([logits, jnp.swapaxes(rest, 0, 1)], 1)

    whole, decoded = run(params)
    close(decoded, whole)


# Intermediate values ----------------------------------------------------------------------------


def meet(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a[:, :, None] == b[:, None]) & (b > 0)[:, None]


def test_intermediates_are_those_of_the_pass():
    config = tiny(norm_position="pre", remat="full", encoder_layers=LAYERS + 1)
    model, params = init(config)
    watch = jax.jit(partial(model.apply, mutable="intermediates"))
    segments, source_segments = jnp.array(SEGMENTS), jnp.array(SOURCE_SEGMENTS)
    logits, sown = watch(
        {"params": params},
        TOKENS,
        SOURCE,
        segment_ids=segments,
        encoder_segment_ids=source_segments,
    )
    encoder, decoder = (sown["intermediates"][name]["blocks"] for name in ("encoder", "decoder"))
    plain = Plain(config, params)
    source = SOURCE, SOURCE_SEGMENTS, np.arange(S)[None]
    close(logits, plain(TOKENS, SEGMENTS, np.arange(T)[None], source=source))

    # The last norm and the head get the last hidden states ...
    (hidden,) = decoder["hidden"]
    assert hidden.shape == (LAYERS, B, T, WIDTH)
    p = plain.params["decoder"]
    close(plain.logits(plain.norm(p["norm"], np.asarray(hidden[-1], np.float64))), logits)
    # ... and a block gets the hidden states of the block before.
    block = jax.tree.map(lambda x: x[1], p["blocks"])
    x = plain.norm(block["self_attention_norm"], np.asarray(hidden[0], np.float64))
    q, k = (plain.linear(block["self_attention"][name], x) for name in ("query", "key"))
    scores = np.einsum("btnh,bsnh->bnts", q, k.repeat(2, axis=2)) / np.sqrt(q.shape[-1])
    seen = meet(SEGMENTS, SEGMENTS) & np.tri(T, dtype=bool)
    expected = np.exp(scores) * seen[:, None]
    expected /= np.maximum(expected.sum(-1, keepdims=True), 1e-300)
    close(decoder["self_attention"]["weights"][0][1], expected)

    for where, layers, name, allowed in (
        (encoder, LAYERS + 1, "self_attention", meet(SOURCE_SEGMENTS, SOURCE_SEGMENTS)),
        (decoder, LAYERS, "self_attention", seen),
        (decoder, LAYERS, "cross_attention", meet(SEGMENTS, SOURCE_SEGMENTS)),
    ):
        (weights,) = where[name]["weights"]
        assert weights.shape == (layers, B, HEADS, *allowed.shape[1:])
        everywhere = np.broadcast_to(allowed[:, None], weights.shape)
        np.testing.assert_array_equal(weights > 0, everywhere)
        # The weights of a query sum to 1, or to 0 in padding.
        np.testing.assert_allclose(weights.sum(-1), everywhere.any(-1), atol=1e-6)


# In training ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("core", ["dense", "flash"])
def test_remat_and_unroll_change_no_value_and_no_gradient(core: str):
    def value_and_gradient(**changes):
        rates = {"dropout": 0.2, "attention_dropout": 0.3, "feed_forward_dropout": 0.4}
        changes |= {"attention_core": core}
        model, params = init(tiny("decoder_only", **rates, **changes))

        @jax.jit
        @jax.value_and_grad
        def loss(params):
            rngs = {"dropout": jax.random.key(3)}
            logits: Any = model.apply({"params": params}, TOKENS, deterministic=False, rngs=rngs)
            return jnp.sum(jnp.sin(logits))

        return loss(params)

    value, gradient = value_and_gradient()
    for remat, unroll in (("full", 2), ("attention", 1)):
        other_value, other_gradient = value_and_gradient(remat=remat, unroll=unroll)
        np.testing.assert_allclose(other_value, value, rtol=1e-5)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), other_gradient, gradient
        )


@pytest.mark.parametrize(("unroll", "taught"), [(None, LAYERS), (1, 1)])
def test_the_loop_over_layers_is_none_in_decoding(unroll: int | None, taught: int):
    model = build(tiny("decoder_only", unroll=unroll))
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    teach = jax.make_jaxpr(model.apply)(params, TOKENS)
    cache = empty_cache(model.config, B, T)
    decode = jax.make_jaxpr(partial(model.apply, method="decode"))
    assert f" unroll={taught}\n" in str(teach)
    assert f" unroll={LAYERS}\n" in str(decode(params, TOKENS, cache=cache, offset=jnp.int32(0)))


@pytest.mark.slow
def test_each_rematerialisation_keeps_less_than_the_one_before():
    kept = []
    for remat in ("none", "dots", "attention", "full"):
        model, params = init(tiny("decoder_only", norm_position="pre", remat=remat))
        loss = lambda params, model=model: jnp.sum(model.apply({"params": params}, TOKENS))  # noqa: E731
        _, pull = jax.eval_shape(partial(jax.vjp, loss), params)
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(pull)))
    assert kept == sorted(set(kept), reverse=True)


@pytest.mark.slow
def test_dots_keeps_what_every_linear_map_of_a_block_gives():
    options = {"window": 1, "global_tokens": 1, "global_projections": True}
    changes = {f"attention_{name}": x for name, x in options.items()}
    _, params = init(tiny("encoder_only", feed_forward_gated=True, **changes))
    paths = flatten_dict(params["encoder"]["blocks"])
    assert {path[-2] for path in paths if path[-1] == "kernel"} == set(KEPT["dots"])
    assert {path[-2] for path in paths if "self_attention" in path} == set(KEPT["attention"])


def test_dropout_acts_at_each_place_in_training_only():
    places = ("dropout", "attention_dropout", "feed_forward_dropout")
    model, params = init(tiny("decoder_only", **dict.fromkeys(places, 0.5)))
    quiet = Plain(model.config, params)(TOKENS, np.ones((B, T)), np.arange(T)[None])
    with pytest.raises(Exception, match="dropout"):  # Training needs a key.
        jax.eval_shape(partial(model.apply, deterministic=False), {"params": params}, TOKENS)
    close(jax.jit(model.apply)({"params": params}, TOKENS), quiet)
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
    # Each of two blocks adds 1 to all elements; with dropout it adds 1 / (1 - rate) or 0.
    config = tiny("decoder_only", dropout=0.5, norm_position="pre", positions_kind="none")
    model, params = init(config)
    params = jax.tree.map(jnp.zeros_like, params)
    params["decoder"]["blocks"]["feed_forward"]["down"]["bias"] += 1.0
    train = partial(model.apply, deterministic=False, mutable="intermediates")
    rngs = {"dropout": jax.random.key(0)}
    _, sown = jax.jit(train)({"params": params}, TOKENS, rngs=rngs)
    added = sown["intermediates"]["decoder"]["blocks"]["hidden"][0][-1]
    shares = [(added == value).mean() for value in (0, 2, 4)]
    # The shares would be 1/2, 0 and 1/2 if both layers had the same dropout mask.
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.15)
