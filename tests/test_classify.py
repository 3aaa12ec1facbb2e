"""Test classification of texts: outputs equal those in training, in the order of the texts."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from heedful.data.config import TokenizerConfig
from heedful.data.pipeline import Dataset
from heedful.model.config import HeadConfig, ModelConfig
from heedful.model.transformer import build
from heedful.train.config import TrainConfig
from heedful.train.errors import TrainError
from heedful.train.inference.classify import Classifier
from heedful.train.load import Trained, load
from heedful.train.model_loss import classification_loss
from heedful.train.sharding import to_devices
from heedful.train.step import make_eval_step

WORDS = TokenizerConfig(kind="words")
TEXTS = ["red cat", "small large bird dog dog cat", "", "dog", "cat red"]


def trained(folder: Path, model: ModelConfig, table: Path, objective: str) -> Trained:
    # A batch has 128 positions, so that the texts of one length do not fit into one batch.
    data = toy.data(table, objective, tokenizer=WORDS, batch_tokens=128, max_length=19)
    toy.random_run(folder / "run", model, data, dataclasses.replace(toy.TRAIN, average_last=1))
    return load(folder / "run", toy.QUIET)


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("classes")
    return trained(
        folder, toy.model(head=toy.CLASSIFIER), toy.write_table(folder), "classification"
    )


def test_each_text_by_itself_and_in_order(classes):
    classifier = Classifier(classes)
    together = classifier.outputs(TEXTS * 5)
    assert together.shape == (25, 2) and together.dtype == np.float32
    alone = np.concatenate([classifier.outputs([text]) for text in TEXTS])
    np.testing.assert_allclose(together, np.tile(alone, (5, 1)), atol=1e-5)
    assert len(np.unique(alone.round(3), axis=0)) == len(TEXTS)
    assert classifier.outputs([]).shape == (0, 2) and classifier([]) == []


def test_as_in_training(classes):
    """The outputs for the validation texts equal those of the evaluation step."""
    run = classes.run
    dataset = Dataset.prepare(run.data, classes.tokenizer, "valid")
    step, kept = make_eval_step(run.model, classes.mesh, classification_loss), []
    for batch in dataset.eval_batches():
        with jax.set_mesh(classes.mesh):
            _, _, found = step(classes.params, to_devices(batch, classes.mesh))
        columns = np.column_stack([found["outputs"], found["targets"]])
        kept.append(columns[np.asarray(found["weights"]) > 0])
    seen = np.concatenate(kept)
    rows = [line.split("\t") for line in Path(run.data.train[0]).read_text().splitlines()]
    texts = {text for text, _ in rows[1:]}
    ours = Classifier(classes).outputs(sorted(texts))
    for row in seen:  # The examples of a bucket are in another order.
        assert np.abs(ours - row[:2]).max(1).min() < 1e-5


def test_a_line_says_the_class_and_its_probability(classes):
    outputs = Classifier(classes).outputs(TEXTS).astype(np.float64)
    chances = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    for line, row in zip(Classifier(classes)(TEXTS), chances, strict=True):
        name, chance = line.split("\t")
        assert name == ("bad", "good")[row.argmax()]
        assert float(chance) == pytest.approx(row.max(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("types", [0, 2])
def test_pairs(tmp_path, types: int):
    rows = ["red cat\tdog\tyes", "dog\tred cat\tno", "bird\tcat\tyes"] * 30
    lines = [f"{i}{line}" for i, line in enumerate(rows)]  # equal texts share a split
    (tmp_path / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tlabel", *lines]) + "\n")
    model = toy.model(head=HeadConfig(kind="classifier"), type_vocab_size=types)
    classifier = Classifier(trained(tmp_path, model, tmp_path / "pairs.tsv", "classification"))
    outputs = classifier.outputs(["red\tdog cat", "red dog\tcat", "dog cat\tred"])
    assert all(np.abs(outputs[i] - outputs[j]).max() > 1e-4 for i, j in ((0, 1), (0, 2), (1, 2)))
    bos, eos = classifier.trained.tokenizer.frame
    (red,), dog_cat = classifier.trained.tokenizer.encode_batch(["red", "dog cat"])
    tokens = jnp.array([[bos, red, eos, *dog_cat, eos]])
    kinds = {"type_ids": jnp.array([[0, 0, 0, 1, 1, 1]])} if types else {}
    run, params = classifier.trained.run, {"params": classifier.trained.params}
    expected = build(run.model).apply(params, tokens, **kinds)
    np.testing.assert_allclose(outputs[:1], expected, atol=1e-5)
    with pytest.raises(TrainError, match=r"line 2 has 3 texts between tabs"):
        classifier(["red\tcat", "red\tcat\tdog"])


def test_a_number(tmp_path):
    model = toy.model(head=toy.CLASSIFIER)
    table = toy.write_table(tmp_path, toy.number)
    classifier = Classifier(trained(tmp_path, model, table, "regression"))
    outputs = classifier.outputs(TEXTS)
    assert outputs.shape == (5, 1)
    assert classifier(TEXTS) == [f"{number:.4f}" for number in outputs[:, 0]]


def test_a_text_that_is_too_long(classes):
    fits = " ".join(["cat"] * 17)
    assert len(Classifier(classes)([fits])) == 1
    with pytest.raises(TrainError, match=r"line 2 has 20 tokens, more than data.max_length = 19"):
        Classifier(classes)(["cat", fits + " cat"])


def test_a_language_model_does_not_classify(tmp_path):
    data = toy.data(toy.write_text(tmp_path), "causal_lm")
    toy.random_run(tmp_path / "run", toy.model("decoder_only"), data, TrainConfig(average_last=1))
    with pytest.raises(TrainError, match=r"is a causal_lm model, which does not classify"):
        Classifier(load(tmp_path / "run", toy.QUIET))
