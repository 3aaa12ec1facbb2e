"""Errors about data and settings, and texts for their messages."""

from collections.abc import Collection
from itertools import islice


class DataError(ValueError):
    """Bad data or a bad setting; the message names the file or field and the fix in one line."""


def require(condition: bool, message: str) -> None:
    """Raise DataError unless the condition holds."""
    if not condition:
        raise DataError(message)


def short(text: str, limit: int = 80) -> str:
    """Return a text for an error message, cut after `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def listed(names: Collection[object], limit: int = 12) -> str:
    """Return a list of names for an error message: at most `limit`, and their number."""
    shown = [short(str(name)) for name in islice(names, limit)]
    first = ", ".join(name if name.isprintable() else repr(name) for name in shown)
    return first if len(names) <= limit else f"{first}, ... ({len(names):,} in all)"
