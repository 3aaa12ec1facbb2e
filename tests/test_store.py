"""Test the store of tokens: it keeps tokens, labels and a fingerprint of a dataset on disk."""

import pickle

import numpy as np
import pytest

from heedful.data import packages
from heedful.data import store as module
from heedful.data.config import TokenizerConfig
from heedful.data.store import TokenStore, fingerprint
from heedful.data.tokenizer import Tokenizer

SIDES = ("source", "target")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEEDFUL_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def tokenizer():
    words = [f"{language}{i} {i}" for i in range(37) for language in ("en", "de")]
    return Tokenizer.train(words, TokenizerConfig(kind="words", vocab_size=331))


def test_tokens_are_stored_once(tokenizer, monkeypatch):
    examples = [{"source": "en3 5", "target": "de3"}, {"source": "", "target": "de5 7 11"}]
    key = fingerprint(examples)
    store = TokenStore.build(examples, SIDES, tokenizer, key)
    assert [len(store[1][side]) for side in ("source", "target")] == [0, 3]
    assert store.counts()["source"].tolist() == [2, 0]
    assert store.blank.tolist() == [False, True]

    def fail(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(module, "_write", fail)
    again = TokenStore.build(examples, SIDES, tokenizer, key)
    np.testing.assert_array_equal(again[0]["source"], store[0]["source"])
    with pytest.raises(AssertionError):
        TokenStore.build(examples, SIDES, tokenizer, fingerprint(examples[:1]))


def test_tokens_are_written_chunk_by_chunk(tokenizer, monkeypatch):
    examples = [{"source": f"en{i} {i}", "target": f"de{i}"} for i in range(23, 34)]
    monkeypatch.setattr(module, "CHUNK", 11)
    store = TokenStore.build(examples, SIDES, tokenizer, "chunks of three")
    for i, example in enumerate(examples):
        assert tokenizer.decode(store[i]["source"]) == example["source"]
        assert tokenizer.decode(store[i]["target"]) == example["target"]


def test_fingerprint_sees_text_label_order_and_border():
    def of(*pairs):
        return fingerprint([{"source": s, "target": t} for s, t in pairs])

    different = [of(("a", "b")), of(("b", "a")), of(("ab", "")), of(("a", "b"), ("", ""))]
    different += [of(("a", "b"), ("c", "d")), of(("c", "d"), ("a", "b"))]
    different += [fingerprint([{"text": "a", "label": label}]) for label in "bc"]
    different += [fingerprint([{"text": "a"}])]
    assert len(set(different)) == len(different)
    assert of(("a", "b")) == of(("a", "b"))


def test_sizes_labels_and_blanks(tokenizer):
    examples = [
        {"text": "zwei Häuser", "pair": "é", "label": "a"},
        {"text": "x", "pair": " ", "label": "b"},
    ]
    store = TokenStore.build(examples, ("text", "pair"), tokenizer, "labelled")
    assert store.sizes.tolist() == [[12, 2], [14, 2]]
    assert store.labels() == ["a", "b"]
    assert store.blank.tolist() == [False, True]
    # A store with other fields is another one.
    assert (
        TokenStore.build(examples, ("text",), tokenizer, "labelled").blank.tolist() == [False] * 2
    )


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_long_documents_are_tokenised_in_parts(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr("heedful.data.text_parts.PART", 5)
    texts = ["", "abcdefghijklmnop" * 3, "abc", "", "ponm" * 5]
    chars = Tokenizer.train(texts, TokenizerConfig(kind="chars", vocab_size=31))
    store = TokenStore.build([{"text": text} for text in texts], ("text",), chars, f"{chunk}")
    assert [chars.decode(store[i]["text"]) for i in range(len(texts))] == texts
    assert store.counts()["text"].tolist() == [len(text) for text in texts]


def test_slices_of_a_document(tokenizer):
    examples = [{"text": text} for text in ("en3", "en5 5 de7", "de2 2")]
    store = TokenStore.build(examples, ("text",), tokenizer, "slices")
    store = pickle.loads(pickle.dumps(store))
    for document in range(3):
        bare = store[document]["text"].tolist()
        framed = [1, *bare, 2]
        for start in range(len(framed)):
            for stop in range(start + 1, len(framed) + 1):
                found = store.text(document, start, stop, (1, 2))
                assert found.tolist() == framed[start:stop]
                assert found.dtype == np.int32
                if stop <= len(bare):
                    assert store.text(document, start, stop).tolist() == bare[start:stop]


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def large(path):
    ids = np.fromfile(path, np.int32)
    ids[1] = 2**30
    ids.tofile(path)


@pytest.mark.parametrize("damage", [halve, zeros, large, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["source.ids", "target.offsets.npy", "sizes.npy"])
def test_a_damaged_store_is_made_again(tokenizer, capfd, name, damage):
    examples = [{"source": f"en{i} {i}", "target": f"de{i}"} for i in range(5)]
    wanted = TokenStore.build(examples, SIDES, tokenizer, "damaged")
    wanted = [wanted[i]["source"].tolist() for i in range(5)], wanted.sizes.tolist()
    (folder,) = (path.parent for path in packages.cache().rglob("blank.npy"))
    damage(folder / name)
    for said in (f"{name} differs from its checksum): building it again", ""):
        store = TokenStore.build(examples, SIDES, tokenizer, "damaged")
        assert [store[i]["source"].tolist() for i in range(5)] == wanted[0]
        assert store.sizes.tolist() == wanted[1] and store.counts()["target"].tolist() == [1] * 5
        assert said in capfd.readouterr().err
    assert not list(packages.cache().rglob(".tmp-*"))
