"""Count the FLOPs and the memory traffic of each instruction of a compiled program."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from heedful.train.plan.hlo import COLLECTIVES, Computation, Instruction, Program, Step

NO_COST = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
    "partition-id", "replica-id", "opt-barrier", "optimization-barrier",
)  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")
CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
GROUPS = re.compile(r"batch_group_count=(\d+)")
WINDOW = re.compile(r"window=\{([^}]*)\}")
KERNEL = re.compile(r'"flops":\s*"?(\d+)')


class InstructionCost(NamedTuple):
    """Cost of one instruction, and how often it runs in a step."""

    name: str
    flops: float
    """FLOPs: two per multiply-add of matrix products; other operations are not counted."""
    bytes: int
    """Bytes read from and written to the main memory of the chip."""
    times: int


def instruction_costs(program: Program) -> Iterator[InstructionCost]:
    """Yield the cost of each instruction that is not a collective."""
    for step in program.steps():
        opcode = step.instruction.opcode
        if opcode in NO_COST or opcode.endswith("-done") or opcode.startswith(COLLECTIVES):
            continue
        yield InstructionCost(
            step.instruction.name, _flops(program, step), _bytes(program, step), step.times
        )


def kernels_without_flops(program: Program) -> int:
    """Count the Pallas kernels whose FLOPs the program does not give."""
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
    """Count a matrix product that a TPU's compiler wrote as a convolution.

    Dimensions of the product may be spatial dimensions of the convolution, mostly padded.
    """
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
    """Movement of a kernel along one dimension."""

    size: int
    stride: int
    low: int
    lhs_dilate: int
    rhs_dilate: int

    def pairs(self, inputs: int, outputs: int) -> int:
        """Count the pairs of output and kernel element that read an input element, not padding."""
        at = np.arange(outputs)[:, None] * self.stride - self.low
        at = at + np.arange(self.size) * self.rhs_dilate
        is_inside = (at >= 0) & (at <= (inputs - 1) * self.lhs_dilate)
        return int((is_inside & (at % self.lhs_dilate == 0)).sum())


def _windows(instruction: Instruction) -> list[_Window]:
    found = WINDOW.search(instruction.attributes)
    if found is None:
        return []
    values = dict(item.split("=", 1) for item in found[1].split())
    sizes = values["size"].split("x")

    def numbers(name: str, default: str) -> list[int]:
        listed = values[name].split("x") if name in values else [default] * len(sizes)
        return [int(value.split("_")[0]) for value in listed]

    return [
        _Window(*one)
        for one in zip(
            numbers("size", "1"), numbers("stride", "1"), numbers("pad", "0"),
            numbers("lhs_dilate", "1"), numbers("rhs_dilate", "1"), strict=True,
        )
    ]  # fmt: skip


def _bytes(program: Program, step: Step) -> int:
    """Count bytes of operands and results in main memory; for a sliced operand, of the slice."""
    instruction, computation, _ = step
    opcode = instruction.opcode
    if opcode == "fusion":
        return _fusion_bytes(program, instruction, computation)
    if opcode in SLICES:
        return _main_memory_bytes(instruction) + instruction.bytes
    if opcode == "dynamic-update-slice":
        update = computation.shapes(instruction)[1]
        return 2 * sum(shape.bytes for shape in update if shape.in_main_memory)
    operands = [shape for shapes in computation.shapes(instruction) for shape in shapes]
    results = list(instruction.shapes)
    if opcode in ("copy-start", "async-start", "slice-start"):
        results = results[:1] if opcode == "copy-start" else results[-2:-1]
        operands = operands if opcode == "copy-start" else results
    return sum(shape.bytes for shape in (*operands, *results) if shape.in_main_memory)


def _fusion_bytes(program: Program, instruction: Instruction, outer: Computation) -> int:
    (inner,) = program.called(instruction)
    total = 0
    updated = set()  # Parameters that are updated in place: only the update is written.
    results = []
    root = inner.root
    parts = [inner.by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]
    for part, shape in zip(parts, instruction.shapes, strict=False):
        origin = _origin(part, inner)
        if origin.opcode == "parameter" or origin.opcode.startswith(COLLECTIVES):
            continue  # The fusion forwards this array unchanged.
        if origin.opcode == "dynamic-update-slice":
            updated.add(_origin(inner.by_name[origin.operands[0]], inner).name)
            results.append((inner.shapes(origin)[1][0].bytes, shape.in_main_memory))
        else:
            results.append((shape.bytes, shape.in_main_memory))
    total += sum(size for size, in_main_memory in results if in_main_memory)
    for parameter in _parameters(inner):
        if any(shape.in_main_memory for shape in parameter.shapes):
            total += _bytes_read(program, parameter, inner, parameter.name in updated)
    return total


def _parameters(computation: Computation) -> list[Instruction]:
    return [i for i in computation.instructions if i.opcode == "parameter"]


def _bytes_read(
    program: Program, parameter: Instruction, inner: Computation, is_updated: bool = False
) -> int:
    """Count the bytes of a fusion's parameter that this fusion or a nested fusion reads."""
    total = 0
    for user in _users(parameter, inner):
        if user.opcode in SLICES:
            total += user.bytes
        elif user.opcode == "fusion":
            (nested,) = program.called(user)
            operands = [_origin(inner.by_name[name], inner).name for name in user.operands]
            for nested_parameter in _parameters(nested):
                if operands[int(nested_parameter.literal)] == parameter.name:
                    total += _bytes_read(program, nested_parameter, nested)
        elif not _forwards(user) and not (is_updated and user.opcode == "dynamic-update-slice"):
            return parameter.bytes
    return min(total, parameter.bytes)


def _forwards(instruction: Instruction) -> bool:
    """Tell if an instruction only forwards its operands, or sends them to other chips."""
    return instruction.opcode == "tuple" or instruction.opcode.startswith(COLLECTIVES)


def _origin(instruction: Instruction, computation: Computation) -> Instruction:
    """Follow bitcasts, copies and conversions back to the instruction that computes the value."""
    while instruction.opcode in ("bitcast", "copy", "convert") and instruction.operands:
        instruction = computation.by_name[instruction.operands[0]]
    return instruction


def _users(instruction: Instruction, computation: Computation) -> list[Instruction]:
    users = []
    for user in computation.users.get(instruction.name, []):
        users += _users(user, computation) if user.opcode == "bitcast" else [user]
    return users


def _main_memory_bytes(instruction: Instruction) -> int:
    return sum(shape.bytes for shape in instruction.shapes if shape.in_main_memory)
