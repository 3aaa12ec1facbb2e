"""Turning scores into sequences: greedy, sampling and beam search, on the device from end to end.

Both loops take `step(tokens [R, 1], cache, position) -> (logits [R, V], cache)` and begin with the
logits of the first token to choose, so how a cache is filled is the caller's business.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Step = Callable[[Int[Array, "R 1"], Any, Int[Array, ""]], tuple[Float[Array, "R V"], Any]]


class Decoded(NamedTuple):
    """Chosen tokens, 0 after the end token, and the sum of their log-probabilities."""

    tokens: Int[Array, "B T"]
    scores: Float[Array, " B"]


def sample(
    step: Step,
    logits: Float[Array, "B V"],
    cache: Any,
    *,
    start: int,
    limits: Int[Array, " B"],
    max_steps: int,
    eos_id: int,
    keys: jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Decoded:
    """Token by token, the likeliest (temperature 0) or a random one, until all rows have ended.

    `logits` score position `start`; row b gets at most `limits[b]` tokens, none if that is 0.
    `keys` [B] holds one random key per row, so that a row's text does not depend on its neighbours;
    `top_k` (0: all) and `top_p` (arXiv:1904.09751) cut the tail before drawing.
    """
    if temperature > 0.0 and keys is None:
        raise ValueError(f"temperature = {temperature} needs random keys; 0 is greedy")

    def choose(logits: jax.Array, t: jax.Array) -> jax.Array:
        if temperature == 0.0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        kept = cut_tail(logits / temperature, top_k, top_p)
        draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, t), row))
        return draw(keys, kept).astype(jnp.int32)

    def unfinished(state):
        t, done = state[0], state[1]
        return (t < max_steps) & ~jnp.all(done)

    def body(state):
        t, done, logits, tokens, scores, cache = state
        chosen = choose(logits, t)
        log_probs = jax.nn.log_softmax(logits)
        gain = jnp.take_along_axis(log_probs, chosen[:, None], axis=1)[:, 0]
        scores = jnp.where(done, scores, scores + gain)
        chosen = jnp.where(done, 0, chosen)
        tokens = tokens.at[:, t].set(chosen)
        done |= (chosen == eos_id) | (t + 1 >= limits)
        logits, cache = step(chosen[:, None], cache, start + t)
        return t + 1, done, logits.astype(jnp.float32), tokens, scores, cache

    batch = logits.shape[0]
    tokens = jnp.zeros((batch, max_steps), jnp.int32)
    scores = jnp.zeros(batch, jnp.float32)
    first = (jnp.int32(0), limits <= 0, logits.astype(jnp.float32), tokens, scores, cache)
    _, _, _, tokens, scores, _ = jax.lax.while_loop(unfinished, body, first)
    return Decoded(tokens, scores)


def cut_tail(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """-inf outside the `top_k` likeliest tokens and the smallest set of probability `top_p`."""
    if top_k > 0:
        lowest = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if top_p < 1.0:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        lowest = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


def length_penalty(length: jax.Array | int, exponent: float) -> jax.Array | float:
    """((5 + length) / 6)^exponent (arXiv:1609.08144 §7); scores are divided by it."""
    return ((5.0 + length) / 6.0) ** exponent


def beam_search(
    step: Step,
    logits: Float[Array, "B V"],
    cache: Any,
    *,
    start: int,
    limits: Int[Array, " B"],
    max_steps: int,
    eos_id: int,
    width: int,
    exponent: float,
) -> Decoded:
    """The best of `width` hypotheses per row, by log-probability over length penalty.

    A row ends when no living hypothesis can still beat its best finished one, which is exact since
    log-probabilities only fall. A row that never finishes within `limits[b]` tokens gives its best
    living hypothesis. `cache` must have `repeat(width)` and `reorder(rows)`.
    """
    batch, vocab = logits.shape
    rows = jnp.arange(batch)[:, None]

    def unfinished(state):
        t, done = state[0], state[1]
        return (t < max_steps) & ~jnp.all(done)

    def body(state):
        t, done, log_probs, live, live_scores, best, best_score, cache = state
        # Twice the width: at most `width` of these can be ends, so `width` stay alive.
        totals = (live_scores[..., None] + log_probs).reshape(batch, width * vocab)
        scores, picks = jax.lax.top_k(totals, 2 * width)
        parents, chosen = picks // vocab, (picks % vocab).astype(jnp.int32)
        sequences = live[rows, parents].at[:, :, t].set(chosen)
        ended = chosen == eos_id

        normalised = jnp.where(ended, scores / length_penalty(t + 1, exponent), -jnp.inf)
        winner = jnp.argmax(normalised, axis=1)
        better = (normalised[rows[:, 0], winner] > best_score) & ~done
        best = jnp.where(better[:, None], sequences[rows[:, 0], winner], best)
        best_score = jnp.where(better, normalised[rows[:, 0], winner], best_score)

        scores = jnp.where(ended, -jnp.inf, scores)
        scores, order = jax.lax.top_k(scores, width)
        live = jnp.where(done[:, None, None], live, sequences[rows, order])
        live_scores = jnp.where(done[:, None], live_scores, scores)
        attainable = live_scores[:, 0] / length_penalty(limits, exponent)
        done |= (attainable <= best_score) | (t + 1 >= limits)

        cache = cache.reorder((rows * width + parents[rows, order]).reshape(-1))
        tokens = chosen[rows, order].reshape(-1, 1)
        logits, cache = step(tokens, cache, start + t)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, width, vocab)
        return t + 1, done, log_probs, live, live_scores, best, best_score, cache

    # All hypotheses of a row are equal at first: only one of them may have children.
    one_alive = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    first = (
        jnp.int32(0),
        limits <= 0,
        jnp.broadcast_to(log_probs[:, None], (batch, width, vocab)),
        jnp.zeros((batch, width, max_steps), jnp.int32),
        jnp.broadcast_to(one_alive, (batch, width)),
        jnp.zeros((batch, max_steps), jnp.int32),
        jnp.full(batch, -jnp.inf),
        cache.repeat(width),
    )
    state = jax.lax.while_loop(unfinished, body, first)
    _, _, _, live, live_scores, best, best_score, _ = state
    finished = jnp.isfinite(best_score)
    tokens = jnp.where(finished[:, None], best, live[:, 0])
    partial = live_scores[:, 0] / length_penalty(limits, exponent)
    return Decoded(tokens, jnp.where(finished, best_score, partial))
