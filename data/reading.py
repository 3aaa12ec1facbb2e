"""JSON of other people: whatever is wrong with it is a short reason."""

import json
from typing import Any


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text; raises ValueError with a reason of a few words."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error
    except RecursionError as error:
        raise ValueError("it has too many levels") from error
    except ValueError as error:
        raise ValueError("it has a number of too many digits") from error


def require_characters(value: Any) -> None:
    """Raises ValueError where a JSON value has half a character, which no text in UTF-8 has."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it has half a character (\\ud800-\\udfff)") from error
