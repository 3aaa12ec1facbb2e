"""Test code of a user's own, outside the clone: experiment files, import paths, JSON and YAML."""

import json
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
import toy

from heedful import own_code
from heedful.configs import base
from heedful.data.config import DataConfig
from heedful.data.errors import DataError
from heedful.data.sources import load as load_source
from heedful.model.attention import CoreSpec, spec_of
from heedful.model.config import ModelError
from heedful.train import cli, code_record
from heedful.train.cli import experiments
from heedful.train.config import OptimizerConfig, TrainError
from heedful.train.config_json import to_json
from heedful.train.optimizer import learning_rate, make_optimizer
from heedful.train.run import Run
from heedful.train.tasks import task_named, task_of

CORE = """
import dataclasses
from heedful.model.attention.dense import SPEC as DENSE
SPEC = dataclasses.replace(DENSE, name="mine")
NUMBER = 3
"""
TASK = """
import dataclasses
import my_helpers
from heedful.data.objectives import OBJECTIVES
from heedful.train.tasks import TASKS

def backwards(example, rng, config, tokenizer):
    tokens = example["text"][::-1].copy()
    return {"inputs": tokens[:-1], "targets": tokens[1:]}

OBJECTIVE = dataclasses.replace(OBJECTIVES["causal_lm"], row=backwards)
TASK = dataclasses.replace(TASKS["causal_lm"], objective=OBJECTIVE)
"""
SOURCE = """
from heedful.data.sources.source import Source
SOURCE = Source(load=lambda config, split: [{"text": f"{split} {i}"} for i in range(3)])
"""
OPTIMIZER = """
import optax
def sign(config, rate):
    return optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(rate))
def half(config, steps):
    return lambda step: config.peak_lr / 2
def number(config, steps):
    return 3
def words(config, steps):
    return lambda step: "fast"
"""
EXPERIMENT = '''"""A text backwards, with a core of my own."""
from heedful.configs.base import Experiment
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.model.config import AttentionConfig, FeedForwardConfig, ModelConfig
from heedful.train.config import OptimizerConfig, TrainConfig

ROWS = {"narrow": 8, "wide": 16}

def get_config(row="narrow"):
    return Experiment(
        model=ModelConfig(
            architecture="decoder_only", width=ROWS[row], layers=1,
            attention=AttentionConfig(heads=2, core="my_core:SPEC"),
            feed_forward=FeedForwardConfig(width=8),
        ),
        data=DataConfig(
            source="files", train=("text.txt",), holdout=0.1, objective="my_task:TASK",
            batch_tokens=256, max_length=16, buckets=1, tokenizer=TokenizerConfig(kind="words"),
        ),
        train=TrainConfig(
            steps=3, label_smoothing=0.0, checkpoint_every=2, average_last=1, log_every=1,
            optimizer=OptimizerConfig(kind="my_optimizer:sign", schedule="my_optimizer:half",
                                      warmup_steps=1),
        ),
    )
'''
FILES = {
    "my_core.py": CORE, "my_task.py": TASK, "my_helpers.py": "X = 1\n", "my_source.py": SOURCE,
    "my_optimizer.py": OPTIMIZER, "my_experiment.py": EXPERIMENT,
}  # fmt: skip


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Go to an empty folder; the folder lab/ beside has a user's files."""
    (tmp_path / "lab").mkdir()
    for name, text in FILES.items():
        (tmp_path / "lab" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(own_code, "_FOLDERS", {})
    yield tmp_path / "lab"
    forget()


def forget() -> None:
    """Import the user's modules anew the next time, as another process would."""
    for name in [name for name in sys.modules if name.startswith(("my_", "lab", "heedful_file_"))]:
        del sys.modules[name]


def fails(error: type[Exception], action, *words: str) -> str:
    """Return the message, which is one line and has the words."""
    with pytest.raises(error) as found:
        action()
    message = str(found.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


# Import paths ------------------------------------------------------------------------------------


def test_each_table_takes_an_import_path(lab):
    own_code.search_in(lab)
    assert spec_of("my_core:SPEC").name == "mine"
    config = DataConfig(objective="my_task:TASK", source="my_source:SOURCE")
    assert task_named("my_task:TASK") is task_of(config)
    assert config.objective_spec.row.__name__ == "backwards" and config.is_packed
    assert task_of(config).objective is config.objective_spec
    assert list(load_source(config, "valid"))[2] == {"text": "valid 2"}
    optimizer = OptimizerConfig(
        kind="my_optimizer:sign", schedule="my_optimizer:half", warmup_steps=0, peak_lr=0.5
    )
    assert learning_rate(optimizer, 9)(7) == 0.25
    made, params = make_optimizer(optimizer, 9), {"kernel": 4.0}
    assert made.update({"kernel": -3.0}, made.init(params), params)[0]["kernel"] == 0.25


def test_modules_are_found_here_in_folders_and_on_the_path(lab, monkeypatch):
    assert spec_of("lab.my_core:SPEC").name == "mine"  # Below the current folder.
    fails(ModelError, lambda: spec_of("my_core:SPEC"), str(lab.parent))
    before = list(sys.path)
    own_code.search_in(lab)
    (lab / "json.py").write_text("")
    assert spec_of("my_core:SPEC").name == "mine"
    assert sys.path[: len(before)] == before and str(lab) in sys.path  # It hides no package.


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("my_coer:SPEC", ["there is no module my_coer", "did you mean my_core?"]),
        ("my_core.inside:SPEC", ["there is no module my_core.inside"]),
        ("my_core:SPEK", ["my_core.py", "has no SPEK", "did you mean SPEC?"]),
        ("my_core:NUMBER", ["it is of type int, not heedful.model.attention.core.CoreSpec"]),
        ("my_broken:SPEC", ["my_broken.py, line 3: ZeroDivisionError: division by zero"]),
        ("my_syntax:SPEC", ["my_syntax.py, line 2: SyntaxError"]),
        (
            "my_missing:SPEC",
            ["my_missing.py, line 1: ModuleNotFoundError: No module named 'numpi'"],
        ),
        ("my_exit:SPEC", ["my_exit.py, line 1: it ends the program"]),
    ],
)
def test_code_that_cannot_be_used_is_one_line(path, words, lab, unchecked):
    (lab / "my_broken.py").write_text("def f():\n    '''doc'''\n    return 1 / 0\nf()\n")
    (lab / "my_syntax.py").write_text("\ndef (:\n")
    (lab / "my_missing.py").write_text("import numpi\n")
    (lab / "my_exit.py").write_text("raise SystemExit(3)\n")
    own_code.search_in(lab)
    fails(ModelError, lambda: spec_of(path), f"model.attention.core = {path}: ", *words)


