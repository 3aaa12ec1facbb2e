"""Weights in and out: safetensors and config.json as Hugging Face's transformers has them.

BERT, Longformer, GPT-2, LLaMA, T5 and Marian; numpy on the host, float32. Errors are ModelError.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.config import ModelConfig, ModelError, require
from model.pretrained.architecture import (
    HuggingFace,
    Keys,
    Pretrained,
    label_values,
    made_up_labels,
)
from model.pretrained.config import architecture_of, config_from_hf, config_to_hf
from model.pretrained.layout import flat, places, shapes, to_params, to_tensor
from model.pretrained.llama2c import read_llama2c
from model.pretrained.lora import merge_lora
from model.pretrained.tensors import CONFIG, Tensors, read_json, save

__all__ = [
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
    return _Source(directory).read()


def read_config(directory: Path) -> ModelConfig:
    """Its config alone; of the tensors only names are read, and what may be tied."""
    return _Source(directory).config


class _Source:
    """A directory with a model, whose tensors are known by the names of the table."""

    def __init__(self, directory: Path):
        path = directory / CONFIG
        self.keys = Keys(read_json(path), str(path))
        self.kind, self.architecture = architecture_of(self.keys)
        self.tensors = Tensors(directory)
        self.actual = {self.kind.canonical(name): name for name in self.tensors.names}
        self._untie()
        self.config = self.kind.from_hf(self.keys, self.architecture, self.actual.keys())

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

    def read(self) -> Pretrained:
        found, ours = places(self.kind, self.config), shapes(self.config)
        left = dict(self.actual)

        def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
            if name not in left:
                raise ModelError(f"{self.tensors.source} has no tensor {name}")
            return self.tensors.read(left.pop(name), shape)

        params = to_params(found, ours, tensor)
        for name, other in self._ties():
            require(
                other not in left,
                f"{self.tensors.source}: {other} differs from {name}, "
                "but one matrix for both is all that is supported",
            )
        buffers = re.compile(self.kind.buffers)
        return Pretrained(
            config=self.config,
            params=params,
            architecture=self.architecture,
            unused=sorted(left[name] for name in left if not buffers.fullmatch(name)),
            special=_special(self.keys),
            labels=_labels(self.keys, self.config),
        )


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
