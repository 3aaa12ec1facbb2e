"""Read the values of a config.json, with errors that name the key."""

import sys
from collections.abc import Mapping, Set
from typing import Any, TypeVar

from heedful.model.config import ModelError

T = TypeVar("T", int, float, bool, str)

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""Names of activations in transformers, and our names."""
ACTIVATION_NAMES = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}
"""Our names of activations, and the names that an export writes."""
INT_LIMIT = 2**31
SINGLE_LABEL = "single_label_classification"


class Keys:
    """The values of a config.json; each value is checked when it is read.

    `aliases` maps other names of a key to the key; as in transformers, an alias in the file
    overrides the key. `read` collects the keys that were read. All methods raise ModelError, which
    names the key, its value and the supported values.
    """

    def __init__(self, values: Mapping[str, Any], name: str = "config.json"):
        self.values, self.name = values, name
        self.aliases: Mapping[str, str] = {}
        self.read: set[str] = set()

    def name_in_file(self, key: str) -> str:
        """Return the alias of the key that the file has, or the key itself; mark both as read."""
        names = [alias for alias, name in self.aliases.items() if name == key]
        self.read.update(names, (key,))
        return next((name for name in names if name in self.values), key)

    def value(self, key: str, default: Any = None) -> Any:
        """Return a value of any type, unchecked."""
        return self.values.get(self.name_in_file(key), default)

    def get(self, key: str, default: T) -> T:
        """Return a value of the type of `default`, which is the default of transformers."""
        value = self.value(key, default)
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise self.unsupported(key, value, f"a value of type {type(default).__name__}")
        limit = sys.float_info.max if isinstance(default, float) else INT_LIMIT
        if not isinstance(value, str) and not abs(value) < limit:
            raise self.unsupported(key, value, f"finite numbers below {limit:,}")
        return type(default)(value)

    def optional(self, key: str, kind: type[T]) -> T | None:
        """Return a value of type `kind`, or None where the key is missing or null."""
        return None if self.value(key) is None else self.get(key, kind())

    def required(self, key: str, kind: type[T]) -> T:
        """Return a value of type `kind`; raise ModelError if the file lacks the key."""
        if self.name_in_file(key) not in self.values:
            raise ModelError(f'{self.name} has no "{key}": add this key, or fetch the file again')
        return self.get(key, kind())

    def only(self, key: str, *supported: Any) -> None:
        """Raise ModelError for other values than `supported`; the first of these is the default."""
        value = self.value(key, supported[0])
        if value not in supported:
            raise self.unsupported(key, value, " or ".join(map(repr, supported)))

    def same(self, key: str, other: str, default: T) -> T:
        """Return the value of two keys; raise ModelError if the two values differ."""
        one, two = self.get(key, default), self.get(other, default)
        if one != two:
            raise self.unsupported(key, one, f'{two!r}, as in "{self.name_in_file(other)}"')
        return one

    def outputs(self) -> int:
        """Return the number of classes: the length of "id2label", or "num_labels", or 2."""
        labels, outputs = self.value("id2label"), self.optional("num_labels", int)
        named = len(labels) if isinstance(labels, dict) else outputs
        if outputs not in (None, named):  # Versions of transformers differ in which key wins.
            raise self.unsupported("num_labels", outputs, f'{named}, as in "id2label"')
        outputs = 2 if named is None else named
        self.only("problem_type", None, SINGLE_LABEL if outputs > 1 else "regression")
        return outputs

    def activation(self, key: str, default: str) -> Any:
        """Return our name of an activation."""
        value = self.get(key, default)
        if value not in ACTIVATIONS:
            raise self.unsupported(key, value, ", ".join(ACTIVATIONS))
        return ACTIVATIONS[value]

    def unsupported(self, key: str, value: Any, supported: str) -> ModelError:
        """Return the error for a value that is not supported."""
        return ModelError(
            f'{self.name} has "{self.name_in_file(key)}": {_short(value)}, '
            f"but heedful supports only {supported}: use a model with a supported value"
        )

    def refuse_others(self, ignored: Set[str], fixed: Mapping[str, Any]) -> None:
        """Raise ModelError for keys that were not read and may change the model.

        Accepted are keys in `ignored`, keys in `fixed` with the value in `fixed`, ids of special
        tokens, and keys with a null value.
        """
        for key, value in self.values.items():
            if key in self.read or key in ignored or key.endswith("_token_id") or value is None:
                continue
            if key not in fixed:
                raise ModelError(
                    f'{self.name} has "{key}": {_short(value)}, an unknown key: delete the key '
                    "from the file if it does not change the model"
                )
            self.only(key, fixed[key])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
