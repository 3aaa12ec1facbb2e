"""Run from the models of other libraries, and models for them from runs."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from heedful.data.config import DataConfig
from heedful.model import pretrained
from heedful.model.config import ModelConfig
from heedful.train.checkpoint import Checkpoints
from heedful.train.config import DecodeConfig, MeshConfig, TrainConfig, TrainError
from heedful.train.config_json import write_json
from heedful.train.conversion.init_from import Source, print_notes
from heedful.train.hosts import is_first, to_host
from heedful.train.load import Trained
from heedful.train.reproducibility.record import add_environment, environment
from heedful.train.run import Run, is_begun
from heedful.train.sharding import make_mesh
from heedful.train.start import require_fit
from heedful.train.state import abstract_params, parameter_count
from heedful.train.tasks import TASKS


def default_data(model: ModelConfig) -> DataConfig:
    """What a model of this kind may be measured on, where nothing else is said."""
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
    """A run in `directory` whose only checkpoint holds the parameters of `source`."""
    if is_begun(directory):
        raise TrainError(f"{directory} holds a run already: give another --run-dir")
    if source.model.head.kind == "classifier" and source.model.head.outputs is None:
        raise TrainError(
            f"{source.name} is a body without a head: give it one by fine-tuning, with "
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
    """Those of the config, or else those that the model names, or else their numbers."""
    outputs = source.model.head.outputs or 0
    classes = data.classes or tuple(source.labels()) or tuple(map(str, range(outputs)))
    if len(classes) != outputs:
        raise TrainError(
            f"data.classes names {len(classes)} classes, but {source.name} has {outputs} outputs: "
            "name as many"
        )
    return classes


def export_run(trained: Trained, directory: Path, console: Console) -> None:
    """Write safetensors, config.json and the tokenizer, as transformers reads them.

    Raises TrainError for a directory that holds something, and ModelError for a model that no
    known architecture expresses.
    """
    if directory.is_dir() and any(directory.iterdir()):
        raise TrainError(f"{directory} is not empty: give another directory to export to")
    model, params = pretrained.merge_lora(trained.run.model, to_host(trained.params))
    if not is_first():
        return
    tokenizer = trained.tokenizer
    files = {} if tokenizer.special is None else tokenizer.special.files
    roles = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    special = {f"{role}_token_id": i for role, i in roles.items() if i is not None}
    if "config.json" in files:
        special = _within(files["config.json"], model.vocab_size or 0)
    if model.architecture == "encoder_decoder" and tokenizer.bos is not None:
        special.setdefault("decoder_start_token_id", tokenizer.bos)
    labels = trained.run.data.classes
    pretrained.write(directory, model, params, special=special, labels=labels)
    framing = tokenizer.framing(model.architecture).following(None)
    framing.save(directory / "tokenizer.json")
    # What transformers calls a tokenizer that is all in its tokenizer.json.
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    names = [
        "input_ids",
        *(["token_type_ids"] if model.type_vocab_size > 1 else []),
        "attention_mask",
    ]
    values |= {"model_input_names": names, "clean_up_tokenization_spaces": False}
    named = roles | {"unk": tokenizer.unk, "mask": tokenizer.mask}
    if tokenizer.is_bare and tokenizer.special is None:  # The text "<eos>" is text.
        values["split_special_tokens"] = True
    if model.architecture == "decoder_only":
        values["padding_side"] = "left"
    values |= {f"{role}_token": tokenizer.name(i) for role, i in named.items() if i is not None}
    values |= files.get("tokenizer_config.json", {})
    write_json(directory / "tokenizer_config.json", values)
    if (name := "generation_config.json") in files and model.head.kind == "language_model":
        write_json(directory / name, files[name])
    console.print(
        f"exported to {directory}: {', '.join(sorted(p.name for p in directory.iterdir()))}"
    )


def _within(special: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The ids that a model of `size` tokens has, as they were before it was imported."""
    found = {}
    for key, value in special.items():
        inside = [i for i in (value if isinstance(value, list) else [value]) if i in range(size)]
        if inside:
            found[key] = inside if isinstance(value, list) else value
    return found
