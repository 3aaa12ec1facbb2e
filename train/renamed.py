"""Config fields that had other names once: old runs are still read, old flags name the new ones."""

from collections.abc import Sequence
from typing import Any

from heedful.train.config import TrainError

RENAMED = {
    "model.types": "model.type_vocab_size",
    "train.keep": "train.max_checkpoints",
    "train.average": "train.average_last",
    "train.optimizer.head_lr": "train.optimizer.head_lr_multiplier",
}


def with_new_names(values: Any, name: str = "") -> Any:
    """Return configs as JSON values with the present names of fields; a present name wins."""
    if not isinstance(values, dict):
        return values
    found = {key: with_new_names(value, f"{name}{key}.") for key, value in values.items()}
    for old, new in RENAMED.items():
        if old.startswith(name) and (key := old.removeprefix(name)) in found:
            found.setdefault(new.removeprefix(name), found.pop(key))
    return found


def require_new_flags(arguments: Sequence[str]) -> None:
    """Raise TrainError for a flag that has another name now."""
    flags = {_flag(old): _flag(new) for old, new in RENAMED.items()}
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in flags:
            raise TrainError(f"{flag} has another name now: give {flags[flag]}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
