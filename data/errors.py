"""Errors about data and settings, and the words in them."""

from collections.abc import Collection
from itertools import islice


class DataError(ValueError):
    """Bad data or a bad data setting: one line that names the thing and the fix."""


def require(condition: bool, message: str) -> None:
    """Raise DataError unless the condition holds."""
    if not condition:
        raise DataError(message)


def short(text: str, most: int = 80) -> str:
    """Return a text for an error: its beginning where it is long."""
    return text if len(text) <= most else f"{text[:most]}..."


def listed(names: Collection[object], most: int = 12) -> str:
    """Return names for an error: the first ones where there are many."""
    shown = [short(str(name)) for name in islice(names, most)]
    first = ", ".join(name if name.isprintable() else repr(name) for name in shown)
    return first if len(names) <= most else f"{first}, ... ({len(names):,} in all)"
