"""The closed set of logical axis names of parameters and activations.

The model gives each axis a name; `train/sharding.py` maps each name to mesh axes. Flax silently
replicates an axis with an unknown name, so a name outside of this set raises an error here.
"""

import math
from typing import Any

import flax.linen as nn
import jax

PARAMETER_AXES = (
    "embed",  # D: width of hidden states
    "heads",  # N: query heads
    "kv_heads",  # K: key/value heads
    "head_dim",  # H: size of a head
    "mlp",  # F: inner width of the feed-forward layer
    "vocab",  # V: entries of the vocabulary
    "position",  # rows of a table of positions or token types, or of a linformer projection
    "buckets",  # buckets of distances of a relative bias
    "features",  # outputs of a square matrix in a head
    "classes",  # outputs of a classifier
    "rank",  # R: rank of a low-rank adaptation or a linformer projection
    "norm",  # scale and bias of a norm, which are small and never sharded
    "layers",  # L: layers, added by the scan over blocks
)
ACTIVATION_AXES = (
    "act_batch",
    "act_length",
    "act_embed",
    "act_heads",
    "act_kv_heads",
    "act_head_dim",
    "act_mlp",
    "act_vocab",
)
AXES = frozenset(PARAMETER_AXES + ACTIVATION_AXES)


def partitioned(init: Any, *names: str) -> Any:
    """Wrap an initializer so that its parameter has one axis name per dimension."""
    _check(names)
    return nn.with_logical_partitioning(init, names)


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Shard `x` by its axis names; return `x` itself if no sharding rules are in force."""
    _check(names)
    if x.ndim != len(names):
        raise ValueError(
            f"axis names {names} do not fit an array of shape {x.shape}: give {x.ndim} names, one "
            "for each axis"
        )
    return nn.with_logical_constraint(x, names)  # type: ignore[reportPrivateImportUsage]


def mesh_axes(*names: str) -> tuple[tuple[str, ...], ...]:
    """Return for each name the mesh axes over which `constrain` shards it.

    Mesh axes of size 1 are left out; without rules or a mesh in force, no name has a mesh axis.
    Computations that the compiler cannot shard by itself need the mesh axes.
    """
    _check(names)
    sizes = jax.sharding.get_abstract_mesh().shape
    found: list[tuple[str, ...]] = []
    for axes in nn.logical_to_mesh_axes(names) or ():  # type: ignore[reportPrivateImportUsage]
        axes = (axes,) if isinstance(axes, str) else axes or ()
        found.append(tuple(axis for axis in axes if sizes.get(axis, 1) > 1))
    return tuple(found)


def shards(name: str) -> int:
    """Return the number of devices over which `constrain` shards an axis of this name."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axes in mesh_axes(name) for axis in axes)


def target_platform() -> str:
    """Return "cpu", "gpu" or "tpu": the platform of the mesh in force, or the default one.

    The devices of the mesh need not exist if a program is only compiled for them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _check(names: tuple[str, ...]) -> None:
    unknown = [name for name in names if name not in AXES]
    if unknown:
        raise ValueError(
            f"unknown axis names {unknown}: choose among {sorted(AXES)} (model/axes.py)"
        )
