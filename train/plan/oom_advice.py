"""What to do when a step does not fit into memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from heedful.data.config import DataConfig
from heedful.model.attention import choose, saves_memory, spec_of
from heedful.model.config import ModelConfig
from heedful.train.config import TrainConfig, TrainError
from heedful.train.inspection.costs import device_bytes
from heedful.train.inspection.inspect import number
from heedful.train.plan.compiled import Compiled, Memory, compile_step
from heedful.train.trainable import split


class Way(NamedTuple):
    """Flags, what they cost, and the bytes per chip that they save, roughly."""

    flags: str
    price: str
    saves: float


def ways_out(
    model: ModelConfig, data: DataConfig, train: TrainConfig, compiled: Compiled
) -> list[Way]:
    """At most three ways to need less memory, the cheapest first; those that save a tenth first."""
    memory, sizes = compiled.memory, compiled.mesh.shape
    gradients = device_bytes(split(compiled.setup.abstract.params, compiled.setup.factors)[0])
    activations = float(max(0, memory.temporaries - gradients))
    rows = compiled.shape.rows // (sizes["data"] * sizes["fsdp"] * train.accumulate)
    ways = []

    platform = compiled.mesh.devices.flat[0].platform
    core, _ = choose(model.attention.core, platform, data.max_length, shards=sizes["seq"])
    if spec_of(core).is_quadratic:
        linear = saves_memory(platform, sizes["seq"])
        scores = 4.0 * rows * model.attention.heads * data.max_length**2
        scores /= sizes["tensor"] * sizes["seq"]
        layers = model.layers if model.remat == "none" else 1
        ways.append(
            Way(
                f"--model.attention.core {linear}",
                "the same result, where the core runs the mask (heedful cores)",
                min(2 * scores * layers, activations),
            )
        )
    if sizes["data"] > 1:
        fsdp = sizes["data"] * sizes["fsdp"]
        state = memory.parameters + memory.moments + gradients
        ways.append(
            Way(
                f"--train.mesh.fsdp {fsdp}",
                "the same update; parameters travel in each step",
                state * (1 - 1 / sizes["data"]),
            )
        )
    if rows > 1:
        parts = next(n for n in range(2, rows + 1) if rows % n == 0)
        ways.append(
            Way(
                f"--train.accumulate {train.accumulate * parts}",
                "the same update, in smaller parts",
                activations * (1 - 1 / parts),
            )
        )
    if model.remat != "full":
        ways.append(
            Way(
                "--model.remat full",
                "the same update, up to a third more time",
                activations * (1 - 2 / max(model.layers, 2)),
            )
        )
    if rows > 1:
        ways.append(
            Way(
                f"--data.batch-tokens {data.batch_tokens // 2}",
                "another update: half the batch",
                activations / 2,
            )
        )
    return sorted(ways, key=lambda way: way.saves < memory.total / 10)[:3]


def memory_table(memory: Memory, chips: str) -> Table:
    """What lies in the memory of each chip, and what is left of it."""
    table = Table(title=f"memory per chip, {chips}")
    table.title_justify = table.caption_justify = "left"
    table.add_column("what")
    table.add_column("bytes", justify="right")
    known = memory.parameters + memory.moments + memory.batch
    rows: list[tuple[str, int | None]] = [
        ("parameters", memory.parameters),
        ("optimizer state", memory.moments),
        ("batch", memory.batch),
    ]
    if memory.arguments is not None:
        rows.append((f"(the compiler's sum of these: {_share(memory.arguments, known)})", None))
    rows.append(("activations, gradients and other temporaries", memory.temporaries))
    rows.append(("program", memory.program))
    for what, size in rows:
        table.add_row(what, "" if size is None else _bytes(size))
    table.add_section()
    table.add_row("together", _bytes(memory.total))
    if memory.capacity is not None:
        table.add_row("capacity", _bytes(memory.capacity))
        left = memory.capacity - memory.total
        table.add_row("left" if memory.fits else "missing", _bytes(abs(left)), style="bold")
    return table


def _share(stated: int, predicted: int) -> str:
    return f"{_bytes(stated)}, {stated / predicted - 1:+.2%}"


def _bytes(size: int | float) -> str:
    sign = "-" if size < 0 else ""
    return f"{sign}{number(float(abs(size)), 1024)}B"


def print_ways(ways: list[Way], console: Console) -> None:
    for way in ways:
        saves = f"saves about {_bytes(way.saves)}"
        console.print(f"  {way.flags}    {way.price}; {saves}", markup=False)


@contextmanager
def explained(run: Any, devices: Sequence[Any], console: Console) -> Iterator[None]:
    """Turns an out-of-memory into a TrainError, after the memory table and the ways out."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).strip().split("\n")[0]
        compiled = compile_step(run.model, run.data, run.train, devices)
        console.print(memory_table(compiled.memory, f"largest batch {compiled.shape}"))
        console.print("the cheapest ways out:")
        print_ways(ways_out(run.model, run.data, run.train, compiled), console)
        raise TrainError(f"out of memory: {first}") from error
