"""Test a new objective: rows of two texts, and a loss other than cross-entropy over tokens."""

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from heedful.data.batch import check
from heedful.data.objectives import OBJECTIVES, Arrays, Objective
from heedful.data.pipeline import Dataset
from heedful.model.config import HeadConfig
from heedful.train.config import OptimizerConfig
from heedful.train.evaluation.evaluate import report
from heedful.train.load import load
from heedful.train.loop import fit
from heedful.train.model_loss import LossOptions, LossSums, forward
from heedful.train.start import start_run
from heedful.train.tasks import TASKS, Task

ROOT = Path(__file__).parent.parent
SIDES = ("pair_", "")
DEFAULTS = {
    "data/config.py": {"translation"},
    "data/pipeline.py": {"causal_lm"},
    "train/own_loop.py": {"causal_lm"},
}
"""Objectives that are the default of an argument or a field, by file."""


def test_each_objective_has_a_task():
    assert list(TASKS) == list(OBJECTIVES)
    assert all(task.objective is OBJECTIVES[name] for name, task in TASKS.items())


@pytest.mark.parametrize(
    "path",
    [
        path
        for folder in ("model", "data", "train", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if str(path.relative_to(ROOT)) not in ("data/objectives.py", "train/tasks.py")
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_objective_is_named_outside_the_tables(path: Path):
    """Exceptions are defaults, and a value in the config.json of transformers."""
    name = str(path.relative_to(ROOT))
    allowed = set(DEFAULTS.get(name, ()))
    allowed |= {"regression"} if name.startswith("model/pretrained/") else set()
    found = {
        node.value
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and node.value in OBJECTIVES
    }
    assert found <= allowed


# A contrastive objective: a text must be closer to its own translation than to others in the batch.


def contrast_row(example: Any, rng: None, config: Any, tokenizer: Any) -> Arrays:
    begin, end = tokenizer.frame
    texts = (example["text"], example["pair"])
    rows = [np.concatenate([[begin], text, [end]]).astype(np.int32) for text in texts]
    return {"pair_inputs": rows[1], "inputs": rows[0], "weights": np.array(1, np.float32)}


def contrastive_loss(model: Any, params: Any, batch: Any, options: LossOptions) -> LossSums:
    def embed(side: str) -> jax.Array:
        names = ("inputs", "segment_ids", "positions")
        x = forward(model, params, {name: batch[side + name] for name in names}, options)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    weights = batch["weights"]
    likeness = 10 * embed("") @ embed("pair_").T
    likeness = jnp.where(weights > 0, likeness, -1e9)  # without rows of padding
    own = jnp.diagonal(jax.nn.log_softmax(likeness))
    ranks = jnp.sum(likeness > jnp.diagonal(likeness)[:, None], axis=-1)
    return -jnp.sum(own * weights), jnp.sum(weights), {"ranks": ranks, "weights": weights}


@pytest.fixture
def contrast(monkeypatch) -> None:
    objective = Objective(
        row=contrast_row,
        lengths=lambda n, _: np.stack([n["pair"], n["text"]]) + 2,
        fields=("text", "pair"),
        sides=SIDES,
    )
    task = Task(
        objective=objective,
        architectures=("encoder_only",),
        head="classifier",
        loss=contrastive_loss,
        scores=lambda ranks: {"first": float(np.mean(ranks == 0))},
        metrics=("loss",),
        baseline=None,
        describe=lambda loss, dataset: [f"contrast: {loss:.4f} nats per pair"],
    )
    monkeypatch.setitem(OBJECTIVES, "contrast", objective)
    monkeypatch.setitem(TASKS, "contrast", task)


def write_pairs(folder: Path) -> Path:
    path = folder / "pairs.tsv"
    lines = [f"{line}\t{toy.translate(line)}\n" for line in dict.fromkeys(toy.sentences(400))]
    path.write_text("text\tpair\n" + "".join(lines))
    return path


@pytest.mark.slow
def test_an_objective_with_two_inputs_and_a_loss_of_its_own_trains(contrast, tmp_path):
    """The test uses the real pipeline, step, loop and evaluation on all devices."""
    data = toy.data(write_pairs(tmp_path), "contrast", batch_tokens=512)
    head = HeadConfig(kind="classifier", pooling="mean", pooler=False, outputs=8)
    train = dataclasses.replace(
        toy.TRAIN,
        steps=40,
        checkpoint_every=20,
        average_last=1,
        accumulate=2,
        optimizer=OptimizerConfig(peak_lr=0.01, warmup_steps=5),
    )
    run = start_run(tmp_path / "run", toy.model(head=head), data, train, toy.QUIET)
    dataset = Dataset.prepare(run.data, run.tokenizer(), "train")
    batch = dataset.batch(dataset.train_plan, 0)
    check(batch)
    assert {"inputs", "pair_inputs", "pair_segment_ids", "weights"} < batch.keys()
    fit(run, toy.QUIET)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    first, last = (line for line in lines if "valid_loss" in line)
    assert last["valid_loss"] < first["valid_loss"] and last["valid_first"] > 0
    result = report(load(run.directory, toy.QUIET), run.train.decode, toy.QUIET)
    assert result["valid_loss"] == pytest.approx(last["valid_loss"], rel=1e-4)
    assert 0 < result["test_first"] <= 1 and "valid_frequency_loss" not in result
