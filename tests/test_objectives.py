"""Test objectives: the row that each of them makes of an example."""

import numpy as np
import pytest

from heedful.data.batch import FIELDS
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.data.errors import DataError
from heedful.data.objectives import OBJECTIVES
from heedful.data.tokenizer import Tokenizer

TEXT = "the quick brown fox jumps over the lazy dog and on and on " * 5


def learned(objective, kind="chars"):
    return Tokenizer.train([TEXT], TokenizerConfig(kind=kind, vocab_size=409), objective)


@pytest.fixture(scope="module")
def tokenizers():
    return {name: learned(name) for name in OBJECTIVES}


@pytest.fixture(scope="module")
def make(tokenizers):
    """Return `make(objective, example, seed, **config)`, which returns the row of an example."""

    def make(name, example, seed=0, **changes):
        config = DataConfig(source="tfds:x", objective=name, **changes)
        tokens = {k: np.array(v, np.int32 if k != "label" else None) for k, v in example.items()}
        rng = np.random.default_rng((seed, 5))
        return OBJECTIVES[name].row(tokens, rng, config, tokenizers[name])

    return make


def lists(row):
    return {name: values.tolist() for name, values in row.items()}


EXAMPLES = {
    "translation": [{"source": [5] * s, "target": [7] * t} for s, t in [(0, 3), (5, 2), (7, 0)]],
    "classification": [{"text": [5] * n, "label": np.int32(1)} for n in (0, 3, 11)],
    "regression": [
        {"text": [5] * s, "pair": [7] * t, "label": np.float32(-1)} for s, t in [(0, 3), (5, 2)]
    ],
    "span_corruption": [{"text": range(110, 110 + n)} for n in (1, 2, 3, 7, 13)],
} | {
    name: [{"text": [1, *range(5, n), 2]} for n in (5, 6, 17)]
    for name in ("causal_lm", "masked_lm", "prefix_lm")
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_predicts_its_lengths(make, name):
    config = DataConfig(source="tfds:x", objective=name)
    examples = EXAMPLES[name]
    counts = {
        field: np.array([len(e[field]) for e in examples])
        for field in examples[0].keys() - {"label"}
    }
    lengths = OBJECTIVES[name].lengths(counts, config)
    for i, example in enumerate(examples):
        row = make(name, example)
        sides = [len(v) for key, v in row.items() if key.endswith("inputs")]
        assert sorted(lengths[:, i]) == sorted(sides)
        for key, values in row.items():
            is_number = name == "regression" and key == "targets"
            assert values.dtype == (np.float32 if is_number else FIELDS[key].dtype), key


def test_translation_shifts_targets_once(make):
    row = make("translation", {"source": [5, 7], "target": [11, 13, 17]})
    assert lists(row) == {
        "inputs": [1, 11, 13, 17],
        "targets": [11, 13, 17, 2],
        "encoder_inputs": [5, 7, 2],
    }


def test_the_tokenizer_says_how_to_begin_and_end():
    class Marian:
        frame = (59, 61)

    example = {"source": np.array([5], np.int32), "target": np.array([7], np.int32)}
    row = OBJECTIVES["translation"].row(example, None, None, Marian)
    assert row["inputs"].tolist() == [59, 7]
    assert row["targets"].tolist() == [7, 61]
    assert row["encoder_inputs"].tolist() == [5, 61]


def test_causal_lm(make):
    assert lists(make("causal_lm", {"text": [1, 11, 13, 2]})) == {
        "inputs": [1, 11, 13],
        "targets": [11, 13, 2],
    }


def test_prefix_lm_predicts_what_comes_after_the_prefix(make):
    tokens = [1, 11, 13, 17, 19, 2]
    prefixes = set()
    for seed in range(97):
        row = make("prefix_lm", {"text": tokens}, seed)
        prefix = int(row["prefix_len"])
        prefixes.add(prefix)
        assert row["inputs"].tolist() == tokens[:-1]
        # The loss counts the targets after the prefix, beginning with the first token after it.
        assert row["targets"][row["weights"] > 0].tolist() == tokens[prefix:]
        assert row["weights"].sum() == len(tokens) - prefix
    assert prefixes == {1, 2, 3, 4, 5}


# Masked language model ---------------------------------------------------------------------------


def test_masked_lm_takes_its_share(make, tokenizers):
    tokenizer = tokenizers["masked_lm"]
    tokens = np.array([1, *np.resize(tokenizer.ordinary, 4001), tokenizer.unk, 2], np.int32)
    row = make("masked_lm", {"text": tokens}, noise=0.31)
    chosen = row["weights"] > 0
    assert chosen.sum() == round(0.31 * 4001)
    assert not chosen[tokenizer.is_special[tokens]].any()
    assert row["targets"].tolist() == tokens.tolist()
    assert (row["inputs"] == tokens)[~chosen].all()
    inputs, targets = row["inputs"][chosen], tokens[chosen]
    masked = inputs == tokenizer.mask
    assert masked.mean() == pytest.approx(0.8, abs=0.04)
    same = inputs == targets  # kept tokens, and random tokens that equal the target by chance
    vocabulary = len(tokenizer.ordinary)
    assert same.mean() == pytest.approx(0.1 + 0.1 / vocabulary, abs=0.03)
    drawn = inputs[~masked & ~same]
    assert drawn.size > 50
    assert not tokenizer.is_special[drawn].any()
    assert len(set(drawn)) > vocabulary / 2


@pytest.mark.parametrize("whole_words", [False, True])
def test_masked_lm_predicts_at_least_one_token(make, whole_words):
    for text, count in (([1, 9, 2], 1), ([1, 2], 0), ([9], 1), ([2], 0)):
        row = make("masked_lm", {"text": text}, whole_words=whole_words)
        assert row["weights"].sum() == count
        assert lists(row)["targets"] == text


def test_masked_lm_masks_anew_for_every_seed(make):
    rows = [make("masked_lm", {"text": range(5, 30)}, seed) for seed in (0, 0, 1)]
    weights = [row["weights"].tolist() for row in rows]
    assert weights[0] == weights[1] != weights[2]


def test_whole_words_are_masked_whole(make, tokenizers):
    tokenizer = tokenizers["masked_lm"]
    (ids,) = tokenizer.encode_batch([TEXT])
    tokens = np.array([1, *ids, 2], np.int32)
    words = tokenizer.words(tokens)
    partly = []
    for seed in range(7):
        for whole_words in (True, False):
            row = make("masked_lm", {"text": tokens}, seed, whole_words=whole_words, noise=0.2)
            shares = [row["weights"][words == w].mean() for w in range(words.max() + 1)]
            if whole_words:
                assert set(shares) == {0, 1}
                longest = np.bincount(words).max()
                assert abs(row["weights"].sum() - 0.2 * len(ids)) <= longest / 2 + 1
            else:
                partly.append(any(0 < share < 1 for share in shares))
    assert all(partly)


# Span corruption ---------------------------------------------------------------------------------


def restore(row, tokenizer):
    """Return the text that inputs and targets give together, and the lengths of the spans."""
    source, target = row["encoder_inputs"].tolist(), row["targets"].tolist()
    assert source.pop() == target.pop() == tokenizer.eos
    order = [token for token in target if token in tokenizer.sentinels]
    assert order == [token for token in source if token in tokenizer.sentinels]
    assert order == list(tokenizer.sentinels[: len(order)])
    spans, text = {}, []
    for token in target:
        if token in tokenizer.sentinels:
            last = spans.setdefault(token, [])
        else:
            last.append(token)
    for token in source:
        text += spans.get(token, [token])
    return text, [len(span) for span in spans.values()]


@pytest.mark.parametrize("noise", [0.15, 0.5, 0.9])
@pytest.mark.parametrize("span_length", [1.0, 3.0])
def test_both_sides_together_are_the_text(make, tokenizers, noise, span_length):
    tokenizer = tokenizers["span_corruption"]
    for n in (1, 2, 3, 5, 17, 101):
        text = np.resize(tokenizer.ordinary, n)
        for seed in range(5):
            how = {"noise": noise, "span_length": span_length}
            row = make("span_corruption", {"text": text}, seed, **how)
            restored, spans = restore(row, tokenizer)
            assert restored == text.tolist()
            assert min(spans) >= 1
            lost = min(max(round(n * noise), 1), max(n - 1, 1))
            assert sum(spans) == lost
            assert len(spans) == max(1, min(round(lost / span_length), n - lost))
            assert row["inputs"].tolist() == [tokenizer.bos, *row["targets"][:-1]]
            assert "weights" not in row  # All targets count.


def test_spans_are_drawn(make, tokenizers):
    tokenizer = tokenizers["span_corruption"]
    text = {"text": np.resize(tokenizer.ordinary, 101)}
    rows = [restore(make("span_corruption", text, seed), tokenizer)[1] for seed in range(23)]
    assert len({tuple(spans) for spans in rows}) > 17
    assert np.mean(np.concatenate(rows)) == pytest.approx(3)
    starts = {
        make("span_corruption", text, s)["encoder_inputs"].tolist().index(4) for s in range(9)
    }
    assert len(starts) > 2


@pytest.mark.parametrize("max_length", [3, 4, 7, 64, 113])
@pytest.mark.parametrize("noise", [0.01, 0.15, 0.5, 0.99])
def test_longest_piece_fills_a_row_and_no_more(tokenizers, max_length, noise):
    objective = OBJECTIVES["span_corruption"]
    config = DataConfig(
        source="tfds:x", objective="span_corruption", max_length=max_length, noise=noise
    )
    longest = objective.chunking.max_positions(config, tokenizers["span_corruption"])
    sides = objective.lengths({"text": np.arange(1, longest + 2)}, config)
    assert sides[:, :-1].max() <= max_length < sides[:, -1].max()
    assert (np.diff(sides, axis=1) >= 0).all()


def test_spans_that_cannot_be(tokenizers):
    longest = OBJECTIVES["span_corruption"].chunking.max_positions
    config = DataConfig(source="tfds:x", objective="span_corruption", max_length=2)
    with pytest.raises(DataError, match=r"data\.max_length = 2: no room for a span; give 3"):
        longest(config, tokenizers["span_corruption"])
    config = DataConfig(source="tfds:x", objective="span_corruption", max_length=2048)
    expected = r"data\.max_length = 2048: rows have 1\d\d spans.* 100 sentinels"
    with pytest.raises(DataError, match=expected):
        longest(config, tokenizers["span_corruption"])


# Classification and regression -------------------------------------------------------------------


def test_classification_of_a_text(make):
    assert lists(make("classification", {"text": [11, 13], "label": np.int32(3)})) == {
        "inputs": [1, 11, 13, 2],
        "type_ids": [0, 0, 0, 0],
        "targets": 3,
        "weights": 1,
    }


def test_regression_of_a_pair(make):
    example = {"text": [11], "pair": [13, 17], "label": np.float32(-2.5)}
    assert lists(make("regression", example)) == {
        "inputs": [1, 11, 2, 13, 17, 2],
        "type_ids": [0, 0, 0, 1, 1, 1],
        "targets": -2.5,
        "weights": 1,
    }
