"""The arithmetic and the memory traffic of a compiled program, instruction by instruction."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from heedful.train.plan.hlo import Computation, Instruction, Program, Step

FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
    "partition-id", "replica-id", "opt-barrier", "optimization-barrier",
)  # fmt: skip
ELSEWHERE = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SLICES = ("dynamic-slice", "slice", "gather")
CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
GROUPS = re.compile(r"batch_group_count=(\d+)")
WINDOW = re.compile(r"window=\{([^}]*)\}")
KERNEL = re.compile(r'"flops":\s*"?(\d+)')


class Work(NamedTuple):
    """Of one instruction, as often as it runs in a step."""

    name: str
    flops: float
    """Two for each multiply-add of a matrix product; nothing else counts."""
    bytes: int
    """Between the chip and its large memory."""
    times: int


def work(program: Program) -> Iterator[Work]:
    """What each instruction that is no exchange does."""
    for step in program.steps():
        opcode = step.instruction.opcode
        if opcode in FREE or opcode.endswith("-done") or opcode.startswith(ELSEWHERE):
            continue
        yield Work(step.instruction.name, _flops(program, step), _bytes(program, step), step.times)


def silent_kernels(program: Program) -> int:
    """Kernels, written by hand, that do not state their arithmetic."""
    return sum(
        step.instruction.opcode == "custom-call"
        and "tpu_custom_call" in step.instruction.attributes
        and KERNEL.search(step.instruction.attributes) is None
        for step in program.steps()
    )


def _flops(program: Program, step: Step) -> float:
    instruction, computation, _ = step
    if instruction.opcode == "dot":
        return _dot(instruction, computation)
    if instruction.opcode == "convolution":
        return _convolution(instruction, computation)
    if instruction.opcode == "custom-call" and (stated := KERNEL.search(instruction.attributes)):
        return float(stated[1])
    inside = [(one, inner) for inner in program.called(instruction) for one in inner.instructions]
    return sum((_flops(program, Step(one, inner, 1)) for one, inner in inside), 0.0)


def _dot(instruction: Instruction, computation: Computation) -> float:
    (left, *_), *_ = computation.shapes(instruction)
    found = CONTRACTED.search(instruction.attributes)
    inner = [left.dims[int(n)] for n in found[1].split(",") if n] if found else []
    return 2.0 * instruction.shapes[0].size * math.prod(inner)


def _convolution(instruction: Instruction, computation: Computation) -> float:
    """The TPU's matrix products: some of their dimensions are windows that hardly overlap."""
    (left, *_), (kernel, *_), *_ = computation.shapes(instruction)
    labels = LABELS.search(instruction.attributes)
    assert labels is not None, instruction.attributes
    lhs, rhs, out = labels.groups()
    (result, *_) = instruction.shapes
    groups = math.prod(int(n) for n in GROUPS.findall(instruction.attributes))
    total = left.dims[lhs.index("b")] / groups
    total *= kernel.dims[rhs.index("i")] * kernel.dims[rhs.index("o")]
    for number, window in enumerate(_windows(instruction)):
        axis = str(number)
        sizes = (x.dims[names.index(axis)] for x, names in ((left, lhs), (result, out)))
        total *= window.pairs(*sizes)
    return 2.0 * total


class _Window(NamedTuple):
    """How a kernel moves along one dimension."""

    size: int
    stride: int
    low: int
    lhs_dilate: int
    rhs_dilate: int

    def pairs(self, given: int, results: int) -> int:
        """Pairs of a result and a place of the kernel that meet an element, not padding."""
        at = np.arange(results)[:, None] * self.stride - self.low
        at = at + np.arange(self.size) * self.rhs_dilate
        is_inside = (at >= 0) & (at <= (given - 1) * self.lhs_dilate)
        return int((is_inside & (at % self.lhs_dilate == 0)).sum())


