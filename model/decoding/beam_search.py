"""Beam search: the best of several hypotheses for each text, computed entirely on the device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from heedful.model.decoding.logits import exclude, penalise, require_seen
from heedful.model.decoding.sampling import Decoded, Ends, Step, is_end
from heedful.model.ops.softmax import logsumexp_given_max
from heedful.model.ops.top_k import top_k


class BeamState(NamedTuple):
    """W living hypotheses of each of B texts, and the best hypothesis that has ended."""

    time: Int[Array, ""]
    """Number of tokens of each living hypothesis."""
    done: Bool[Array, " B"]
    last: Int[Array, "B W"]
    """Last token of each living hypothesis."""
    live: Int[Array, "B W T"]
    """Tokens of the living hypotheses, the likeliest first."""
    live_scores: Float[Array, "B W"]
    """Sums of log-probabilities; -inf: no hypothesis."""
    best: Int[Array, "B T"]
    """Tokens of the best hypothesis that has ended."""
    best_length: Int[Array, " B"]
    ended_scores: Float[Array, "B E"]
    """Best E scores of ended hypotheses, divided by their length penalty; -inf: no hypothesis."""
    seen: Bool[Array, "R V"] | None
    """True for the tokens that each of the R = B * W living hypotheses holds; None: not needed."""
    cache: Any


class Extensions(NamedTuple):
    """The C likeliest extensions of living hypotheses by one token, the likeliest first."""

    scores: Float[Array, "B C"]
    parents: Int[Array, "B C"]
    """Number of the living hypothesis that each extension continues."""
    last: Int[Array, "B C"]
    tokens: Int[Array, "B C T"]
    ended: Bool[Array, "B C"]


class Rules(NamedTuple):
    """Arguments of `beam_search` that say which hypotheses live, and when a text is done."""

    limits: Int[Array, " B"]
    eos_id: Ends
    width: int
    exponent: float
    offset: int
    early_stopping: bool | str
    repetition_penalty: float
    never: tuple[int, ...]

    @property
    def candidates(self) -> int:
        """Number of extensions of which `width` live on, even if all hypotheses end in all ways."""
        return self.width * (1 + max(1, np.size(self.eos_id)))

    def penalty(self, length: jax.Array) -> jax.Array:
        """Return the length penalty, by which a score is divided."""
        return jnp.asarray(length_penalty(length, self.exponent, self.offset))


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
    """Return the best of `width` hypotheses per row: log-probability divided by length penalty.

    The algorithm is that of Hugging Face transformers. In each step, the `width` likeliest
    extensions of all living hypotheses may be finished: extensions that end, and all of them at the
    limit of the row. The `width` likeliest extensions that have not ended live on.
    `early_stopping` tells when a row stops:

    True: when `width` hypotheses are finished;
    False: when the worst of the best `width` finished hypotheses is at least as good as the best
    living hypothesis would be if it ended now;
    "never": when no living hypothesis can become better than the best finished hypothesis, at any
    length. This rule is exact, because the log-probability of a hypothesis only falls.

    The repetition penalty changes log-probabilities (in sampling, it changes logits), so that
    probabilities sum to less than 1. Tokens in `never` are not chosen, but keep their share of the
    probability, as in transformers. `cache` must have the methods `repeat(width)` and
    `reorder(parents [B, W])`. The other arguments are those of `sampling.init_decode` and
    `sampling.decode_until`. Raises ValueError for a repetition penalty without `seen`.
    """
    require_seen(repetition_penalty, seen)
    rules = Rules(
        limits, eos_id, width, exponent, offset, early_stopping, repetition_penalty, never
    )
    start = jnp.repeat(start, width) if start.ndim else start

    def unfinished(state: BeamState):
        return (state.time < max_steps) & ~jnp.all(state.done)

    def body(state: BeamState) -> BeamState:
        logits, cache = step(state.last.reshape(-1, 1), state.cache, start + state.time)
        extensions = extend(state, logits.astype(jnp.float32), rules)
        state = finish(state._replace(cache=cache), extensions, rules)
        return live_on(state, extensions, rules)

    state = init_beam(last, cache, max_steps, seen, rules)
    state = jax.lax.while_loop(unfinished, body, state)
    scores = jnp.where(limits > 0, state.ended_scores[:, 0], 0.0)
    return Decoded(tokens=state.best, lengths=state.best_length, scores=scores)


def init_beam(
    last: Int[Array, " B"], cache: Any, max_steps: int, seen: jax.Array | None, rules: Rules
) -> BeamState:
    """Return the first state: hypotheses of a row are equal; only the first has a finite score."""
    batch, width = len(last), rules.width
    one_alive = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf)
    # Number of ended scores that decide when a row stops; the exact rule needs only the best.
    deciding = 1 if rules.early_stopping == "never" else width
    return BeamState(
        time=jnp.int32(0),
        done=rules.limits <= 0,
        last=jnp.repeat(last.astype(jnp.int32)[:, None], width, axis=1),
        live=jnp.zeros((batch, width, max_steps), jnp.int32),
        live_scores=jnp.broadcast_to(one_alive, (batch, width)),
        best=jnp.zeros((batch, max_steps), jnp.int32),
        best_length=jnp.zeros(batch, jnp.int32),
        ended_scores=jnp.full((batch, deciding), -jnp.inf),
        seen=None if seen is None else jnp.repeat(seen, width, axis=0),
        cache=cache.repeat(width),
    )


def extend(state: BeamState, logits: Float[Array, "R V"], rules: Rules) -> Extensions:
    """Return the likeliest extensions of the living hypotheses."""
    batch, never = len(state.done), rules.never
    if state.seen is not None:
        logits -= logsumexp_given_max(logits, jnp.max(logits, axis=-1))[:, None]
        logits = penalise(logits, state.seen, rules.repetition_penalty)
    children = min(rules.candidates, logits.shape[-1])  # per hypothesis
    log_probs, tokens = top_k(exclude(logits, never), children)
    if state.seen is None:
        highest = jnp.max(logits, axis=-1) if never else log_probs[:, 0]
        log_probs -= logsumexp_given_max(logits, highest)[:, None]
    totals = state.live_scores.reshape(-1, 1) + log_probs
    scores, picks = jax.lax.top_k(totals.reshape(batch, -1), rules.candidates)
    row, parents = _rows(state), picks // children
    last = tokens.reshape(batch, -1)[row, picks]
    return Extensions(
        scores=scores,
        parents=parents,
        last=last,
        tokens=state.live[row, parents].at[:, :, state.time].set(last),
        ended=is_end(last, rules.eos_id) | (state.time + 1 >= rules.limits)[:, None],
    )


def finish(state: BeamState, extensions: Extensions, rules: Rules) -> BeamState:
    """Return the state with the best ended hypothesis, including ended ones of `extensions`."""
    length = state.time + 1
    scores = jnp.where(extensions.ended, extensions.scores / rules.penalty(length), -jnp.inf)
    scores = jnp.where(state.done[:, None], -jnp.inf, scores[:, : rules.width])
    row, winner = jnp.arange(len(scores)), jnp.argmax(scores, axis=1)
    better = scores[row, winner] > state.ended_scores[:, 0]
    together = jnp.concatenate([state.ended_scores, scores], axis=1)
    return state._replace(
        best=jnp.where(better[:, None], extensions.tokens[row, winner], state.best),
        best_length=jnp.where(better, length, state.best_length),
        ended_scores=jax.lax.top_k(together, state.ended_scores.shape[1])[0],
    )


def live_on(state: BeamState, extensions: Extensions, rules: Rules) -> BeamState:
    """Return the state with the likeliest extensions that have not ended; mark rows as done."""
    row, length, done = _rows(state), state.time + 1, state.done
    scores = jnp.where(extensions.ended, -jnp.inf, extensions.scores)
    scores, order = jax.lax.top_k(scores, rules.width)
    parents, last = extensions.parents[row, order], extensions.last[row, order]
    live_scores = jnp.where(done[:, None], state.live_scores, scores)
    seen = state.seen
    if seen is not None:
        seen = seen[(row * rules.width + parents).reshape(-1)]
        seen = seen.at[jnp.arange(len(seen)), last.reshape(-1)].set(True)
    return state._replace(
        time=length,
        done=done | _stops(live_scores, state.ended_scores, length, rules),
        last=last,
        live=jnp.where(done[:, None, None], state.live, extensions.tokens[row, order]),
        live_scores=live_scores,
        seen=seen,
        cache=state.cache.reorder(parents),
    )


def _stops(
    live_scores: jax.Array, ended_scores: jax.Array, length: jax.Array, rules: Rules
) -> Bool[Array, " B"]:
    """Return True for rows that stop, by `early_stopping` or at their limit."""
    if rules.early_stopping is True:
        stops = ended_scores[:, -1] > -jnp.inf
    else:
        # With the limit 0, the penalty could be 0, and scores are divided by it.
        at_limit = jnp.maximum(rules.limits, 1)
        penalty = rules.penalty(at_limit if rules.early_stopping == "never" else length)
        stops = live_scores[:, 0] / penalty <= ended_scores[:, -1]
    return stops | (length >= rules.limits)


def _rows(state: BeamState) -> Int[Array, "B 1"]:
    return jnp.arange(len(state.done))[:, None]


def length_penalty(length: jax.Array | int, exponent: float, offset: int) -> jax.Array | float:
    """Return ((offset + length) / (offset + 1))^exponent (arXiv:1609.08144 §7)."""
    return ((offset + length) / (offset + 1.0)) ** exponent
