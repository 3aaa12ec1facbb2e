"""Our tree of parameters and the tensors of a file: which is where, and in which shape."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from heedful.model.config import ModelConfig, ModelError
from heedful.model.pretrained.architecture import HuggingFace
from heedful.model.transformer import build

SUFFIXES = {"kernel": "weight", "scale": "weight", "table": "weight", "bias": "bias"}

Shape = tuple[int, ...]


@cache
def shapes(config: ModelConfig) -> Mapping[str, Shape]:
    """Path and shape of each parameter; without the classes of a head whose number is not set."""
    is_body = config.head.kind == "classifier" and config.head.outputs is None
    if is_body:
        config = replace(config, head=replace(config.head, outputs=1))
    model, tokens = build(config), jnp.zeros((1, 1), jnp.int32)
    inputs = (tokens, tokens) if config.architecture == "encoder_decoder" else (tokens,)
    tree: Any = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    flat: dict[str, Any] = flatten_dict(tree, sep="/")
    is_there = lambda path: not (is_body and "/classes/" in path)  # noqa: E731
    return {path: leaf.shape for path, leaf in flat.items() if is_there(path)}


@dataclass(frozen=True, kw_only=True)
class TensorMapping:
    """A tensor of the file, or one for each layer, and the parameters that it holds."""

    name: str
    """With {} for the layer, where there is one for each."""
    paths: tuple[str, ...]
    parts: tuple[Shape, ...]
    """Shapes of the parameters in one layer, as matrices [in, out] or as vectors."""
    layers: int | None
    transposed: bool
    shape: Shape
    """Of the tensor in the file."""
    skipped: int = 0
    """Its first rows that are no parameters."""

    def names(self) -> Iterator[tuple[str, Any]]:
        """Each tensor's name and the index of its layer in our arrays."""
        if self.layers is None:
            yield self.name, ...
        else:
            yield from ((self.name.format(i), i) for i in range(self.layers))


def places(kind: HuggingFace, config: ModelConfig) -> list[TensorMapping]:
    """Where the parameters of a model of this config stand, in the order of the table.

    Raises ModelError for a parameter that has no place.
    """
    ours = shapes(config)
    found = _find(kind, config, ours)
    homeless = set(ours).difference(*found.values())
    if homeless:
        raise ModelError(f"{kind.model_type} has no place for {min(homeless)}")
    return [_place(kind, name, paths, ours) for name, paths in found.items()]


def tensor_names(kind: HuggingFace, config: ModelConfig) -> set[str]:
    """Names of the tensors of such a model, as far as it has a place for its parameters."""
    return set(_find(kind, config, shapes(config)))


def _find(kind: HuggingFace, config: ModelConfig, ours: Iterable[str]) -> dict[str, list[str]]:
    """The parameters that each tensor holds, by its name in the table."""
    found: dict[str, list[str]] = {}
    for module, target in kind.table(config).items():
        for path in ours:
            parent, _, leaf = path.rpartition("/")
            if path == module:
                found.setdefault(target, []).append(path)
            elif parent == module:
                found.setdefault(f"{target}.{SUFFIXES[leaf]}", []).append(path)
    return found


def _place(
    kind: HuggingFace, name: str, paths: list[str], ours: Mapping[str, Shape]
) -> TensorMapping:
    is_stacked = "/blocks/" in paths[0]
    one = [ours[path][1:] if is_stacked else ours[path] for path in paths]
    is_matrix = paths[0].endswith("/kernel")
    if is_matrix:
        inputs = 2 if paths[0].endswith("/out/kernel") else 1  # heads and their size come in
        one = [(math.prod(s[:inputs]), math.prod(s[inputs:])) for s in one]
    elif paths[0].endswith(("/scale", "/bias")):
        one = [(math.prod(s),) for s in one]
    skipped = kind.skipped.get(paths[0], 0)
    shape = (*one[0][:-1], sum(part[-1] for part in one))
    shape = (skipped + shape[0], *shape[1:])
    transposed = is_matrix and not (kind.conv1d and is_stacked)
    return TensorMapping(
        name=name,
        paths=tuple(paths),
        parts=tuple(one),
        layers=ours[paths[0]][0] if is_stacked else None,
        transposed=transposed,
        shape=(1, *shape) if name == "final_logits_bias" else shape[:: -1 if transposed else 1],
        skipped=skipped,
    )


def to_params(
    found: list[TensorMapping], ours: Mapping[str, Shape], read: Callable[[str], np.ndarray]
) -> dict[str, Any]:
    """The tree of parameters, out of tensors that `read(name)` gives one by one."""
    params = {path: np.empty(shape, np.float32) for path, shape in ours.items()}
    for place in found:
        ends = np.cumsum([part[-1] for part in place.parts])[:-1]
        for name, layer in place.names():
            tensor = read(name)
            tensor = (tensor.T if place.transposed else tensor)[place.skipped :]
            for path, part in zip(place.paths, np.split(tensor, ends, axis=-1), strict=True):
                params[path][layer] = part.reshape(params[path][layer].shape)
    return unflatten_dict(params, sep="/")


def to_tensor(place: TensorMapping, layer: Any, params: dict[str, np.ndarray]) -> np.ndarray:
    """One tensor of the file, out of our parameters by path."""
    parts = [
        np.asarray(params[path][layer], np.float32).reshape(part)
        for path, part in zip(place.paths, place.parts, strict=True)
    ]
    tensor = np.concatenate(parts, axis=-1)
    if place.skipped:
        tensor = np.pad(tensor, ((place.skipped, 0), (0, 0)))
    tensor = tensor.T if place.transposed else tensor
    return np.ascontiguousarray(tensor).reshape(place.shape)


def flat(config: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Parameters by path; raises ModelError where they are not those of this config."""
    found = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    wanted = shapes(config)
    for path in sorted(found.keys() | wanted.keys()):
        if path not in found or path not in wanted:
            has, has_not = ("config", "parameters") if path in wanted else ("parameters", "config")
            raise ModelError(f"the {has} have {path}, the {has_not} do not")
        if found[path].shape != wanted[path]:
            raise ModelError(
                f"{path} has shape {found[path].shape}, but the config asks for {wanted[path]}"
            )
    return found
