"""Search against enumeration, on a toy whose scores depend on the whole history of a hypothesis."""

import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from tiny import random_params, tiny

from model.decoding import Decoded, beam_search, cut_tail, length_penalty, sample
from model.transformer import build, empty_cache

V, STEPS, EOS, START = 5, 4, 3, 2
LIMITS = [4, 4, 4, 4, 3, 1, 0]
B = len(LIMITS)
NODES = sum(V**depth for depth in range(STEPS + 1))
DEPTHS = np.repeat(np.arange(STEPS + 1), [V**depth for depth in range(STEPS + 1)])

# Row by row, scores after each history: nearly even to sharp. Row 3 never ends. Row 0 may end at
# once, but goes on at no cost to a length at which it scores better: too early to stop there.
TABLE = np.random.default_rng(0).normal(size=(B, NODES, V)) * np.array(
    [0.1, 1, 3, 1, 1, 1, 1], np.float64
).reshape(B, 1, 1)
TABLE[3, :, EOS] = -np.inf
TABLE[0, 0, EOS] += 0.5
TABLE[0, (DEPTHS == 1) | (DEPTHS == 2), 1] += 20
TABLE[0, DEPTHS == 3, EOS] += 20


@struct.dataclass
class History:
    """The node of each hypothesis in the tree of all histories, and the row that it belongs to."""

    node: jax.Array
    row: jax.Array

    @classmethod
    def of_rows(cls, rows: int) -> "History":
        return cls(node=jnp.zeros(rows, jnp.int32), row=jnp.arange(rows))

    def repeat(self, times: int) -> "History":
        return jax.tree.map(lambda x: jnp.repeat(x, times), self)

    def reorder(self, rows: jax.Array) -> "History":
        return self.replace(node=self.node[rows])  # type: ignore[attr-defined]


def toy_step(table: jax.Array, tokens: jax.Array, cache: History, position: jax.Array):
    node = cache.node * V + 1 + tokens[:, 0]
    on_time = jnp.asarray(DEPTHS)[node] == position - START + 1
    logits = jnp.where(on_time[:, None], table[cache.row, node], jnp.nan)
    return logits, cache.replace(node=node)  # type: ignore[attr-defined]


