"""The arithmetic and the memory traffic of a compiled program, instruction by instruction."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from train.plan.hlo import Computation, Instruction, Program, Step

FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
    "partition-id", "replica-id", "opt-barrier", "optimization-barrier",
)  # fmt: skip
ELSEWHERE = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
GROUPS = re.compile(r"(?:feature|batch)_group_count=(\d+)")
KERNEL = re.compile(r'"flops":\s*"?(\d+)')


class Work(NamedTuple):
    """Of one instruction, as often as it runs in a step."""

    name: str
    flops: float
    """Two for each multiply-add of a matrix product; nothing else counts."""
    bytes: float
    """Between the chip and its large memory."""
    times: int


def work(program: Program) -> Iterator[Work]:
    """What each instruction that is no exchange does."""
    for step in program.steps():
        opcode = step.instruction.opcode
        if opcode in FREE or opcode.endswith("-done") or opcode.startswith(ELSEWHERE):
            continue
        yield Work(step.instruction.name, _flops(program, step), _bytes(program, step), step.times)


def _flops(program: Program, step: Step) -> float:
    instruction, computation, _ = step
    if instruction.opcode == "dot":
        return _dot(instruction, computation)
    if instruction.opcode == "convolution":
        return _convolution(instruction, computation)
    if instruction.opcode == "custom-call" and (stated := KERNEL.search(instruction.attributes)):
        return float(stated[1])
    return sum(
        _flops(program, Step(one, inner, 1))
        for inner in program.called(instruction)
        for one in inner.instructions
    )


def _dot(instruction: Instruction, computation: Computation) -> float:
    (left, *_), *_ = computation.shapes(instruction)
    found = CONTRACTED.search(instruction.attributes)
    inner = [left.dims[int(n)] for n in found[1].split(",") if n] if found else []
    return 2.0 * instruction.shapes[0].size * math.prod(inner)


def _convolution(instruction: Instruction, computation: Computation) -> float:
    """The TPU's matrix products. Each output is a sum over the kernel but for its outputs."""
    _, (kernel, *_), *_ = computation.shapes(instruction)
    labels = LABELS.search(instruction.attributes)
    outputs = kernel.dims[labels[2].index("o")] if labels else 1
    groups = math.prod(int(n) for n in GROUPS.findall(instruction.attributes))
    return 2.0 * instruction.shapes[0].size * kernel.size / outputs / groups


def _bytes(program: Program, step: Step) -> float:
    """Of operands and results in the large memory; of a slice only what is sliced."""
    instruction, computation, _ = step
    opcode = instruction.opcode
    if opcode == "fusion":
        (inner,) = program.called(instruction)
        return _fused(instruction, computation, inner)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return _far(instruction) + instruction.bytes
    if opcode == "dynamic-update-slice":
        return 2 * sum(shape.bytes for shape in computation.shapes(instruction)[1] if shape.is_far)
    given = [shape for shapes in computation.shapes(instruction) for shape in shapes]
    results = list(instruction.shapes)
    if opcode in ("copy-start", "async-start", "slice-start"):
        results = results[:1] if opcode == "copy-start" else results[-2:-1]
        given = given if opcode == "copy-start" else results
    return sum(shape.bytes for shape in (*given, *results) if shape.is_far)


def _fused(instruction: Instruction, outer: Computation, inner: Computation) -> float:
    total = 0.0
    parameters = [i for i in inner.instructions if i.opcode == "parameter"]
    updated = set()  # written in place: only the update moves
    results = []
    root = inner.root
    parts = [inner.by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]
    for part, shape in zip(parts, instruction.shapes, strict=False):
        origin = _behind(part, inner)
        if origin.opcode == "dynamic-update-slice":
            updated.add(_behind(inner.by_name[origin.operands[0]], inner).name)
            results.append((inner.shapes(origin)[1][0].bytes, shape.is_far))
        else:
            results.append((shape.bytes, shape.is_far))
    total += sum(size for size, is_far in results if is_far)
    for parameter in parameters:
        if parameter.name in updated or not any(s.is_far for s in parameter.shapes):
            continue
        users = _users(parameter, inner)
        if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
            total += sum(user.bytes for user in users)
        else:
            total += _far(parameter)
    return total


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


def _far(instruction: Instruction) -> float:
    return sum(shape.bytes for shape in instruction.shapes if shape.is_far)
