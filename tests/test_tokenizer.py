"""Test tokenizers: all kinds, files of other libraries, special tokens and limits."""

import json
import pickle
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from heedful.data import text_parts
from heedful.data.config import TokenizerConfig
from heedful.data.errors import DataError
from heedful.data.tokenizer import BOS, EOS, PAD, SPECIAL, UNK, Tokenizer

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


def learn(kind, objective="translation", vocab_size=431, texts=TEXTS, **changes):
    config = TokenizerConfig(kind=kind, vocab_size=vocab_size, **changes)
    return Tokenizer.train(texts, config, objective)


@pytest.fixture(scope="module")
def lossless(bpe):
    return {"bpe": bpe, "bytes": learn("bytes")}


def tokens(tokenizer, ids):
    return [tokenizer._tokenizer.id_to_token(int(i)) for i in ids]


@given(st.text(st.characters(exclude_categories=["Cs"])))
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_round_trip_is_exact(lossless, kind, text):
    tokenizer = lossless[kind]
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
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
    chars = learn("chars")
    assert chars.decode(chars.encode_batch([text])[0]) == text
    (ids,) = learn("wordpiece").encode_batch([text])
    assert (ids > UNK).all()


def test_words_that_are_spelled_like_special_tokens_leave_their_ids_alone():
    tokenizer = learn("words", texts=["a <eos> b <eos> <pad> a", "<mask> <eos>"])
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.unk) == (0, 1, 2, 3)
    assert tokenizer.mask is None  # Here "<mask>" is a word of the text.
    (ids,) = tokenizer.encode_batch(["a <eos> <mask>"])
    assert (ids[[0, 2]] > UNK).all()
    assert ids[1] == UNK


def test_decode_drops_special_tokens_and_stops_nowhere(bpe):
    (ids,) = bpe.encode_batch(["the dog"])
    framed = [BOS, *ids[:2], EOS, PAD, *ids[2:], EOS, PAD]
    assert bpe.decode(framed) == "the dog"
    # A model may have more outputs than the vocabulary has entries.
    assert bpe.decode([*framed, bpe.vocab_size + 5]) == "the dog"


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
    for kind in ("wordpiece", "chars", "bytes"):
        vocab_sizes = (271, 277) if kind == "bytes" else (83, 89, 97)
        for size in vocab_sizes:
            prints = {learn(kind, "masked_lm", size, t).fingerprint for t in (TEXTS, mixed, TEXTS)}
            assert len(prints) == 1
            assert learn(kind, "masked_lm", size, iter(TEXTS)).fingerprint in prints
    for vocab_size in (8, 9):  # Words with equal counts are the last of the vocabulary.
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


# The other kinds ---------------------------------------------------------------------------------


def test_special_tokens_of_the_objective():
    for kind in ("bpe", "wordpiece", "chars", "bytes", "words"):
        assert learn(kind).mask is None
        assert learn(kind).sentinels == ()
        masked, spans = learn(kind, "masked_lm"), learn(kind, "span_corruption")
        assert (masked.pad, masked.bos, masked.eos, masked.unk, masked.mask) == (0, 1, 2, 3, 4)
        assert spans.sentinels == tuple(range(4, 104))
        for tokenizer, n in ((masked, 5), (spans, 104)):
            assert tokenizer.is_special.sum() == n
            assert tokenizer.ordinary.tolist() == [*range(n, tokenizer.vocab_size)]
            assert tokenizer.vocab_size <= 431


def test_wordpiece_splits_like_bert():
    tokenizer = learn("wordpiece", texts=["unhappy unhappily happy happily"] * 7, vocab_size=61)
    (ids,) = tokenizer.encode_batch(["unhappy,happily zz"])
    pieces = tokens(tokenizer, ids)
    assert pieces[0].startswith("un")
    assert all(piece.startswith("##") for piece in pieces[1 : pieces.index("<unk>")])
    assert pieces.count("<unk>") == 2  # The comma and zz.
    assert tokenizer.decode(tokenizer.encode_batch(["happily unhappy"])[0]) == "happily unhappy"
    folded = learn("wordpiece", texts=["Été été"], vocab_size=61, lowercase=True)
    assert len({tuple(ids) for ids in folded.encode_batch(["Été", "été", "ete"])}) == 1
    assert UNK in learn("wordpiece", texts=["été"], vocab_size=61).encode_batch(["Été"])[0]


