"""Change the paths in configs."""

import dataclasses
from collections.abc import Callable

from heedful.data.config import DataConfig
from heedful.train.config import TrainConfig


def data_paths(data: DataConfig, change: Callable[[str], str]) -> DataConfig:
    """Return the config with `change` applied to every path."""
    files = {name: tuple(map(change, getattr(data, name))) for name in ("train", "valid", "test")}
    path = data.tokenizer.path and change(data.tokenizer.path)
    return dataclasses.replace(
        data, tokenizer=dataclasses.replace(data.tokenizer, path=path), **files
    )


def train_paths(train: TrainConfig, change: Callable[[str], str]) -> TrainConfig:
    """Return the config with `change` applied to every path; packages and buckets stay as is."""
    init_from, checkpoints = train.init_from, train.checkpoints
    if init_from is not None and not init_from.startswith("package:"):
        kind, colon, path = init_from.rpartition("hf:")
        init_from = kind + colon + change(path)
    if checkpoints is not None and "://" not in checkpoints:
        checkpoints = change(checkpoints)
    return dataclasses.replace(train, init_from=init_from, checkpoints=checkpoints)
