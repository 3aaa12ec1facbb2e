"""What a run compiles, it compiles once for each shape of a batch, and never again."""

import dataclasses

import jax
import pytest

from configs import base
from train import step
from train.audit.subject import Subject
from train.config import MeshConfig
from train.sharding import make_mesh, to_devices
from train.state import first_state, init_params, set_up
from train.step import make_train_step

COMPILED: list[str] = []
"""Names of the functions that have been compiled, or read from the cache of what was."""


def _listen(event: str, seconds: float, **facts: str) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(facts["fun_name"])


jax.monitoring.register_event_duration_secs_listener(_listen)


def same_when_small() -> list[str]:
    """The shipped configs, but for those that differ in sizes only."""
    found = {}
    for name in base.names():
        experiment = base.load(name)[0]
        model = dataclasses.replace(experiment.model, dtype="float32")
        found.setdefault(repr((model, experiment.data.objective)), name)
    return list(found.values())


@pytest.mark.parametrize("name", base.names())
def test_the_step_of_a_shipped_config_is_compiled_once_for_each_shape(name: str, monkeypatch):
    fast = {"xla_backend_optimization_level": 0}
    monkeypatch.setattr(step, "compiler_options", lambda *_: fast)
    experiment, _ = base.load(name)
    subject = Subject.of(experiment.model, experiment.data)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = experiment.train
    setup = set_up(subject.model, config, mesh)
    train_step = make_train_step(subject.model, config, setup)
    state = first_state(setup, init_params(subject.model, mesh, seed=0))
    data, shapes = subject.dataset, set()
    COMPILED.clear()
    with jax.set_mesh(mesh):
        for i in range(2 * data.batches_per_epoch + 2):
            batch = data.batch(data.train_plan, 0, 1, i)
            shapes.add(tuple(x.shape for x in batch.values()))
            state, _ = train_step(state, to_devices(batch, mesh))
    print(COMPILED, shapes, i)
    assert COMPILED.count("step") == len(shapes)


def test_a_run_compiles_nothing_after_its_first_checkpoint(tmp_path, monkeypatch): ...