def test_wordpiece_knows_the_most_frequent_characters(monkeypatch):
    monkeypatch.setattr("heedful.data.vocabulary.MAX_ALPHABET", 3)
    tokenizer = learn("wordpiece", texts=["aaab bbc cd", "d d"])
    assert [UNK in ids for ids in tokenizer.encode_batch(["abd", "c"])] == [False, True]


def test_chars_are_the_characters_of_the_text():
    text = "Zwei Häuser,\n\nein\tDach \u2028 👩‍🚀"
    tokenizer = learn("chars", texts=[text])
    (ids,) = tokenizer.encode_batch([text])
    assert tokens(tokenizer, ids) == list(text)
    assert tokens(tokenizer, range(4, tokenizer.vocab_size)) == sorted(set(text))
    assert tokenizer.decode(ids) == text
    (ids,) = tokenizer.encode_batch(["Zqq"])
    assert ids[1:].tolist() == [UNK, UNK]


def test_bytes_are_the_256_bytes():
    tokenizer = learn("bytes", texts=[])
    assert tokenizer.vocab_size == 4 + 256
    for text in ("aé\n", "👩 \0"):
        assert tokenizer.encode_batch([text])[0].tolist() == [4 + byte for byte in text.encode()]


@pytest.mark.parametrize(
    ("kind", "objective", "size"),
    [("bpe", "span_corruption", 300), ("bytes", "masked_lm", 260), ("chars", "causal_lm", 11)],
)
def test_alphabet_that_does_not_fit(kind, objective, size):
    with pytest.raises(DataError, match=rf"data\.tokenizer\.vocab_size is {size}, but .*{kind}"):
        learn(kind, objective, size)


# Tokenizers of other libraries -------------------------------------------------------------------


def other(model, special, path, **parts):
    """Write a tokenizer.json as other libraries do, with a post-processor and truncation."""
    tokenizer = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens(special)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(path))
    return Tokenizer.load(path)


BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", ",", "[", "]"]


@pytest.fixture
def bert(tmp_path):
    return other(
        models.WordPiece({token: i for i, token in enumerate(BERT)}, unk_token="[UNK]"),
        BERT[:5],
        tmp_path / "bert.json",
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        post_processor=processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
        decoder=decoders.WordPiece(),
    )


@pytest.fixture
def gpt2(tmp_path):
    trained = learn("bpe")
    contents = json.loads(trained._json)["model"]
    vocabulary = {t: i for i, t in enumerate(list(contents["vocab"])[4:])}
    merges = [tuple(merge) for merge in contents["merges"]]
    return other(
        models.BPE(vocabulary | {"<|endoftext|>": len(vocabulary)}, merges),
        ["<|endoftext|>"],
        tmp_path / "gpt2.json",
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )


