"""`heedful plan`: whether a training step fits, what it exchanges and how long it should take."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from heedful.data.config import DataConfig
from heedful.model.config import ModelConfig
from heedful.train.config import TrainConfig
from heedful.train.inspection.costs import BACKWARD, Part, parts
from heedful.train.inspection.inspect import complete, describe, number
from heedful.train.plan.chips import Chip, chip_of
from heedful.train.plan.collectives import Collective, collectives, seconds
from heedful.train.plan.compiled import Compiled, compile_step
from heedful.train.plan.hlo import Program
from heedful.train.plan.oom_advice import memory_table, print_ways, ways_out
from heedful.train.plan.roofline import Roofline, milliseconds, roofline
from heedful.train.plan.topology import devices_of
from heedful.train.plan.work import Work, silent_kernels, work


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One compiled step and what follows from it."""

    compiled: Compiled
    exchanges: list[Collective]
    flops: float
    """Of all chips as compiled, what is computed twice included."""
    useful: float
    """Of the model: three forward passes without the scores that a causal mask hides."""
    roofline: Roofline | None
    """None where it does not fit, or the chip's figures are not known."""
    unknown_loops: int

    def utilisation(self, chip: Chip) -> float:
        """Share of the chips' arithmetic that the model makes use of, if nothing is slower."""
        assert self.roofline is not None
        return self.useful / (self.compiled.mesh.size * chip.flops * self.roofline.step)


def make_plan(
    model: ModelConfig, data: DataConfig, train: TrainConfig, devices: Sequence[Any]
) -> Plan:
    """Compiles the step and reads its program."""
    chip = chip_of(devices[0])
    compiled = compile_step(model, data, train, devices, capacity(chip, devices))
    exchanges, works, unknown = [], [], 0
    if compiled.text is not None:
        program = Program(compiled.text)
        exchanges, works = collectives(program, len(devices)), list(work(program))
        unknown = program.loops_of_unknown_length
        if silent_kernels(program):
            works.append(attention_kernels(model, data, compiled))
    time = None
    if chip is not None and works:
        time = roofline(works, exchanges, chip, coordinates(compiled))
    return Plan(
        compiled=compiled,
        exchanges=exchanges,
        flops=len(devices) * sum((one.flops * one.times for one in works), 0.0),
        useful=useful_flops(model, data, compiled),
        roofline=time,
        unknown_loops=unknown,
    )


def coordinates(compiled: Compiled) -> list[tuple[int, ...]]:
    """Where each device of the mesh stands in the torus."""
    return [tuple(getattr(d, "coords", ())) for d in compiled.mesh.devices.flat]


def seen_flops(part: Part, model: ModelConfig) -> float:
    """Of a part, per token, without the half of the scores that a causal mask hides."""
    is_causal = part.stack == "decoder" and part.name == "self-attention scores"
    return part.flops / (2 if is_causal and model.attention.window is None else 1)


def useful_flops(model: ModelConfig, data: DataConfig, compiled: Compiled) -> float:
    """Of a step on full rows (arXiv:2204.02311 appendix B), half the scores where causal."""
    forward = 0.0
    for part in parts(model, compiled.setup.abstract.params, data.max_length):
        forward += seen_flops(part, model)
    return forward * (1 + BACKWARD) * compiled.shape.rows * compiled.shape.lengths[-1]


def attention_kernels(model: ModelConfig, data: DataConfig, compiled: Compiled) -> Work:
    """The scores of a step on each chip, for kernels that do not state their arithmetic.

    Backward they are computed again, and then take two and a half times as much (arXiv:2205.14135
    §3.1); with `model.remat` once more.
    """
    scores = 0.0
    for part in parts(model, compiled.setup.abstract.params, data.max_length):
        if part.name.endswith("scores"):
            scores += seen_flops(part, model)
    tokens = compiled.shape.rows * compiled.shape.lengths[-1] / compiled.mesh.size
    passes = 3.5 + (model.remat != "none")
    return Work("attention kernels", scores * passes * tokens, 0, 1)


