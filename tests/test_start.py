"""Test the start of a run: three configs must fit together, and the data completes them."""

import dataclasses
from pathlib import Path

import pytest
import toy

from heedful.data.config import DataConfig, TokenizerConfig
from heedful.data.tokenizer import Tokenizer
from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    LinformerConfig,
    ModelConfig,
    PerformerConfig,
    PositionConfig,
)
from heedful.train.config import DecodeConfig, TrainConfig
from heedful.train.errors import TrainError
from heedful.train.run import Run
from heedful.train.start import require_fit, start_run

WORDS = TokenizerConfig(kind="words")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    toy.write_table(folder)
    toy.write_text(folder)
    return folder


def start(folder: Path, directory: Path, objective: str, model: ModelConfig, **values) -> Run:
    name = "table.tsv" if model.head.kind == "classifier" else "text.txt"
    train = dataclasses.replace(toy.TRAIN, **values.pop("train", {}))
    config = toy.data(folder / name, objective, **{"tokenizer": WORDS, **values})
    return start_run(directory, model, config, train, toy.QUIET)


CLASSES = toy.model(head=toy.CLASSIFIER)


def test_vocabulary_classes_and_outputs_come_from_the_data(folder, tmp_path):
    run = start(folder, tmp_path / "run", "classification", CLASSES)
    words = set(" ".join(toy.sentences(499)).split())
    assert run.model.vocab_size == run.tokenizer().vocab_size == 4 + len(words)
    assert run.data.classes == ("bad", "good") and run.model.head.outputs == 2
    assert Run.open(run.directory) == run
    assert start(folder, run.directory, "classification", CLASSES) == run  # the second start


def test_a_regression_has_one_output(folder, tmp_path):
    toy.write_table(tmp_path, toy.number)
    model = dataclasses.replace(CLASSES, vocab_size=23)  # A larger vocabulary is accepted.
    run = start(tmp_path, tmp_path / "run", "regression", model)
    assert run.model.head.outputs == 1 and run.model.vocab_size == 23 and run.data.classes == ()


def test_classes_in_the_order_of_the_config(folder, tmp_path):
    run = start(
        folder, tmp_path / "run", "classification", CLASSES, classes=("good", "so-so", "bad")
    )
    assert run.data.classes == ("good", "so-so", "bad") and run.model.head.outputs == 3


@pytest.mark.parametrize(
    ("objective", "special"),
    [("masked_lm", "<mask>"), ("causal_lm", None), ("span_corruption", "<extra_id_0>")],
)
def test_the_tokenizer_has_what_the_objective_needs(folder, tmp_path, objective, special):
    architectures = {"masked_lm": "encoder_only", "causal_lm": "decoder_only"}
    model = toy.model(architectures.get(objective, "encoder_decoder"))
    run = start(folder, tmp_path / "run", objective, model)
    entries = run.tokenizer()
    assert (entries.mask is not None) == (special == "<mask>")
    assert bool(entries.sentinels) == (special == "<extra_id_0>")


OUTPUTS = dataclasses.replace(CLASSES, head=dataclasses.replace(toy.CLASSIFIER, outputs=5))


