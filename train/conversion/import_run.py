"""Import a pretrained model as a run."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from heedful.data.config import DataConfig
from heedful.model.config import ModelConfig
from heedful.train.checkpoint import Checkpoints
from heedful.train.config import DecodeConfig, MeshConfig, TrainConfig
from heedful.train.conversion.init_from import Source, print_notes
from heedful.train.errors import TrainError
from heedful.train.reproducibility.record import add_environment, environment
from heedful.train.run import Run, is_begun
from heedful.train.sharding import make_mesh
from heedful.train.start import require_fit
from heedful.train.state import abstract_params, parameter_count
from heedful.train.tasks import TASKS


def default_data(model: ModelConfig) -> DataConfig:
    """Return the default data for the evaluation of a model of this kind."""
    is_number = model.head.kind == "classifier" and model.head.outputs == 1
    return next(
        DataConfig(source=task.default_source, objective=name)
        for name, task in TASKS.items()
        if task.default_source is not None
        and task.fits(model)
        and (task.objective.label == "number") == is_number
    )


def import_run(
    source: Source, directory: Path, data: DataConfig, decode: DecodeConfig, console: Console
) -> Run:
    """Create a run in `directory` with one checkpoint: the parameters of `source`.

    Raises TrainError if the directory has a run, if the model has no head, or if the data do not
    fit the model.
    """
    if is_begun(directory):
        raise TrainError(f"{directory} holds a run already: give another --run-dir")
    if source.model.head.kind == "classifier" and source.model.head.outputs is None:
        raise TrainError(
            f"{source.name} is a model without a head: add a head by fine-tuning, with "
            f"heedful train CONFIG --init-from {source.name}"
        )
    train = TrainConfig(
        steps=1,
        max_checkpoints=1,
        average_last=1,
        label_smoothing=0.0,
        init_from=source.name,
        decode=decode,
    )
    require_fit(source.model, data, train)
    if data.objective_spec.label == "class":
        data = dataclasses.replace(data, classes=_classes(source, data))
    run = Run(directory, source.model, data, train)
    mesh = make_mesh(MeshConfig())
    abstract = abstract_params(source.model, mesh)
    params = jax.tree.map(
        lambda like, x: jax.device_put(np.asarray(x, like.dtype), like.sharding),
        abstract,
        source.params(),
    )
    run.start(source.tokenizer)
    add_environment(run, environment(run, mesh, {}), 0, console)
    checkpoints = Checkpoints(run.checkpoints, source.tokenizer.fingerprint, keep=1)
    checkpoints.save_params(params)
    checkpoints.close()
    console.print(f"parameters: {parameter_count(params):,} ({source.model.architecture})")
    print_notes(source, console)
    console.print(f"the run lies in {directory}")
    return run


def _classes(source: Source, data: DataConfig) -> tuple[str, ...]:
    """Return data.classes, or else the classes of the model, or else "0", "1", ... per output."""
    outputs = source.model.head.outputs or 0
    classes = data.classes or tuple(source.labels()) or tuple(map(str, range(outputs)))
    if len(classes) != outputs:
        raise TrainError(
            f"data.classes names {len(classes)} classes, but {source.name} has {outputs} outputs: "
            "name one class per output"
        )
    return classes