def capacity(chip: Chip | None, devices: Sequence[Any]) -> int | None:
    """Bytes that a program may use of each device."""
    if devices[0].platform == "cpu":  # the devices of a machine share its memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    # A device that is there says what jax may take of it, three quarters of a GPU unless told.
    there = devices[0] in jax.devices()
    limit = (devices[0].memory_stats() or {}).get("bytes_limit") if there else None
    return limit or (chip and chip.memory)


def print_model(title: str, model: ModelConfig, data: DataConfig, console: Console) -> ModelConfig:
    """Says what is planned, and returns it with the numbers that data would give it."""
    model, notes = complete(model, data)
    for line in (f"{title}: {describe(model)}", *notes):
        console.print(line, markup=False)
    return model


def plan(
    title: str,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    console: Console,
    *,
    topology: str | None,
) -> bool:
    """Prints the plan; True if it fits."""
    devices = devices_of(topology)
    model = print_model(title, model, data, console)
    found = make_plan(model, data, train, devices)
    compiled, memory = found.compiled, found.compiled.memory
    chip = chip_of(devices[0])
    sizes = ", ".join(f"{axis} {size}" for axis, size in compiled.mesh.shape.items())
    console.print(
        f"{len(devices):,} x {devices[0].device_kind} (mesh: {sizes}), batch {compiled.shape}, "
        f"model.remat {model.remat}; compiled in {compiled.seconds:.0f} s\n"
    )
    console.print(memory_table(memory, f"{devices[0].device_kind}"))
    if not memory.fits:
        assert memory.capacity is not None
        over = number(memory.total - memory.capacity, 1024)
        console.print(f"does not fit: {over}B too much. The cheapest ways out:")
        print_ways(ways_out(model, data, train, compiled), console)
    if found.exchanges:
        console.print(_exchange_table(found.exchanges, chip, compiled))
    if compiled.text is not None:
        _print_time(found, chip, console)
    if memory.fits:
        console.print("fits")
    return memory.fits


def _exchange_table(exchanges: list[Collective], chip: Chip | None, compiled: Compiled) -> Table:
    table = Table(title="exchanges of each chip in a step")
    table.title_justify = table.caption_justify = "left"
    table.caption = (
        "bytes that a chip sends, by ring algorithms; what stands in a loop counts as often as the "
        "loop runs; beside: those that the compiler lets other work go on with"
    )
    for name in ("what", "among", "times", "bytes", "beside", "time"):
        table.add_column(name, justify="left" if name == "what" else "right")
    places = coordinates(compiled)
    groups: dict[tuple[str, int], list[Collective]] = {}
    for one in exchanges:
        groups.setdefault((one.kind, len(one.group)), []).append(one)
    for (kind, size), some in sorted(groups.items()):
        sent = sum(one.sent * one.times for one in some)
        beside = sum(one.sent * one.times for one in some if one.is_async)
        time = sum(seconds(one, chip, places) * one.times for one in some) if chip else None
        table.add_row(
            kind,
            "pairs" if kind == "collective-permute" else f"{size:,}",
            f"{sum(one.times for one in some):,}",
            number(sent, 1024) + "B",
            f"{beside / sent:.0%}" if sent else "",
            "" if time is None else milliseconds(time),
        )
    return table


def _print_time(found: Plan, chip: Chip | None, console: Console) -> None:
    again = f"{found.flops / found.useful:.2f} x the model's" if found.useful else ""
    console.print(
        f"arithmetic: {number(found.useful)}FLOPs a step of the model, {number(found.flops)}FLOPs "
        f"as compiled ({again})"
    )
    if found.unknown_loops:
        console.print(f"{found.unknown_loops} loops of unknown length count once")
    time = found.roofline
    if chip is None or time is None:
        console.print("no time is estimated: train/plan/chips.py has no figures of this device")
        return
    tokens = found.compiled.shape.rows * found.compiled.shape.lengths[-1]
    console.print(
        f"at least {milliseconds(time.step)} a step: compute {milliseconds(time.compute)}, memory "
        f"bandwidth {milliseconds(time.memory)}, waiting for the interconnect "
        f"{milliseconds(time.waiting)} (beside other work {milliseconds(time.hidden)})\n"
        f"bottleneck: {time.bottleneck}; {tokens / time.step:,.0f} tokens/s; utilisation at most "
        f"{found.utilisation(chip):.1%} (an estimate from the compiled program, not a measurement)"
    )