def test_a_value_of_another_kind_is_refused(lab, unchecked):
    own_code.search_in(lab)
    fails(DataError, lambda: DataConfig(objective="my_core:SPEC"), "CoreSpec, not", "tasks.Task")
    alone = DataConfig(objective="my_task:OBJECTIVE")
    fails(TrainError, lambda: task_of(alone), "of type Objective, not heedful.train.tasks.Task")
    source = DataConfig(objective="causal_lm", source="my_core:SPEC")
    fails(DataError, lambda: load_source(source, "train"), "data.source = my_core:SPEC", "Source")
    for name, said in {"number": "not callable", "words": "'fast'", "sign": "train"}.items():
        config = OptimizerConfig(schedule=f"my_optimizer:{name}", warmup_steps=0)
        fails(TrainError, lambda c=config: learning_rate(c, 9), "schedule = my_optimizer", said)
    config = OptimizerConfig(kind="my_optimizer:half")
    fails(TrainError, lambda: make_optimizer(config, 9), "returns a function", "optimizer of optax")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: spec_of("dens"), ["did you mean dense?", "my_package.my_core:SPEC"]),
        (lambda: DataConfig(objective="causal_ml"), ["did you mean causal_lm?"]),
        (lambda: OptimizerConfig(kind="adamm"), ["train.optimizer.kind", "did you mean adam"]),
        (lambda: OptimizerConfig(schedule="cosin"), ["did you mean cosine?"]),
        (lambda: load_source(DataConfig(source="tfd"), "train"), ["did you mean tfds?"]),
    ],
)
def test_a_misspelt_name_is_explained(make, words):
    fails(ValueError, make, *words)


@pytest.mark.parametrize("name", ["lion", "sgd", "lamb"])
def test_an_optimizer_of_optax_takes_the_settings_of_the_config(name):
    made = make_optimizer(OptimizerConfig(kind=f"optax:{name}", peak_lr=0.5, warmup_steps=0), 9)
    params, grads = ({"kernel": jnp.array(x), "bias": jnp.array(x)} for x in (4.0, 1.0))
    update, _ = made.update(grads, made.init(params), params)
    assert update["kernel"] == update["bias"] < 0
    decayed = OptimizerConfig(kind=f"optax:{name}", weight_decay=0.5)
    if name == "sgd":
        fails(TrainError, lambda: make_optimizer(decayed, 9), "takes no mask and weight_decay")
        return
    made = make_optimizer(decayed, 9)  # Matrices only.
    update, _ = made.update(grads, made.init(params), params)
    assert update["kernel"] != update["bias"]


# Experiment files --------------------------------------------------------------------------------


