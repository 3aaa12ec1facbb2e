"""The description of a family of checkpoints of Hugging Face's transformers."""

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from heedful.model.config import Architecture, ModelConfig, ModelError, require
from heedful.model.pretrained.generation_keys import GENERATION_KEYS
from heedful.model.pretrained.ignored_keys import FIXED, IGNORED
from heedful.model.pretrained.keys import Keys

WRAPPERS = r"^(module\.)+|(?<![^.])_orig_mod\."
"""Prefixes that torch's DataParallel and torch.compile put before the names of tensors."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of checkpoints: conversion of its config.json, and names of its tensors."""

    model_type: str
    architecture: Architecture
    """Our architecture for models of this family."""
    classes: tuple[str, ...]
    """Names of classes in config.json that can be read."""
    from_hf: Callable[[Keys, str, Set[str]], ModelConfig]
    """Converts (values of config.json, name of the class, names of the tensors) to a config."""
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    """Converts a config to values of config.json. If the values cannot express a field, `from_hf`
    of these values returns a different config."""
    table: Callable[[ModelConfig], dict[str, str]]
    """Returns {path of our module or parameter: its name in the file}; {} stands for the layer.

    Modules with the same name are concatenated in one tensor, in the order of the table.
    """
    body_prefix: str = ""
    """Prefix of the names of all tensors outside of the head; files without a head lack the
    prefix."""
    body_modules: tuple[str, ...] = ()
    """Names of the modules directly below `body_prefix`."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """{other name of a key: key}, the attribute_map of the config class in transformers."""
    ignored_keys: frozenset[str] = frozenset()
    """Keys of this family that do not change the model, in addition to those of all families."""
    keys_of_fields: Mapping[str, str] = field(default_factory=dict)
    """The key in config.json for each of our fields; errors name the key."""
    unprefixed: tuple[str, ...] = ()
    """Classes whose files are written without `body_prefix`."""
    skipped_rows: Mapping[str, int] = field(default_factory=dict)
    """{our path: number of first rows of the tensor in the file that are never looked up}."""
    scale_offset: float = 0.0
    """Number that is added to the scales of norms in the file: Gemma stores scale - 1."""
    conv1d: bool = False
    """True: matrices of blocks are stored as [in, out]; torch's Linear stores [out, in]."""
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """{name of a tensor: other names under which a file may hold the tensor}."""
    ties_output: bool = True
    """True: the output projection is the embedding, unless config.json says otherwise."""
    buffers: Mapping[str, Callable[[np.ndarray, ModelConfig], bool]] = field(default_factory=dict)
    """Tensors that are not parameters: {regular expression of their names: function that returns
    True if the values are those with which a model of the config computes}."""
    unused: str = r"(?!)"
    """Regular expression of names of tensors that a file may have and our model does not use; the
    default matches no name."""
    special_ids: tuple[str, ...] = ()
    """Keys of ids of special tokens in config.json; null if the tokenizer has no such token."""
    required_ids: tuple[str, ...] = ()
    """Keys of ids of special tokens that must not be null."""
    fixed_ids: Mapping[str, int] = field(default_factory=dict)
    """{key: id} for special tokens whose id is the same in all models of the family."""

    def config(self, keys: Keys, name: str, names: Set[str]) -> ModelConfig:
        """Return our config for class `name` and a file with tensors of these `names`.

        Raises ModelError, which names the file and the key, for a value that is not supported, and
        for a key that is not read and not known to be irrelevant.
        """
        keys.aliases = self.aliases
        try:
            config = self.from_hf(keys, name, names)
        except ModelError as error:
            raise self._about_file(error, keys) from error
        keys.refuse_others(IGNORED | GENERATION_KEYS | self.ignored_keys, FIXED)
        return config

    def _about_file(self, error: ModelError, keys: Keys) -> ModelError:
        """Return the error about our fields as an error about the keys of the file.

        The fix after the colon is dropped, because it is for our config and not for the file.
        """
        message = str(error)
        if keys.name in message:
            return error
        message = message.partition(": ")[0]
        for name in sorted(self.keys_of_fields, key=len, reverse=True):
            key = f'"{keys.name_in_file(self.keys_of_fields[name])}"'
            message = re.sub(rf"\b(model\.)?{re.escape(name)}\b", key, message)
        return ModelError(f"{keys.name}: {message}; correct the file, or fetch it again")

    def canonical(self, name: str) -> str:
        """Return the name of a tensor in the table: with `body_prefix`, and with torch's names."""
        name = re.sub(WRAPPERS, "", name)
        if name.split(".")[0] in self.body_modules:
            name = self.body_prefix + name
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )

    def is_needed(self, name: str, mapped: Set[str]) -> bool:
        """Return True if leaving out a tensor, which the table lacks, would change the outputs.

        Such a tensor belongs to the body, or to a module that has a tensor in `mapped`.
        """
        if re.fullmatch(self.unused, name):
            return False
        is_body = self.body_prefix or name.split(".")[0] in self.body_modules
        modules = {tensor.rpartition(".")[0] for tensor in mapped} - {""}
        return (bool(is_body) and name.startswith(self.body_prefix)) or any(
            name.startswith(module + ".") for module in modules
        )


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A pretrained model.

    `params` is the float32 parameter tree of `config`. A file without a head (BertModel,
    LlamaModel) gives a `config.head` of kind classifier with `outputs` None, and `params` without
    the output layer of the classes.
    """

    config: ModelConfig
    params: dict[str, Any]
    architecture: str
    """Name of the class of the model in transformers."""
    model_type: str = ""
    """Name of the family in transformers."""
    unused: list[str] = field(default_factory=list)
    """Tensors of the file that the model does not use, such as those of another head."""
    special: dict[str, int | list[int]] = field(default_factory=dict)
    """Ids of special tokens, named as in config.json: eos_token_id, ..."""
    labels: list[str] = field(default_factory=list)
    """Names of the classes; empty if the file names no classes."""


def is_close(values: np.ndarray, expected: np.ndarray) -> bool:
    """Return True if floating-point values equal `expected` within the precision of their type.

    The tolerance is at least 1e-4, for angles that were computed in float32.
    """
    if values.shape != expected.shape or not jnp.issubdtype(values.dtype, jnp.floating):
        return False
    eps = max(1e-4, float(jnp.finfo(values.dtype).eps))
    return np.allclose(values.astype(np.float32), expected, rtol=eps, atol=eps)


def is_range(values: np.ndarray, config: ModelConfig) -> bool:
    """Return True if the values are 0, 1, 2, ..."""
    return np.array_equal(values.ravel(), np.arange(values.size))


def vocab_size(config: ModelConfig) -> int:
    """Return `config.vocab_size`; raise ModelError if it is None."""
    require(
        config.vocab_size is not None,
        "model.vocab_size is not set: set it to the tokenizer's vocabulary size",
    )
    return config.vocab_size or 0


def default_labels(outputs: int) -> list[str]:
    """Return the names that transformers gives to classes without names."""
    return [f"LABEL_{i}" for i in range(outputs)]


def label_values(labels: Sequence[str]) -> dict[str, Any]:
    """Return the values of config.json that name the classes, and thereby give their number."""
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
