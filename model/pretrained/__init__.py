"""Weights in and out: safetensors and config.json as Hugging Face's transformers has them.

BERT, Longformer, GPT-2, LLaMA, T5 and Marian; numpy on the host, float32. Errors are ModelError.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heedful.model.config import ModelConfig, ModelError, require
from heedful.model.pretrained.architecture import (
    WRAPPERS,
    HuggingFace,
    Keys,
    Pretrained,
    label_values,
    made_up_labels,
)
from heedful.model.pretrained.config import architecture_of, config_from_hf, config_to_hf
from heedful.model.pretrained.layout import flat, places, shapes, to_params, to_tensor
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
    """The model in a directory with config.json and safetensors."""
    return ModelDirectory(directory).read()


def read_config(directory: Path) -> ModelConfig:
    """Its config alone; of the tensors only names are read, and what may be tied."""
    return ModelDirectory(directory).config


class ModelDirectory:
    """A directory with a model, whose tensors are known by the names of the table.

    Raises ModelError for tensors without a place that the model would compute with.
    """

    def __init__(self, directory: Path):
        path = directory / CONFIG
        self.keys = Keys(read_json(path), str(path))
        self.kind, self.architecture = architecture_of(self.keys)
        self.tensors = Tensors(directory)
        self.actual: dict[str, str] = {}
        for name in sorted(self.tensors.names):
            other = self.actual.setdefault(self.kind.canonical(name), name)
            require(
                other == name,
                f"{self.tensors.source} has {other} and {name}, which are one tensor of "
                f"{self.kind.model_type}: take one of them out",
            )
        self._untie()
        self.config = self.kind.config(self.keys, self.architecture, self.actual.keys())
        self.places = places(self.kind, self.config)
        self._check_shapes()
        self._sort_rest()

    def _untie(self) -> None:
        """Leaves one name to tensors that are in the file under several."""
        for name, other in self._ties():
            if other in self.actual and name not in self.actual:
                self.actual[name] = self.actual.pop(other)
            elif other in self.actual and self._bits(name) == self._bits(other):
                del self.actual[other]

    def _ties(self) -> Iterator[tuple[str, str]]:
        ties_output = self.keys.get("tie_word_embeddings", self.kind.ties_output)
        for name, others in self.kind.tied.items():
            yield from ((name, o) for o in others if ties_output or o != "lm_head.weight")

    def _bits(self, name: str) -> bytes:
        return self.tensors.read(self.actual[name]).tobytes()

    def _check_shapes(self) -> None:
        """Compares what config.json asks for with the file, before any memory is taken for it."""
        for place in self.places:
            for name, _ in place.names():
                if name not in self.actual:
                    raise ModelError(f"{self.tensors.source} has no tensor {name}")
                self.tensors.check(self.actual[name], place.shape)

    def _sort_rest(self) -> None:
        """Sort tensors without a place: buffers, to be compared, and those that may be left out."""
        placed = {name for place in self.places for name, _ in place.names()}
        rest = self.actual.keys() - placed
        for name, other in self._ties():
            require(
                other not in rest,
                f"{self.tensors.source}: {other} differs from {name}, "
                "but one matrix for both is all that is supported",
            )
        if self.config.head.kind == "language_model":
            placed.update(*self.kind.tied.values())
        checks = {name: self._check(name) for name in rest}
        self.buffers = {name: check for name, check in checks.items() if check}
        rest -= self.buffers.keys()
        needed = [self.actual[name] for name in rest if self.kind.is_needed(name, placed)]
        if needed:
            raise ModelError(
                f"{self.tensors.source} has {_some(needed)}, for which a {self.architecture} with "
                f"this {CONFIG} has no place: give the {CONFIG} that these weights were saved with"
            )
        self.unused = sorted(self.actual[name] for name in rest)

    def _check(self, name: str) -> Callable[[np.ndarray, ModelConfig], bool] | None:
        found = (c for pattern, c in self.kind.buffers.items() if re.fullmatch(pattern, name))
        return next(found, None)

    @property
    def notes(self) -> list[str]:
        """Lines that a user should read about the files."""
        wrapped = {m[0] for name in self.tensors.names for m in re.finditer(WRAPPERS, name)}
        notes = [f"{prefix} taken off names of tensors" for prefix in sorted(wrapped)]
        if self.unused:
            notes.append(f"left out, as it is no part of the model: {_some(self.unused)}")
        return notes

    def read(self) -> Pretrained:
        tensor = lambda name: self.tensors.read(self.actual[name])  # noqa: E731
        params = to_params(self.places, shapes(self.config), tensor)
        for name, is_right in self.buffers.items():
            require(
                is_right(self.tensors.raw(self.actual[name]), self.config),
                f"{self.tensors.source}: {self.actual[name]} is not what this {CONFIG} makes "
                f"of it: give the {CONFIG} of these weights, or take the tensor out",
            )
        return Pretrained(
            config=self.config,
            params=params,
            architecture=self.architecture,
            unused=self.unused,
            special=_special(self.keys),
            labels=_labels(self.keys, self.config),
        )


def _some(names: Iterable[str], most: int = 5) -> str:
    """The first names in the order of the alphabet, and how many more there are."""
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
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the model as transformers' from_pretrained reads it.

    `special` has ids of special tokens by their names in config.json (eos_token_id, ...), `labels`
    a name for each class. Raises ModelError for a model that no known architecture expresses,
    naming the first field that does not fit, and for a directory that holds another export.
    """
    values = config_to_hf(config)
    kind, name = architecture_of(Keys(values))
    values |= _special_values(kind, config, special) | _label_values(config, labels)
    by_path, sizes, made = flat(config, params), {}, {}
    prefix = kind.body if name in kind.bare else ""
    for place in places(kind, config):
        for full, layer in place.names():
            short = full.removeprefix(prefix)
            made[short] = place, layer
            sizes[short] = 4 * int(np.prod(place.shape))

    def make(name: str) -> np.ndarray:
        place, layer = made[name]
        return to_tensor(place, layer, by_path)

    save(directory, values, sizes, make, max_shard_bytes)