@pytest.mark.parametrize(
    ("objective", "model", "values", "words"),
    [
        ("masked_lm", toy.model("decoder_only"), {}, ["masked_lm needs", "encoder_only"]),
        ("causal_lm", toy.model("encoder_only"), {}, ["causal_lm needs", "decoder_only"]),
        ("prefix_lm", toy.model("encoder_decoder"), {}, ["prefix_lm", "decoder_only"]),
        ("span_corruption", toy.model("decoder_only"), {}, ["encoder_decoder"]),
        ("classification", toy.model("encoder_only"), {}, ["head.kind classifier"]),
        ("masked_lm", CLASSES, {}, ["head.kind language_model", "classifier"]),
        ("masked_lm", toy.model(), {"train": {"metric": "f1"}}, ["train.metric f1", "choose loss"]),
        ("classification", CLASSES, {"train": {"metric": "pearson"}}, ["pearson", "matthews"]),
        (
            "regression",
            CLASSES,
            {"train": {"label_smoothing": 0.1}},
            ["train.label_smoothing = 0.1", "regression", "0"],
        ),
        (
            "classification",
            dataclasses.replace(CLASSES, vocab_size=7),
            {},
            ["model.vocab_size = 7", "15"],
        ),
        ("classification", OUTPUTS, {}, ["model.head.outputs = 5", "the data needs 2"]),
        (
            "masked_lm",
            dataclasses.replace(
                toy.model(), attention=AttentionConfig(heads=2, window=3, global_tokens=2)
            ),
            {},
            ["model.attention.global_tokens = 2", "--data.no-packing"],
        ),
    ],
)
def test_what_does_not_fit_is_named(folder, tmp_path, objective, model, values, words):
    with pytest.raises(TrainError) as error:
        start(folder, tmp_path / "run", objective, model, **values)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_that_fine_tunes_has_the_tokenizer_of_its_source(folder, tmp_path):
    data = toy.data(folder / "text.txt", "masked_lm", tokenizer=WORDS)
    source = toy.random_run(tmp_path / "source", toy.model(), data)
    train = {"init_from": str(source.directory)}
    model = dataclasses.replace(CLASSES, vocab_size=source.model.vocab_size)
    # The tokenizer is not learned from the run's own data: it has the mask token of the source.
    run = start(folder, tmp_path / "run", "classification", model, train=train)
    assert run.tokenizer().fingerprint == source.tokenizer().fingerprint

    same = TokenizerConfig(path=str(source.tokenizer_path))
    start(folder, tmp_path / "same", "classification", model, train=train, tokenizer=same)
    path = tmp_path / "other.json"
    Tokenizer.train(["red cat"], WORDS).save(path)
    other = TokenizerConfig(path=str(path))
    with pytest.raises(TrainError, match=r"data.tokenizer.path .*other.json differs from"):
        start(folder, tmp_path / "other", "classification", model, train=train, tokenizer=other)


def test_a_translation_has_no_prompt_after_which_it_could_stop():
    train = TrainConfig(decode=DecodeConfig(stop=(".",)))
    with pytest.raises(TrainError, match=r"train.decode.stop = .* continue a prompt: leave"):
        require_fit(toy.model("encoder_decoder"), DataConfig(), train)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 10**9}, "model.vocab_size x model.width = "),
        ({"layers": 10**9, "width": 2**14}, "model.layers x model.width"),
        ({"vocab_size": 10**12}, "model.vocab_size x model.width"),
        ({"feed_forward": FeedForwardConfig(width=10**12)}, "model.feed_forward.width"),
        (
            {"positions": PositionConfig(kind="learned", max_length=10**12)},
            "model.positions.max_length x model.width",
        ),
        (
            {
                "attention": AttentionConfig(
                    heads=2, core="performer", performer=PerformerConfig(features=10**12)
                )
            },
            "model.attention.performer.features",
        ),
        (
            {
                "attention": AttentionConfig(
                    heads=2,
                    core="linformer",
                    linformer=LinformerConfig(rank=10**6, max_length=10**6),
                )
            },
            "model.attention.linformer.rank",
        ),
    ],
)
def test_sizes_without_room_are_refused_before_anything_is_made(folder, tmp_path, changes, words):
    model = dataclasses.replace(toy.model(), **changes)
    with pytest.raises(TrainError, match=rf"{words}.* in float32 do not fit in the .* smaller"):
        start(folder, tmp_path / "run", "masked_lm", model, packing=False)
    assert not (tmp_path / "run").exists()


def test_a_batch_without_room_is_refused(folder, tmp_path):
    model = dataclasses.replace(toy.model(), width=2**10)
    with pytest.raises(TrainError, match=r"data\.batch_tokens / train\.accumulate .* do not fit"):
        start(folder, tmp_path / "run", "masked_lm", model, batch_tokens=2**31 - 1)
