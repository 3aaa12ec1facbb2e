"""Test evaluation: losses and scores against plain loops over the examples in float64."""

import dataclasses
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from rich.console import Console

from heedful.data import sources
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.data.pipeline import Dataset
from heedful.model.config import ModelConfig
from heedful.model.transformer import build
from heedful.train.config import DecodeConfig
from heedful.train.config_json import write_json
from heedful.train.errors import TrainError
from heedful.train.evaluation import evaluate
from heedful.train.evaluation.evaluate import evaluation_directory, report
from heedful.train.evaluation.measure import describe, frequency_loss, measure
from heedful.train.evaluation.perplexity import strided_loss
from heedful.train.growing_files import Lines
from heedful.train.load import Trained, load
from heedful.train.model_loss import language_model_loss
from heedful.train.step import make_eval_step
from heedful.train.tasks import task_of

WORDS = TokenizerConfig(kind="words")


def trained(folder: Path, model: ModelConfig, path: Path, objective: str) -> Trained:
    data = toy.data(path, objective, tokenizer=WORDS)
    toy.random_run(folder / "run", model, data, dataclasses.replace(toy.TRAIN, average_last=1))
    return load(folder / "run", toy.QUIET)


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("classes")
    model = toy.model(head=toy.CLASSIFIER)
    return trained(folder, model, toy.write_table(folder), "classification")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("numbers")
    model = toy.model(head=toy.CLASSIFIER)
    return trained(folder, model, toy.write_table(folder, toy.number), "regression")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("text")
    return trained(folder, toy.model("decoder_only"), toy.write_text(folder), "causal_lm")


def prepare(trained: Trained, split: str = "valid") -> Dataset:
    return Dataset.prepare(trained.run.data, trained.tokenizer, split)


def measured(trained: Trained, dataset: Dataset, **how: Any) -> dict[str, float]:
    step = make_eval_step(trained.run.model, trained.mesh, task_of(trained.run.data).loss, **how)
    with jax.set_mesh(trained.mesh):
        return measure(step, trained.params, dataset, trained.mesh)


