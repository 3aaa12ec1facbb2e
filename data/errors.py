"""Errors about data and settings, and texts for their messages."""

from collections.abc import Collection
from itertools import islice

from heedful.errors import HeedfulError


class DataError(HeedfulError, ValueError):
    """Bad data or a bad setting; the message, one line, names the file or field and the fix.

    >>> import heedful as hf
    >>> try:
    ...     hf.DataConfig(max_length=1)
    ... except hf.DataError as error:
    ...     print(error)
    data.max_length is 1: give 2 or more
    """


def require(condition: bool, message: str) -> None:
    """Raise DataError unless the condition holds."""
    if not condition:
        raise DataError(message)


def short(text: str, limit: int = 80) -> str:
    """Return a text for an error message, cut after `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def listed(names: Collection[object], limit: int = 12) -> str:
    """Join at most `limit` names for an error message; if there are more, add how many in all."""
    shown = [short(str(name)) for name in islice(names, limit)]
    first = ", ".join(name if name.isprintable() else repr(name) for name in shown)
    return first if len(names) <= limit else f"{first}, ... ({len(names):,} in all)"
