"""Test beam search and sampling against enumeration.

A toy model gives the scores; they depend on the whole history of a hypothesis.
"""

import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import struct
from tiny import random_params, tiny

from heedful.model.decoding.beam_search import beam_search, length_penalty
from heedful.model.decoding.logits import cut_tail, penalise
from heedful.model.decoding.sampling import (
    Decoded,
    Sampling,
    decode_until,
    init_decode,
    sample,
)
from heedful.model.transformer import build, empty_cache

V, STEPS, EOS = 5, 4, 3
LAST = 6  # The token before the first one; the scores do not depend on it.
LIMITS = [4, 4, 4, 4, 3, 1, 0]
B = len(LIMITS)
NODES = sum(V**depth for depth in range(STEPS + 1))
DEPTHS = np.repeat(np.arange(STEPS + 1), [V**depth for depth in range(STEPS + 1)])

# Scores of each row after each history: nearly uniform to sharp. Row 3 never ends. Row 0 may end at
# once, but it continues at no cost to a length with a better score, so that stopping at the first
# end is too early.
TABLE = np.random.default_rng(0).normal(size=(B, NODES, V)) * np.array(
    [0.1, 1, 3, 1, 1, 1, 1], np.float64
).reshape(B, 1, 1)
TABLE[3, :, EOS] = -np.inf
TABLE[0, 0, EOS] += 0.5
TABLE[0, (DEPTHS == 1) | (DEPTHS == 2), 1] += 20
TABLE[0, DEPTHS == 3, EOS] += 20


@struct.dataclass
class History:
    """The node of each hypothesis in the tree of all histories, its row, and the row's start."""

    node: jax.Array
    row: jax.Array
    start: jax.Array

    @classmethod
    def of_rows(cls, start: jax.Array) -> "History":
        return cls(node=jnp.zeros_like(start), row=jnp.arange(len(start)), start=start)

    def repeat(self, times: int) -> "History":
        return jax.tree.map(lambda x: jnp.repeat(x, times), self)

    def reorder(self, parents: jax.Array) -> "History":
        node = jnp.take_along_axis(self.node.reshape(parents.shape), parents, axis=1)
        return self.replace(node=node.reshape(-1))  # type: ignore[attr-defined]


def toy_step(table: jax.Array, tokens: jax.Array, cache: History, position: jax.Array):
    at_root = position == cache.start
    node = jnp.where(at_root, cache.node, cache.node * V + 1 + tokens[:, 0])
    on_time = (jnp.asarray(DEPTHS)[node] == position - cache.start) & (
        at_root == (tokens[:, 0] == LAST)
    )
    logits = jnp.where(on_time[:, None], table[cache.row, node], jnp.nan)
    return logits, cache.replace(node=node)  # type: ignore[attr-defined]


def decode(search, table=TABLE, limits=LIMITS, eos_id=EOS, **options) -> Decoded:
    @jax.jit
    def run(table, limits, keys):
        named = options | ({"keys": keys} if search is sample else {})
        start = 2 + jnp.arange(len(table)) % 5  # Rows start at different positions.
        return search(
            partial(toy_step, table),
            jnp.full(len(table), LAST),
            History.of_rows(start),
            start=start,
            limits=limits,
            max_steps=STEPS,
            eos_id=eos_id,
            **named,
        )

    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(len(limits)))
    return jax.tree.map(np.asarray, run(jnp.float32(table), jnp.array(limits), keys))


def log_probs(row: int, history: tuple[int, ...]) -> np.ndarray:
    node = 0
    for token in history:
        node = node * V + 1 + token
    scores = TABLE[row, node]
    return scores - np.log(np.sum(np.exp(scores)))


def score(row: int, tokens: tuple[int, ...]) -> float:
    return sum(log_probs(row, tokens[:i])[token] for i, token in enumerate(tokens))


def padded(tokens: tuple[int, ...]) -> list[int]:
    return list(tokens) + [0] * (STEPS - len(tokens))


def penalty(length: int, exponent: float, offset: int = 5) -> float:
    return (offset + length) ** exponent / (offset + 1) ** exponent  # arXiv:1609.08144 §7, eq. 14


