"""Parse the HLO text of a compiled program, and count how often each instruction runs."""

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
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
"""Opcodes that exchange data between devices; asynchronous opcodes end in -start and -done."""


class Shape(NamedTuple):
    """Type and dimensions of an array; in_main_memory: not in the on-chip memory."""

    dtype: str
    dims: tuple[int, ...]
    in_main_memory: bool

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        if self.dtype in ("token", "opaque"):
            return 0
        bits = BITS.search(self.dtype)
        return -(-self.size * int(bits[0]) // 8) if bits else self.size  # pred: 1 byte


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Results: one array, or the arrays of a tuple."""
    operands: tuple[str, ...]
    literal: str
    """Text between the brackets; for a constant, its value."""
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
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    def shapes(self, instruction: Instruction) -> list[tuple[Shape, ...]]:
        """Return the shapes of each operand."""
        producers = [self.by_name.get(name) for name in instruction.operands]
        return [producer.shapes if producer else () for producer in producers]


class Step(NamedTuple):
    """An instruction, its computation, and how often it runs in one call of the program."""

    instruction: Instruction
    computation: Computation
    times: int


class Program:
    """A module of HLO text, from `as_text()` of a compiled function."""

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
        """Return the computations that an instruction calls, except for loops."""
        names = CALLS.findall(instruction.attributes)
        for listed, single in BRANCHES.findall(instruction.attributes):
            names += (
                [name.strip().lstrip("%") for name in listed.split(",")] if listed else [single]
            )
        return [self.computations[name] for name in names if name in self.computations]

    def steps(self) -> Iterator[Step]:
        """Yield every instruction with the product of the trip counts of the loops around it.

        A fusion is one instruction; all branches of a conditional count. A loop with an unknown
        trip count counts once; `loops_of_unknown_length` is the number of these loops.
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
        """Return the trip count, stated or from a counter from 0 to a constant; None: unknown."""
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
        """Return the constant added per iteration to element `number` of the state; or None."""
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
    """Return the index of the closing bracket for the opening bracket at `begin`."""
    depth = 0
    for i in range(begin, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text) - 1