def outputs(trained: Trained, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Compute the model's outputs for each row of tokens alone, without padding, as float64."""
    apply: Any = jax.jit(build(trained.run.model).apply)
    params = jax.device_get(trained.params)
    return [
        np.asarray(apply({"params": params}, jnp.asarray(row)[None])[0], np.float64) for row in rows
    ]


def labelled(trained: Trained) -> tuple[np.ndarray, list[str]]:
    """Return outputs [E, C] and labels of the validation examples."""
    examples = list(sources.load(trained.run.data, "valid"))
    bos, eos = trained.tokenizer.frame
    ids = trained.tokenizer.encode_batch([example["text"] for example in examples])
    rows = [np.array([bos, *row, eos]) for row in ids]
    return np.stack(outputs(trained, rows)), [example["label"] for example in examples]


def test_classes(classes):
    dataset = prepare(classes)
    # The last batch is padded. A mean of the batches' means would give its examples more weight.
    assert dataset.batches_per_epoch > 1 and len(dataset.kept) % dataset.eval_plan.shapes[0].rows
    found, labels = labelled(classes)
    targets = np.array([classes.run.data.classes.index(label) for label in labels])
    chances = np.exp(found) / np.exp(found).sum(1, keepdims=True)
    got = measured(classes, dataset)
    losses = -np.log(chances[np.arange(len(targets)), targets])
    assert got["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert got["accuracy"] == pytest.approx((found.argmax(1) == targets).mean())
    assert set(got) == {"loss", "accuracy", "f1", "matthews"}
    lines = describe(got, dataset)
    assert lines[0] == f"loss: {got['loss']:.4f} nats per example"
    assert f"accuracy: {100 * got['accuracy']:.2f} %" in lines
    got = measured(classes, dataset, label_smoothing=0.3)
    smoothed = 0.7 * losses - 0.3 * np.log(chances).mean(1)
    assert got["smoothed_loss"] == pytest.approx(smoothed.mean(), rel=1e-5)
    assert got["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    shares = [np.mean(targets == i) for i in set(targets)]
    assert frequency_loss(dataset) == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_numbers(numbers):
    found, labels = labelled(numbers)
    targets = np.array(list(map(float, labels)))
    dataset = prepare(numbers)
    got = measured(numbers, dataset)
    assert got["loss"] == pytest.approx(((found[:, 0] - targets) ** 2).mean(), rel=1e-4)
    assert got["pearson"] == pytest.approx(np.corrcoef(found[:, 0], targets)[0, 1], rel=1e-3)
    assert set(got) == {"loss", "pearson", "spearman"}
    assert describe(got, dataset)[0] == f"mean squared error: {got['loss']:.4f}"
    assert frequency_loss(dataset) == pytest.approx(targets.var(), rel=1e-5)


def test_a_loss_beyond_all_numbers_is_still_told(text):
    (line, _) = describe({"loss": 1e4}, prepare(text))
    assert line == "loss: 10000.0000 nats per token (perplexity inf)"


def test_data_without_anything_to_predict_are_refused(text, monkeypatch):
    dataset = prepare(text)
    blank = [batch | {"weights": 0 * batch["weights"]} for batch in dataset.eval_batches()]
    monkeypatch.setattr(Dataset, "eval_batches", lambda *_: blank)
    with pytest.raises(TrainError, match=r"valid data has nothing to predict: .*data\.tok"):
        measured(text, dataset)


def document(trained: Trained) -> tuple[str, np.ndarray]:
    """Return the validation text and its tokens, begin and end included."""
    (example,) = sources.load(trained.run.data, "valid")
    bos, eos = trained.tokenizer.frame
    return example["text"], np.array(
        [bos, *trained.tokenizer.encode_batch([example["text"]])[0], eos]
    )


def nats(trained: Trained, tokens: np.ndarray, windows: list[tuple[int, int, int]]) -> float:
    """Return the loss of tokens[known + 1 : stop + 1], summed over windows (start, known, stop)."""
    found = outputs(trained, [tokens[start:stop] for start, _, stop in windows])
    total = 0.0
    for (start, known, stop), scores in zip(windows, found, strict=True):
        logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        for i in range(known, stop):
            total -= logs[i - start, tokens[i + 1]]
    return total


def test_text_in_pieces(text):
    string, tokens = document(text)
    count, length = len(tokens) - 1, text.run.data.max_length
    total = nats(text, tokens, [(i, i, min(i + length, count)) for i in range(0, count, length)])
    dataset = prepare(text)
    assert dataset.target_count == count and dataset.characters == len(string)
    got = measured(text, dataset)
    assert got == {"loss": pytest.approx(total / count, rel=1e-5)}
    loss, bits = describe(got, dataset)
    words = loss.replace("(", "").replace(")", "").split()
    assert words[::2] == ["loss:", "nats", "token", f"{math.exp(total / count):.2f}"]
    # Bits of the whole text, with its end token, per character.
    assert bits == f"bits per character: {total / math.log(2) / len(string):.4f}"


def test_a_model_that_knows_nothing_is_told(text):
    _, tokens = document(text)
    _, counts = np.unique(tokens[1:], return_counts=True)
    known = -np.sum(counts / counts.sum() * np.log(counts / counts.sum()))
    console = Console(markup=False, file=io.StringIO(), width=500)
    result = report(text, text.run.train.decode, console)
    assert result["valid_frequency_loss"] == pytest.approx(known)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"validation loss of a guess by frequency alone: {known:.4f}\nthe model is no" in said


def test_a_loss_that_is_no_number_is_an_error(text):
    params = jax.tree.map(lambda x: x * jnp.nan, text.params)
    broken = dataclasses.replace(text, params=params)
    result = text.run.directory / "result.json"
    before = result.read_text() if result.exists() else None
    for stride in (None, 5):
        with pytest.raises(TrainError, match=r"the validation loss is nan.*nothing is written"):
            report(broken, text.run.train.decode, toy.QUIET, stride=stride)
    assert (result.read_text() if result.exists() else None) == before


def test_files_of_numbers_are_json(tmp_path):
    values = {"a": [1.5, math.nan], "b": (math.inf, {"c": -math.inf}), "d": "NaN", "e": True}
    write_json(tmp_path / "x.json", values)
    lines = Lines(tmp_path / "x.jsonl", 0)
    lines.write(values)
    lines.close()
    for name in ("x.json", "x.jsonl"):
        found = json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
        assert found == {"a": [1.5, None], "b": [None, {"c": None}], "d": "NaN", "e": True}


def test_the_class_of_an_f1_is_named(classes, numbers):
    measured = {"loss": 1.0, "accuracy": 0.5, "f1": 0.25, "matthews": 0.0}
    dataset = prepare(classes)
    assert f"f1 of class {dataset.classes[1]}: 25.00 %" in describe(measured, dataset)
    three = dataclasses.replace(dataset, classes=("a", "b", "c"))
    assert "f1 of all classes, their mean: 25.00 %" in describe(measured, three)


def test_other_settings_lie_elsewhere(text):
    run, own = text.run, text.run.train.decode
    assert run.train.average_last == 1
    usual: dict[str, Any] = {"fallback": False, "seed": 0, "stride": None, "other_data": False}

    def name(decode: DecodeConfig = own, checkpoint: str | None = None, **others: Any) -> str:
        settings: dict[str, Any] = usual | others
        return evaluation_directory(run, decode, checkpoint=checkpoint, **settings).name

    for checkpoint in (None, "best"):
        found = evaluation_directory(run, own, checkpoint=checkpoint, **usual)
        assert found == run.directory
    decode = dataclasses.replace(own, beam=7)
    assert name(decode, "last") == "checkpoint=last,beam=7"
    assert name(stride=5, seed=3, fallback=True) == "fallback=True,seed=3,stride=5"
    assert name(other_data=True) == "other_data=True"
    strange = [name(dataclasses.replace(own, stop=(stop,))) for stop in ("/../", "/.. ", "x" * 300)]
    assert len(set(strange)) == 3
    assert all(len(n) < 120 and "/" not in n for n in strange)
    (run.directory / "evaluations").symlink_to(run.directory.parent)
    with pytest.raises(TrainError, match="evaluations is a link"):
        name(seed=3)
    (run.directory / "evaluations").unlink()
    report(text, own, toy.QUIET)
    before = (run.directory / "result.json").read_text()
    usual["stride"] = 5
    elsewhere = evaluation_directory(run, own, checkpoint=None, **usual)
    console = Console(markup=False, file=io.StringIO(), width=500)
    report(text, own, console, stride=5, directory=elsewhere)
    assert (run.directory / "result.json").read_text() == before
    assert json.loads((elsewhere / "result.json").read_text())["stride"] == 5
    assert f"result.json lies in {elsewhere}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_data_that_are_not_those_of_the_training(text, tmp_path):
    files = text.run.data.train
    sums = {split: prepare(text, split).data_fingerprint for split in ("train", "valid", "test")}
    run = dataclasses.replace(text.run, directory=tmp_path)
    moved = dataclasses.replace(text, run=run)

    def measured(recorded: dict[str, str], **how: Any) -> str:
        environment = {"from_step": 0, "config": run.values(), "data": recorded}
        write_json(tmp_path / "environment.json", [environment])
        console = Console(markup=False, file=io.StringIO(), width=500)
        report(moved, run.train.decode, console, **how)
        return console.file.getvalue()  # type: ignore[attr-defined]

    report(moved, run.train.decode, console := Console(markup=False, file=io.StringIO(), width=500))
    assert "has no record of its training data" in console.file.getvalue()  # type: ignore[attr-defined]
    of_before = {name: sums[name] for name in ("train", "valid")}
    for recorded in (sums, of_before):
        assert "training data" not in measured(recorded)
    for recorded, name in (
        (sums | {"valid": "0"}, "validation"), (sums | {"test": "0"}, "test"),
        (of_before | {"train": "0"}, "test"),
    ):  # fmt: skip
        with pytest.raises(TrainError, match=rf"the {name} data of .*{files[0]}.* --other-data"):
            measured(recorded)
        assert f"the {name} data of" in measured(recorded, other_data=True)
    # The user may evaluate other test data than the recorded data.
    environment = {"config": {"data": {"test": ["a.txt"]}}, "data": sums | {"test": "0"}}
    write_json(tmp_path / "environment.json", [environment])
    report(moved, run.train.decode, toy.QUIET)


@pytest.mark.parametrize("stride", [5, 16])
def test_text_in_windows(text, stride: int):
    """Each token is predicted once, from as many tokens before it as fit into a window.

    With stride 16 the windows are separate pieces.
    """
    _, tokens = document(text)
    count, length = len(tokens) - 1, text.run.data.max_length
    stops = [length, *range(length + stride, count, stride), count]
    windows = [
        (max(stop - length, 0), known, stop)
        for known, stop in zip([0, *stops], stops, strict=False)
    ]
    step = make_eval_step(text.run.model, text.mesh, language_model_loss)
    got = strided_loss(step, text.params, prepare(text), text.mesh, stride)
    assert got == pytest.approx(nats(text, tokens, windows) / count, rel=1e-5)


def test_strides_that_cannot_be(text, classes):
    step = make_eval_step(text.run.model, text.mesh, language_model_loss)
    for stride in (0, 17):
        with pytest.raises(TrainError, match=rf"--stride {stride}: .* data.max_length = 16"):
            strided_loss(step, text.params, prepare(text), text.mesh, stride)
    with pytest.raises(TrainError, match="not classification"):
        strided_loss(step, classes.params, prepare(classes), classes.mesh, 5)


@pytest.fixture
def translation(tmp_path) -> Trained:
    toy.write_corpus(tmp_path / "corpus", {"train": 97, "valid": 5, "test": 7})
    pairs = {
        split: tuple(str(tmp_path / "corpus" / f"{split}.{language}") for language in ("en", "de"))
        for split in ("train", "valid", "test")
    }
    data = DataConfig(
        source="files", batch_tokens=256, max_length=16, buckets=1, tokenizer=WORDS, **pairs
    )
    decode = DecodeConfig(beam=1, extra_length=3)
    train = dataclasses.replace(toy.TRAIN, average_last=1, decode=decode)
    toy.random_run(tmp_path / "run", toy.model("encoder_decoder"), data, train)
    return load(tmp_path / "run", toy.QUIET)


class Gone(io.StringIO):
    """An output that fails as soon as the first score is printed."""

    def write(self, text: str) -> int:
        if "validation loss" in text:
            raise UnicodeEncodeError("ascii", text, 0, 1, "no such character")
        return super().write(text)


class GoneLater(Gone):
    def write(self, text: str) -> int:
        if "test BLEU" in text:
            raise BrokenPipeError
        return io.StringIO.write(self, text)


@pytest.mark.slow
def test_results_are_written_before_they_are_shown(translation, monkeypatch):
    # After a broken pipe, rich connects standard output, here that of pytest, with nothing.
    monkeypatch.setattr(Console, "on_broken_pipe", lambda console: sys.exit(1))
    decode, folder = translation.run.train.decode, translation.run.directory
    with pytest.raises(UnicodeEncodeError):
        report(translation, decode, Console(markup=False, file=Gone()))
    assert {"valid_loss", "test_loss"} <= json.loads((folder / "result.json").read_text()).keys()
    with pytest.raises(SystemExit):
        report(translation, decode, Console(markup=False, file=GoneLater()))
    assert "test_bleu" in json.loads((folder / "result.json").read_text())
    assert len((folder / "translations.test.txt").read_text().splitlines()) == 7


@pytest.mark.slow
def test_a_run_that_cannot_be_written_is_measured_all_the_same(translation, monkeypatch):
    def refused(path: Path, _: Any) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(evaluate, "write_json", refused)
    console = Console(markup=False, file=io.StringIO(), width=500)
    assert "test_bleu" in report(translation, translation.run.train.decode, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "result.json cannot be written (Read-only file system): the results are only printed",
        "validation loss: ",
        "test BLEU: ",
    ):
        assert words in said
    assert "the run lies in" not in said
