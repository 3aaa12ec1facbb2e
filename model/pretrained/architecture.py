"""What is known of an architecture of Hugging Face's transformers."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from heedful.model.config import Architecture, ModelConfig, ModelError, require
from heedful.model.pretrained.idle import FIXED, GENERATION, IDLE

T = TypeVar("T", int, float, bool, str)

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""Their names to ours."""
ACTIVATION_NAMES = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}
"""Ours to theirs."""
LIMIT = 2**31
SINGLE = "single_label_classification"


WRAPPERS = r"^(module\.)+|(?<![^.])_orig_mod\."
"""Prefixes that torch's DataParallel and torch.compile put before the names of tensors."""


class Keys:
    """The values of a config.json, each checked when it is asked for.

    What is asked raises ModelError with the key, its value and what is supported. `aliases` are
    further names of keys, and win over them as in transformers.
    """

    def __init__(self, values: Mapping[str, Any], name: str = "config.json"):
        self.values, self.name = values, name
        self.aliases: Mapping[str, str] = {}
        self.asked: set[str] = set()

    def key(self, key: str) -> str:
        """The name under which the file has this key."""
        names = [alias for alias, name in self.aliases.items() if name == key]
        self.asked.update(names, (key,))
        return next((name for name in names if name in self.values), key)

    def value(self, key: str, default: Any = None) -> Any:
        """A value as it stands in the file."""
        return self.values.get(self.key(key), default)

    def get(self, key: str, default: T) -> T:
        """A value of the type of its default, which is transformers' own."""
        value = self.value(key, default)
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise self.unsupported(key, value, f"a value of type {type(default).__name__}")
        limit = sys.float_info.max if isinstance(default, float) else LIMIT
        if not isinstance(value, str) and not abs(value) < limit:
            raise self.unsupported(key, value, f"finite numbers below {limit:,}")
        return type(default)(value)

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The same where null, or no such key, means that the value follows from others."""
        return None if self.value(key) is None else self.get(key, kind())

    def required(self, key: str, kind: type[T]) -> T:
        """The same where there is no default."""
        if self.key(key) not in self.values:
            raise ModelError(f'{self.name} has no "{key}"')
        return self.get(key, kind())

    def only(self, key: str, *supported: Any) -> None:
        """Refuses all but these values; the first is the default."""
        value = self.value(key, supported[0])
        if value not in supported:
            raise self.unsupported(key, value, " or ".join(map(repr, supported)))

    def same(self, key: str, other: str, default: T) -> T:
        """The value of two keys, refused where they differ."""
        one, two = self.get(key, default), self.get(other, default)
        if one != two:
            raise self.unsupported(key, one, f'{two!r}, as in "{self.key(other)}"')
        return one

    def outputs(self) -> int:
        """Classes of a classifier, by their names or by their number."""
        labels, outputs = self.value("id2label"), self.optional("num_labels", int)
        named = len(labels) if isinstance(labels, dict) else outputs
        if outputs not in (None, named):  # versions of transformers differ in what they take
            raise self.unsupported("num_labels", outputs, f'{named}, as in "id2label"')
        outputs = 2 if named is None else named
        self.only("problem_type", None, SINGLE if outputs > 1 else "regression")
        return outputs

    def activation(self, key: str, default: str) -> Any:
        value = self.get(key, default)
        if value not in ACTIVATIONS:
            raise self.unsupported(key, value, ", ".join(ACTIVATIONS))
        return ACTIVATIONS[value]

    def unsupported(self, key: str, value: Any, supported: str) -> ModelError:
        key, supported = self.key(key), f"supported is only {supported}"
        return ModelError(f'{self.name} has "{key}": {_short(value)}, but {supported}')

    def refuse_others(self, idle: Set[str], fixed: Mapping[str, Any]) -> None:
        """Refuses keys that were not asked for, may change the model, and are not null.

        `idle` keys change nothing, `fixed` ones nothing at these values.
        """
        for key, value in self.values.items():
            if key in self.asked or key in idle or key.endswith("_token_id") or value is None:
                continue
            if key not in fixed:
                raise ModelError(
                    f'{self.name} has "{key}": {_short(value)}, which is not known here: take it '
                    "out of the file if it changes nothing of the model"
                )
            self.only(key, fixed[key])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """One architecture: its config.json in and out, and where its tensors go."""

    model_type: str
    architecture: Architecture
    """Which of ours it is."""
    classes: tuple[str, ...]
    """Class names in config.json that can be read."""
    from_hf: Callable[[Keys, str, Set[str]], ModelConfig]
    """Config of these values, for this class and a file with tensors of these names."""
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    """Values for a config; what they cannot say comes back different from `from_hf`."""
    table: Callable[[ModelConfig], dict[str, str]]
    """Path of a module (or of a parameter) in our tree to that of theirs; {} is the layer.

    Modules of one name there share a tensor, one after the other in the order of the table.
    """
    body: str = ""
    """Prefix of all but the head, which files of the bare body lack."""
    body_modules: tuple[str, ...] = ()
    """What may follow that prefix."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names of its keys, the attribute_map of its config there."""
    idle: frozenset[str] = frozenset()
    """Keys of its files that change no output, beside those of all architectures."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """The keys of our fields, for errors."""
    bare: tuple[str, ...] = ()
    """Classes that are written without the prefix."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Rows at the beginning of their tensor that nothing looks up, by the path of ours."""
    conv1d: bool = False
    """Whether the matrices of blocks are [in, out], as ours; torch's Linear has [out, in]."""
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensors that files may have under further names."""
    ties_output: bool = True
    """Whether the output projection is the embedding where config.json does not say."""
    buffers: Mapping[str, Callable[[np.ndarray, ModelConfig], bool]] = field(default_factory=dict)
    """Tensors of a file that are no parameters: a regular expression of their names, and whether
    values are those that a model of this config computes with."""
    heads: str = r"(?!)"
    """Regular expression of tensors below the prefix that belong to other heads, or to nothing."""
    special: tuple[str, ...] = ()
    """Ids of special tokens that its config.json has, null where there is none."""
    required: tuple[str, ...] = ()
    """Those that it cannot do without."""
    fixed: Mapping[str, int] = field(default_factory=dict)
    """Those that can be nothing else."""

    def config(self, keys: Keys, name: str, names: Set[str]) -> ModelConfig:
        """Our config by `from_hf`, with every key read or known not to matter.

        Raises ModelError that names the file and its keys.
        """
        keys.aliases = self.aliases
        try:
            config = self.from_hf(keys, name, names)
        except ModelError as error:
            raise self._of_file(error, keys) from error
        keys.refuse_others(IDLE | GENERATION | self.idle, FIXED)
        return config

    def _of_file(self, error: ModelError, keys: Keys) -> ModelError:
        """An error of our fields as one of theirs; its advice is for those who write the config."""
        message = str(error)
        if keys.name in message:
            return error
        message = message.partition(": ")[0]
        for ours in sorted(self.fields, key=len, reverse=True):
            theirs = f'"{keys.key(self.fields[ours])}"'
            message = re.sub(rf"\b(model\.)?{re.escape(ours)}\b", theirs, message)
        return ModelError(f"{keys.name}: {message}")

    def canonical(self, name: str) -> str:
        """Name of a tensor as the table has it: with the prefix, and as torch calls norms."""
        name = re.sub(WRAPPERS, "", name)
        if name.split(".")[0] in self.body_modules:
            name = self.body + name
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )

    def is_needed(self, name: str, placed: Set[str]) -> bool:
        """Tell if the model computes another function without a tensor that has no place in it.

        That is one of the body, or one beside or below those of its head.
        """
        if re.fullmatch(self.heads, name):
            return False
        is_body = self.body or name.split(".")[0] in self.body_modules
        modules = {other.rpartition(".")[0] for other in placed} - {""}
        return (bool(is_body) and name.startswith(self.body)) or any(
            name.startswith(module + ".") for module in modules
        )


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model that was trained before.

    `params` is the tree of `config`, float32. Where the file holds no more than a body (BertModel,
    LlamaModel), `config.head` is a classifier with `outputs` None, and `params` lack its classes.
    """

    config: ModelConfig
    params: dict[str, Any]
    architecture: str
    """Name of its class in transformers."""
    unused: list[str] = field(default_factory=list)
    """Tensors of the file that this model has no place for, such as those of another head."""
    special: dict[str, int | list[int]] = field(default_factory=dict)
    """Ids of special tokens, named as in config.json: eos_token_id, ..."""
    labels: list[str] = field(default_factory=list)
    """Names of the classes, if they have any."""


def is_close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Tell if values are the expected ones, as far as their type and angles in float32 show it."""
    if found.shape != expected.shape or not jnp.issubdtype(found.dtype, jnp.floating):
        return False
    eps = max(1e-4, float(jnp.finfo(found.dtype).eps))
    return np.allclose(found.astype(np.float32), expected, rtol=eps, atol=eps)


def is_range(found: np.ndarray, config: ModelConfig) -> bool:
    """Tell if values count from 0."""
    return np.array_equal(found.ravel(), np.arange(found.size))


def vocab_size(config: ModelConfig) -> int:
    require(config.vocab_size is not None, "model.vocab_size is not set: give the tokenizer's")
    return config.vocab_size or 0


def made_up_labels(outputs: int) -> list[str]:
    """Names of classes that have none."""
    return [f"LABEL_{i}" for i in range(outputs)]


def label_values(labels: Sequence[str]) -> dict[str, Any]:
    """The values of a config.json that name the classes, and say how many there are."""
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
