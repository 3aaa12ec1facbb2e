"""Turning scores into sequences: greedy, sampling and beam search, on the device from end to end.

All loops take `step(tokens [R, 1], cache, position) -> (logits [R, V], cache)` and begin with the
last token of each row so far and the position where it stands, one for all rows or one for each:
how a cache is filled up to there is the caller's business.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from heedful.model.axes import target_platform
from heedful.model.linear import MAX_ROWS_TRANSPOSED

BLOCK = 32  # scores of which `block_top_k` looks at the highest first

Position = Int[Array, ""] | Int[Array, " R"]
Ends = int | tuple[int, ...]
Step = Callable[[Int[Array, "R 1"], Any, Position], tuple[Float[Array, "R V"], Any]]


class Sampling(NamedTuple):
    """How the next token is chosen."""

    temperature: float = 0.0
    """0: the likeliest token."""
    top_k: int = 0
    """Among the likeliest k; 0: all."""
    top_p: float = 1.0
    """Among the smallest set of this probability (arXiv:1904.09751)."""
    min_p: float = 0.0
    """Among those of this share of the likeliest one's probability (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Against tokens that the row holds already (arXiv:1909.05858 §4.1)."""
    never: tuple[int, ...] = ()
    """Tokens that are not chosen."""


class Decoded(NamedTuple):
    """Chosen tokens, 0 beyond the end, how many, and the sum of their log-probabilities."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    scores: Float[Array, " B"]


class DecodeState(NamedTuple):
    """Rows that are being written, between two calls of `decode_until`."""

    time: Int[Array, ""]
    """Tokens written in the longest row."""
    last: Int[Array, " B"]
    start: Int[Array, ""] | Int[Array, " B"]
    """Where the first `last` stood."""
    limits: Int[Array, " B"]
    done: Bool[Array, " B"]
    decoded: Decoded
    keys: Any
    seen: Bool[Array, "B V"] | None
    cache: Any


def init_decode(
    last: Int[Array, " B"],
    cache: Any,
    *,
    start: Int[Array, ""] | Int[Array, " B"],
    limits: Int[Array, " B"],
    max_steps: int,
    keys: jax.Array | None = None,
    seen: Bool[Array, "B V"] | None = None,
) -> DecodeState:
    """Rows that end in the tokens `last`, at position `start`, with nothing written yet.

    Row b gets at most `limits[b]` tokens, none if that is 0. `keys` [B] holds one random key per
    row, so that a row's text does not depend on its neighbours; `seen` says which tokens a row
    holds already.
    """
    batch = last.shape[0]
    nothing = Decoded(
        tokens=jnp.zeros((batch, max_steps), jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        scores=jnp.zeros(batch, jnp.float32),
    )
    return DecodeState(
        time=jnp.int32(0),
        last=last.astype(jnp.int32),
        start=start,
        limits=limits,
        done=limits <= 0,
        decoded=nothing,
        keys=keys,
        seen=seen,
        cache=cache,
    )


def decode_until(
    step: Step, rows: DecodeState, until: Int[Array, ""] | int, *, eos_id: Ends, sampling: Sampling
) -> DecodeState:
    """Writes on, token by token, until rows hold `until` tokens or all have ended.

    Each token of `eos_id` ends a row. No token has the id -1, so -1 leaves the end to the limits.
    """
    if sampling.temperature > 0.0 and rows.keys is None:
        raise ValueError(f"temperature = {sampling.temperature} needs random keys; 0 is greedy")
    _require_seen(sampling.repetition_penalty, rows.seen)
    index = jnp.arange(rows.last.shape[0])
    until = jnp.minimum(until, rows.decoded.tokens.shape[1])

    def unfinished(rows: DecodeState):
        return (rows.time < until) & ~jnp.all(rows.done)

    def body(rows: DecodeState) -> DecodeState:
        t, done, (tokens, lengths, scores) = rows.time, rows.done, rows.decoded
        logits, cache = step(rows.last[:, None], rows.cache, rows.start + t)
        logits = penalise(logits.astype(jnp.float32), rows.seen, sampling.repetition_penalty)
        logits = _without(logits, sampling.never)
        chosen = _choose(logits, rows.keys, t, sampling)
        gain = logits[index, chosen] - logsumexp_given_max(logits, jnp.max(logits, axis=-1))
        seen = None if rows.seen is None else rows.seen.at[index, chosen].set(True)
        chosen = jnp.where(done, 0, chosen)
        return rows._replace(
            time=t + 1,
            last=chosen,
            done=done | _ends(chosen, eos_id) | (t + 1 >= rows.limits),
            decoded=Decoded(
                tokens=tokens.at[:, t].set(chosen),
                lengths=lengths + ~done,
                scores=jnp.where(done, scores, scores + gain),
            ),
            seen=seen,
            cache=cache,
        )

    return jax.lax.while_loop(unfinished, body, rows)


def sample(
    step: Step,
    last: Int[Array, " B"],
    cache: Any,
    *,
    max_steps: int,
    eos_id: Ends,
    sampling: Sampling = Sampling(),  # noqa: B008
    **rows: Any,
) -> Decoded:
    """Token by token until all rows have ended: `init_decode` and all of `decode_until`."""
    begun = init_decode(last, cache, max_steps=max_steps, **rows)
    return decode_until(step, begun, max_steps, eos_id=eos_id, sampling=sampling).decoded


def _choose(
    logits: jax.Array, keys: jax.Array | None, t: jax.Array, sampling: Sampling
) -> jax.Array:
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    kept = cut_tail(logits, sampling.top_k, sampling.top_p, sampling.min_p)
    draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, t), row))
    return draw(keys, kept).astype(jnp.int32)


def penalise(
    logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"] | None, penalty: float
) -> Float[Array, "*B V"]:
    """Positive logits of tokens in `seen` divided by `penalty`, negative ones multiplied."""
    if seen is None or penalty == 1.0:
        return logits
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _without(logits: Float[Array, "B V"], never: tuple[int, ...]) -> Float[Array, "B V"]:
    """-inf for the tokens that are not chosen."""
    return logits.at[:, jnp.array(never)].set(-jnp.inf) if never else logits


def _ends(tokens: Int[Array, "*B"], eos_id: Ends) -> Bool[Array, "*B"]:
    return jnp.isin(tokens, jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32)))


def _require_seen(penalty: float, seen: jax.Array | None) -> None:
    if penalty != 1.0 and seen is None:
        raise ValueError(f"repetition_penalty = {penalty} needs the tokens that rows hold: seen")


def cut_tail(
    logits: Float[Array, "B V"], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Array, "B V"]:
    """-inf outside the `top_k` likeliest tokens, of those outside the smallest set of probability
    `top_p`, and below `min_p` times the highest probability; ties stay together."""
    if top_k > 0:
        best, _ = _both(jax.lax.top_k(logits, min(top_k, logits.shape[-1])))
        logits = jnp.where(logits < best[:, -1:], -jnp.inf, logits)
    if top_p < 1.0:
        probabilities = jax.nn.softmax(logits)
        logits = jnp.where(probabilities < _nucleus(probabilities, top_p), -jnp.inf, logits)
    if min_p > 0.0:
        lowest = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


def _nucleus(probabilities: Float[Array, "B V"], mass: float) -> Float[Array, "B 1"]:
    """The highest threshold above which the probabilities sum to at least `mass`.

    Found by halving: positive floats are ordered as their bits are, so 30 sums tell it exactly, in
    a fraction of the time of sorting a large vocabulary.
    """

    def halve(_: Any, between: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = between
        middle = (low + high) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
        total = jnp.sum(probabilities, axis=-1, keepdims=True, where=probabilities >= threshold)
        enough = total >= mass
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros((probabilities.shape[0], 1), jnp.int32)
    above_one = jnp.full_like(low, 0x3F800001)
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, above_one))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def block_top_k(
    scores: Float[Array, "B V"], count: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """`jax.lax.top_k`, ties and all, on a CPU in half of its time or less.

    The highest lie in those blocks whose maxima are the highest: the others are not searched.
    """
    size = scores.shape[1]
    if target_platform() != "cpu" or size < 4 * BLOCK * count:
        best, index = jax.lax.top_k(scores, count)
        return best, index
    full, rows = size - size % BLOCK, jnp.arange(len(scores))[:, None]
    if len(scores) > MAX_ROWS_TRANSPOSED:
        peaks = jnp.max(scores[:, :full].reshape(len(scores), -1, BLOCK), axis=2)
        at = lambda places: scores[rows, places]  # noqa: E731
    else:  # As `logsumexp_given_max` reads them.
        columns = scores.T
        peaks = jnp.max(columns[:full].reshape(-1, BLOCK, len(scores)), axis=1).T
        at = lambda places: columns[places, rows]  # noqa: E731
    chosen = jnp.sort(_both(jax.lax.top_k(peaks, count))[1])  # The first wins a tie.
    places = (chosen[..., None] * BLOCK + jnp.arange(BLOCK)).reshape(len(scores), -1)
    rest = jnp.broadcast_to(jnp.arange(full, size), (len(scores), size - full))
    places = jnp.concatenate([places, rest], axis=1)
    inside = at(places)
    best, index = _both(jax.lax.top_k(inside, count))
    return best, jnp.take_along_axis(places, index, axis=1)


def logsumexp_given_max(
    logits: Float[Array, "B V"], most: Float[Array, " B"]
) -> Float[Array, " B"]:
    """log(sum(exp(logits))) of each row, whose highest is `most`.

    Of few rows with V in front, as `transposed_matmul` leaves them: a CPU would turn everything
    around before.
    """
    if len(logits) > MAX_ROWS_TRANSPOSED:
        return most + jnp.log(jnp.sum(jnp.exp(logits - most[:, None]), axis=1))
    return most + jnp.log(jnp.sum(jnp.exp(logits.T - most), axis=0))


def _both(best: Any) -> Any:
    """Values and indices of `top_k`: where XLA sees that one of them is not used, it sorts all."""
    return jax.lax.optimization_barrier(best)


def length_penalty(length: jax.Array | int, exponent: float, offset: int) -> jax.Array | float:
    """((offset + length) / (offset + 1))^exponent (arXiv:1609.08144 §7), which divides scores."""
    return ((offset + length) / (offset + 1.0)) ** exponent


def beam_search(
    step: Step,
    last: Int[Array, " B"],
    cache: Any,
    *,
    start: Int[Array, ""] | Int[Array, " B"],
    limits: Int[Array, " B"],
    max_steps: int,
    eos_id: Ends,
    width: int,
    exponent: float,
    offset: int = 5,
    early_stopping: bool | str = "never",
    repetition_penalty: float = 1.0,
    never: tuple[int, ...] = (),
    seen: Bool[Array, "B V"] | None = None,
) -> Decoded:
    """The best of `width` hypotheses per row, by log-probability over length penalty.

    The rule is that of Hugging Face transformers. Of the extensions of all living hypotheses the
    likeliest `width` may be finished: those that end, and all of them at the limit of the row. The
    likeliest others live on. A row stops with `early_stopping`

    True: when `width` hypotheses are finished,
    False: when the worst of these is as good as the best living one would be if it ended now,
    "never": when no living hypothesis can become better than the best finished one, whatever its
    length. That is exact, since log-probabilities only fall.

    The repetition penalty changes log-probabilities, not logits as in sampling, and their sum is
    then below 1. Tokens in `never` are not chosen, and keep their share of the probability, as
    there. `cache` must have `repeat(width)` and `reorder(parents [B, W])`.
    """
    _require_seen(repetition_penalty, seen)
    batch = last.shape[0]
    rows = jnp.arange(batch)[:, None]
    penalty = partial(length_penalty, exponent=exponent, offset=offset)
    largest = penalty(jnp.maximum(limits, 1))  # An empty row divides by it, too.
    start = jnp.repeat(start, width) if start.ndim else start
    candidates = width * (1 + max(1, np.size(eos_id)))
    # The finished hypotheses that decide when a row stops: the best one where that rule is exact.
    deciding = 1 if early_stopping == "never" else width

    def unfinished(state):
        t, done = state[0], state[1]
        return (t < max_steps) & ~jnp.all(done)

    def body(state):
        t, done, last, live, live_scores, best, best_length, finished, seen, cache = state
        logits, cache = step(last.reshape(-1, 1), cache, start + t)
        logits = logits.astype(jnp.float32)
        if seen is not None:
            logits -= logsumexp_given_max(logits, jnp.max(logits, axis=-1))[:, None]
            logits = penalise(logits, seen, repetition_penalty)

        # So many that `width` stay alive, if all hypotheses may end in all ways.
        children = min(candidates, logits.shape[-1])
        log_probs, tokens = block_top_k(_without(logits, never), children)
        if seen is None:
            most = jnp.max(logits, axis=-1) if never else log_probs[:, 0]
            log_probs -= logsumexp_given_max(logits, most)[:, None]
        totals = live_scores.reshape(-1, 1) + log_probs
        scores, picks = jax.lax.top_k(totals.reshape(batch, -1), candidates)
        parents, chosen = picks // children, tokens.reshape(batch, -1)[rows, picks]
        sequences = live[rows, parents].at[:, :, t].set(chosen)
        ended = _ends(chosen, eos_id) | (t + 1 >= limits)[:, None]

        normalised = jnp.where(ended, scores / penalty(t + 1), -jnp.inf)[:, :width]
        normalised = jnp.where(done[:, None], -jnp.inf, normalised)
        winner = jnp.argmax(normalised, axis=1)
        better = normalised[rows[:, 0], winner] > finished[:, 0]
        best = jnp.where(better[:, None], sequences[rows[:, 0], winner], best)
        best_length = jnp.where(better, t + 1, best_length)
        finished = jnp.concatenate([finished, normalised], axis=1)
        finished = jax.lax.top_k(finished, deciding)[0]

        scores = jnp.where(ended, -jnp.inf, scores)
        scores, order = jax.lax.top_k(scores, width)
        parents, last = parents[rows, order], chosen[rows, order]
        live = jnp.where(done[:, None, None], live, sequences[rows, order])
        live_scores = jnp.where(done[:, None], live_scores, scores)
        best_living = live_scores[:, 0] / (largest if early_stopping == "never" else penalty(t + 1))
        stops = best_living <= finished[:, -1]
        if early_stopping is True:
            stops = finished[:, -1] > -jnp.inf
        done |= stops | (t + 1 >= limits)

        if seen is not None:
            seen = seen[(rows * width + parents).reshape(-1)]
            seen = seen.at[jnp.arange(len(seen)), last.reshape(-1)].set(True)
        cache = cache.reorder(parents)
        return t + 1, done, last, live, live_scores, best, best_length, finished, seen, cache

    # All hypotheses of a row are equal at first: only one of them may have children.
    one_alive = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf)
    first = (
        jnp.int32(0),
        limits <= 0,
        jnp.repeat(last.astype(jnp.int32)[:, None], width, axis=1),
        jnp.zeros((batch, width, max_steps), jnp.int32),
        jnp.broadcast_to(one_alive, (batch, width)),
        jnp.zeros((batch, max_steps), jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.full((batch, deciding), -jnp.inf),
        None if seen is None else jnp.repeat(seen, width, axis=0),
        cache.repeat(width),
    )
    state = jax.lax.while_loop(unfinished, body, first)
    _, _, _, _, _, best, best_length, finished, _, _ = state
    scores = jnp.where(limits > 0, finished[:, 0], 0.0)
    return Decoded(tokens=best, lengths=best_length, scores=scores)
