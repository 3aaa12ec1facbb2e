"""Experiments: each file of this folder has the settings of a model, its data and its training."""

import importlib
import pkgutil
from pathlib import Path

from heedful.names import did_you_mean
from heedful.train.errors import TrainError
from heedful.train.experiment import Experiment

__all__ = ["Experiment", "has", "load", "names"]


def names() -> list[str]:
    """Return the names of the experiments in this folder, sorted."""
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in found if name != "base")


def has(name: str) -> bool:
    """Tell if `name` is NAME or NAME:ROW with a known experiment NAME.

    ROW, a variation in the ROWS of the experiment's file, is not checked here.
    """
    return name.partition(":")[0] in names()


def load(name: str) -> tuple[Experiment, str]:
    """Return the experiment NAME or NAME:ROW, and its description.

    Raises TrainError for an unknown NAME or ROW.
    """
    if not has(name):
        meant = did_you_mean(name.partition(":")[0], names())
        raise TrainError(f"unknown config '{name}': {meant}choose one of {', '.join(names())}")
    file, colon, row = name.partition(":")
    module = importlib.import_module(f"heedful.configs.{file}")
    if not colon:
        return module.get_config(), module.__doc__ or ""
    rows = getattr(module, "ROWS", {})
    if row not in rows:
        known = f"choose one of {', '.join(rows)}" if rows else "this config has no rows"
        known = did_you_mean(row, rows) + known
        raise TrainError(f"unknown row '{row}' of config '{file}': {known}")
    return module.get_config(row), module.__doc__ or ""
