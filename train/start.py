"""Start a run: make its tokenizer, complete the model's sizes, and check that all configs fit."""

import dataclasses
import math
from pathlib import Path

import jax
from rich.console import Console

from heedful.data import pipeline
from heedful.data.config import DataConfig
from heedful.data.tokenizer import Tokenizer
from heedful.model.attention import spec_of, specs
from heedful.model.config import ModelConfig
from heedful.train.config import TrainConfig
from heedful.train.conversion.source import open_source
from heedful.train.errors import TrainError
from heedful.train.hosts import is_first
from heedful.train.optimizer import make_optimizer
from heedful.train.run import Run, is_begun
from heedful.train.tasks import task_of
from heedful.train.trackers import require_tracker


def start_run(
    directory: Path,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    console: Console,
    tokenizer: Tokenizer | None = None,
    experiment_file: Path | None = None,
) -> Run:
    """Return the run in `directory`: a new run, or the existing run if its config is the same.

    An existing run without a checkpoint starts again. `tokenizer` None: it is learned from the
    data, or comes from the source. Raises TrainError, DataError or ModelError if the three configs
    and the tokenizer do not fit together.
    """
    require_fit(model, data, train)
    require_tracker(train.tracker)
    is_old = is_begun(directory)
    if not is_old and (directory / "config.json").exists():
        console.print(f"{directory} was started before and has no checkpoint: the run starts again")
    if is_old or not is_first():
        tokenizer = _the_same(tokenizer, Run.open(directory).tokenizer(), str(directory))
    elif train.init_from is not None and tokenizer is not None:
        tokenizer = _the_same(
            tokenizer, open_source(train.init_from, console).tokenizer, train.init_from
        )
    elif tokenizer is not None:
        tokenizer.require(data.objective)
    elif train.init_from is not None:
        tokenizer = _tokenizer_of_source(train.init_from, data, console)
    else:
        with console.status("learning the vocabulary"):
            texts = pipeline.tokenizer_texts(data)
            tokenizer = Tokenizer.prepare(texts, data.tokenizer, data.objective)
    if data.objective_spec.label == "class" and not data.classes:
        data = dataclasses.replace(data, classes=pipeline.classes(data))
    run = Run(directory, _sized(model, data, tokenizer), data, train, experiment_file)
    _require_room(run)
    run.start(tokenizer)
    return run


def require_fit(model: ModelConfig, data: DataConfig, train: TrainConfig) -> None:
    """Raise TrainError if model, objective and training settings do not fit together."""
    task = task_of(data)
    specs(model)  # Unknown cores raise an error.
    make_optimizer(train.optimizer, train.steps)  # So do optimizers and schedules.
    if not task.fits(model):
        raise TrainError(
            f"data.objective {data.objective} needs model.architecture "
            f"{' or '.join(task.architectures)} and model.head.kind {task.head}, not "
            f"{model.architecture} and {model.head.kind}: change the objective or the model"
        )
    for site in model.sites if data.is_packed else ():
        core = model.attention.core_of(site)
        if site in spec_of(core).one_document_at:
            name = {"self": "core", "decoder": "decoder_core", "cross": "cross_core"}[site]
            raise TrainError(
                f"model.attention.{name} {core} cannot tell the documents of a packed row apart: "
                "give --data.no-packing, or choose another core"
            )
    if train.metric not in task.metrics:
        raise TrainError(
            f"train.metric {train.metric} does not exist for data.objective {data.objective}: "
            f"choose {' or '.join(task.metrics)}"
        )
    if model.attention.global_tokens and data.is_packed:
        raise TrainError(
            f"model.attention.global_tokens = {model.attention.global_tokens} are the first of a "
            "row, and data.packing puts several documents in a row: give --data.no-packing"
        )
    if task.use == "translate" and train.decode.stop:
        raise TrainError(
            f"train.decode.stop = {train.decode.stop} is only for texts that continue a prompt: "
            "leave train.decode.stop out"
        )
    if train.label_smoothing and "smoothed_loss" not in task.metrics:
        raise TrainError(
            f"train.label_smoothing = {train.label_smoothing} has no effect with data.objective "
            f"{data.objective}: set train.label_smoothing to 0"
        )


def _require_room(run: Run) -> None:
    """Raise TrainError if one of the largest arrays does not fit on all devices together.

    Call this before arrays are created: a far too large array may end the process, or make the
    machine unusable.
    """
    from heedful.train.plan.report import capacity

    here = jax.local_devices()
    room = (capacity(None, here) or math.inf) * len(here) * jax.process_count()
    model, data = run.model, run.data
    attention, feed_forward = model.attention, model.feed_forward
    deeper = "encoder_layers" if (model.encoder_layers or 0) > model.layers else "layers"
    matrices = 2 * attention.heads * model.head_dim + 2 * feed_forward.width
    sizes = {
        "model.vocab_size x model.width": (model.vocab_size or 0) * model.input_width,
        f"model.{deeper} x model.width x (2 model.attention.heads x head_dim + 2 "
        "model.feed_forward.width)": getattr(model, deeper) * model.width * matrices,
        "data.batch_tokens / train.accumulate x model.width": (
            data.batch_tokens // run.train.accumulate * model.width
        ),
    }
    if model.positions.has_table:
        length = model.positions.max_length
        sizes["model.positions.max_length x model.width"] = length * model.input_width
    for spec in specs(model).values():
        sizes |= spec.sizes(model)
    for name, size in sizes.items():
        if 4 * size > room:
            raise TrainError(
                f"{name} = {size:,} numbers in float32 do not fit in the {room / 2**30:.1f} GiB of "
                "all devices: give smaller values"
            )


def _tokenizer_of_source(init_from: str, data: DataConfig, console: Console) -> Tokenizer:
    tokenizer = open_source(init_from, console).tokenizer
    path = data.tokenizer.path
    if path is not None and not tokenizer.reads_as(Tokenizer.load(path)):
        raise TrainError(
            f"data.tokenizer.path {path} differs from the tokenizer of {init_from}, whose "
            "parameters need their own vocabulary: leave data.tokenizer.path out"
        )
    return tokenizer


def _the_same(given: Tokenizer | None, own: Tokenizer, where: str) -> Tokenizer:
    """Return the tokenizer of a run or a source; raise TrainError if another one was given."""
    if given is not None and given.fingerprint != own.fingerprint:
        raise TrainError(
            f"the given tokenizer differs from the tokenizer of {where}, whose parameters need "
            "their own vocabulary: use that tokenizer"
        )
    return own


def _sized(model: ModelConfig, data: DataConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Return the model with the sizes that the tokenizer and the data decide."""
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    elif model.vocab_size < tokenizer.vocab_size:
        raise TrainError(
            f"model.vocab_size = {model.vocab_size} is less than the {tokenizer.vocab_size} "
            "entries of the tokenizer: raise model.vocab_size, or leave it out"
        )
    if (count := task_of(data).outputs) is None:
        return model
    outputs = count(data)
    if model.head.outputs not in (None, outputs):
        raise TrainError(
            f"model.head.outputs = {model.head.outputs}, but the data needs {outputs}: leave "
            "model.head.outputs out"
        )
    head = dataclasses.replace(model.head, outputs=outputs)
    return dataclasses.replace(model, head=head)
