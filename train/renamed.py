"""Renamed config fields: read old runs, and reject old flags with a hint to the new flag."""

from collections.abc import Sequence
from typing import Any

from heedful.train.errors import TrainError

RENAMED = {
    "model.types": "model.type_vocab_size",
    "train.keep": "train.max_checkpoints",
    "train.average": "train.average_last",
    "train.optimizer.head_lr": "train.optimizer.head_lr_multiplier",
}


def with_new_names(values: Any, name: str = "") -> Any:
    """Return configs (JSON values) with old names of fields replaced; a value by new name wins."""
    if not isinstance(values, dict):
        return values
    found = {key: with_new_names(value, f"{name}{key}.") for key, value in values.items()}
    for old, new in RENAMED.items():
        if old.startswith(name) and (key := old.removeprefix(name)) in found:
            found.setdefault(new.removeprefix(name), found.pop(key))
    return found


def require_new_flags(arguments: Sequence[str]) -> None:
    """Raise TrainError for a renamed flag, with its new name."""
    flags = {_flag(old): _flag(new) for old, new in RENAMED.items()}
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in flags:
            raise TrainError(f"{flag} has another name now: give {flags[flag]}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