def plain_beam(
    log_probs, limit: int, width: int, exponent: float, eos: int | tuple[int, ...],
    offset: int = 5, early_stopping: bool | str = "never", never: tuple[int, ...] = (),
):  # fmt: skip
    """Search with a beam over Python tuples and return (tokens, score).

    With early_stopping "never" the search runs to the last step.
    """
    ends = (eos,) if isinstance(eos, int) else eos
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, limit + 1):
        children = [
            (total + gain, (*tokens, token))
            for total, tokens in live
            for token, gain in enumerate(log_probs(tokens))
            if token not in never
        ]
        children = sorted(children, reverse=True)[: (1 + len(ends)) * width]
        divisor = penalty(length, exponent, offset)
        finished += [
            (total / divisor, tokens)
            for total, tokens in children[:width]
            if total > -math.inf and (tokens[-1] in ends or length == limit)
        ]
        finished = sorted(finished, reverse=True)[:width]
        live = [child for child in children if child[1][-1] not in ends][:width]
        is_full = len(finished) == width
        if early_stopping is True and is_full:
            break
        if early_stopping is False and is_full and live[0][0] / divisor <= finished[-1][0]:
            break
    total, tokens = finished[0] if finished else (0.0, ())
    return tokens, total


@pytest.mark.parametrize(
    ("exponent", "offset"), quick.only([(0.6, 5)], [(0.0, 5), (0.6, 5), (2.0, 5), (1.0, 0)])
)
def test_a_wide_beam_finds_the_best_of_all_sequences(exponent: float, offset: int):
    width = V * (V - 1) ** (STEPS - 1)
    found = decode(beam_search, width=width, exponent=exponent, offset=offset)
    words = [token for token in range(V) if token != EOS]
    cut = 0
    for row, limit in enumerate(LIMITS):
        ended: list[tuple[int, ...]] = [
            (*tokens, EOS)
            for length in range(limit)
            for tokens in itertools.product(words, repeat=length)
        ]
        ended += itertools.product(words, repeat=limit) if limit else []
        scored = {
            tokens: score(row, tokens) / penalty(len(tokens), exponent, offset) for tokens in ended
        }
        best = max(scored, key=scored.__getitem__) if scored else ()
        assert found.tokens[row].tolist() == padded(best)
        assert found.lengths[row] == len(best)
        assert found.scores[row] == pytest.approx(scored.get(best, 0.0), abs=1e-5)
        cut += row != 3 and EOS not in best
    assert cut > 1  # Row 3 cannot end; other rows do not end because the end would score worse.


@pytest.mark.parametrize("early_stopping", ["never", False, True])
@pytest.mark.parametrize(
    ("width", "exponent", "offset"),
    quick.only([(3, 0.6, 5)], [(1, 0.0, 5), (2, 1.0, 5), (3, 0.6, 5), (2, 1.0, 0)]),
)
def test_a_narrow_beam_is_that_of_plain_lists(
    width: int, exponent: float, offset: int, early_stopping: bool | str
):
    options: dict[str, Any] = {"offset": offset, "early_stopping": early_stopping}
    found = decode(beam_search, width=width, exponent=exponent, **options)
    for row, limit in enumerate(LIMITS):
        if limit == 0:
            assert found.tokens[row].tolist() == padded(())
            continue
        best, total = plain_beam(partial(log_probs, row), limit, width, exponent, EOS, **options)
        assert found.tokens[row].tolist() == padded(best)
        assert found.lengths[row] == len(best)
        assert found.scores[row] == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_every_end_ends_and_some_tokens_are_never_chosen(width: int):
    ends = (EOS, next(token for token in range(V) if token != EOS))
    never = (next(token for token in range(V) if token not in ends),)
    changed = 0
    for options in ({"eos": ends}, {"eos": EOS, "never": never}, {"eos": ends, "never": never}):
        own = {"eos_id": options["eos"], "never": options.get("never", ())}
        found = decode(beam_search, width=width, exponent=0.6, **own)
        greedy = decode(sample, eos_id=own["eos_id"], sampling=Sampling(never=own["never"]))
        for row, limit in enumerate(LIMITS):
            if not limit:
                continue
            search = partial(plain_beam, partial(log_probs, row), limit)
            best, total = search(width, 0.6, **options)
            assert found.tokens[row].tolist() == padded(best)
            assert found.scores[row] == pytest.approx(total, abs=1e-5)
            likeliest: tuple[int, ...] = ()
            while len(likeliest) < limit and not {*likeliest} & {*np.atleast_1d(own["eos_id"])}:
                left = {
                    t: p for t, p in enumerate(log_probs(row, likeliest)) if t not in own["never"]
                }
                likeliest += (max(left, key=left.__getitem__),)
            assert greedy.tokens[row].tolist() == padded(likeliest)
            changed += best != search(width, 0.6, EOS)[0]
    assert changed > 3


