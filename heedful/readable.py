"""Text of configs for people."""

import dataclasses
from typing import Any

WIDTH = 88


def changed(config: Any) -> str:
    """Return a dataclass as Python code, without the fields that have their default values.

    A text that is wider than 88 characters has one field per line.
    """
    parts = []
    for entry in dataclasses.fields(config):
        value, default = getattr(config, entry.name), entry.default
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        if value != default:
            parts.append(f"{entry.name}={value!r}")
    name, flat = type(config).__name__, ", ".join(parts)
    if len(name) + len(flat) + 2 <= WIDTH and "\n" not in flat:
        return f"{name}({flat})"
    lines = "".join(f"{part},\n" for part in parts).splitlines()
    return f"{name}(\n" + "".join(f"    {line}\n" for line in lines) + ")"


class Readable:
    """Base of configs: `repr` shows the fields that differ from their defaults, as Python code."""

    def __repr__(self) -> str:
        return changed(self)
