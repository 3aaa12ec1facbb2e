"""Greedy decoding and sampling: one token after another, computed entirely on the device.

The loops here and in `beam_search` take a function `step(tokens [R, 1], cache, position) ->
(logits [R, V], cache)` for R rows. They begin with the last token of each row and its position, a
single number or one for each row. The cache must already hold all tokens before the last token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from heedful.model.decoding.logits import cut_tail, exclude, penalise, require_seen
from heedful.model.ops.softmax import logsumexp_given_max

Position = Int[Array, ""] | Int[Array, " R"]
Ends = int | tuple[int, ...]
Step = Callable[[Int[Array, "R 1"], Any, Position], tuple[Float[Array, "R V"], Any]]


class Sampling(NamedTuple):
    """Rules for the choice of the next token."""

    temperature: float = 0.0
    """Number by which logits are divided; 0: always choose the likeliest token."""
    top_k: int = 0
    """Number of the likeliest tokens to choose among; 0: all."""
    top_p: float = 1.0
    """Probability of the smallest set of tokens to choose among (arXiv:1904.09751)."""
    min_p: float = 0.0
    """Least probability of a token, as a share of the highest one (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Penalty of tokens that the row holds already (arXiv:1909.05858 §4.1); 1: none."""
    never: tuple[int, ...] = ()
    """Ids of tokens that are never chosen."""


class Decoded(NamedTuple):
    """Chosen tokens (0 after the end), their number, and the sum of their log-probabilities."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    scores: Float[Array, " B"]


class DecodeState(NamedTuple):
    """Rows that are being decoded, between two calls of `decode_until`."""

    time: Int[Array, ""]
    """Number of tokens decoded in the longest row."""
    last: Int[Array, " B"]
    """Last token of each row."""
    start: Int[Array, ""] | Int[Array, " B"]
    """Position of the token `last` with which decoding began."""
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
    """Return the state of rows that end with the tokens `last`, at position `start`.

    Row b gets at most limits[b] tokens, and no token if limits[b] is 0. `keys` [B] has one random
    key per row, so that a row's text does not depend on other rows; None: greedy decoding only.
    `seen` is True for the tokens that a row already holds; None: no repetition penalty.
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
    step: Step, state: DecodeState, until: Int[Array, ""] | int, *, eos_id: Ends, sampling: Sampling
) -> DecodeState:
    """Decode token by token until rows hold `until` tokens or all rows have ended.

    Each id in `eos_id` ends a row; with -1, which is the id of no token, only the limits end rows.
    Raises ValueError for a temperature without keys and for a repetition penalty without `seen`.
    """
    if sampling.temperature > 0.0 and state.keys is None:
        raise ValueError(
            f"temperature = {sampling.temperature} needs random keys: give `keys`, or set "
            "temperature to 0 for greedy decoding"
        )
    require_seen(sampling.repetition_penalty, state.seen)
    index = jnp.arange(state.last.shape[0])
    until = jnp.minimum(until, state.decoded.tokens.shape[1])

    def unfinished(state: DecodeState):
        return (state.time < until) & ~jnp.all(state.done)

    def body(state: DecodeState) -> DecodeState:
        t, done, (tokens, lengths, scores) = state.time, state.done, state.decoded
        logits, cache = step(state.last[:, None], state.cache, state.start + t)
        logits = penalise(logits.astype(jnp.float32), state.seen, sampling.repetition_penalty)
        logits = exclude(logits, sampling.never)
        chosen = _choose(logits, state.keys, t, sampling)
        log_prob = logits[index, chosen] - logsumexp_given_max(logits, jnp.max(logits, axis=-1))
        seen = None if state.seen is None else state.seen.at[index, chosen].set(True)
        chosen = jnp.where(done, 0, chosen)
        return state._replace(
            time=t + 1,
            last=chosen,
            done=done | is_end(chosen, eos_id) | (t + 1 >= state.limits),
            decoded=Decoded(
                tokens=tokens.at[:, t].set(chosen),
                lengths=lengths + ~done,
                scores=jnp.where(done, scores, scores + log_prob),
            ),
            seen=seen,
            cache=cache,
        )

    return jax.lax.while_loop(unfinished, body, state)


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
    """Decode until all rows have ended; `rows` are the other arguments of `init_decode`."""
    state = init_decode(last, cache, max_steps=max_steps, **rows)
    return decode_until(step, state, max_steps, eos_id=eos_id, sampling=sampling).decoded


def is_end(tokens: Int[Array, "*B"], eos_id: Ends) -> Bool[Array, "*B"]:
    """Return True for tokens that end a row."""
    return jnp.isin(tokens, jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32)))


def _choose(
    logits: jax.Array, keys: jax.Array | None, t: jax.Array, sampling: Sampling
) -> jax.Array:
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    kept = cut_tail(logits, sampling.top_k, sampling.top_p, sampling.min_p)
    draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, t), row))
    return draw(keys, kept).astype(jnp.int32)
