"""What chips send each other in a step, and over which links."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from heedful.train.plan.chips import Chip
from heedful.train.plan.hlo import Computation, Instruction, Program, Step

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
CHAIN = re.compile(r'chain_id="(\d+)"')
PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One exchange among groups of devices."""

    kind: str
    group: tuple[int, ...]
    """The first group: numbers of devices, in the order of the mesh."""
    sent: float
    """Bytes that each device sends, by the algorithms that send the least (rings)."""
    times: int
    """In a step."""
    is_async: bool
    """Whether the compiler lets other work go on meanwhile."""


def collectives(program: Program, devices: int) -> list[Collective]:
    """All of a step, fused and asynchronous ones included."""
    found = []
    chains = set()
    for step in program.steps():
        for instruction, computation, hint in _inside(program, step):
            kind = hint or instruction.opcode.removesuffix("-start")
            group = _group(instruction, devices)
            # A TPU goes on with one exchange in several fusions, which share the number of a chain.
            chain = CHAIN.search(instruction.attributes)
            key = (step.computation.name, chain and chain[1])
            if len(group) < 2 or (chain and key in chains):
                continue
            chains.add(key)
            found.append(
                Collective(
                    kind=kind,
                    group=group,
                    sent=_sent(kind, instruction, computation, len(group)),
                    times=step.times,
                    is_async=chain is not None or step.instruction.opcode.endswith("-start"),
                )
            )
    return found


def _inside(program: Program, step: Step) -> Iterator[tuple[Instruction, Computation, str | None]]:
    """The collectives of an instruction or of what it calls, each with the kind it amounts to."""
    instruction, computation, _ = step
    if instruction.opcode.removesuffix("-start") in KINDS:
        yield instruction, computation, None
    elif instruction.opcode in ("fusion", "async-start", "custom-call"):
        for inner in program.called(instruction):
            for one in inner.instructions:
                for found, where, hint in _inside(program, Step(one, inner, 1)):
                    # Of a sum that is computed for all, each device then takes its own part.
                    is_scatter = "all-reduce-scatter" in inner.name
                    yield found, where, "reduce-scatter" if is_scatter else hint


def _sent(kind: str, instruction: Instruction, computation: Computation, n: int) -> float:
    given = sum(shape.bytes for shapes in computation.shapes(instruction) for shape in shapes)
    factors = {"all-gather": n - 1.0, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
    return given * factors.get(kind, (n - 1) / n)


def _group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """The first group of devices; of a permutation the first pair."""
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
    """Of devices that differ in these axes only; of an axis "a:(m)n" in n parts, after m."""
    names = {name: int(size) for name, size, *_ in AXIS.findall(sizes)}
    numbers = np.arange(np.prod(list(names.values()))).reshape(tuple(names.values()))
    index: list[np.ndarray] = [np.array([0]) for _ in names]
    for name, _, before, size in AXIS.findall(along):
        whole = names[name]
        part = np.arange(whole)
        if size:
            part = part.reshape(int(before), int(size), -1)[0, :, 0]
        index[list(names).index(name)] = part
    return tuple(map(int, numbers[np.ix_(*index)].ravel()))


def seconds(collective: Collective, chip: Chip, coordinates: Sequence[tuple[int, ...]]) -> float:
    """Time of one exchange when nothing else is on its links.

    Bytes over the bandwidth of all axes of the torus along which the group lies, both ways where
    they close to a ring (https://jax-ml.github.io/scaling-book/sharding). Devices in between, whose
    own groups share the links, leave a part of them. Without coordinates every device has one link.
    """
    if not chip.wraps:
        return collective.sent / chip.link
    whole = np.array(coordinates).max(0) + 1
    places = np.array([coordinates[i] for i in collective.group])
    bandwidth, longest = 0.0, 1
    for axis, length in enumerate(whole):
        along = np.unique(places[:, axis])
        if len(along) == 1:
            continue
        closes = len(along) == length and length % chip.wraps == 0
        bandwidth += chip.link * (2 if closes else 1) / int(np.diff(along).min())
        longest = max(longest, len(along))
    if collective.kind == "collective-permute":
        return collective.sent / chip.link
    # Of an all-to-all each byte crosses a quarter of the ring.
    hops = max(1.0, longest / 4) if collective.kind == "all-to-all" else 1.0
    return collective.sent * hops / bandwidth
