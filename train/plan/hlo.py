"""The program that a compiler has made, read from its text, with how often each part runs."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

CALLS = re.compile(r"\b(?:calls|to_apply|called_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
BODY = re.compile(r"\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
TRIPS = re.compile(r'"?known_trip_count"?\s*:\s*\{\s*"?n"?\s*:\s*"?(\d+)"?')
INDEX = re.compile(r"\bindex=(\d+)")
SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
BITS = re.compile(r"\d+")


class Shape(NamedTuple):
    """One array: its type, its dimensions, and whether it lies in the large memory of the chip."""

    dtype: str
    dims: tuple[int, ...]
    is_far: bool

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        if self.dtype in ("token", "opaque"):
            return 0
        bits = BITS.search(self.dtype)
        return -(-self.size * int(bits[0]) // 8) if bits else self.size  # pred has no number


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """What it gives: one array, or the arrays of a tuple."""
    operands: tuple[str, ...]
    literal: str
    """What stands between the brackets: of a constant its value."""
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    def shapes(self, instruction: Instruction) -> list[tuple[Shape, ...]]:
        """Of the operands."""
        known = self.by_name
        return [known[name].shapes if name in known else () for name in instruction.operands]


class Step(NamedTuple):
    """An instruction that does something, where it stands, and how often it runs."""

    instruction: Instruction
    computation: Computation
    times: int


class Program:
    """A module of HLO text, as a compiled function gives it."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.loops_of_unknown_length = 0
        current = None
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                is_entry = line.startswith("ENTRY ")
                name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0].split("(", 1)[0]
                current = self.computations[name] = Computation(name)
                if is_entry:
                    self.entry = current
            elif current is not None and " = " in line:
                current.instructions.append(_instruction(line))

    def called(self, instruction: Instruction) -> list[Computation]:
        """What it calls, loops aside."""
        names = CALLS.findall(instruction.attributes)
        for listed, single in BRANCHES.findall(instruction.attributes):
            names += (
                [name.strip().lstrip("%") for name in listed.split(",")] if listed else [single]
            )
        return [self.computations[name] for name in names if name in self.computations]

    def steps(self) -> Iterator[Step]:
        """Every instruction that runs, with the product of the lengths of the loops around it.

        Fusions count as one; of a conditional every branch counts. A loop whose length the compiler
        does not state counts once, and in `loops_of_unknown_length`.
        """
        self.loops_of_unknown_length = 0
        yield from self._walk(self.entry, 1)

    def _walk(self, computation: Computation, times: int) -> Iterator[Step]:
        for instruction in computation.instructions:
            if instruction.opcode == "while":
                trips = self._trips(instruction)
                self.loops_of_unknown_length += trips is None
                inner = self.computations[BODY.findall(instruction.attributes)[0][1]]
                yield from self._walk(inner, times * (1 if trips is None else trips))
            elif instruction.opcode in ("call", "conditional"):
                for inner in self.called(instruction):
                    yield from self._walk(inner, times)
            else:
                yield Step(instruction, computation, times)

    def _trips(self, loop: Instruction) -> int | None:
        """As the compiler states it, or as its counter moves from 0 to a constant."""
        if stated := TRIPS.search(loop.attributes):
            return int(stated[1])
        condition, body = (self.computations[name] for name in BODY.findall(loop.attributes)[0])
        compare = condition.root
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        counter, limit = (condition.by_name[name] for name in compare.operands)
        number = INDEX.search(counter.attributes)
        if number is None or not limit.literal.isdigit():
            return None
        step = self._step(body, int(number[1]))
        return None if step is None else -(-int(limit.literal) // step)

    @staticmethod
    def _step(body: Computation, number: int) -> int | None:
        """What a turn of a loop adds to this part of its state."""
        added = body.by_name[body.root.operands[number]]
        while added.opcode in ("copy", "bitcast"):
            added = body.by_name[added.operands[0]]
        if added.opcode != "add":
            return None
        steps = [body.by_name[name].literal for name in added.operands]
        return next((int(literal) for literal in steps if literal.isdigit()), None)


def _instruction(line: str) -> Instruction:
    left, right = line.split(" = ", 1)
    left = left.strip()
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shapes = tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in layout)
        for dtype, dims, layout in SHAPE.findall(right[:end])
    )
    rest = right[end:].lstrip()
    begin = rest.index("(")
    close = _closing(rest, begin)
    operands = re.findall(r"%([\w.\-]+)", rest[begin:close])
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=rest[:begin],
        shapes=shapes,
        operands=tuple(operands),
        literal=rest[begin + 1 : close],
        attributes=rest[close + 1 :],
        is_root=left.startswith("ROOT "),
    )


def _closing(text: str, begin: int) -> int:
    """Where the bracket closes that opens at `begin`."""
    depth = 0
    for i in range(begin, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text) - 1
