"""The error of a model that cannot be built, and checks of config fields."""

import math
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin


class ModelError(ValueError):
    """The error of a model that cannot be built, or of its input; one line, with the fix."""


def require(condition: bool, message: str) -> None:
    """Raise ModelError with this message unless the condition holds."""
    if not condition:
        raise ModelError(message)


def require_choices(section: str, config: Any, error: type[ValueError] = ModelError) -> None:
    """Raise `error` for a value that no Literal has, and for a number that is not finite.

    An unknown choice would silently take the last branch, and infinity passes a lower limit.
    """
    for entry in fields(config):
        value, choices = getattr(config, entry.name), get_args(entry.type)
        if isinstance(value, float) and not math.isfinite(value):
            raise error(f"{section}.{entry.name} must be a finite number, not {value}")
        if get_origin(entry.type) is Literal and value not in choices:
            known = ", ".join(map(str, choices))
            raise error(f"{section}.{entry.name} must be one of {known}, not {value}")


def require_idle(section: str, config: Any, names: tuple[str, ...], need: str) -> None:
    """Raise ModelError where one of these fields, which act only with `need`, is set."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        require(
            entry.name not in names or value == entry.default,
            f"{section}.{entry.name} = {value} needs {need}: set that, or leave it out",
        )


def require_rate(name: str, value: float) -> None:
    """Raise ModelError for a rate of dropout outside [0, 1)."""
    require(0 <= value < 1, f"{name} must lie in [0, 1), not {value}")
