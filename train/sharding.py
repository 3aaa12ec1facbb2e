"""The device mesh, and the mesh axes that each logical axis is sharded over."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from heedful.data.packing import Shape
from heedful.model.axes import AXES
from heedful.train.config import MeshConfig
from heedful.train.errors import TrainError

MESH_AXES = ("data", "fsdp", "seq", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "position": (),
    "buckets": (),
    "features": (),
    "classes": (),
    "rank": (),
    "norm": (),
    "layers": (),
    "act_batch": ("data", "fsdp"),
    "act_length": ("seq",),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_head_dim": (),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}
assert set(RULES) == AXES, "a rule for every axis name, and no other"


def flax_rules() -> list[tuple[str, tuple[str, ...] | None]]:
    """Return RULES in the form of `nn.logical_axis_rules`, for use inside a traced function."""
    return [(name, axes or None) for name, axes in RULES.items()]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of `config` over the devices; raise TrainError if the numbers do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    others = int(np.prod([size for size in sizes if size != -1]))
    if config.data == -1 and len(devices) % others == 0:
        sizes[0] = len(devices) // others
    if int(np.prod(sizes)) != len(devices):
        asked = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise TrainError(
            f"train.mesh asks for {asked} devices, but there are {len(devices)}: "
            f"change train.mesh so that the product of its axes is {len(devices)}"
        )
    # Auto, not Explicit, the default since jax 0.9: flax's annotations are hints to the compiler.
    return jax.make_mesh(
        tuple(sizes), MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def resolve(name: str, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh):
    """Return the sharding of the array `name` with these logical axes.

    Raises TrainError with the name of the array for an unknown axis, a wrong number of axes, a mesh
    axis that is used twice, and a dimension that its mesh axes do not divide.
    """
    if len(axes) != len(shape):
        raise TrainError(
            f"{name}: {len(axes)} axis names {axes} for shape {shape}; give one per dimension"
        )
    spec: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in RULES:
            raise TrainError(f"{name}: unknown axis name '{axis}'; choose among {sorted(RULES)}")
        over = tuple(a for a in RULES[axis] if mesh.shape[a] > 1) if axis else ()
        if used & set(over):
            raise TrainError(
                f"{name}: axes {axes} use the mesh axis {used & set(over)} twice; change the axis "
                "names, or train.sharding.RULES"
            )
        used |= set(over)
        parts = int(np.prod([mesh.shape[a] for a in over]))
        if size % parts:
            raise TrainError(
                f"{name}: dimension '{axis}' of {size} does not divide into {parts} parts of the "
                f"mesh axes {over}: change the dimension, or train.mesh"
            )
        spec.append(over or None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Return the shardings of a tree of boxed (abstract) parameters, as a tree without boxes."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(leaf, nn.LogicallyPartitioned):
            raise TrainError(f"{name}: a parameter without axis names: wrap it in `partitioned`")
        return resolve(name, leaf.names, leaf.value.shape, mesh)

    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_box)


def require_divisible(shape: Shape, accumulate: int, mesh: Mesh) -> None:
    """Raise TrainError unless rows and lengths of a batch divide into devices and micro-batches.

    `accumulate` is the number of micro-batches.
    """
    parts, seq = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["seq"]
    if shape.rows % (parts * accumulate):
        raise TrainError(
            f"batches of {shape} do not divide into {parts} devices x train.accumulate = "
            f"{accumulate}: set data.batch_multiple to {parts * accumulate}"
        )
    if any(length % seq for length in shape.lengths):
        raise TrainError(
            f"the length of batches of {shape} does not divide into train.mesh.seq = {seq}: set "
            f"data.length_multiple and data.max_length to multiples of {seq}"
        )


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
    """Return the sharding of an array [B, T] or [B] of a batch."""
    return NamedSharding(mesh, PartitionSpec(*[RULES["act_batch"], RULES["act_length"]][:rank]))


@functools.cache
def rows_here(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """Return (parts, count): the devices here hold `parts` (indices) of `count` parts of a batch.

    The rows of a batch are divided into as few parts as possible. If mesh axes other than data and
    fsdp extend over processes, several processes hold the same rows.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return local_batch_shards(
        owners.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1), jax.process_index()
    )


def local_batch_shards(owners: np.ndarray, process: int) -> tuple[tuple[int, ...], int]:
    """Return `rows_here` of a process; `owners` [parts, devices] has the process of each device."""
    mine, count = np.flatnonzero((owners == process).any(1)), len(owners)
    for size in range(count, 1, -1):
        parts = np.unique(mine // size)
        if count % size == 0 and len(parts) * size == len(mine):
            return tuple(parts.tolist()), count // size
    return tuple(mine.tolist()), count


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return the global batch; each process gives the rows that its devices hold (`rows_here`)."""
    parts, count = rows_here(mesh)

    def gather(array: np.ndarray) -> jax.Array:
        size = len(array) // len(parts)
        shape = (size * count, *array.shape[1:])

        def read(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            first = parts.index(start // size) * size + start % size
            return array[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback(shape, batch_sharding(mesh, array.ndim), read)

    if count == 1:
        return whole_to_devices(batch, mesh)
    return {name: gather(array) for name, array in batch.items()}


def whole_to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return the global batch from a whole batch, the same in every process."""
    return {name: place(array, batch_sharding(mesh, array.ndim)) for name, array in batch.items()}


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Return a global array from a whole array, the same in every process."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # Not `device_put`: it compares the values of all processes first.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is whole on every device, to be read everywhere."""
    return NamedSharding(mesh, PartitionSpec())
