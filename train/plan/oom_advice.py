"""Advice for a step that does not fit in memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from heedful.data.config import DataConfig
from heedful.model.attention import choose, saves_memory, spec_of
from heedful.model.config import ModelConfig
from heedful.train.config import TrainConfig
from heedful.train.errors import TrainError
from heedful.train.inspection.costs import device_bytes
from heedful.train.inspection.inspect import number
from heedful.train.plan.compiled import Compiled, Memory, compile_step
from heedful.train.trainable import split


class Advice(NamedTuple):
    """Flags that reduce memory, what they cost, and an estimate of the bytes saved per chip."""

    flags: str
    price: str
    saves: float


def memory_advice(
    model: ModelConfig, data: DataConfig, train: TrainConfig, compiled: Compiled
) -> list[Advice]:
    """Return at most three options that need less memory, the cheapest first.

    Options that save less than a tenth of the memory come last.
    """
    memory, sizes = compiled.memory, compiled.mesh.shape
    gradients = device_bytes(split(compiled.setup.abstract.params, compiled.setup.factors)[0])
    activations = float(max(0, memory.temporaries - gradients))
    rows = compiled.shape.rows // (sizes["data"] * sizes["fsdp"] * train.accumulate)
    advice = []

    platform = compiled.mesh.devices.flat[0].platform
    core, _ = choose(model.attention.core, platform, data.max_length, shards=sizes["seq"])
    if spec_of(core).is_quadratic:
        linear = saves_memory(platform, sizes["seq"])
        scores = 4.0 * rows * model.attention.heads * data.max_length**2
        scores /= sizes["tensor"] * sizes["seq"]
        layers = model.layers if model.remat == "none" else 1
        advice.append(
            Advice(
                f"--model.attention.core {linear}",
                "the same result, if the core supports the mask (see heedful cores)",
                min(2 * scores * layers, activations),
            )
        )
    if sizes["data"] > 1:
        fsdp = sizes["data"] * sizes["fsdp"]
        state = memory.parameters + memory.moments + gradients
        advice.append(
            Advice(
                f"--train.mesh.fsdp {fsdp}",
                "the same update; each step gathers the parameters",
                state * (1 - 1 / sizes["data"]),
            )
        )
    if rows > 1:
        parts = next(n for n in range(2, rows + 1) if rows % n == 0)
        advice.append(
            Advice(
                f"--train.accumulate {train.accumulate * parts}",
                "the same update, in smaller parts",
                activations * (1 - 1 / parts),
            )
        )
    if model.remat != "full":
        advice.append(
            Advice(
                "--model.remat full",
                "the same update, up to a third more time",
                activations * (1 - 2 / max(model.layers, 2)),
            )
        )
    if rows > 1:
        advice.append(
            Advice(
                f"--data.batch-tokens {data.batch_tokens // 2}",
                "another update: half the batch",
                activations / 2,
            )
        )
    return sorted(advice, key=lambda one: one.saves < memory.total / 10)[:3]


def memory_table(memory: Memory, chips: str) -> Table:
    """Return a table of the memory of each chip: used, capacity and left."""
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


def print_advice(advice: list[Advice], console: Console) -> None:
    for one in advice:
        saves = f"saves about {_bytes(one.saves)}"
        console.print(f"  {one.flags}    {one.price}; {saves}")


@contextmanager
def explained(run: Any, devices: Sequence[Any], console: Console) -> Iterator[None]:
    """Turn an out-of-memory error into a TrainError, after printing memory table and advice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).strip().split("\n")[0]
        compiled = compile_step(run.model, run.data, run.train, devices)
        console.print(memory_table(compiled.memory, f"largest batch {compiled.shape}"))
        console.print("to reduce memory, cheapest first:")
        print_advice(memory_advice(run.model, run.data, run.train, compiled), console)
        raise TrainError(f"out of memory ({first}): give one of the flags above") from error