def test_rules_of_stopping_differ():
    """Row 0 gets a better score if it continues; with False it stops before the score improves."""
    options: dict[str, Any] = {"width": 1, "exponent": 2.0}
    texts = [
        decode(beam_search, early_stopping=rule, **options).tokens.tolist()
        for rule in ("never", False)
    ]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("search", [sample, partial(beam_search, width=2, exponent=0.6)])
def test_the_loop_stops_when_all_rows_have_ended(search):
    calls = []

    def step(tokens, cache, position):
        calls.append(int(position))
        # The second token is the end with a probability of nearly 1.
        likely = EOS if len(calls) > 1 else 1
        return jnp.full((tokens.shape[0], V), -50.0).at[:, likely].set(0.0), cache

    common = {"start": jnp.int32(2), "max_steps": 100, "eos_id": EOS}
    last, history = jnp.full(2, LAST), History.of_rows(jnp.full(2, 2))
    with jax.disable_jit():
        found = search(step, last, history, limits=jnp.array([90, 0]), **common)
    assert found.tokens[:, :3].tolist() == [[1, EOS, 0], [0, 0, 0]]
    assert found.lengths.tolist() == [2, 0]
    assert calls == [2, 3]


def test_length_penalty():
    for case in itertools.product((1, 2, 7, 50), (0.0, 0.6, 1.0), (0, 5)):
        assert float(length_penalty(*case)) == pytest.approx(penalty(*case))
    assert length_penalty(7, 1.0, 0) == 7  # divides a sum by its length


def test_greedy_takes_the_likeliest_token_each_time():
    found = decode(sample)
    for row, limit in enumerate(LIMITS):
        tokens = greedy(partial(log_probs, row), limit)
        assert found.tokens[row].tolist() == padded(tokens)
        assert found.lengths[row] == len(tokens)
        assert found.scores[row] == pytest.approx(score(row, tokens), abs=1e-5)
    assert EOS in found.tokens  # Some rows end, so that the test covers ends.


def test_without_an_end_token_only_the_limits_end_a_row():
    for search in (sample, partial(beam_search, width=2, exponent=0.6)):
        found = decode(search, eos_id=-1)
        np.testing.assert_array_equal(found.lengths, LIMITS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_in_pieces_it_is_the_same(temperature: float):
    options: dict[str, Any] = {"sampling": Sampling(temperature=temperature), "eos_id": EOS}
    table, start, keys = jnp.float32(TABLE), jnp.arange(B), jax.random.split(jax.random.key(5), B)
    common: dict[str, Any] = {"limits": jnp.array(LIMITS), "start": start, "keys": keys}
    last, history = jnp.full(B, LAST), History.of_rows(start)
    step = partial(toy_step, table)
    whole = jax.jit(lambda: sample(step, last, history, max_steps=STEPS, **common, **options))()
    rows = init_decode(last, history, max_steps=STEPS, **common)
    go_on = jax.jit(lambda rows, until: decode_until(step, rows, until, **options))
    for until in (1, 1, 3, 99):
        rows = go_on(rows, until)
        time = min(until, STEPS)
        assert rows.time == time
        np.testing.assert_array_equal(rows.decoded.tokens[:, :time], whole.tokens[:, :time])
        np.testing.assert_array_equal(rows.decoded.lengths, np.minimum(whole.lengths, time))
    np.testing.assert_array_equal(rows.decoded.scores, whole.scores)


def test_samples_follow_the_distribution_at_every_step():
    count, temperature = 20_000, 0.7
    table = np.broadcast_to(TABLE[1], (count, NODES, V))
    limits = [2] * count
    found = decode(sample, table[:, : 1 + V], limits, sampling=Sampling(temperature=temperature))

    def cooled(history):
        scaled = np.exp(log_probs(1, history) / temperature)
        return scaled / scaled.sum()

    expected = np.zeros((V, V))
    for first in range(V):
        if first == EOS:
            expected[EOS, 0] = cooled(())[EOS]
        else:
            expected[first] = cooled(())[first] * cooled((first,))
    seen = np.zeros((V, V))
    np.add.at(seen, (found.tokens[:, 0], found.tokens[:, 1]), 1 / count)
    noise = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(seen - expected) <= 5 * noise).all()


