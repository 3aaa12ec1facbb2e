"""Test that exported runs give the same answers in transformers, with begin and end tokens."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from peer import array, torch, transformers

from heedful.data.config import TokenizerConfig
from heedful.data.vocabulary import read_wordpiece
from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
)
from heedful.train import cli
from heedful.train.inference.classify import Classifier
from heedful.train.inference.generate import Generator
from heedful.train.inference.translate import Translator
from heedful.train.load import Trained, load

SENTENCES = [
    "small red cat sleeps",
    "Bird",
    "large dog, (blue) CAT runs!",
    "a zebra <eos> sings",
    "dog dog dog",
]


def texts_for(kind: str) -> list[str]:
    """Return the sentences; for words, "<eos>" is replaced, as transformers reads it as a token."""
    return [s.replace("<eos>", "<unk>") for s in SENTENCES] if kind == "words" else SENTENCES


def without_unknown(text: str, kind: str) -> str:
    """Remove unknown tokens from our text: they are special tokens in transformers."""
    if kind == "words":
        return " ".join(word for word in text.split(" ") if word != "<unk>")
    return text.replace("<unk>", "")


KINDS = ("bpe", "chars", "bytes", "words")
POSITIONS = PositionConfig(kind="learned", max_length=128)
BASE = ModelConfig(
    architecture="encoder_only",
    width=16,
    layers=2,
    attention=AttentionConfig(heads=2),
    feed_forward=FeedForwardConfig(width=12, activation="gelu"),
    positions=POSITIONS,
    scale_embeddings=False,
)
BERT = dataclasses.replace(
    BASE, norm=NormConfig(epsilon=1e-12, embeddings=True), type_vocab_size=2, init="normal",
    head=HeadConfig(kind="classifier"),
)  # fmt: skip
GPT2 = dataclasses.replace(
    BASE,
    architecture="decoder_only",
    feed_forward=FeedForwardConfig(width=12, activation="gelu_tanh"),
    norm=NormConfig(position="pre", epsilon=1e-5),
)
MARIAN = dataclasses.replace(
    BASE, architecture="encoder_decoder", norm=NormConfig(epsilon=1e-5), positions=PositionConfig()
)


def exported(folder: Path, model: ModelConfig, data: Any) -> tuple[Trained, Any, Path]:
    """Export a random run; return the run, transformers' tokenizer, and the export's folder."""
    toy.random_run(folder / "run", model, data)
    assert cli.run(["export", str(folder / "run"), str(folder / "hf")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    return load(folder / "run", toy.QUIET), tokenizer, folder / "hf"


def small(kind: str) -> TokenizerConfig:
    return TokenizerConfig(kind=kind, vocab_size=300)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [*KINDS, "wordpiece", "vocab.txt"])
def test_classes(kind: str, tmp_path: Path):
    texts = texts_for(kind)
    config = small("words" if kind == "vocab.txt" else kind)
    if kind == "vocab.txt":
        path = tmp_path / "vocab.txt"
        entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "##s", *toy.SOURCE, "z"]
        path.write_text("\n".join(dict.fromkeys(entries)) + "\n")
        assert read_wordpiece(path.read_text(), {})
        config = TokenizerConfig(path=str(path))
    data = toy.data(toy.write_table(tmp_path), "classification", tokenizer=config, max_length=100)
    trained, tokenizer, directory = exported(tmp_path, BERT, data)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    pairs = [f"{a}\t{b}" for a, b in pairwise(texts)]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    both = tokenizer(texts[:-1], texts[1:], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = [array(model(**batch).logits) for batch in (inputs, both)]
    expected = [Classifier(trained, pairs=True).outputs(some) for some in (texts, pairs)]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_translations(kind: str, tmp_path: Path):
    texts = texts_for(kind)
    toy.write_corpus(tmp_path)
    files = (str(tmp_path / "train.en"), str(tmp_path / "train.de"))
    data = dataclasses.replace(
        toy.data(tmp_path, "translation", tokenizer=small(kind)), train=files
    )
    trained, tokenizer, directory = exported(tmp_path, MARIAN, data)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    translator = Translator(
        trained.run.model, trained.run.train.decode, trained.tokenizer, trained.params, trained.mesh
    )
    extra = trained.run.train.decode.extra_length
    for text, expected in zip(texts, translator(texts), strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        most = inputs["input_ids"].shape[1] + extra
        ids = model.generate(**inputs, max_new_tokens=most, do_sample=False, num_beams=1)
        found = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert found.replace("\n", " ") == without_unknown(expected, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_go_on(kind: str, tmp_path: Path):
    texts = texts_for(kind)
    data = toy.data(toy.write_text(tmp_path), "causal_lm", tokenizer=small(kind))
    trained, tokenizer, directory = exported(tmp_path, GPT2, data)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    decode = dataclasses.replace(trained.run.train.decode, max_tokens=20)
    generator = Generator(
        trained.run.model, decode, trained.tokenizer, trained.params, trained.mesh
    )
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    start = inputs["input_ids"].shape[1]
    for row, text, expected in zip(ids, texts, generator(texts), strict=True):
        (prompt,) = trained.tokenizer.encode_batch([text])
        whole = tokenizer.decode([*prompt, *row[start:]], skip_special_tokens=True)
        whole = whole.rstrip("\ufffd")  # Our text omits an incomplete character.
        ours = trained.tokenizer.decode(prompt) + expected
        assert whole == without_unknown(ours, kind)