@pytest.fixture
def t5(tmp_path):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("▁the", -2.0)]
    pieces += [(c, -5.0) for c in "abcdefhist,</>_01"]
    pieces += [("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)]
    return other(
        models.Unigram(pieces, unk_id=2),
        ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"],
        tmp_path / "t5.json",
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


def test_bert(bert):
    assert (bert.pad, bert.unk, bert.bos, bert.eos, bert.mask) == (0, 1, 2, 3, 4)
    (ids,) = bert.encode_batch(["The cats, the cats sat, the cats"])
    expected = "the cat ##s , the cat ##s sat , the cat ##s"  # no truncation at 5, no frame
    assert tokens(bert, ids) == expected.split()
    assert bert.decode([bert.bos, *ids[:3], bert.mask, bert.eos]) == "the cats"
    (ids,) = bert.encode_batch(["cat [SEP] [MASK]"])
    assert tokens(bert, ids) == ["cat", "[", "[UNK]", "]", "[", "[UNK]", "]"]


def test_gpt2(gpt2):
    end = gpt2.vocab_size - 1
    assert (gpt2.bos, gpt2.eos, gpt2.pad, gpt2.unk) == (end, end, None, None)
    text = "the dog <|endoftext|>"
    (ids,) = gpt2.encode_batch([text])
    assert end not in ids
    assert gpt2.decode([end, *ids, end]) == text
    assert (ids + 4).tolist() == learn("bpe").encode_batch([text])[0].tolist()


def test_t5(t5):
    assert (t5.pad, t5.bos, t5.eos, t5.unk, t5.mask) == (0, 0, 1, 2, None)
    assert tokens(t5, t5.sentinels) == ["<extra_id_0>", "<extra_id_1>"]
    # The vocabulary has special tokens as pieces, but a text must not be split into them.
    (ids,) = t5.encode_batch(["the </s> is<extra_id_0>"])
    assert t5.decode(ids) == "the </s> is<e<unk>t<unk>a_id_0>"
    assert not {t5.eos, *t5.sentinels} & set(ids.tolist())


def test_vocab_txt(bert, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(BERT) + "\n")
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.mask) == (0, 2, 3, 4)
    texts = ["The CATS sat", "[SEP] [MASK] the", "zz, cat"]
    for ids, expected in zip(*(t.encode_batch(texts) for t in (tokenizer, bert)), strict=True):
        assert ids.tolist() == expected.tolist()
    path.write_text("\n".join([*BERT, "Cat"]))  # A capital keeps the case.
    cased = Tokenizer.load(path)
    assert tokens(cased, cased.encode_batch(["Cat The"])[0]) == ["Cat", "[UNK]"]
    path.write_text("a\nb\n")
    with pytest.raises(DataError, match=r"vocab\.txt has no \[UNK\]"):
        Tokenizer.load(path)


def test_the_last_of_repeated_entries_counts(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*BERT, "cat", "dog"]))
    tokenizer = Tokenizer.load(path)
    (ids,) = tokenizer.encode_batch(["the cat dog"])
    assert ids.tolist() == [5, 12, 13]  # as in transformers 5.24; id 6 is unused
    assert tokenizer.vocab_size == 14 and tokenizer.is_special[6]


@pytest.mark.parametrize(
    ("config", "text", "expected"),
    [
        ({"do_lower_case": False}, "The été", "[UNK] été"),
        ({"do_lower_case": True}, "The été", "the ete"),
        ({"do_lower_case": True, "strip_accents": False}, "THE Été", "the été"),
        ({"do_lower_case": False, "strip_accents": True}, "the été", "the ete"),
        ({"tokenize_chinese_chars": False}, "漢字", "漢字"),
        ({"tokenize_chinese_chars": True}, "漢字", "漢 字"),
        ({"never_split": ["[MASK]"]}, "The", "the"),
        ({"cls_token": "<go>", "sep_token": {"content": "<stop>"}}, "the", "the"),
    ],
)
def test_vocab_txt_is_split_as_its_config_says(tmp_path, config, text, expected):
    entries = [*BERT, "été", "ete", "漢字", "漢", "字", "<go>", "<stop>"]
    (tmp_path / "vocab.txt").write_text("\n".join(entries), "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path / "vocab.txt")
    assert tokens(tokenizer, tokenizer.encode_batch([text])[0]) == expected.split()
    framed = ("<go>", "<stop>") if "cls_token" in config else ("[CLS]", "[SEP]")
    assert tokens(tokenizer, tokenizer.frame) == list(framed)
    assert tokenizer.decode([*tokenizer.frame]) == ""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"never_split": ["foo-bar"]}', r"never_split \['foo-bar'\].*delete never_split"),
        ('{"do_lower_case": "yes"}', r"do_lower_case 'yes': give true or false"),
        ("{", r"tokenizer_config\.json is not JSON"),
        ("[]", r"tokenizer_config\.json is JSON, but not an object"),
    ],
)
def test_config_that_cannot_be_followed(tmp_path, config, message):
    (tmp_path / "vocab.txt").write_text("\n".join(BERT))
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path / "vocab.txt")


