"""Map our parameter tree to the tensors of a file: names, shapes, transposes, concatenations."""

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
from heedful.model.pretrained.family import Family
from heedful.model.transformer import build

SUFFIXES = {"kernel": "weight", "scale": "weight", "table": "weight", "bias": "bias"}

Shape = tuple[int, ...]


@cache
def shapes(config: ModelConfig) -> Mapping[str, Shape]:
    """Return {path: shape} of all parameters; without the classes if `outputs` is None."""
    is_body = config.head.kind == "classifier" and config.head.outputs is None
    if is_body:
        config = replace(config, head=replace(config.head, outputs=1))
    model, tokens = build(config), jnp.zeros((1, 1), jnp.int32)
    inputs = (tokens, tokens) if config.architecture == "encoder_decoder" else (tokens,)
    tree: Any = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    flat: dict[str, Any] = flatten_dict(tree, sep="/")
    is_left_out = lambda path: is_body and "/classes/" in path  # noqa: E731
    return {path: leaf.shape for path, leaf in flat.items() if not is_left_out(path)}


@dataclass(frozen=True, kw_only=True)
class TensorMapping:
    """A tensor of the file (or one per layer), and the parameters that it concatenates."""

    name: str
    """Name in the file; {} stands for the layer if there is one tensor per layer."""
    paths: tuple[str, ...]
    parts: tuple[Shape, ...]
    """Shape of each parameter in one layer, as a matrix [in, out] or as a vector."""
    layers: int | None
    """Number of layers, each with its own tensor; None for one tensor outside of the layers."""
    transposed: bool
    shape: Shape
    """Shape of the tensor in the file."""
    skipped_rows: int = 0
    """Number of first rows of the tensor that are not parameters."""
    offset: float = 0.0
    """Number that is added to the values in the file."""

    def names(self) -> Iterator[tuple[str, Any]]:
        """Yield the name of each tensor and its index on the layer axis of our arrays."""
        if self.layers is None:
            yield self.name, ...
        else:
            yield from ((self.name.format(i), i) for i in range(self.layers))


def tensor_mappings(family: Family, config: ModelConfig) -> list[TensorMapping]:
    """Return the tensors of all parameters of `config`, in the order of the family's table.

    Raises ModelError for a parameter that the table lacks.
    """
    expected = shapes(config)
    paths_by_name = _paths_by_name(family, config, expected)
    missing = set(expected).difference(*paths_by_name.values())
    if missing:
        raise ModelError(
            f"{family.model_type} has no tensor for the parameter {min(missing)}: use a config "
            "without this parameter"
        )
    return [_mapping(family, name, paths, expected) for name, paths in paths_by_name.items()]


def tensor_names(family: Family, config: ModelConfig) -> set[str]:
    """Return the names of a model's tensors; parameters that the table lacks are left out."""
    return set(_paths_by_name(family, config, shapes(config)))


def _paths_by_name(
    family: Family, config: ModelConfig, paths: Iterable[str]
) -> dict[str, list[str]]:
    """Return {name of a tensor: paths of the parameters in it}."""
    paths_by_name: dict[str, list[str]] = {}
    for module, name in family.table(config).items():
        for path in paths:
            parent, _, leaf = path.rpartition("/")
            if path == module:
                paths_by_name.setdefault(name, []).append(path)
            elif parent == module:
                paths_by_name.setdefault(f"{name}.{SUFFIXES[leaf]}", []).append(path)
    return paths_by_name


def _mapping(
    family: Family, name: str, paths: list[str], shapes: Mapping[str, Shape]
) -> TensorMapping:
    is_stacked = "/blocks/" in paths[0]
    parts = [shapes[path][1:] if is_stacked else shapes[path] for path in paths]
    is_matrix = paths[0].endswith("/kernel")
    if is_matrix:
        input_axes = 2 if paths[0].endswith("/out/kernel") else 1  # [heads, head_dim, width]
        parts = [(math.prod(s[:input_axes]), math.prod(s[input_axes:])) for s in parts]
    elif paths[0].endswith(("/scale", "/bias")):
        parts = [(math.prod(s),) for s in parts]
    skipped_rows = family.skipped_rows.get(paths[0], 0)
    shape = (*parts[0][:-1], sum(part[-1] for part in parts))
    shape = (skipped_rows + shape[0], *shape[1:])
    transposed = is_matrix and not (family.conv1d and is_stacked)
    return TensorMapping(
        name=name,
        paths=tuple(paths),
        parts=tuple(parts),
        layers=shapes[paths[0]][0] if is_stacked else None,
        transposed=transposed,
        shape=(1, *shape) if name == "final_logits_bias" else shape[:: -1 if transposed else 1],
        skipped_rows=skipped_rows,
        offset=family.scale_offset if paths[0].endswith("/scale") else 0.0,
    )


def to_params(
    mappings: list[TensorMapping], shapes: Mapping[str, Shape], read: Callable[[str], np.ndarray]
) -> dict[str, Any]:
    """Return the float32 parameter tree; `read(name)` returns one tensor of the file."""
    params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    for mapping in mappings:
        ends = np.cumsum([part[-1] for part in mapping.parts])[:-1]
        for name, layer in mapping.names():
            tensor = read(name) + np.float32(mapping.offset) if mapping.offset else read(name)
            tensor = (tensor.T if mapping.transposed else tensor)[mapping.skipped_rows :]
            for path, part in zip(mapping.paths, np.split(tensor, ends, axis=-1), strict=True):
                params[path][layer] = part.reshape(params[path][layer].shape)
    return unflatten_dict(params, sep="/")


def to_tensor(mapping: TensorMapping, layer: Any, params: dict[str, np.ndarray]) -> np.ndarray:
    """Return one float32 tensor of the file; `params` are our parameters by path."""
    parts = [
        np.asarray(params[path][layer], np.float32).reshape(part)
        for path, part in zip(mapping.paths, mapping.parts, strict=True)
    ]
    tensor = np.concatenate(parts, axis=-1)
    tensor = tensor - np.float32(mapping.offset) if mapping.offset else tensor
    if mapping.skipped_rows:
        tensor = np.pad(tensor, ((mapping.skipped_rows, 0), (0, 0)))
    tensor = tensor.T if mapping.transposed else tensor
    return np.ascontiguousarray(tensor).reshape(mapping.shape)


def flat(config: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Return {path: parameter}.

    Raises ModelError if a path or a shape does not fit the config.
    """
    by_path = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    expected = shapes(config)
    for path in sorted(by_path.keys() | expected.keys()):
        if path not in by_path:
            raise ModelError(
                f"params have no {path}, which the config needs: give the parameters and the "
                "config of one model"
            )
        if path not in expected:
            raise ModelError(
                f"params have {path}, which the config does not have: give the parameters and the "
                "config of one model"
            )
        if by_path[path].shape != expected[path]:
            raise ModelError(
                f"{path} has shape {by_path[path].shape}, but the config asks for "
                f"{expected[path]}: give the parameters and the config of one model"
            )
    return by_path