def test_samples_end_as_they_must_and_are_scored_untempered():
    rng = np.random.default_rng(0)
    rows, limits = rng.integers(0, 3, 97), rng.integers(0, STEPS + 1, 97)
    found = decode(sample, TABLE[rows], list(limits), sampling=Sampling(temperature=1.5))
    for i, (row, limit, tokens) in enumerate(zip(rows, limits, found.tokens, strict=True)):
        ends = np.flatnonzero(tokens == EOS)
        length = min(limit, ends[0] + 1) if ends.size else limit
        assert found.lengths[i] == length
        assert not tokens[length:].any()
        assert found.scores[i] == pytest.approx(score(row, tuple(tokens[:length])), abs=1e-4)


def test_a_sample_depends_on_its_key_and_not_on_its_neighbours():
    options: dict[str, Any] = {"sampling": Sampling(temperature=1.0, top_k=4, top_p=0.95)}
    many = decode(sample, TABLE[[4, 1, 1, 2]], [4, 4, 4, 4], **options)
    few = decode(sample, TABLE[[4, 2, 1]], [4, 1, 4], **options)  # Rows 0 and 2 have the same keys.
    np.testing.assert_array_equal(few.tokens[[0, 2]], many.tokens[[0, 2]])
    same = decode(sample, TABLE[[1] * 50], [4] * 50, **options)
    assert len(np.unique(same.tokens, axis=0)) > 10


def test_what_decoding_needs_and_does_not_get_is_missed():
    rows = init_decode(jnp.array([1]), None, start=jnp.int32(0), limits=jnp.array([2]), max_steps=2)
    step = lambda tokens, cache, position: (jnp.zeros((1, V)), cache)  # noqa: E731
    for sampling, needed in (
        (Sampling(temperature=0.5), r"temperature = 0\.5 needs random keys"),
        (Sampling(repetition_penalty=2.0), r"repetition_penalty = 2\.0 needs the tokens"),
    ):
        with pytest.raises(ValueError, match=needed):
            decode_until(step, rows, 1, eos_id=EOS, sampling=sampling)


def penalised(
    row: int, history: tuple[int, ...], held: tuple[int, ...], penalty: float, in_beam: bool = False
):
    """Return log-probabilities after the repetition penalty.

    The penalty changes the raw scores; in a beam it changes the log-probabilities.
    """
    node = 0
    for token in history:
        node = node * V + 1 + token
    scores = TABLE[row, node].copy()
    if in_beam:
        scores -= np.log(np.sum(np.exp(scores)))
    for token in {*history, *held}:
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    return scores if in_beam else scores - np.log(np.sum(np.exp(scores)))


@pytest.mark.parametrize("width", [0, 2])
def test_the_repetition_penalty_counts_prompt_and_text(width: int):
    penalty, held = 3.0, [(row % V, (2 * row) % V) for row in range(B)]
    seen = np.zeros((B, V), bool)
    for row, tokens in enumerate(held):
        seen[row, list(tokens)] = True
    np.testing.assert_allclose(
        jax.nn.log_softmax(penalise(jnp.float32(TABLE[:, 0]), jnp.array(seen), penalty)),
        [penalised(row, (), held[row], penalty) for row in range(B)],
        atol=1e-5,
    )
    if width:
        options: dict[str, Any] = {"repetition_penalty": penalty, "exponent": 0.6}
        found = decode(partial(beam_search, width=width), seen=jnp.array(seen), **options)
    else:
        sampling = Sampling(repetition_penalty=penalty)
        found = decode(sample, seen=jnp.array(seen), sampling=sampling)
    differs = False
    for row, limit in enumerate(LIMITS):
        scores = partial(penalised, row, held=held[row], penalty=penalty, in_beam=width > 0)
        if width:
            best, _ = plain_beam(scores, limit, width, 0.6, EOS)
            plain, _ = plain_beam(partial(log_probs, row), limit, width, 0.6, EOS)
        else:
            best, plain = greedy(scores, limit), greedy(partial(log_probs, row), limit)
        assert found.tokens[row].tolist() == padded(best)
        differs |= best != plain
    assert differs  # The penalty changes some results.