def test_prepare_loads_or_learns(bert, tmp_path):
    def fail():
        raise AssertionError("read the texts")
        yield ""

    path = str(tmp_path / "bert.json")
    loaded = Tokenizer.prepare(fail(), TokenizerConfig(path=path), "masked_lm")
    assert loaded.fingerprint == bert.fingerprint
    learned = Tokenizer.prepare(TEXTS, TokenizerConfig(kind="bytes"), "masked_lm")
    assert learned.fingerprint == learn("bytes", "masked_lm", 4099).fingerprint
    folded = TokenizerConfig(kind="wordpiece", path=path, lowercase=True)
    with pytest.raises(DataError, match=r"data\.tokenizer\.lowercase .*bert\.json"):
        Tokenizer.prepare(TEXTS, folded, "masked_lm")


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("masked_lm", r"gpt2\.json lacks a mask token like <mask> or \[MASK\], which .*masked_lm"),
        ("span_corruption", r"gpt2\.json lacks sentinels like <extra_id_0>"),
    ],
)
def test_missing_special_tokens(gpt2, tmp_path, objective, message):
    config = TokenizerConfig(path=str(tmp_path / "gpt2.json"))
    assert Tokenizer.prepare([], config, "causal_lm").fingerprint == gpt2.fingerprint
    with pytest.raises(DataError, match=message):
        Tokenizer.prepare([], config, objective)


def test_no_begin_and_no_end(tmp_path):
    tokenizer = other(models.BPE({"a": 0}, []), [], tmp_path / "t.json")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (None, None, None)
    with pytest.raises(DataError, match=r"the tokenizer lacks a begin.* and an end.* causal_lm"):
        tokenizer.require("causal_lm")


def test_a_worker_process_gets_the_same(bert):
    again = pickle.loads(pickle.dumps(bert))
    assert again.fingerprint == bert.fingerprint
    text = "the cats, [SEP] and cats"
    assert again.encode_batch([text])[0].tolist() == bert.encode_batch([text])[0].tolist()


# Long texts and words ----------------------------------------------------------------------------

LONG = "the quick  brown\n\nfox, don't jump\nover\n the lazy\tdog  .\n" * 29


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "chars", "bytes", "words", "bert", "gpt2"])
def test_parts_of_a_text_have_its_tokens(kind, request, monkeypatch):
    is_fixture = kind in ("bert", "gpt2")
    tokenizer = request.getfixturevalue(kind) if is_fixture else learn(kind, texts=[LONG])
    (whole,) = tokenizer.encode_batch([LONG])
    for size in (1, 7, 97):
        monkeypatch.setattr(text_parts, "PART", size)
        parts = list(tokenizer.parts(LONG))
        assert "".join(parts) == LONG
        assert len(parts) > len(LONG) / (size + 20)
        assert np.concatenate(tokenizer.encode_batch(parts)).tolist() == whole.tolist()


def test_a_text_without_borders_and_a_tokenizer_without_them_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(text_parts, "PART", 7)
    assert list(learn("bpe").parts("x" * 97)) == ["x" * 97]
    assert max(map(len, learn("chars").parts("x" * 97))) == 7
    llama = other(
        models.BPE({"<unk>": 0, "▁": 1, "t": 2, "h": 3}, [], unk_token="<unk>"),
        ["<unk>"],
        tmp_path / "llama.json",
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )
    assert list(llama.parts(LONG)) == [LONG]


def test_words(bert, gpt2, t5, words):
    def split(tokenizer, text):
        (ids,) = tokenizer.encode_batch([text])
        groups = tokenizer.words(ids)
        return [
            "".join(tokens(tokenizer, ids[groups == i])).replace("Ġ", "_").replace("▁", "_")
            for i in range(max(groups, default=-1) + 1)
        ]

    assert split(bert, "cats sat,the") == ["cat##s", "sat", ",", "the"]
    assert split(words, "bü@@ sche zwei er") == ["bü@@sche", "zwei", "er"]
    assert split(gpt2, "xyz-don't  zzz 77\n") == [
        "xyz",
        "-",
        "don",
        "'",
        "t",
        "_",
        "_zzz",
        "_77",
        "Ċ",
    ]
    assert split(t5, "the cabs,had") == ["_the", "_cabs", ",", "had"]
    chars = learn("chars", texts=["ab, c漢字_d"])
    assert split(chars, "ab, c漢字d") == ["ab", ",", " c", "漢", "字", "d"]
    assert split(learn("bytes"), "né, c") == ["nÃ©", ",", "_c"]
    assert split(bert, "") == []
    framed = [bert.bos, 6, 7, bert.mask, 7, bert.eos]  # [CLS] cat ##s [MASK] ##s [SEP]
    assert bert.words(np.array(framed)).tolist() == [0, 1, 1, 2, 3, 4]


