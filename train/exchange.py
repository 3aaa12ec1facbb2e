"""Runs from the models of other libraries, and models for them from runs."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from data.config import DataConfig, Objective
from data.tokenizer import Tokenizer
from model import pretrained
from model.config import ModelConfig
from train.checkpoint import Checkpoints
from train.config import DecodeConfig, MeshConfig, TrainConfig, TrainError
from train.init_from import Source
from train.load import Trained
from train.run import Run
from train.sharding import make_mesh
from train.state import abstract_params, parameter_count


def default_data(model: ModelConfig) -> DataConfig:
    """What a model of this kind may be measured on, where nothing else is said."""
    if model.head.kind == "classifier":
        return DataConfig(source="sentiment", objective="classification")
    kinds: dict[str, tuple[str, Objective]] = {
        "encoder_only": ("shakespeare", "masked_lm"),
        "decoder_only": ("shakespeare", "causal_lm"),
        "encoder_decoder": ("homeassistant", "translation"),
    }
    source, objective = kinds[model.architecture]
    return DataConfig(source=source, objective=objective)


def import_run(
    source: Source, directory: Path, data: DataConfig, decode: DecodeConfig, console: Console
) -> Run:
    """A run in `directory` whose only checkpoint holds the parameters of `source`."""
    if (directory / "config.json").exists():
        raise TrainError(f"{directory} holds a run already: give another --run-dir")
    train = TrainConfig(steps=1, keep=1, average=1, init_from=source.name, decode=decode)
    run = Run(directory, source.model, data, train)
    mesh = make_mesh(MeshConfig())
    abstract = abstract_params(source.model, mesh)
    params = jax.tree.map(
        lambda like, x: jax.device_put(np.asarray(x, like.dtype), like.sharding),
        abstract,
        source.params(),
    )
    run.start(source.tokenizer)
    checkpoints = Checkpoints(run.checkpoints, source.tokenizer.fingerprint, keep=1)
    checkpoints.save_params(params)
    checkpoints.close()
    console.print(f"parameters: {parameter_count(params):,} ({source.model.architecture})")
    console.print(f"the run lies in {directory}")
    return run


def export_run(trained: Trained, directory: Path, console: Console) -> None:
    """Writes safetensors, config.json and the tokenizer, as transformers reads them."""
    model, params = pretrained.merge_lora(trained.run.model, jax.device_get(trained.params))
    tokenizer = trained.tokenizer
    special = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }
    pretrained.write(directory, model, params, special=special)
    _write_tokenizer(tokenizer, directory)
    console.print(
        f"exported to {directory}: {', '.join(sorted(p.name for p in directory.iterdir()))}"
    )
