"""Test that a run compiles each function once for each shape of a batch."""

import dataclasses
import shutil
from collections import Counter

import jax
import pytest
import quick
import toy

from heedful.configs import base
from heedful.data.pipeline import Dataset
from heedful.train import step
from heedful.train.audit.subject import Subject
from heedful.train.config import MeshConfig
from heedful.train.loop import fit
from heedful.train.sharding import make_mesh, to_devices
from heedful.train.start import start_run
from heedful.train.state import first_state, set_up
from heedful.train.tasks import task_of

COMPILED: list[str] = []
"""Names of the functions that were compiled or read from the cache of compiled programs."""
ALIKE = {"bert_tiny", "gpt2_medium", "gpt2_large", "gpt2_xl", "listops_tiny", "multi30k_table3",
         "sentiment_tiny", "shakespeare_char", "shakespeare_char_gpu", "t5_tiny", "vaswani_base",
         "vaswani_big", "vaswani_table3"}  # fmt: skip
"""Configs that differ from another one only or mainly in sizes, rates and places of norms."""


def _listen(event: str, seconds: float, **facts: str) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(facts["fun_name"])


jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.fixture(autouse=True)
def none_yet():
    COMPILED.clear()


@pytest.mark.parametrize("name", quick.only(["gpt2_small"], sorted(set(base.names()) - ALIKE)))
def test_the_step_of_a_shipped_config_is_compiled_once_for_each_shape(name: str):
    experiment, _ = base.load(name)
    subject = Subject.of(experiment.model, experiment.data)
    setup = set_up(subject.model, experiment.train, make_mesh(MeshConfig(), jax.devices()[:1]))
    loss = task_of(experiment.data).loss
    train_step = step.make_train_step(subject.model, experiment.train, setup, loss)
    shardings = jax.tree.map(lambda x: x.sharding, setup.abstract.params)
    state = first_state(setup, jax.device_put(subject.params, shardings))
    data, shapes = subject.dataset, set()
    with jax.set_mesh(setup.mesh):
        for i in range(2 * data.batches_per_epoch + 2):
            batch = data.batch(data.train_plan, i)
            shapes.add(tuple(x.shape for x in batch.values()))
            state, _ = train_step(state, to_devices(batch, setup.mesh))
    assert COMPILED.count("jit(train_step)") == len(shapes)


@pytest.mark.slow
def test_a_run_that_is_resumed_compiles_each_function_once(tmp_path):
    config = dataclasses.replace(toy.TRAIN, steps=18, checkpoint_every=9, fingerprint_every=2)
    data = toy.data(toy.write_table(tmp_path), "classification", buckets=2, batch_tokens=128)
    model = toy.model(head=toy.CLASSIFIER)
    run = start_run(tmp_path / "run", model, data, config, toy.QUIET)
    plan = Dataset.prepare(run.data, run.tokenizer(), "train").train_plan
    for _ in range(2):
        COMPILED.clear()
        fit(run, toy.QUIET)
        counts = Counter(COMPILED)
        assert counts["jit(train_step)"] == counts["jit(eval_step)"] == len(plan.shapes) > 1
        assert counts["jit(fingerprint)"] == 1 and counts["jit(words_of_leaves)"] <= 1
        shutil.rmtree(run.checkpoints / "18")  # as if the run had stopped earlier
    # orbax compiles `slice`: each device writes a slice of an array that several devices hold.
    ours = {"train_step", "eval_step", "fingerprint", "words_of_leaves"}
    assert set(COMPILED) <= {f"jit({name})" for name in ours | {"slice"}}