def _special(keys: Keys) -> dict[str, Any]:
    return {k: v for k, v in keys.values.items() if k.endswith("_token_id") and v is not None}


def _special_values(kind: HuggingFace, config: ModelConfig, special: Special) -> dict[str, Any]:
    for key, value in special.items():
        require(key.endswith("_token_id"), f"special has {key!r}: name it as eos_token_id")
        for one in value if isinstance(value, list) else [value]:
            require(
                0 <= one < (config.vocab_size or 0),
                f"special has {key} = {one}, but model.vocab_size is {config.vocab_size}",
            )
    for key in kind.required:
        require(key in special, f"special has no {key}, which {kind.model_type} needs")
    for key, value in kind.fixed.items():
        require(
            special.get(key, value) == value,
            f"special has {key} = {special.get(key)}, but in {kind.model_type} it is {value}: "
            "use a tokenizer that has it there",
        )
    return dict.fromkeys(kind.special) | dict(special)


def _labels(keys: Keys, config: ModelConfig) -> list[str]:
    """Names of the classes, unless they are those that transformers makes up."""
    names, ids = keys.values.get("id2label"), [str(i) for i in range(_outputs(config))]
    if not ids or names is None:
        return []
    if not isinstance(names, dict) or set(names) != set(ids):
        raise keys.unsupported("id2label", names, f"an object with keys 0 to {len(ids) - 1}")
    labels = [str(names[i]) for i in ids]
    return labels if labels != made_up_labels(len(ids)) else []


def _outputs(config: ModelConfig) -> int:
    return (config.head.outputs or 0) if config.head.kind == "classifier" else 0


def _label_values(config: ModelConfig, labels: Sequence[str]) -> dict[str, Any]:
    outputs = _outputs(config)
    require(
        len(labels) in (0, outputs), f"{len(labels)} labels, but the model has {outputs} classes"
    )
    require(len(set(labels)) == len(labels), f"labels name a class twice: {', '.join(labels)}")
    return label_values(labels) if labels else {}