def test_an_experiment_is_read_from_a_file(lab):
    named = experiments.load("lab/my_experiment.py:wide")
    assert (named.label, named.experiment.model.width) == ("my_experiment:wide", 16)
    assert named.description == "A text backwards, with a core of my own."
    assert named.rows == ("narrow", "wide") and named.file == Path("lab/my_experiment.py")
    assert experiments.load("lab/my_experiment.py").experiment.model.width == 8


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        (None, "mine.py", ["mine.py: there is no such file", "did you mean mini.py?"]),
        ("x = 1", "mine.py", ["mine.py has no function get_config"]),
        ("def get_config():\n    return 3", "mine.py",
         ["returns a int", "configs.base.Experiment"]),
        ("def get_config():\n    return {}['a']", "mine.py", ["mine.py, line 2: KeyError: 'a'"]),
        ("get_config = lambda: ModelConfig()", "mine.py", ["line 1: NameError"]),
        ("import heedful.model.config as m\n\nm.ModelConfig(width=-1)", "mine.py",
         ["mine.py, line 3: model.width must be positive, not -1"]),
        ("def get_config(row=None): ...\nROWS = {'wide': 1}", "mine.py:wid",
         ["did you mean wide?"]),
    ],
)  # fmt: skip
def test_an_experiment_that_cannot_be_read_is_one_line(text, name, words, lab, unchecked):
    Path("mini.py").write_text("")
    if text is not None:
        Path("mine.py").write_text(text)
    fails(TrainError, lambda: experiments.load(name), *words)


# JSON and YAML -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["translate_tiny", "t5_tiny", "vaswani_table3:heads_1"])
def test_a_config_that_is_printed_is_read_to_the_same_values(name, tmp_path, capsys):
    assert cli.run(["configs", name, "--json"]) == 0
    (tmp_path / "file.json").write_text(text := capsys.readouterr().out)
    read = experiments.read(tmp_path / "file.json")
    assert read.experiment == base.load(name)[0] and read.label == "file"
    (tmp_path / "file.yaml").write_text(text)
    assert experiments.read(tmp_path / "file.yaml").experiment == read.experiment


def test_a_yaml_file_names_what_differs_from_the_defaults(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(
        "train:\n  steps: 3  # few\n  average: 1\n  optimizer: {peak_lr: 1e-3, kind: adam}\n"
        "data:\n  languages: [en, no]\n"
    )
    experiment = experiments.read(path).experiment
    assert (experiment.train.steps, experiment.train.average_last) == (3, 1)
    assert experiment.train.optimizer == OptimizerConfig(peak_lr=1e-3, kind="adam")
    assert experiment.data == DataConfig(languages=("en", "no"))
    path.write_text("")
    assert to_json(experiments.read(path).experiment.data) == to_json(DataConfig())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {stesp: 3}", ["file.yaml: train.stesp is unknown: did you mean steps?"]),
        ("trian: {steps: 3}", ["file.yaml: trian is unknown: did you mean train?"]),
        ("train: {steps: many}", ["train.steps = 'many': it must be of type int"]),
        ("train: {optimizer: {kind: 3}}", ["train.optimizer.kind = 3: it must be of type str"]),
        ("train: {steps: 0}", ["file.yaml: train.steps must be positive"]),
        ("train:\n  steps: 3\n  steps: 4", ["line 3", 'duplicate key "steps"']),
        ("train: {steps: 3", ["file.yaml, line 1", "correct the file"]),
        ("train: 2020-01-01", ["correct the file"]),
        ("- 3", ["file.yaml has no fields"]),
        (None, ["No such file or directory"]),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(text, words, tmp_path, unchecked):
    if text is not None:
        (tmp_path / "file.yaml").write_text(text)
    fails(TrainError, lambda: experiments.read(tmp_path / "file.yaml"), *words)


# Runs --------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    """Run a command as a process of its own does, without the modules of earlier commands."""
    forget()
    own_code._FOLDERS.clear()
    return cli.run(list(arguments))


@pytest.mark.slow
def test_a_run_with_own_code_trains_resumes_and_is_reproduced(lab, capsys, unchecked):
    toy.write_text(lab.parent)
    train = "train", "lab/my_experiment.py", "--no-audit"
    assert run(*train) == 0
    folder = Path("runs/my_experiment").absolute()
    environment = json.loads((folder / "environment.json").read_text())[-1]
    assert environment["own_code"].keys() == {
        "my_experiment.py", "my_core", "my_task", "my_helpers", "my_optimizer"
    }  # fmt: skip
    for name, file in environment["own_code_files"].items():
        assert environment["own_code"][name] == own_code.sha256(Path(file)) and lab.name in file
    assert Run.open(folder).model.attention.core == "my_core:SPEC"

    shutil.rmtree(folder / "checkpoints" / "3")
    (folder / "result.json").unlink()
    capsys.readouterr()
    assert run(*train) == 0
    said = capsys.readouterr().out
    assert "resuming from the checkpoint of step 2" in said and "environment" not in said

    (lab / "my_helpers.py").write_text("X = 2\n")
    assert run("reproduce", str(folder), "--steps", "3") == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "own_code.my_helpers is" in said and "identical to step" in said
    assert "own_code.my_core" not in said
    changed = code_record.changes(folder, Run.open(folder).values())
    assert changed == [f"{lab / 'my_helpers.py'} has changed since the run was trained"]

    (lab / "my_core.py").unlink()
    assert run("reproduce", str(folder)) == 2
    said = capsys.readouterr().err
    digest = environment["own_code"]["my_core"]
    for words in ("there is no module my_core in", f"{lab / 'my_core.py'}, SHA-256 {digest}"):
        assert words in said and said.count("\n") == 1
    assert isinstance(spec_of("dense"), CoreSpec)