def _windows(instruction: Instruction) -> list[_Window]:
    found = WINDOW.search(instruction.attributes)
    if found is None:
        return []
    values = dict(item.split("=", 1) for item in found[1].split())
    sizes = values["size"].split("x")

    def of(name: str, default: str) -> list[int]:
        listed = values[name].split("x") if name in values else [default] * len(sizes)
        return [int(value.split("_")[0]) for value in listed]

    return [
        _Window(*one)
        for one in zip(
            of("size", "1"), of("stride", "1"), of("pad", "0"), of("lhs_dilate", "1"),
            of("rhs_dilate", "1"), strict=True,
        )
    ]  # fmt: skip


def _bytes(program: Program, step: Step) -> int:
    """Of operands and results in the large memory; of a slice only what is sliced."""
    instruction, computation, _ = step
    opcode = instruction.opcode
    if opcode == "fusion":
        return _fused(program, instruction, computation)
    if opcode in SLICES:
        return _far(instruction) + instruction.bytes
    if opcode == "dynamic-update-slice":
        update = computation.shapes(instruction)[1]
        return 2 * sum(shape.bytes for shape in update if shape.is_far)
    given = [shape for shapes in computation.shapes(instruction) for shape in shapes]
    results = list(instruction.shapes)
    if opcode in ("copy-start", "async-start", "slice-start"):
        results = results[:1] if opcode == "copy-start" else results[-2:-1]
        given = given if opcode == "copy-start" else results
    return sum(shape.bytes for shape in (*given, *results) if shape.is_far)


def _fused(program: Program, instruction: Instruction, outer: Computation) -> int:
    (inner,) = program.called(instruction)
    total = 0
    updated = set()  # written in place: only the update moves
    results = []
    root = inner.root
    parts = [inner.by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]
    for part, shape in zip(parts, instruction.shapes, strict=False):
        origin = _behind(part, inner)
        if origin.opcode == "parameter" or origin.opcode.startswith(ELSEWHERE):
            continue  # it only passes by
        if origin.opcode == "dynamic-update-slice":
            updated.add(_behind(inner.by_name[origin.operands[0]], inner).name)
            results.append((inner.shapes(origin)[1][0].bytes, shape.is_far))
        else:
            results.append((shape.bytes, shape.is_far))
    total += sum(size for size, is_far in results if is_far)
    for parameter in _parameters(inner):
        if any(shape.is_far for shape in parameter.shapes):
            total += _read(program, parameter, inner, parameter.name in updated)
    return total


def _parameters(computation: Computation) -> list[Instruction]:
    return [i for i in computation.instructions if i.opcode == "parameter"]


def _read(
    program: Program, parameter: Instruction, inner: Computation, is_updated: bool = False
) -> int:
    """Bytes of a fusion's parameter that it reads, itself or in fusions within."""
    total = 0
    for user in _users(parameter, inner):
        if user.opcode in SLICES:
            total += user.bytes
        elif user.opcode == "fusion":
            (nested,) = program.called(user)
            given = [_behind(inner.by_name[name], inner).name for name in user.operands]
            for own in _parameters(nested):
                if given[int(own.literal)] == parameter.name:
                    total += _read(program, own, nested)
        elif not _passes(user) and not (is_updated and user.opcode == "dynamic-update-slice"):
            return parameter.bytes
    return min(total, parameter.bytes)


def _passes(instruction: Instruction) -> bool:
    """Whether it hands on what it is given, or sends it to other chips."""
    return instruction.opcode == "tuple" or instruction.opcode.startswith(ELSEWHERE)


def _behind(instruction: Instruction, computation: Computation) -> Instruction:
    """What an instruction that moves nothing stands for."""
    while instruction.opcode in ("bitcast", "copy", "convert") and instruction.operands:
        instruction = computation.by_name[instruction.operands[0]]
    return instruction


def _users(instruction: Instruction, computation: Computation) -> list[Instruction]:
    users = []
    for user in computation.users.get(instruction.name, []):
        users += _users(user, computation) if user.opcode == "bitcast" else [user]
    return users


def _far(instruction: Instruction) -> int:
    return sum(shape.bytes for shape in instruction.shapes if shape.is_far)
