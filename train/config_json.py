"""Convert configs to JSON values, and back."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heedful.data.writing import write_whole
from heedful.names import did_you_mean


def to_json(config: Any) -> Any:
    """Return a config as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(cls: Any, value: Any, name: str = "") -> Any:
    """Return the config of class `cls` from its JSON value; raise TypeError for other values."""
    if dataclasses.is_dataclass(cls):
        if not isinstance(value, dict):
            raise TypeError(f"{name} is not an object")
        hints = typing.get_type_hints(cls)
        if unknown := sorted(map(str, value.keys() - hints.keys())):
            close = did_you_mean(unknown[0], hints)
            raise TypeError(
                f"{name}.{unknown[0]} is unknown: {close}correct it, or use the version that wrote "
                "it"
            )
        return cls(**{k: from_json(hints[k], v, f"{name}.{k}") for k, v in value.items()})  # type: ignore[operator]
    choices = typing.get_args(cls)
    if typing.get_origin(cls) is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{name} = {value!r}: it must be a list")
        return tuple(from_json(choices[0], item, name) for item in value)
    if typing.get_origin(cls) in (types.UnionType, typing.Union):
        literals = [choice for choice in choices if typing.get_origin(choice) is typing.Literal]
        if value is None or any(value in typing.get_args(choice) for choice in literals):
            return value
        inner = next((c for c in choices if c not in (type(None), *literals)), str)
        return from_json(inner, value, name)
    kinds = {float: (int, float), int: int, str: str, bool: bool}
    is_other = isinstance(value, bool) and cls is not bool
    if cls in kinds and (is_other or not isinstance(value, kinds[cls])):
        raise TypeError(f"{name} = {value!r}: it must be of type {cls.__name__}")
    return value


def differences(ours: Any, theirs: Any, name: str = "") -> Iterator[str]:
    """Yield the differences between two configs (JSON values), one text per field."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours.keys() | theirs.keys():
            yield from differences(ours.get(key), theirs.get(key), f"{name}.{key}".lstrip("."))
    elif ours != theirs:
        yield f"{name} is {theirs!r} there and {ours!r} here"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_whole(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return JSON values with null instead of NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
