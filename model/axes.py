"""The closed set of logical axis names, on parameters and on activations.

The model says what an axis means; `train/sharding.py` says over which mesh axis it is sharded.
Flax replicates an unknown name silently, so a name outside of this set is an error here.
"""

import math
from typing import Any

import flax.linen as nn
import jax

PARAMETER_AXES = (
    "embed",  # D
    "heads",  # N
    "kv_heads",  # K
    "head_dim",  # H
    "mlp",  # F
    "vocab",  # V
    "position",  # rows of a learned position table, of token types or of a linformer projection
    "buckets",  # distances of a relative bias
    "features",  # outputs of a square matrix in a head
    "classes",  # outputs of a classifier
    "rank",  # R, of a low-rank adaptation or a linformer projection
    "norm",  # scale and bias of a norm: small, and wanted whole
    "layers",  # L, added by the scan over blocks
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
    """Wrap an initializer so that its parameter carries one axis name per dimension."""
    _check(names)
    return nn.with_logical_partitioning(init, names)


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Ask that `x` be sharded by its axis names; the identity where no rules are in force."""
    _check(names)
    if x.ndim != len(names):
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}")
    return nn.with_logical_constraint(x, names)  # type: ignore[reportPrivateImportUsage]


def mesh_axes(*names: str) -> tuple[tuple[str, ...], ...]:
    """Return for each name the mesh axes over which `constrain` shards it.

    Mesh axes of one device do not count; without rules or a mesh in force there are none. This is
    for computations that the compiler cannot shard by itself.
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

    The devices of a mesh may be absent, when a program is only compiled for them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _check(names: tuple[str, ...]) -> None:
    unknown = [name for name in names if name not in AXES]
    if unknown:
        raise ValueError(f"unknown axis names {unknown}; model/axes.py knows {sorted(AXES)}")