def decode(search, table=TABLE, limits=LIMITS, **options) -> Decoded:
    @jax.jit
    def run(table, limits, keys):
        named = options | ({"keys": keys} if search is sample else {})
        return search(
            partial(toy_step, table),
            table[:, 0],
            History.of_rows(table.shape[0]),
            start=START,
            limits=limits,
            max_steps=STEPS,
            eos_id=EOS,
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


def penalty(length: int, exponent: float) -> float:
    return (5 + length) ** exponent / (5 + 1) ** exponent  # arXiv:1609.08144 §7, eq. 14


def plain_beam(log_probs, limit: int, width: int, exponent: float, eos: int):
    """Beam search over Python tuples, to the last step: (tokens, score)."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    best: tuple[float, tuple[int, ...]] = (-math.inf, ())
    for length in range(1, limit + 1):
        children = [
            (total + gain, (*tokens, token))
            for total, tokens in live
            for token, gain in enumerate(log_probs(tokens))
        ]
        children = sorted(children, reverse=True)[: 2 * width]
        for total, tokens in children:
            if tokens[-1] == eos:
                best = max(best, (total / penalty(length, exponent), tokens))
        live = [child for child in children if child[1][-1] != eos][:width]
    if best[0] > -math.inf:
        return best[1], best[0]
    return live[0][1], live[0][0] / penalty(limit, exponent)


@pytest.mark.parametrize("exponent", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_the_best_of_all_sequences(exponent: float):
    found = decode(beam_search, width=(V - 1) ** (STEPS - 1), exponent=exponent)
    words = [token for token in range(V) if token != EOS]
    for row, limit in enumerate(LIMITS):
        ended = [
            (*tokens, EOS)
            for length in range(limit)
            for tokens in itertools.product(words, repeat=length)
        ]
        if row == 3:  # never ends: the best that fills the limit
            ended = list(itertools.product(words, repeat=limit))
        scored = {tokens: score(row, tokens) / penalty(len(tokens), exponent) for tokens in ended}
        best = max(scored, key=scored.__getitem__) if scored else ()
        assert found.tokens[row].tolist() == padded(best)
        assert found.scores[row] == pytest.approx(scored.get(best, 0.0), abs=1e-5)


@pytest.mark.parametrize(("width", "exponent"), [(1, 0.0), (2, 1.0), (3, 0.6)])
def test_a_narrow_beam_is_the_one_without_early_stopping(width: int, exponent: float):
    found = decode(beam_search, width=width, exponent=exponent)
    for row, limit in enumerate(LIMITS):
        if limit == 0:
            assert found.tokens[row].tolist() == padded(())
            continue
        best, total = plain_beam(partial(log_probs, row), limit, width, exponent, EOS)
        assert found.tokens[row].tolist() == padded(best)
        assert found.scores[row] == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("search", [sample, partial(beam_search, width=2, exponent=0.6)])
def test_the_loop_stops_when_all_rows_have_ended(search):
    calls = []

    def step(tokens, cache, position):
        calls.append(int(position))
        # The second token ends a row, for all but certain.
        return jnp.full((tokens.shape[0], V), -50.0).at[:, EOS].set(0.0), cache

    logits = jnp.full((2, V), -50.0).at[:, 1].set(0.0)
    common = {"start": START, "max_steps": 100, "eos_id": EOS}
    with jax.disable_jit():
        found = search(step, logits, History.of_rows(2), limits=jnp.array([90, 0]), **common)
    assert found.tokens[:, :3].tolist() == [[1, EOS, 0], [0, 0, 0]]
    assert calls == [START, START + 1]


def test_length_penalty():
    for length, exponent in itertools.product((1, 2, 7, 50), (0.0, 0.6, 1.0)):
        assert float(length_penalty(length, exponent)) == pytest.approx(penalty(length, exponent))


def test_greedy_takes_the_likeliest_token_each_time():
    found = decode(sample)
    for row, limit in enumerate(LIMITS):
        tokens: tuple[int, ...] = ()
        while len(tokens) < limit and EOS not in tokens:
            tokens = (*tokens, int(np.argmax(log_probs(row, tokens))))
        assert found.tokens[row].tolist() == padded(tokens)
        assert found.scores[row] == pytest.approx(score(row, tokens), abs=1e-5)
    assert EOS in found.tokens  # or its end was never tried


def test_samples_follow_the_distribution_at_every_step():
    count, temperature = 20_000, 0.7
    table = np.broadcast_to(TABLE[1], (count, NODES, V))
    limits = [2] * count
    found = decode(sample, table[:, : 1 + V], limits, temperature=temperature)

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
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rows = rng.integers(0, 3, 31)
        limits = rng.integers(0, STEPS + 1, 31)
        found = decode(sample, TABLE[rows], list(limits), temperature=1.5)
        for row, limit, tokens, total in zip(rows, limits, found.tokens, found.scores, strict=True):
            ends = np.flatnonzero(tokens == EOS)
            length = min(limit, ends[0] + 1) if ends.size else limit
            assert not tokens[length:].any()
            assert total == pytest.approx(score(row, tuple(tokens[:length])), abs=1e-4)


def test_a_sample_depends_on_its_key_and_not_on_its_neighbours():
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 4, "top_p": 0.95}
    many = decode(sample, TABLE[[4, 1, 1, 2]], [4, 4, 4, 4], **options)
    few = decode(sample, TABLE[[4, 2, 1]], [4, 1, 4], **options)  # keys go by row
    np.testing.assert_array_equal(few.tokens[[0, 2]], many.tokens[[0, 2]])
    same = decode(sample, TABLE[[1] * 50], [4] * 50, **options)
    assert len(np.unique(same.tokens, axis=0)) > 10
    with pytest.raises(ValueError, match=r"temperature = 0\.5 needs random keys"):
        sample(
            partial(toy_step, jnp.float32(TABLE)),
            jnp.float32(TABLE[:, 0]),
            History.of_rows(B),
            start=START,
            limits=jnp.array(LIMITS),
            max_steps=STEPS,
            eos_id=EOS,
            temperature=0.5,
        )


def test_the_tail_is_cut_where_a_sum_by_hand_cuts_it():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(13, 11)) * 2
    for top_k, top_p in ((0, 1.0), (3, 1.0), (99, 1.0), (0, 0.6), (0, 0.999), (5, 0.8), (1, 0.1)):
        kept = np.isfinite(np.asarray(cut_tail(jnp.float32(logits), top_k, top_p)))
        for row in range(13):
            order = sorted(range(11), key=lambda token: -logits[row, token])
            order = order[: top_k or None]
            weights = [math.exp(logits[row, token]) for token in order]
            expected, mass = set(), 0.0
            for token, weight in zip(order, weights, strict=True):
                if mass < top_p:
                    expected.add(token)
                mass += weight / sum(weights)
            assert set(np.flatnonzero(kept[row])) == expected


def test_a_beam_over_a_real_cache_finds_what_a_beam_without_a_cache_finds():
    vocab, rows, length, limits = 7, 3, 5, [5, 4, 5]
    config = tiny(vocab_size=vocab, tie_embeddings=False, norm_position="pre")
    model = build(config)
    rng = np.random.default_rng(0)
    source = jnp.array(rng.integers(0, vocab, (rows, length)))
    segments = jnp.array((np.arange(length) < [[5], [2], [3]]).astype(int))
    begin = jnp.ones((rows, 1), jnp.int32)
    late_end = jnp.zeros(vocab).at[EOS].set(-1.0)  # or all end at once
    params = {"params": random_params(model, begin, source, scale=0.7)}

    @jax.jit
    def search():
        encoded = model.apply(params, source, segments, method="encode")

        def step(tokens, cache, position, encoded=None):
            own = jnp.repeat(segments, tokens.shape[0] // rows, axis=0)
            options = {"cache": cache, "offset": position, "method": "decode"}
            logits, cache = model.apply(params, tokens, encoded, own, **options)
            return logits[:, -1] + late_end, cache

        logits, cache = step(begin, empty_cache(config, rows, 6), jnp.int32(0), encoded)
        options: dict[str, Any] = {"eos_id": EOS, "width": 3, "exponent": 0.6, "max_steps": 5}
        return beam_search(step, logits, cache, start=1, limits=jnp.array(limits), **options)

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
    assert max(lengths) > 2  # long enough for hypotheses to have changed places