# Text that a tokenizer loses ---------------------------------------------------------------------


def test_text_that_the_vocabulary_lacks(bpe, bert, words):
    known = {"cats": 0, "the dog": 1, "x" * 101: 1, "zz, zz": 2}
    for text, count in known.items():
        assert bert.count_unknown(bert.encode_batch([text])[0]) == count
        assert bpe.count_unknown(bpe.encode_batch([text])[0]) == 0
    assert bpe.unknown is None and words.count_unknown(words.encode_batch(["<eos> zwei"])[0]) == 1


def test_tokenizers_that_lose_spaces_are_for_no_texts_that_are_written(bert, gpt2, t5, tmp_path):
    for kind, loses in {"wordpiece": True, "bpe": False, "chars": False, "words": False}.items():
        assert learn(kind).loses_spaces == loses
    assert bert.loses_spaces and not gpt2.loses_spaces and not t5.loses_spaces
    path = str(tmp_path / "bert.json")
    for objective in ("translation", "causal_lm", "prefix_lm"):
        with pytest.raises(DataError, match=f"kind wordpiece .*spaces.* {objective} .*kind bpe"):
            Tokenizer.prepare(TEXTS, TokenizerConfig(kind="wordpiece"), objective)
        with pytest.raises(DataError, match=rf"bert\.json .*spaces.* {objective} .*kind bpe"):
            Tokenizer.prepare(TEXTS, TokenizerConfig(path=path), objective)
    assert Tokenizer.prepare(TEXTS, TokenizerConfig(path=path), "classification").loses_spaces


# Bounds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_long_words_are_learned_from_in_pieces(kind, monkeypatch):
    ordinary = learn(kind)
    monkeypatch.setattr("heedful.data.vocabulary.MAX_WORD", 29)
    assert learn(kind).fingerprint == ordinary.fingerprint
    monkeypatch.setattr("heedful.data.vocabulary.MAX_WORD", 3)
    shorter = learn(kind)
    assert shorter.fingerprint != ordinary.fingerprint
    longest = max(len(shorter.name(int(i)).removeprefix("##")) for i in shorter.ordinary)
    assert longest == 3
    # Both tokenizers split texts in the same way.
    whole, cut = (json.loads(t._json)["pre_tokenizer"] for t in (ordinary, shorter))
    assert whole == cut


def test_a_vocabulary_has_bounds(tmp_path):
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    path = tmp_path / "tokenizer.json"
    for model in (models.WordPiece, models.WordLevel):
        # When the library saves such a tokenizer, it lists each missing id, which takes 16 GB.
        text = tokenizers.Tokenizer(model(vocabulary, unk_token="[UNK]")).to_str()
        path.write_text(text.replace('"b":2', '"b":4000000000'))
        with pytest.raises(
            DataError, match=r"tokenizer\.json gives .* id 4000000000, .*10,000,000"
        ):
            Tokenizer.load(path)
    tokenizers.Tokenizer(models.WordLevel(vocabulary | {"b": 9}, unk_token="[UNK]")).save(str(path))
    assert Tokenizer.load(path).is_special.tolist() == [True, False, *[True] * 7, False]
    with pytest.raises(DataError, match=r"vocab_size is 1000000000: give 4194304 or less"):
        TokenizerConfig(vocab_size=10**9)


def test_missing_or_broken_file(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*nothing"):
        Tokenizer.load(tmp_path / "nothing")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken\.json is not a tokenizer"):
        Tokenizer.load(tmp_path / "broken.json")
