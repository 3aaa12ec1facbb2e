"""Test what people ask runs: their state, their curves, what differs, and how a run goes on."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from heedful.data.config import DataConfig, TokenizerConfig
from heedful.data.tokenizer import Tokenizer
from heedful.model.config import ModelConfig
from heedful.train.config import OptimizerConfig, TrainConfig
from heedful.train.errors import TrainError
from heedful.train.inspection import curves
from heedful.train.inspection.compare import compare
from heedful.train.inspection.curves import draw, plot, try_plot
from heedful.train.inspection.runs import find_runs, print_runs, summarize
from heedful.train.run import Run

STEPS = TrainConfig(steps=40, checkpoint_every=10)


def make(directory: Path, train: TrainConfig = STEPS, saved: tuple[int, ...] = ()) -> Run:
    """Write a run that has logged metrics and saved checkpoints, without training."""
    data = DataConfig(tokenizer=TokenizerConfig(kind="words"))
    run = Run(directory, ModelConfig(vocab_size=8), data, train)
    run.start(Tokenizer.train(["a b c"], data.tokenizer, "translation"))
    for step in saved:
        (run.checkpoints / str(step)).mkdir(parents=True)
        with run.metrics.open("a") as file:
            values = {"loss": 9 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 5e3}
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.write(json.dumps({"step": step, "valid_loss": 8 / step}) + "\n")
    return run


def said(function, *arguments) -> str:
    console = Console(file=io.StringIO(), width=80, markup=False, soft_wrap=True)
    function(*arguments, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("saved", "train", "state"),
    [
        ((), STEPS, "no checkpoint"),
        ((10, 20), STEPS, "stopped"),
        ((10, 20, 30, 40), STEPS, "finished"),
        ((10, 20), dataclasses.replace(STEPS, patience=1), "stopped"),
    ],
)
def test_states(tmp_path, saved, train, state: str):
    run = make(tmp_path / "run", train, saved)
    found = summarize(run.directory)
    assert (found.state, found.step, found.steps) == (state, max(saved, default=0), 40)
    if saved:
        assert (
            found.loss == 9 / saved[-1] and found.best == f"loss {8 / saved[-1]:.4f} at {saved[-1]}"
        )


def test_a_run_that_patience_has_ended_is_finished(tmp_path):
    run = make(tmp_path / "run", dataclasses.replace(STEPS, patience=1), (10,))
    (run.checkpoints / "20").mkdir()
    with run.metrics.open("a") as file:
        file.write('{"step": 20, "valid_loss": 1.0}\n')
    assert summarize(run.directory).state == "finished"


def test_a_run_is_running_while_its_lock_is_held(tmp_path):
    run = make(tmp_path / "run", saved=(10,))
    release = run.lock()
    assert summarize(run.directory).state == "running"
    release()
    assert summarize(run.directory).state == "stopped"


def test_the_table_has_every_run_and_the_reason_of_a_broken_one(tmp_path):
    make(tmp_path / "a", saved=(10,))
    make(tmp_path / "a" / "row", saved=(40,))  # Rows of a config lie in its folder.
    broken = make(tmp_path / "b").directory
    (broken / "config.json").write_text("{")
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "metrics.jsonl").touch()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "bert"}')
    names = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert names == ["a", "a/row", "b", "lost"]
    table = said(print_runs, tmp_path)
    assert "10/40" in table and "40/40" in table and "config.json cannot be read" in table
    assert "it has no config.json" in " ".join(table.split())
    with pytest.raises(TrainError, match="has no runs"):
        said(print_runs, tmp_path / "hf")


def test_plots_are_ours_and_a_file_of_the_user_is_kept(tmp_path):
    run = make(tmp_path / "run", saved=(10, 20))
    path = tmp_path / "run" / "plot.png"
    said(try_plot, run)
    with Image.open(path) as image:
        assert image.info["Software"] == "heedful" and image.size[0] > 900
    Image.new("RGB", (3, 5)).save(path)
    before = path.read_bytes()
    assert "not a picture of heedful" in said(try_plot, run)
    assert path.read_bytes() == before


def test_a_failed_picture_loses_nothing(tmp_path, monkeypatch):
    run = make(tmp_path / "run", saved=(10,))

    def fail(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr(curves, "draw", fail)
    assert "plot.png was not drawn: no memory" in " ".join(said(try_plot, run).split())
    monkeypatch.undo()
    with pytest.raises(TrainError, match="has no metrics"):
        plot(make(tmp_path / "new"), Console(file=io.StringIO()))


def test_values_that_are_not_finite_are_gaps(tmp_path):
    run = make(tmp_path / "run", saved=(10,))
    with run.metrics.open("a") as file:
        file.write('{"step": 20, "loss": null, "grad_norm": null}\n')
    draw({"run": run}, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_compare_shows_only_what_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a", saved=(10,))
    rate = OptimizerConfig(peak_lr=0.5)
    run = make(tmp_path / "b", dataclasses.replace(STEPS, optimizer=rate), (10, 20))
    (run.directory / "result.json").write_text('{"test_bleu": 12.5}')
    text = said(compare, [Path("a"), Path("b")])
    settings = text.partition("number")[0]
    assert settings.split() == ["setting", "a", "b", "train.optimizer.peak_lr", "0.001", "0.5"]
    assert "test_bleu" in text and "12.5" in text and (tmp_path / "compare.a.b.png").exists()
    with pytest.raises(TrainError, match="are the same"):
        said(compare, [Path("a"), Path("a")])


# How a finished run goes on -----------------------------------------------------------------------


def again(run: Run, **changes) -> Run:
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))


def tokenizer_of(run: Run) -> Tokenizer:
    return run.tokenizer()


def test_more_steps_continue_a_run_whose_rates_do_not_depend_on_them(tmp_path):
    run = make(tmp_path / "run", saved=(40,))
    longer = again(run, steps=60)
    longer.start(tokenizer_of(run))
    assert Run.open(run.directory).train.steps == 60
    with pytest.raises(TrainError, match=r"train.steps = 30, but .* has reached step 40"):
        again(run, steps=30).start(tokenizer_of(run))


def test_more_steps_of_a_decay_are_refused_with_the_command(tmp_path):
    decay = OptimizerConfig(schedule="cosine", warmup_steps=5)
    run = make(tmp_path / "run", dataclasses.replace(STEPS, optimizer=decay), (40,))
    with pytest.raises(TrainError) as error:
        again(run, steps=60).start(tokenizer_of(run))
    message = str(error.value)
    assert "the cosine schedule depends on train.steps" in message
    command = f"heedful train {run.directory} --init-from {run.directory} --run-dir NEW"
    assert f"{command} --train.steps 60" in message
    assert Run.open(run.directory) == run


def test_another_rate_is_refused_with_the_command(tmp_path):
    run = make(tmp_path / "run", saved=(40,))
    rate = dataclasses.replace(run.train.optimizer, peak_lr=0.5, clip_norm=None)
    other = again(run, optimizer=rate, deterministic=False)
    with pytest.raises(TrainError) as error:
        other.start(tokenizer_of(run))
    for flag in ("optimizer.peak-lr 0.5", "optimizer.clip-norm None", "no-deterministic"):
        assert f"--train.{flag}" in str(error.value)


def test_an_earlier_result_is_kept_when_a_run_goes_on(tmp_path):
    run = make(tmp_path / "run", saved=(40,))
    for text in ("first", "second"):
        (run.directory / "result.json").write_text(text)
        run.keep_result(40)
    kept = run.directory / "evaluations"
    assert (kept / "step=40" / "result.json").read_text() == "first"
    assert (kept / "step=40.2" / "result.json").read_text() == "second"


def test_a_running_run_keeps_its_config(tmp_path):
    run = make(tmp_path / "run", saved=(10,))
    release = run.lock()
    with pytest.raises(TrainError, match="another process trains"):
        again(run, steps=60).start(tokenizer_of(run))
    release()
    assert Run.open(run.directory) == run
