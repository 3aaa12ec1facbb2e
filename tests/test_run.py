"""Test run directories: configs as JSON, comparison of configs by field, and files of a run."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from heedful.configs import base
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.data.tokenizer import Tokenizer
from heedful.model.config import ModelConfig
from heedful.train.checkpoint import Checkpoints
from heedful.train.config import DecodeConfig, OptimizerConfig, TrainConfig
from heedful.train.config_json import from_json, to_json
from heedful.train.errors import TrainError
from heedful.train.paths import train_paths
from heedful.train.reproducibility.record import changes, environments
from heedful.train.run import FILES, Run, is_begun


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["red cat", "blue dog"], TokenizerConfig(kind="words"))


@pytest.mark.parametrize("name", base.names())
def test_configs_survive_json(name: str):
    experiment, _ = base.load(name)
    for config in (experiment.model, experiment.data, experiment.train):
        text = json.dumps(to_json(config))
        assert from_json(type(config), json.loads(text)) == config


def test_fields_that_had_other_names_are_read(tokenizer, tmp_path):
    model = ModelConfig(architecture="encoder_only", vocab_size=8, type_vocab_size=2)
    optimizer = OptimizerConfig(head_lr_multiplier=3.0)
    train = TrainConfig(max_checkpoints=7, average_last=4, optimizer=optimizer)
    run = Run(tmp_path, model, DataConfig(source="files", train=("a",)), train)
    run.start(tokenizer)
    values = json.loads((tmp_path / "config.json").read_text())
    values["model"]["types"] = values["model"].pop("type_vocab_size")
    for old, new in (("keep", "max_checkpoints"), ("average", "average_last")):
        values["train"][old] = values["train"].pop(new)
    optimizer = values["train"]["optimizer"]
    optimizer["head_lr"] = optimizer.pop("head_lr_multiplier")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert Run.open(tmp_path) == run
    environment = [{"from_step": 0, "config": {name: values[name] for name in run.values()}}]
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    now = {"config": run.values(), "data": {}}
    assert changes({"data": {}, **environments(tmp_path)[0]}, now) == []


def test_a_run_can_be_opened_again(tokenizer, tmp_path):
    data = DataConfig(source="files", train=("a", "b"), languages=("en", "fr"))
    run = Run(tmp_path / "run", ModelConfig(vocab_size=8), data, TrainConfig(seed=3))
    run.start(tokenizer)
    run.start(tokenizer)
    assert Run.open(tmp_path / "run") == run
    assert run.tokenizer().fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "[" * 99_999, "config of a run: it has too many nested levels"),
        (lambda text: text.replace("512", "5" * 5000), "it has a number of too many digits"),
        (lambda text: text.replace('"en"', '"\\ud800"'), "half of a surrogate pair"),
        (lambda text: text[:99], "cannot be read as the config of a run"),
        (lambda text: "[]", "cannot be read as the config of a run"),
        (lambda text: '{"model": 5}', "model is not an object"),
        (lambda text: text.replace('"width"', '"witdh"', 1), "model.witdh is unknown"),
        (lambda text: text.replace('"layers": 6', '"layers": 6.5'), "model.layers = 6.5"),
        (lambda text: text.replace('"layers": 6', '"layers": true'), "model.layers = True"),
        (lambda text: text.replace('"bias": true', '"bias": "no"', 1), "attention.bias = 'no'"),
        (lambda text: text.replace('"source": "', '"source": 7, "label": "'), "data.source = 7"),
        (lambda text: text.replace('"train": []', '"train": "a"'), "data.train = 'a'"),
    ],
)
def test_a_damaged_config_is_refused_in_one_line(change, words, tokenizer, tmp_path):
    run = Run(tmp_path / "run", ModelConfig(vocab_size=8), DataConfig(), TrainConfig())
    run.start(tokenizer)
    path = tmp_path / "run" / "config.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(TrainError) as error:
        Run.open(tmp_path / "run")
    message = str(error.value)
    assert str(path) in message and words in message
    assert "\n" not in message and len(message) < 400


def test_another_config_is_refused_and_every_difference_named(tokenizer, tmp_path):
    run = Run(tmp_path / "run", ModelConfig(vocab_size=8), DataConfig(), TrainConfig())
    run.start(tokenizer)
    (run.checkpoints / "4").mkdir(parents=True)
    other = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, width=64),
        data=DataConfig(languages=("en", "fr")),
    )
    with pytest.raises(TrainError) as error:
        other.start(tokenizer)
    for word in ("model.width is 512 there and 64 here", "data.languages", "--run-dir"):
        assert word in str(error.value)
    assert Run.open(tmp_path / "run") == run


def test_unknown_fields_and_bad_values_are_refused(tokenizer, tmp_path):
    run = Run(tmp_path / "run", ModelConfig(vocab_size=8), DataConfig(), TrainConfig())
    run.start(tokenizer)
    path = run.directory / "config.json"
    for part, field, value in (("model", "widht", 3), ("train", "steps", 0)):
        values = json.loads(path.read_text())
        values[part][field] = value
        broken = tmp_path / field
        broken.mkdir()
        (broken / "config.json").write_text(json.dumps(values))
        with pytest.raises(TrainError, match=rf"config\.json cannot be read.*{field}"):
            Run.open(broken)


def test_checkpoints_that_lie_elsewhere_are_not_forgotten(tokenizer, tmp_path):
    """Without the flag for checkpoints the same command would start again and lose the metrics."""
    elsewhere = tmp_path / "elsewhere"
    train = TrainConfig(checkpoints=str(elsewhere))
    run = Run(tmp_path / "run", ModelConfig(vocab_size=8), DataConfig(), train)
    run.start(tokenizer)
    without = dataclasses.replace(run, train=TrainConfig())
    without.start(tokenizer)  # There is no checkpoint yet.
    run.start(tokenizer)
    (elsewhere / "30").mkdir(parents=True)
    with pytest.raises(TrainError, match=r"has its checkpoints in .*elsewhere and none in .*run"):
        without.start(tokenizer)
    assert Run.open(tmp_path / "run") == run
    elsewhere.rename(tmp_path / "run" / "checkpoints")
    without.start(tokenizer)


def test_what_is_done_in_the_end_may_change(tokenizer, tmp_path):
    data = DataConfig(source="files", train=("a", "b"), valid=("c", "d"), test=("typo", "f"))
    run = Run(tmp_path / "run", ModelConfig(vocab_size=8), data, TrainConfig())
    run.start(tokenizer)
    other = dataclasses.replace(
        run,
        data=dataclasses.replace(data, test=("e", "f")),
        train=TrainConfig(decode=DecodeConfig(beam=2), samples=3),
    )
    other.start(tokenizer)
    assert Run.open(tmp_path / "run") == other


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "run", ModelConfig(vocab_size=8), DataConfig(), TrainConfig())


def test_a_start_without_a_checkpoint_is_begun_anew(run, tokenizer):
    other = Tokenizer.train(["blue dog"], TokenizerConfig(kind="words"))
    dataclasses.replace(run, train=TrainConfig(seed=3)).start(other)
    (run.directory / "environment.json").write_text("[]")
    (run.checkpoints / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    run.start(tokenizer)
    assert Run.open(run.directory) == run and not is_begun(run.directory)
    assert run.tokenizer().fingerprint == tokenizer.fingerprint
    assert not (run.directory / "environment.json").exists()


@pytest.mark.parametrize("name", ["checkpoints/4", "checkpoints.corrupt/4", "result.json"])
def test_what_was_trained_is_never_begun_anew(run, tokenizer, name):
    run.start(tokenizer)
    (run.directory / name).mkdir(parents=True)
    assert is_begun(run.directory)
    with pytest.raises(TrainError, match=r"another config .train.seed is 0 there and 3 here"):
        dataclasses.replace(run, train=TrainConfig(seed=3)).start(tokenizer)
    assert Run.open(run.directory) == run


def test_what_another_process_trains_is_not_begun_anew(run, tokenizer):
    run.start(tokenizer)
    release = run.lock()
    with pytest.raises(TrainError, match="another process trains in"):
        dataclasses.replace(run, train=TrainConfig(seed=3)).start(tokenizer)
    release()
    assert Run.open(run.directory) == run


@pytest.mark.parametrize("name", FILES[1:])
def test_a_folder_that_is_no_run_keeps_its_files(run, tokenizer, name):
    run.directory.mkdir()
    path = run.directory / name
    if name == "checkpoints":
        path.mkdir()
        run.start(tokenizer)  # The folder is empty.
        (run.directory / "config.json").unlink()
        run.tokenizer_path.unlink()
        path /= "epoch.pt"
    path.write_text("mine")
    with pytest.raises(TrainError, match=rf"has no config\.json, but {name}, .*--run-dir"):
        run.start(tokenizer)
    assert path.read_text() == "mine" and not (run.directory / "config.json").exists()


def test_a_link_to_nothing_is_no_place_for_a_file(run, tokenizer, tmp_path):
    run.directory.mkdir()
    (run.directory / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TrainError, match=r"has no config\.json, but tokenizer\.json"):
        run.start(tokenizer)
    assert not (tmp_path / "elsewhere").exists()


def test_relative_paths_are_those_of_where_a_run_was_started(tokenizer, tmp_path, monkeypatch):
    """A run may be evaluated from another folder."""
    home, away = tmp_path / "home", tmp_path / "away"
    for folder in (home, away):
        folder.mkdir()
    for name in ("a.txt", "tokenizer.json", "source"):
        (home / name).touch()
    data = DataConfig(
        source="files",
        objective="causal_lm",
        train=("a.txt", "gone.txt"),
        tokenizer=TokenizerConfig(path="tokenizer.json"),
    )
    train = TrainConfig(init_from="hf:source", checkpoints="gs://bucket")
    run = Run(Path("run"), ModelConfig(vocab_size=8), data, train)
    monkeypatch.chdir(home)
    run.start(tokenizer)
    assert Run.open("run") == run
    monkeypatch.chdir(away)
    there = Run.open(home / "run")
    assert there.data.train == (f"{home}/a.txt", "gone.txt")
    assert there.data.tokenizer.path == f"{home}/tokenizer.json"
    assert there.train.init_from == f"hf:{home}/source"
    assert there.train.checkpoints == "gs://bucket"
    path = home / "run" / "config.json"  # An older config.json does not have the entry.
    path.write_text(json.dumps(run.values()))
    assert Run.open(home / "run") == dataclasses.replace(run, directory=home / "run")


@pytest.mark.parametrize(
    ("init_from", "expected"),
    [("hf:a", "hf:A"), ("a", "A"), ("package:minilm", "package:minilm"), (None, None)],
)
def test_paths_of_what_a_run_begins_from(init_from, expected):
    train = TrainConfig(init_from=init_from, checkpoints="a")
    assert train_paths(train, str.upper) == TrainConfig(init_from=expected, checkpoints="A")


@pytest.mark.parametrize("name", ["exp[1]", "a*b", "a?b", "a\\b"])
def test_a_path_that_checkpoints_do_not_come_back_from_is_refused(tokenizer, tmp_path, name: str):
    """orbax uses the path in a glob pattern, including the names of parent folders."""
    for directory in (tmp_path / name, tmp_path / name / "run"):
        run = Run(directory, ModelConfig(vocab_size=8), DataConfig(), TrainConfig())
        with pytest.raises(TrainError, match=r"has . in its name: .* one of \* \? \[ \\; rename"):
            run.start(tokenizer)
    train = TrainConfig(checkpoints=str(tmp_path / name))
    with pytest.raises(TrainError, match=r"train\.checkpoints"):
        dataclasses.replace(run, directory=tmp_path / "run", train=train).start(tokenizer)
    assert list(tmp_path.iterdir()) == []
    # A run is accepted if its checkpoints are elsewhere.
    train = TrainConfig(checkpoints=str(tmp_path / "elsewhere"))
    dataclasses.replace(run, train=train).start(tokenizer)
    with pytest.raises(TrainError, match="in its name"):
        Checkpoints(tmp_path / name, "abc", keep=1)


@pytest.mark.parametrize(
    "name", ["a b", "a]b", "{a}", "a%20b", "a:b", "a#b", "a\nb", "~a", "ä", "a;b$c", "'a'", "a|b"]
)
def test_checkpoints_come_back_from_any_other_path(tmp_path, name: str):
    with Checkpoints(tmp_path / name / "checkpoints", "abc", keep=1) as checkpoints:
        checkpoints.save_params({"kernel": jnp.ones(3)})
    opened = Checkpoints(tmp_path / name / "checkpoints", "abc")
    restored = opened.restore_params(0, {"kernel": jnp.zeros(3)})
    assert restored["kernel"].tolist() == [1, 1, 1]


def test_a_bucket_is_no_run_directory(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(Path("gs://bucket/run"), ModelConfig(vocab_size=8), DataConfig(), TrainConfig())
    with pytest.raises(TrainError, match=r"give the bucket to train\.checkpoints"):
        run.start(tokenizer)
    assert list(tmp_path.iterdir()) == []
