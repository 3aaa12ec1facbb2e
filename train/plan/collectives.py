"""Collectives of a compiled step: devices, bytes and time."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from heedful.train.plan.chips import Chip
from heedful.train.plan.hlo import COLLECTIVES, Computation, Instruction, Program, Step

LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
CHAIN = re.compile(r'chain_id="(\d+)"')
PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation among groups of devices."""

    kind: str
    group: tuple[int, ...]
    """Devices of the first group, numbered in the order of the mesh."""
    sent: float
    """Bytes that each device sends with ring algorithms, which send the least."""
    times: int
    """Number of executions in a step."""
    is_async: bool
    """True if the compiler overlaps the operation with other instructions."""


def collectives(program: Program, devices: int) -> list[Collective]:
    """Return all collectives of a step, including fused and asynchronous collectives."""
    result = []
    chains = set()
    for step in program.steps():
        for instruction, computation, hint in _inside(program, step):
            kind = hint or instruction.opcode.removesuffix("-start")
            group = _group(instruction, devices)
            # A TPU's compiler splits a collective into several fusions with one chain id.
            chain = CHAIN.search(instruction.attributes)
            key = (step.computation.name, chain and chain[1])
            if len(group) < 2 or (chain and key in chains):
                continue
            chains.add(key)
            result.append(
                Collective(
                    kind=kind,
                    group=group,
                    sent=_sent(kind, instruction, computation, len(group)),
                    times=step.times,
                    is_async=chain is not None or step.instruction.opcode.endswith("-start"),
                )
            )
    return result


def _inside(program: Program, step: Step) -> Iterator[tuple[Instruction, Computation, str | None]]:
    """Yield the collectives of an instruction and of the computations that it calls, with a kind.

    kind None: the kind of the opcode.
    """
    instruction, computation, _ = step
    if instruction.opcode.removesuffix("-start") in COLLECTIVES:
        yield instruction, computation, None
    elif instruction.opcode in ("fusion", "async-start", "custom-call"):
        for inner in program.called(instruction):
            for one in inner.instructions:
                for collective, where, hint in _inside(program, Step(one, inner, 1)):
                    # An all-reduce of which each device keeps its part is a reduce-scatter.
                    is_scatter = "all-reduce-scatter" in inner.name
                    yield collective, where, "reduce-scatter" if is_scatter else hint


def _sent(kind: str, instruction: Instruction, computation: Computation, n: int) -> float:
    size = sum(shape.bytes for shapes in computation.shapes(instruction) for shape in shapes)
    factors = {"all-gather": n - 1.0, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
    return size * factors.get(kind, (n - 1) / n)


def _group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """Return the first group of devices; for a permutation, the first pair."""
    attributes = instruction.attributes
    if found := IOTA.search(attributes):
        shape, dims, order = (
            tuple(int(n) for n in part.split(",")) if part else None for part in found.groups()
        )
        assert shape and dims
        numbers = np.arange(np.prod(dims)).reshape(dims)
        numbers = numbers.transpose(order) if order else numbers
        return tuple(map(int, numbers.reshape(shape)[0]))
    if found := MESH.search(attributes):
        return _group_of_mesh(*found.groups())
    if found := LISTED.search(attributes) or PAIRS.search(attributes):
        first = found[1].strip("{}").split("}")[0]
        return tuple(int(n) for n in first.split(",") if n)
    return tuple(range(devices))


def _group_of_mesh(sizes: str, along: str) -> tuple[int, ...]:
    """Return the first group of devices of the mesh that differ only in the axes `along`.

    "a:(m)n" is a part of axis a: the middle axis after axis a is reshaped to [m, n, rest].
    """
    names = {name: int(size) for name, size, *_ in AXIS.findall(sizes)}
    numbers = np.arange(np.prod(list(names.values()))).reshape(tuple(names.values()))
    index: list[np.ndarray] = [np.array([0]) for _ in names]
    for name, _, before, size in AXIS.findall(along):
        part = np.arange(names[name])
        if size:
            part = part.reshape(int(before), int(size), -1)[0, :, 0]
        index[list(names).index(name)] = part
    return tuple(map(int, numbers[np.ix_(*index)].ravel()))


def seconds(collective: Collective, chip: Chip, coordinates: Sequence[tuple[int, ...]]) -> float:
    """Return the time of one collective, if nothing else uses its links.

    The time is bytes / bandwidth. The bandwidth is the sum over all axes of the torus along which
    the group extends; an axis that is a ring counts twice
    (https://jax-ml.github.io/scaling-book/sharding). Groups whose devices alternate along an axis
    share its bandwidth. `coordinates` of the devices in the torus are not used for GPUs.
    """
    if not chip.wraps:
        return collective.sent / chip.link
    sides = np.array(coordinates).max(0) + 1
    positions = np.array([coordinates[i] for i in collective.group])
    bandwidth, longest = 0.0, 1
    for axis, length in enumerate(sides):
        along = np.unique(positions[:, axis])
        if len(along) == 1:
            continue
        is_ring = len(along) == length and length % chip.wraps == 0
        bandwidth += chip.link * (2 if is_ring else 1) / int(np.diff(along).min())
        longest = max(longest, len(along))
    if collective.kind == "collective-permute":
        return collective.sent / chip.link
    # In an all-to-all a byte crosses a quarter of the ring on average.
    hops = max(1.0, longest / 4) if collective.kind == "all-to-all" else 1.0
    return collective.sent * hops / bandwidth
