"""The error of a model that cannot be built, and checks of config fields."""

import math
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from heedful.errors import HeedfulError
from heedful.names import did_you_mean


class ModelError(HeedfulError, ValueError):
    """Error of a model that cannot be built, or of its input; one line, which includes the fix.

    >>> import heedful as hf
    >>> try:
    ...     hf.ModelConfig(dropout=2.0)
    ... except hf.ModelError as error:
    ...     print(error)
    model.dropout must lie in [0, 1), not 2.0
    """


def require(condition: bool, message: str) -> None:
    """Raise ModelError with this message unless the condition holds."""
    if not condition:
        raise ModelError(message)


def require_choices(section: str, config: Any, error: type[ValueError] = ModelError) -> None:
    """Raise `error` if a field is not among the choices of its Literal, or not a finite number.

    `section` is the full name of the config, such as model.attention. Without this check, an
    unknown choice would silently act like the last known one, and infinity would pass lower limits.
    """
    for entry in fields(config):
        value, choices = getattr(config, entry.name), get_args(entry.type)
        if isinstance(value, float) and not math.isfinite(value):
            raise error(f"{section}.{entry.name} must be a finite number, not {value}")
        if get_origin(entry.type) is Literal and value not in choices:
            known, meant = ", ".join(map(str, choices)), did_you_mean(value, choices)
            raise error(
                f"{section}.{entry.name} must be one of {known}, not {value}; {meant}".rstrip("; ")
            )


def require_idle(section: str, config: Any, names: tuple[str, ...], need: str) -> None:
    """Raise ModelError if one of the fields `names`, which act only with `need`, is set."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        require(
            entry.name not in names or value == entry.default,
            f"{section}.{entry.name} = {value} needs {need}: set that, or leave "
            f"{section}.{entry.name} out",
        )


def require_rate(name: str, value: float) -> None:
    """Raise ModelError for a dropout rate outside of [0, 1)."""
    require(0 <= value < 1, f"{name} must lie in [0, 1), not {value}")
