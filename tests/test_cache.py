"""Test caches: decoding with a cache gives the logits of a full forward pass."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from tiny import LAYERS, POSITIONS, B, V, init, tiny

from heedful.model import masks
from heedful.model.attention import AttentionCall
from heedful.model.attention.dense import dense
from heedful.model.attention.kernel_sums import FeatureState
from heedful.model.cache import BeamCache, KVCache, WindowCache, new_cache
from heedful.model.config import PerformerConfig
from heedful.model.ops.caches import MAX_SHARED_BEAMS
from heedful.model.transformer import empty_cache

close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
LENGTH, WINDOW, CHUNK = 17, 3, 7
TOKENS = jnp.array(np.random.default_rng(0).integers(0, V, (B, LENGTH)))
LENGTHS = jnp.array([11, 2, 7])  # lengths of the prompts
STEPS = {"attention_dilation": (1, 2, 1, 1, 2, 2)}


def decoder(**changes: Any):
    positions = POSITIONS[changes.pop("positions", "relative")]
    options = {"positions_max_length": LENGTH, "attention_window": WINDOW}
    config = tiny("decoder_only", **positions | options | changes)
    return config, *init(config)


def fill(decode, cache, tokens, lengths, chunk=CHUNK):
    """Prefill a cache as generation does, with padding and a last chunk that overlaps."""
    total = tokens.shape[1]
    for begin in range(0, total, chunk):
        start = min(begin, total - chunk)
        places = start + jnp.arange(chunk)
        real = (places >= begin) & (places < lengths[:, None])
        rows = tokens[:, start : start + chunk]
        _, cache = decode(rows, cache=cache, offset=jnp.array(start), cache_write_mask=real)
    return cache


@pytest.mark.parametrize("kind", quick.only(["rotary", "dilated"], [*POSITIONS, "dilated"]))
def test_rows_of_different_lengths_roll_on_as_the_whole_would(kind: str):
    changes = STEPS if kind == "dilated" else {"positions": kind}
    config, model, params = decoder(**changes)

    @jax.jit
    def run(params):
        decode = partial(model.apply, {"params": params}, method="decode")
        junk = jnp.where(jnp.arange(LENGTH) < LENGTHS[:, None], TOKENS, 0)[:, :12]
        cache = fill(decode, empty_cache(config, B, LENGTH), junk, LENGTHS)

        def step(cache, t):
            token = jnp.take_along_axis(TOKENS, LENGTHS[:, None] + t, axis=1)
            logits, cache = decode(token, cache=cache, offset=LENGTHS + t)
            return cache, logits[:, 0]

        cache, logits = jax.lax.scan(step, cache, jnp.arange(6))
        return model.apply({"params": params}, TOKENS), jnp.swapaxes(logits, 0, 1), cache

    whole, logits, cache = run(params)
    close(logits, whole[np.arange(B)[:, None], LENGTHS[:, None] + np.arange(6)])
    slots = WINDOW * (2 if kind == "dilated" else 1) + 1
    assert cache.self_attention.k.shape[:3] == (LAYERS, B, slots)  # independent of the length
    np.testing.assert_array_equal(cache.self_attention.end, [LENGTHS + 6] * LAYERS)


@pytest.mark.parametrize("chunk", quick.only([4], [1, 3, 4, 5, LENGTH]))
def test_chunks_shorter_and_longer_than_the_window(chunk: int):
    config, model, params = decoder()
    decode = jax.jit(partial(model.apply, {"params": params}, method="decode"))
    cache, found = empty_cache(config, B, LENGTH), []
    for start in range(0, LENGTH, chunk):
        tokens = TOKENS[:, start : start + chunk]
        logits, cache = decode(tokens, cache=cache, offset=jnp.full(B, start))
        found.append(logits)
    close(jnp.concatenate(found, 1), jax.jit(model.apply)({"params": params}, TOKENS))


def test_a_prefix_is_read_as_one_chunk():
    config, model, params = decoder()
    prefix = jnp.array([6, 2, 5])
    decode = jax.jit(partial(model.apply, {"params": params}, method="decode"))
    whole, _ = decode(TOKENS[:, :9], prefix_len=prefix)
    real = jnp.arange(6) < prefix[:, None]
    start = {
        "cache": empty_cache(config, B, LENGTH),
        "offset": jnp.array(0),
        "cache_write_mask": real,
    }
    logits, cache = decode(TOKENS[:, :6], **start, prefix_len=prefix)
    close(logits[real], whole[:, :6][real])
    token = TOKENS[jnp.arange(B), prefix][:, None]
    logits, _ = decode(token, cache=cache, offset=prefix)
    close(logits[:, 0], whole[jnp.arange(B), prefix])
    # Generation decodes the last token of the prefix again, which the other tokens have seen.
    start["cache_write_mask"] = jnp.arange(6) < prefix[:, None] - 1
    _, cache = decode(TOKENS[:, :6], **start, prefix_len=prefix)
    token = TOKENS[jnp.arange(B), prefix - 1][:, None]
    logits, _ = decode(token, cache=cache, offset=prefix - 1)
    close(logits[:, 0], whole[jnp.arange(B), prefix - 1])


BEAMS: dict[str, dict[str, Any]] = {
    **{kind: {"positions": kind, "attention_window": None} for kind in POSITIONS},
    "window": {},
    "wide": {"attention_window": None},
    "global": {"attention_global_tokens": 1},
    "performer": {
        "positions": "rotary",
        "attention_window": None,
        "attention_core": "performer",
        "attention_performer": PerformerConfig(features=7, chunk=2),
    },
}


@pytest.mark.parametrize("kind", quick.only(["relative", "window", "wide", "performer"], BEAMS))
def test_hypotheses_go_on_from_one_another(kind: str):
    width, steps, rng = MAX_SHARED_BEAMS + 1 if kind == "wide" else 4, 6, np.random.default_rng(0)
    config, model, params = decoder(**BEAMS[kind])
    decode = jax.jit(partial(model.apply, {"params": params}, method="decode"))
    junk = jnp.where(jnp.arange(LENGTH) < LENGTHS[:, None], TOKENS, 1)
    cache = fill(decode, empty_cache(config, B, LENGTH), junk[:, :12], LENGTHS).repeat(width)
    others = {"window": WindowCache, "wide": KVCache, "performer": FeatureState}
    assert isinstance(cache.self_attention, others.get(kind, BeamCache))

    texts, ends = np.array(junk).repeat(width, 0), np.array(LENGTHS).repeat(width)
    whole, rows = jax.jit(model.apply), np.arange(B * width)
    for t in range(steps):
        texts[rows, ends + t] = last = rng.integers(0, V, B * width)
        logits, cache = decode(last[:, None], cache=cache, offset=jnp.array(ends + t))
        close(logits[:, 0], whole({"params": params}, texts)[rows, ends + t])
        parents = rng.integers(0, width, (B, width))
        cache = cache.reorder(jnp.array(parents))
        texts = texts[(np.arange(B)[:, None] * width + parents).ravel()]


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("kind", quick.only(["relative"], POSITIONS))
def test_a_token_reads_what_is_filled_and_little_more(kind: str, width: int, monkeypatch):
    monkeypatch.setattr("heedful.model.ops.caches.MIN_PREFIX", 2)
    config, model, params = decoder(positions=kind, attention_window=None)
    decode = jax.jit(partial(model.apply, {"params": params}, method="decode"))
    texts, cache = TOKENS.repeat(width, 0), empty_cache(config, B, LENGTH)
    cache = cache if width == 1 else cache.repeat(width)
    kept, half = cache.self_attention, LENGTH // 2
    # NaN in the unfilled half would appear in the logits if a step read this half.
    unread = kept.replace(v=kept.v.at[..., half * width :, :].set(jnp.nan))
    cache, found = cache.replace(self_attention=unread), []
    for t in range(LENGTH):
        if t == half:
            filled = cache.self_attention
            filled = filled.replace(v=jnp.nan_to_num(filled.v))
            cache = cache.replace(self_attention=filled)
        logits, cache = decode(texts[:, t : t + 1], cache=cache, offset=jnp.array(t))
        found.append(logits)
    close(jnp.concatenate(found, 1), jax.jit(model.apply)({"params": params}, texts))


def test_which_cache_a_model_has():
    window = tiny("decoder_only", attention_window=WINDOW)
    assert isinstance(new_cache(window, B, WINDOW + 2), WindowCache)
    assert isinstance(new_cache(window, B, WINDOW + 1), KVCache)  # not longer than a rolling cache
    seen = tiny("decoder_only", attention_window=WINDOW, attention_global_tokens=1)
    assert isinstance(new_cache(seen, B, 100), KVCache)
    assert isinstance(new_cache(tiny("decoder_only"), B, 100), KVCache)


def test_what_it_cannot_read_is_refused(unchecked):
    _, model, params = decoder()
    cache = empty_cache(model.config, B, LENGTH)
    decode = partial(model.apply, {"params": params}, TOKENS[:, :2], method="decode", cache=cache)
    with pytest.raises(ValueError, match=r"\.at\(t\)"):
        decode()
    further = WindowCache.zeros(tiny(attention_window=4), B, 4)
    q, k, v = jnp.zeros((3, B, 1, 3, 2))
    with pytest.raises(ValueError, match=r"3 positions before a token, but .* \(4, 4\)"):
        further.attend(dense, AttentionCall(q, k, v, masks.sliding(4, 4).at(0)))
    with pytest.raises(ValueError, match="describes 2 kv positions, there are 5"):
        decode(offset=0, segment_ids=jnp.ones((B, 2), int))
    beam = BeamCache.of(KVCache.zeros(tiny(), B, 4), 2)
    with pytest.raises(ValueError, match="6 x 2 tokens for 3 x 2 hypotheses"):
        beam.attend(dense, AttentionCall(*jnp.zeros((3, 6, 2, 3, 2)), masks.causal().at(0)))