def greedy(log_probs, limit: int) -> tuple[int, ...]:
    tokens: tuple[int, ...] = ()
    while len(tokens) < limit and EOS not in tokens:
        tokens = (*tokens, int(np.argmax(log_probs(tokens))))
    return tokens


def test_the_tail_is_cut_where_a_sum_by_hand_cuts_it():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(13, 11)) * 2
    cuts = [(0, 1.0), (3, 1.0), (99, 1.0), (0, 0.6), (0, 0.999), (5, 0.8), (1, 0.1)]
    both = [(0, 1.0, 0.3), (0, 1.0, 0.99), (3, 0.95, 0.2), (0, 0.6, 0.05)]
    for top_k, top_p, min_p in [*((*cut, 0.0) for cut in cuts), *both]:
        kept = np.isfinite(np.asarray(cut_tail(jnp.float32(logits), top_k, top_p, min_p)))
        for row in range(13):
            order = sorted(range(11), key=lambda token: -logits[row, token])
            order = order[: top_k or None]
            weights = [math.exp(logits[row, token]) for token in order]
            expected, mass = set(), 0.0
            for token, weight in zip(order, weights, strict=True):
                if mass < top_p and weight >= min_p * weights[0]:
                    expected.add(token)
                mass += weight / sum(weights)
            assert set(np.flatnonzero(kept[row])) == expected


def test_a_nucleus_keeps_ties_and_drops_what_is_impossible():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]]))
    kept = np.isfinite(cut_tail(logits, top_p=0.5))
    assert kept.tolist() == [[True] * 4 + [False], [False, False, True, False, False]]
    assert np.isfinite(cut_tail(logits, top_p=0.3)).tolist()[0] == [True] + [False] * 4
    close = np.isfinite(cut_tail(jnp.array([[0.0, 2e-5, 1e-5]]), top_p=0.6))
    assert close.tolist() == [[False, True, True]]
    # Rounding may make the sum of all probabilities less than top_p.
    almost = np.isfinite(cut_tail(jnp.zeros((1, 9973)), top_p=0.99999994))
    assert almost.all()


def test_a_beam_over_a_real_cache_finds_what_a_beam_without_a_cache_finds():
    vocab, rows, length, limits = 7, 3, 5, [5, 4, 5]
    config = tiny(vocab_size=vocab, tie_embeddings=False, norm_position="pre")
    model = build(config)
    rng = np.random.default_rng(0)
    source = jnp.array(rng.integers(0, vocab, (rows, length)))
    segments = jnp.array((np.arange(length) < [[5], [2], [3]]).astype(int))
    begins = jnp.ones((rows, 1), jnp.int32)
    late_end = jnp.zeros(vocab).at[EOS].set(-1.0)  # Otherwise all hypotheses would end at once.
    params = {"params": random_params(model, begins, source, scale=0.7)}

    @jax.jit
    def search():
        encoded = model.apply(params, source, segments, method="encode")

        def step(tokens, cache, position, encoded=None):
            options = {"cache": cache, "offset": position, "method": "decode"}
            logits, cache = model.apply(params, tokens, encoded, segments, **options)
            return logits[:, -1] + late_end, cache

        start = jnp.int32(0)
        _, cache = step(begins, empty_cache(config, rows, 5), start, encoded)
        options: dict[str, Any] = {"eos_id": EOS, "width": 3, "exponent": 0.6, "max_steps": 5}
        return beam_search(
            step, begins[:, 0], cache, start=start, limits=jnp.array(limits), **options
        )

    @jax.jit
    def forward(tokens, row):
        one = jnp.asarray(row)[None]
        logits = model.apply(params, tokens, source[one], encoder_segment_ids=segments[one])[0]
        return jax.nn.log_softmax(logits + late_end)

    def log_probs(row, history):
        tokens = np.ones((1, 6), np.int32)
        tokens[0, 1 : 1 + len(history)] = history
        return np.float64(forward(tokens, row)[len(history)])

    found = search()
    lengths = set()
    for row, limit in enumerate(limits):
        best, total = plain_beam(partial(log_probs, row), limit, 3, 0.6, EOS)
        assert found.tokens[row].tolist() == list(best) + [0] * (5 - len(best))
        assert found.scores[row] == pytest.approx(total, abs=1e-4)
        lengths.add(len(best))
    assert max(lengths) > 2  # long enough for hypotheses to be reordered
