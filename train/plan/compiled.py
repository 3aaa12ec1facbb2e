"""Compile a training step for devices that need not be present, and report its memory."""

import itertools
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from heedful.data.batch import FIELDS, PER_ROW, side
from heedful.data.config import DataConfig
from heedful.data.packing import Shape, batch_rows, round_up
from heedful.model.config import ModelConfig
from heedful.train.config import TrainConfig
from heedful.train.errors import TrainError
from heedful.train.plan.chips import GIB
from heedful.train.sharding import batch_sharding, make_mesh, require_divisible
from heedful.train.state import Setup, set_up
from heedful.train.step import make_train_step
from heedful.train.tasks import task_of

# Two messages of the TPU's compiler, from two passes, about a program that does not fit.
USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
TEMPORARIES = re.compile(
    r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
)
TILE = (8, 128)
UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": GIB, "T": 2.0**40}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each chip during a step; sizes of arrays include the padding of their tiles."""

    parameters: int
    moments: int
    """Optimizer state."""
    batch: int
    arguments: int | None
    """Sum of the three sizes above, as stated by the compiler; None: it failed."""
    temporaries: int
    """Activations, gradients and other arrays that exist only during the step."""
    program: int
    capacity: int | None

    @property
    def total(self) -> int:
        arguments = self.arguments or self.parameters + self.moments + self.batch
        return arguments + self.temporaries + self.program

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.total <= self.capacity


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled step and its memory; `text`, its HLO, is None if the step does not fit."""

    mesh: Mesh
    setup: Setup
    shape: Shape
    memory: Memory
    text: str | None
    seconds: float
    """Duration of compiling."""


def largest_batch(data: DataConfig) -> Shape:
    """Return the shape of the batch with the longest rows that the config allows."""
    objective = data.objective_spec
    lengths = (data.max_length,) * len(objective.sides)
    if objective.is_text and len(lengths) > 1:  # The lengths of both sides depend on each other.
        sides = objective.lengths({"text": np.arange(1, 2 * data.max_length)}, data)
        longest = sides[:, (sides <= data.max_length).all(0)][:, -1]
        lengths = tuple(map(int, round_up(longest, data)))
    return Shape(batch_rows(data.max_length, data), lengths)


def abstract_batch(data: DataConfig, shape: Shape, mesh: Mesh) -> dict[str, Any]:
    """Return shapes, types and shardings of the arrays in a batch of the pipeline."""
    objective = data.objective_spec
    lengths = dict(zip(objective.sides, shape.lengths, strict=True))
    names = [prefix + name for prefix in lengths for name in ("inputs", "segment_ids", "positions")]
    names += ["targets", "weights", *objective.arrays]
    per_row = (*PER_ROW, "targets", "weights") if objective.label else PER_ROW

    def one(name: str) -> jax.ShapeDtypeStruct:
        dims = (shape.rows,) if name in per_row else (shape.rows, lengths[side(name)])
        is_number = name == "targets" and objective.label == "number"
        dtype = jnp.float32 if is_number else FIELDS[name.removeprefix(side(name))].dtype
        return jax.ShapeDtypeStruct(dims, dtype, sharding=batch_sharding(mesh, len(dims)))

    return {name: one(name) for name in names}


def stored_bytes(tree: Any, platform: str) -> int:
    """Return the bytes that these arrays take on each device, including padding.

    A TPU stores two dimensions in tiles of 8 x 128, or of fewer rows for smaller arrays. It chooses
    the two dimensions that need the least padding.
    """

    def one(x: jax.ShapeDtypeStruct) -> int:
        assert x.sharding is not None
        dims = x.sharding.shard_shape(x.shape)
        size = math.prod(dims)
        if platform == "tpu" and len(dims) > 1:
            pad_to = lambda n, tile: -(-n // tile) * tile  # noqa: E731
            tile_rows = lambda n: min(TILE[0], 1 << (n - 1).bit_length())  # noqa: E731
            size = min(
                size // max(a * b, 1) * pad_to(a, tile_rows(a)) * pad_to(b, TILE[1])
                for a, b in itertools.permutations(dims, 2)
            )
        return size * x.dtype.itemsize

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def compile_step(
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    devices: Sequence[Any],
    capacity: int | None = None,
) -> Compiled:
    """Compile the step of `heedful train` for its largest batch.

    `capacity` is the memory of a chip in bytes; the compiler's own limit takes precedence. Raises
    TrainError if the mesh does not fit the devices, a parameter or the batch.
    """
    try:
        mesh = make_mesh(train.mesh, devices)
    except NotImplementedError as error:  # jax cannot map the mesh to the links between devices.
        raise TrainError(
            f"train.mesh = {train.mesh}: the mesh cannot follow the links of these chips; choose "
            f"sizes that are products of sides of the topology ({error})"
        ) from error
    shape = largest_batch(data)
    require_divisible(shape, train.accumulate, mesh)
    setup = set_up(model, train, mesh)
    batch = abstract_batch(data, shape, mesh)
    platform = devices[0].platform
    known = {
        "parameters": stored_bytes(setup.abstract.params, platform),
        "moments": stored_bytes(setup.abstract.opt_state, platform),
        "batch": stored_bytes(batch, platform),
    }
    began = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            step: Any = make_train_step(model, train, setup, task_of(data).loss)
            compiled = step.lower(setup.abstract, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        used, temporaries = USED.search(str(error)), TEMPORARIES.search(str(error))
        if (found := used or temporaries) is None:
            raise
        size, limit = (int(float(found[i]) * UNITS[found[i + 1]]) for i in (1, 3))
        size -= sum(known.values()) if used else 0
        memory = Memory(**known, arguments=None, temporaries=size, program=0, capacity=limit)
        text = None
    else:
        sizes = compiled.memory_analysis()
        arguments = sizes.argument_size_in_bytes
        # With donated arguments temp_size_in_bytes counts some arrays twice: the peak is right, but
        # on a CPU it does not include temporaries.
        peak = 0 if platform == "cpu" else sizes.peak_memory_in_bytes
        peak = peak or arguments + sizes.temp_size_in_bytes
        program = sizes.generated_code_size_in_bytes
        memory = Memory(
            **known,
            arguments=arguments,
            temporaries=peak - arguments,
            program=program,
            capacity=capacity,
        )
        text = compiled.as_text()
    return Compiled(
        mesh=mesh,
        setup=setup,
        shape=shape,
        memory=memory,
        text=text,
        seconds=time.perf_counter() - began,
    )
