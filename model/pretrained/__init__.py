"""Read and write models in the files of Hugging Face's transformers.

The files are safetensors and config.json; FAMILIES has the families. Parameters are float32 numpy
arrays on the host. Errors are ModelError.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heedful.model.config import ModelConfig, ModelError, require
from heedful.model.pretrained.config import config_from_hf, config_to_hf, family_of
from heedful.model.pretrained.family import (
    WRAPPERS,
    Family,
    Pretrained,
    default_labels,
    label_values,
)
from heedful.model.pretrained.keys import Keys
from heedful.model.pretrained.layout import flat, shapes, tensor_mappings, to_params, to_tensor
from heedful.model.pretrained.llama2c import read_llama2c
from heedful.model.pretrained.lora import merge_lora
from heedful.model.pretrained.tensors import CONFIG, Tensors, read_json, save

__all__ = [
    "ModelDirectory",
    "Pretrained",
    "config_from_hf",
    "config_to_hf",
    "merge_lora",
    "read",
    "read_config",
    "read_llama2c",
    "write",
]

Special = Mapping[str, int | list[int]]


def read(directory: Path) -> Pretrained:
    """Read the model in a directory with config.json and safetensors; raise ModelError."""
    return ModelDirectory(directory).read()


def read_config(directory: Path) -> ModelConfig:
    """Read only the config of a model; check names and shapes of its tensors, and tied tensors."""
    return ModelDirectory(directory).config


class ModelDirectory:
    """A directory with config.json and safetensors of one model.

    `file_names` maps the names in the family's table to the names in the file. Raises ModelError
    for a config that is not supported, for a missing tensor, and for a tensor that would change the
    outputs but is not in the family's table.
    """

    def __init__(self, directory: Path):
        path = directory / CONFIG
        self.keys = Keys(read_json(path), str(path))
        self.family, self.architecture = family_of(self.keys)
        self.tensors = Tensors(directory)
        self.file_names: dict[str, str] = {}
        for name in sorted(self.tensors.names):
            first = self.file_names.setdefault(self.family.canonical(name), name)
            require(
                first == name,
                f"{self.tensors.source} has {first} and {name}, which are two names of one tensor "
                f"of {self.family.model_type}: delete one of the two",
            )
        self._merge_ties()
        self.config = self.family.config(self.keys, self.architecture, self.file_names.keys())
        self.mappings = tensor_mappings(self.family, self.config)
        self._check_shapes()
        self._sort_unmapped()

    def _merge_ties(self) -> None:
        """Keep one name of each tensor that the file has several times with the same values."""
        for name, copy in self._ties():
            if copy in self.file_names and name not in self.file_names:
                self.file_names[name] = self.file_names.pop(copy)
            elif copy in self.file_names and self._bytes(name) == self._bytes(copy):
                del self.file_names[copy]

    def _ties(self) -> Iterator[tuple[str, str]]:
        """Yield (name, other name) for each other name of each tied tensor."""
        ties_output = self.keys.get("tie_word_embeddings", self.family.ties_output)
        for name, copies in self.family.tied.items():
            yield from ((name, c) for c in copies if ties_output or c != "lm_head.weight")

    def _bytes(self, name: str) -> bytes:
        return self.tensors.read(self.file_names[name]).tobytes()

    def _check_shapes(self) -> None:
        """Compare names and shapes with config.json before memory for the values is allocated."""
        for mapping in self.mappings:
            for name, _ in mapping.names():
                if name not in self.file_names:
                    raise ModelError(
                        f"{self.tensors.source} has no tensor {name}, which {CONFIG} asks for: use "
                        f"the {CONFIG} that these weights were saved with, or fetch the file again"
                    )
                self.tensors.check(self.file_names[name], mapping.shape)

    def _sort_unmapped(self) -> None:
        """Sort tensors that are not parameters into `buffers`, checked when read, and `unused`."""
        mapped = {name for mapping in self.mappings for name, _ in mapping.names()}
        unmapped = self.file_names.keys() - mapped
        for name, copy in self._ties():
            require(
                copy not in unmapped,
                f"{self.tensors.source}: {copy} differs from {name}, but heedful supports only one "
                "tensor for both: use a model in which the two are tied",
            )
        if self.config.head.kind == "language_model":
            mapped.update(*self.family.tied.values())
        checks = {name: self._buffer_check(name) for name in unmapped}
        self.buffers = {name: check for name, check in checks.items() if check}
        unmapped -= self.buffers.keys()
        needed = [self.file_names[n] for n in unmapped if self.family.is_needed(n, mapped)]
        if needed:
            raise ModelError(
                f"{self.tensors.source} has {_some(needed)}, for which a {self.architecture} with "
                f"this {CONFIG} has no place: use the {CONFIG} that these weights were saved with"
            )
        self.unused = sorted(self.file_names[name] for name in unmapped)

    def _buffer_check(self, name: str) -> Callable[[np.ndarray, ModelConfig], bool] | None:
        checks = self.family.buffers.items()
        return next((check for pattern, check in checks if re.fullmatch(pattern, name)), None)

    @property
    def notes(self) -> list[str]:
        """Lines for the user about renamed and unused tensors."""
        wrapped = {m[0] for name in self.tensors.names for m in re.finditer(WRAPPERS, name)}
        notes = [f"prefix {prefix} removed from names of tensors" for prefix in sorted(wrapped)]
        if self.unused:
            notes.append(f"left out, not part of the model: {_some(self.unused)}")
        return notes

    def read(self) -> Pretrained:
        """Read the parameters; raise ModelError for buffers with unexpected values."""
        tensor = lambda name: self.tensors.read(self.file_names[name])  # noqa: E731
        params = to_params(self.mappings, shapes(self.config), tensor)
        for name, is_expected in self.buffers.items():
            require(
                is_expected(self.tensors.raw(self.file_names[name]), self.config),
                f"{self.tensors.source}: {self.file_names[name]} does not have the values that "
                f"this {CONFIG} implies: use the {CONFIG} of these weights, or delete the tensor",
            )
        return Pretrained(
            config=self.config,
            params=params,
            architecture=self.architecture,
            model_type=self.family.model_type,
            unused=self.unused,
            special=_special(self.keys),
            labels=_labels(self.keys, self.config),
        )


def _some(names: Iterable[str], most: int = 5) -> str:
    """List the first `most` names in alphabetical order, and the number of further names."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def write(
    directory: Path,
    config: ModelConfig,
    params: Any,
    *,
    special: Special,
    labels: Sequence[str] = (),
    model_type: str = "",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json and safetensors, which transformers' from_pretrained reads.

    `params` is the parameter tree of `config`. `special` has the ids of special tokens, named as in
    config.json (eos_token_id, ...), `labels` the names of a classifier's classes. The family
    `model_type` is preferred to others that can express the config. Raises ModelError if no family
    can express it (the error names the field), if params, ids or labels do not fit the config, or
    if the directory holds another export.
    """
    values = config_to_hf(config, model_type)
    family, name = family_of(Keys(values))
    values |= _special_values(family, config, special) | _label_values(config, labels)
    by_path, sizes, origins = flat(config, params), {}, {}
    prefix = family.body_prefix if name in family.unprefixed else ""
    for mapping in tensor_mappings(family, config):
        for full, layer in mapping.names():
            short = full.removeprefix(prefix)
            origins[short] = mapping, layer
            sizes[short] = 4 * int(np.prod(mapping.shape))

    def make(name: str) -> np.ndarray:
        mapping, layer = origins[name]
        return to_tensor(mapping, layer, by_path)

    save(directory, values, sizes, make, max_shard_bytes)


def _special(keys: Keys) -> dict[str, Any]:
    return {k: v for k, v in keys.values.items() if k.endswith("_token_id") and v is not None}


def _special_values(family: Family, config: ModelConfig, special: Special) -> dict[str, Any]:
    for key, value in special.items():
        require(
            key.endswith("_token_id"),
            f"special has {key!r}: use a key of config.json, such as eos_token_id",
        )
        for one in value if isinstance(value, list) else [value]:
            require(
                0 <= one < (config.vocab_size or 0),
                f"special has {key} = {one}: give an id from 0 to {(config.vocab_size or 0) - 1} "
                f"(model.vocab_size = {config.vocab_size})",
            )
    for key in family.required_ids:
        require(
            key in special, f"special has no {key}, which {family.model_type} needs: add this id"
        )
    for key, value in family.fixed_ids.items():
        require(
            special.get(key, value) == value,
            f"special has {key} = {special.get(key)}, but in {family.model_type} it is {value}: "
            f"use a tokenizer whose {key} is {value}",
        )
    return dict.fromkeys(family.special_ids) | dict(special)


def _labels(keys: Keys, config: ModelConfig) -> list[str]:
    """Return the names of the classes; [] if there are only the default names of transformers."""
    names, ids = keys.values.get("id2label"), [str(i) for i in range(_outputs(config))]
    if not ids or names is None:
        return []
    if not isinstance(names, dict) or set(names) != set(ids):
        raise keys.unsupported("id2label", names, f"an object with keys 0 to {len(ids) - 1}")
    labels = [str(names[i]) for i in ids]
    return labels if labels != default_labels(len(ids)) else []


def _outputs(config: ModelConfig) -> int:
    return (config.head.outputs or 0) if config.head.kind == "classifier" else 0


def _label_values(config: ModelConfig, labels: Sequence[str]) -> dict[str, Any]:
    outputs = _outputs(config)
    require(
        len(labels) in (0, outputs),
        f"{len(labels)} labels, but the model has {outputs} classes: give one label per class",
    )
    require(
        len(set(labels)) == len(labels),
        f"labels name a class twice: {', '.join(labels)}; rename one",
    )
    return label_values(labels) if labels else {}
