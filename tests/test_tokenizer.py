import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataError, TokenizerConfig
from data.tokenizer import BOS, EOS, PAD, SPECIAL, UNK, Tokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "the quicker foxes jumped over the laziest dogs",
    "der schnelle braune Fuchs springt über den faulen Hund",
    "<eos> <pad> <unk> <bos> in a text are text",
] * 7
WORDS = ["zwei viel@@ er bü@@ sche .", "zwei häuser .", "zwei bü@@ cher ."]


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train(TEXTS, TokenizerConfig(vocab_size=331))


@pytest.fixture(scope="module")
def words():
    return Tokenizer.train(WORDS, TokenizerConfig(kind="words", vocab_size=11))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bpe_round_trip_is_exact(bpe, text):
    (ids,) = bpe.encode_batch([text])
    assert bpe.decode(ids) == text
    assert (ids > UNK).all()


@pytest.mark.parametrize(
    "text", ["", " ", "  two leading", "trailing ", "a\tb\n", "👩‍🚀 ﷽ é", "\0"]
)
def test_bpe_round_trip_of_odd_texts(bpe, text):
    assert bpe.decode(bpe.encode_batch([text])[0]) == text


def test_ids_are_int32_and_within_the_vocabulary(bpe):
    rows = bpe.encode_batch([*TEXTS, ""])
    assert {row.dtype for row in rows} == {np.dtype(np.int32)}
    assert rows[-1].shape == (0,)
    assert max(row.max() for row in rows if len(row)) < bpe.vocab_size <= 331


def test_vocabulary_is_learned(bpe):
    bytes_only = Tokenizer.train(TEXTS, TokenizerConfig(vocab_size=260))
    text = TEXTS[0]
    assert len(bytes_only.encode_batch([text])[0]) == len(text)
    assert len(bpe.encode_batch([text])[0]) < len(text) / 2


@pytest.mark.parametrize("text", ["<eos>", "a<bos>b", "<pad> <unk>", "x <eos> <eos>"])
def test_spelled_special_tokens_are_text(bpe, words, text):
    (ids,) = bpe.encode_batch([text])
    assert (ids > UNK).all()
    assert bpe.decode(ids) == text
    assert (words.encode_batch([text])[0] == UNK).all()


def test_decode_drops_special_tokens_and_stops_nowhere(bpe):
    (ids,) = bpe.encode_batch(["the dog"])
    framed = [BOS, *ids[:2], EOS, PAD, *ids[2:], EOS, PAD]
    assert bpe.decode(framed) == "the dog"


def test_special_tokens_have_fixed_ids(bpe, words, tmp_path):
    for tokenizer in (bpe, words):
        tokenizer.save(tmp_path / "tokenizer.json")
        vocabulary = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
        assert [vocabulary[token] for token in SPECIAL] == [PAD, BOS, EOS, UNK] == [0, 1, 2, 3]


def test_training_is_deterministic_whatever_the_order(bpe):
    again = Tokenizer.train(iter(TEXTS), TokenizerConfig(vocab_size=331))
    assert again.fingerprint == bpe.fingerprint
    mixed = random.Random(5).sample(TEXTS, len(TEXTS))
    assert Tokenizer.train(mixed, TokenizerConfig(vocab_size=331)).fingerprint == bpe.fingerprint
    for vocab_size in (8, 9):  # Words of equal count at the edge of the vocabulary.
        config = TokenizerConfig(kind="words", vocab_size=vocab_size)
        prints = {Tokenizer.train(order, config).fingerprint for order in (WORDS, WORDS[::-1])}
        assert len(prints) == 1


def test_saved_and_loaded_is_the_same(bpe, words, tmp_path):
    for tokenizer in (bpe, words):
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = Tokenizer.load(tmp_path / "tokenizer.json")
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.vocab_size == tokenizer.vocab_size
        assert loaded.pretokenized == tokenizer.pretokenized
        ids = tokenizer.encode_batch(["zwei <eos> bü@@ cher ."])[0]
        assert (loaded.encode_batch(["zwei <eos> bü@@ cher ."])[0] == ids).all()
        assert loaded.decode(ids) == tokenizer.decode(ids)
    assert bpe.fingerprint != words.fingerprint


def test_words_are_joined_and_unknown_ones_shown(words):
    assert words.pretokenized
    (ids,) = words.encode_batch(["zwei bü@@ cher  unbekannt ."])
    assert words.decode(ids) == "zwei bücher <unk> ."
    assert list(ids).count(UNK) == 1
    assert words.plain("viel@@ er bü@@ sche a@@") == "vieler büsche a"


def test_words_vocabulary_is_bounded_and_keeps_the_frequent():
    tokenizer = Tokenizer.train(WORDS, TokenizerConfig(kind="words", vocab_size=7))
    assert tokenizer.vocab_size == 7
    ids = tokenizer.encode_batch(["zwei . bü@@ häuser"])[0]
    assert (ids[:3] > UNK).all()
    assert ids[3] == UNK


def test_plain_bpe_text_is_as_it_is(bpe):
    assert not bpe.pretokenized
    assert bpe.plain("a@@ b") == "a@@ b"


def test_missing_or_broken_file(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*nothing"):
        Tokenizer.load(tmp_path / "nothing")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken\.json is not a tokenizer"):
        Tokenizer.load(tmp_path / "broken.json")
