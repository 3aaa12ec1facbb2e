"""Test that each invalid value of a train config is refused by the name of its field."""

import dataclasses
import inspect
import math

import pytest

import heedful.data.config as data_config
import heedful.model.config as model_config
import heedful.train.config as train_config
from heedful.data.errors import DataError
from heedful.model.config import ModelError
from heedful.train.config import DecodeConfig, MeshConfig, OptimizerConfig, TrainConfig
from heedful.train.errors import TrainError


@pytest.mark.parametrize(
    ("cls", "values", "words"),
    [
        (OptimizerConfig, {"peak_lr": 0.0}, ["optimizer.peak_lr", "0.0"]),
        (OptimizerConfig, {"warmup_steps": -1}, ["optimizer.warmup_steps", "-1"]),
        (OptimizerConfig, {"b1": 1.0}, ["optimizer.b1", "1.0"]),
        (OptimizerConfig, {"b2": -0.1}, ["optimizer.b2", "-0.1"]),
        (OptimizerConfig, {"epsilon": 0.0}, ["optimizer.epsilon"]),
        (OptimizerConfig, {"final_lr": -1.0}, ["optimizer.final_lr"]),
        (OptimizerConfig, {"final_lr": 1e-5}, ["optimizer.final_lr = 1e-05", "linear or cosine"]),
        (OptimizerConfig, {"initial_lr": 0.1, "warmup_steps": 0}, ["optimizer.initial_lr = 0.1"]),
        (OptimizerConfig, {"kind": "sgd"}, ["optimizer.kind", "adamw", "sgd"]),
        (TrainConfig, {"metric": "bleu"}, ["train.metric", "loss", "bleu"]),
        (OptimizerConfig, {"clip_norm": 0.0}, ["optimizer.clip_norm", "None"]),
        (OptimizerConfig, {"kind": "adam", "weight_decay": 0.1}, ["weight_decay", "adamw"]),
        (OptimizerConfig, {"layer_decay": 0.0}, ["optimizer.layer_decay", "(0, 1]", "0.0"]),
        (OptimizerConfig, {"layer_decay": 1.5}, ["optimizer.layer_decay", "1.5"]),
        (
            OptimizerConfig,
            {"head_lr_multiplier": 0.0},
            ["optimizer.head_lr_multiplier", "positive"],
        ),
        (OptimizerConfig, {"freeze": ("ok", "a(")}, ["optimizer.freeze", "'a('", "no regular"]),
        (MeshConfig, {"tensor": 0}, ["mesh.tensor", "0"]),
        (MeshConfig, {"data": -2}, ["mesh.data", "-2"]),
        (DecodeConfig, {"beam": 0}, ["decode.beam"]),
        (DecodeConfig, {"length_penalty": -1.0}, ["decode.length_penalty"]),
        (DecodeConfig, {"length_penalty_offset": -1}, ["decode.length_penalty_offset", "-1"]),
        (DecodeConfig, {"extra_length": 0}, ["decode.extra_length"]),
        (DecodeConfig, {"beam": 1, "temperature": -1.0}, ["decode.temperature"]),
        (DecodeConfig, {"beam": 1, "temperature": 1.0, "top_k": -1}, ["decode.top_k"]),
        (DecodeConfig, {"beam": 1, "temperature": 1.0, "top_p": 0.0}, ["decode.top_p"]),
        (DecodeConfig, {"temperature": 1.0}, ["decode.beam = 1"]),
        (DecodeConfig, {"beam": 1, "top_k": 3}, ["decode.temperature above 0"]),
        (DecodeConfig, {"batch_tokens": 0}, ["decode.batch_tokens"]),
        (DecodeConfig, {"beam": 1, "temperature": 1.0, "min_p": 1.0}, ["decode.min_p", "1.0"]),
        (DecodeConfig, {"beam": 1, "min_p": 0.1}, ["decode.temperature above 0"]),
        (DecodeConfig, {"repetition_penalty": 0.5}, ["decode.repetition_penalty", "0.5"]),
        (DecodeConfig, {"max_tokens": 0}, ["decode.max_tokens"]),
        (DecodeConfig, {"stop": ("a", "")}, ["decode.stop", "empty"]),
        (DecodeConfig, {"early_stopping": "maybe"}, ["decode.early_stopping", "never", "maybe"]),
        (DecodeConfig, {"beam": 10**9}, ["decode.beam", "at most 4,096", "1,000,000,000"]),
        (DecodeConfig, {"max_tokens": 10**9}, ["decode.max_tokens", "1,048,576", "1,000,000,000"]),
        (DecodeConfig, {"extra_length": 10**9}, ["decode.extra_length", "1,048,576"]),
        (DecodeConfig, {"length_penalty": 1e9}, ["decode.length_penalty", "10"]),
        (DecodeConfig, {"beam": 1, "temperature": 1e-40}, ["decode.temperature", "1e-6"]),
        (TrainConfig, {"steps": 0}, ["train.steps", "0"]),
        (TrainConfig, {"seed": -1}, ["train.seed"]),
        (TrainConfig, {"samples": -1}, ["train.samples"]),
        (TrainConfig, {"label_smoothing": 1.0}, ["train.label_smoothing"]),
        (TrainConfig, {"patience": 0}, ["train.patience", "None"]),
        (TrainConfig, {"reinit": ("head",)}, ["train.reinit = head", "train.init_from"]),
        (TrainConfig, {"init_from": "runs/a", "reinit": ("[",)}, ["train.reinit", "'['"]),
        (
            TrainConfig,
            {"steps": 7, "optimizer": OptimizerConfig(warmup_steps=7, schedule="cosine")},
            ["warmup_steps = 7", "train.steps = 7", "cosine"],
        ),
        (
            TrainConfig,
            {"average_last": 7},
            ["train.average_last = 7", "train.max_checkpoints", "5"],
        ),
    ],
)
def test_bad_value_is_named(cls, values, words):
    with pytest.raises(TrainError) as error:
        cls(**values)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "constant"])
def test_a_warmup_may_last_for_all_steps_of_a_schedule_without_end(schedule):
    optimizer = OptimizerConfig(warmup_steps=9, schedule=schedule)
    assert TrainConfig(steps=7, optimizer=optimizer).optimizer is optimizer


def configs() -> list[type]:
    modules = (model_config, data_config, train_config)
    found = {cls for module in modules for _, cls in inspect.getmembers(module, inspect.isclass)}
    return sorted(filter(dataclasses.is_dataclass, found), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", configs())
def test_no_number_is_infinite_or_none_at_all(cls):
    numbers = [entry.name for entry in dataclasses.fields(cls) if "float" in str(entry.type)]
    for name in numbers:
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises((DataError, ModelError, TrainError)) as error:
                cls(**{name: value})
            assert name in str(error.value) and str(value) in str(error.value)
    if cls is DecodeConfig:
        assert {"length_penalty", "repetition_penalty"} <= {*numbers}
