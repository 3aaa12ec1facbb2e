"""Names that a user has misspelt: find the name that was meant."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Return "did you mean X? " with the known name that is most like `name`; "": none is."""
    names = {str(each).lower(): str(each) for each in known}
    close = difflib.get_close_matches(str(name).lower(), names, 1)
    return f"did you mean {names[close[0]]}? " if close else ""
