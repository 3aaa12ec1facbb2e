"""Parse JSON from users, with a short reason for each error."""

import json
from typing import Any


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; for another text raise ValueError with a short reason."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error
    except RecursionError as error:
        raise ValueError("it has too many nested levels") from error
    except ValueError as error:
        raise ValueError("it has a number of too many digits") from error


def require_characters(value: Any) -> None:
    """Raise ValueError for a JSON value with a lone surrogate, which UTF-8 cannot encode."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it has half of a surrogate pair (\\ud800-\\udfff)") from error
