"""`heedful plan`: memory, collectives and a lower bound on the time of a training step."""

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
from heedful.train.inspection.costs import BACKWARD, parts
from heedful.train.inspection.inspect import complete, describe, number
from heedful.train.plan.chips import Chip, chip_of
from heedful.train.plan.collectives import Collective, collectives, seconds
from heedful.train.plan.compiled import Compiled, compile_step
from heedful.train.plan.hlo import Program
from heedful.train.plan.oom_advice import memory_advice, memory_table, print_advice
from heedful.train.plan.roofline import Roofline, milliseconds, roofline
from heedful.train.plan.topology import devices_of
from heedful.train.plan.work import (
    InstructionCost,
    instruction_costs,
    kernels_without_flops,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A compiled step, its collectives, FLOPs and estimated time."""

    compiled: Compiled
    exchanges: list[Collective]
    flops: float
    """FLOPs of all chips in the compiled program, recomputation included."""
    model_flops: float
    """FLOPs of the model: three forward passes, without scores that a causal mask excludes."""
    roofline: Roofline | None
    """Estimated time; None: the step does not fit, or the chip is unknown."""
    unknown_loops: int
    """Number of loops with an unknown trip count, which count once."""

    def utilisation(self, chip: Chip) -> float:
        """Return an upper bound on the model FLOPs utilisation (arXiv:2204.02311 appendix B)."""
        assert self.roofline is not None
        return self.model_flops / (self.compiled.mesh.size * chip.flops * self.roofline.step)


def make_plan(
    model: ModelConfig, data: DataConfig, train: TrainConfig, devices: Sequence[Any]
) -> Plan:
    """Compile the step and analyse its program."""
    chip = chip_of(devices[0])
    compiled = compile_step(model, data, train, devices, capacity(chip, devices))
    exchanges, costs, unknown = [], [], 0
    if compiled.text is not None:
        program = Program(compiled.text)
        exchanges = collectives(program, len(devices))
        costs = list(instruction_costs(program))
        unknown = program.loops_of_unknown_length
        if kernels_without_flops(program):
            costs.append(attention_kernels(model, data, compiled))
    time = None
    if chip is not None and costs:
        time = roofline(costs, exchanges, chip, coordinates(compiled))
    return Plan(
        compiled=compiled,
        exchanges=exchanges,
        flops=len(devices) * sum((one.flops * one.times for one in costs), 0.0),
        model_flops=flops_of_model(model, data, compiled),
        roofline=time,
        unknown_loops=unknown,
    )


def coordinates(compiled: Compiled) -> list[tuple[int, ...]]:
    """Return the coordinates in the torus of each device of the mesh."""
    return [tuple(getattr(d, "coords", ())) for d in compiled.mesh.devices.flat]


def flops_of_model(model: ModelConfig, data: DataConfig, compiled: Compiled) -> float:
    """Return the FLOPs of a step on rows without padding (arXiv:2204.02311 appendix B)."""
    forward = 0.0
    for part in parts(model, compiled.setup.abstract.params, data.max_length):
        forward += part.flops - part.masked
    return forward * (1 + BACKWARD) * compiled.shape.rows * compiled.shape.lengths[-1]


def attention_kernels(model: ModelConfig, data: DataConfig, compiled: Compiled) -> InstructionCost:
    """Estimate the FLOPs per chip of the attention scores in a step.

    This is for Pallas kernels whose FLOPs the compiled program does not give. The backward pass
    recomputes the scores and takes 2.5 times the FLOPs of the forward pass (arXiv:2205.14135 §3.1);
    `model.remat` adds one more forward pass.
    """
    scores = 0.0
    for part in parts(model, compiled.setup.abstract.params, data.max_length):
        if part.name.endswith("scores"):
            scores += part.flops - part.masked
    tokens = compiled.shape.rows * compiled.shape.lengths[-1] / compiled.mesh.size
    passes = 3.5 + (model.remat != "none")
    return InstructionCost("attention kernels", scores * passes * tokens, 0, 1)


def capacity(chip: Chip | None, devices: Sequence[Any]) -> int | None:
    """Return the bytes that a program can use on each device; None: unknown."""
    if devices[0].platform == "cpu":  # CPU devices share the machine's memory.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    # A present device states jax's limit, by default three quarters of a GPU's memory.
    is_present = devices[0] in jax.devices()
    limit = (devices[0].memory_stats() or {}).get("bytes_limit") if is_present else None
    return limit or (chip and chip.memory)


def print_model(title: str, model: ModelConfig, data: DataConfig, console: Console) -> ModelConfig:
    """Print a description of the model; return the model with the sizes that its data would set."""
    model, notes = complete(model, data)
    for line in (f"{title}: {describe(model)}", *notes):
        console.print(line)
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
    """Print the plan; return True if the step fits."""
    devices = devices_of(topology)
    model = print_model(title, model, data, console)
    result = make_plan(model, data, train, devices)
    compiled, memory = result.compiled, result.compiled.memory
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
        console.print(f"does not fit: {over}B too much. To reduce memory, cheapest first:")
        print_advice(memory_advice(model, data, train, compiled), console)
    if result.exchanges:
        console.print(_exchange_table(result.exchanges, chip, compiled))
    if compiled.text is not None:
        _print_time(result, chip, console)
    if memory.fits:
        console.print("fits")
    return memory.fits


def _exchange_table(exchanges: list[Collective], chip: Chip | None, compiled: Compiled) -> Table:
    table = Table(title="exchanges (collectives) of each chip in a step")
    table.title_justify = table.caption_justify = "left"
    table.caption = (
        "group: number of chips; bytes: sent by each chip, with ring algorithms; overlapped: share "
        "of the bytes that the compiler sends while other instructions run"
    )
    for name in ("collective", "group", "times", "bytes", "overlapped", "time"):
        table.add_column(name, justify="left" if name == "collective" else "right")
    positions = coordinates(compiled)
    groups: dict[tuple[str, int], list[Collective]] = {}
    for one in exchanges:
        groups.setdefault((one.kind, len(one.group)), []).append(one)
    for (kind, size), some in sorted(groups.items()):
        sent = sum(one.sent * one.times for one in some)
        overlapped = sum(one.sent * one.times for one in some if one.is_async)
        time = sum(seconds(one, chip, positions) * one.times for one in some) if chip else None
        table.add_row(
            kind,
            "pairs" if kind == "collective-permute" else f"{size:,}",
            f"{sum(one.times for one in some):,}",
            number(sent, 1024) + "B",
            f"{overlapped / sent:.0%}" if sent else "",
            "" if time is None else milliseconds(time),
        )
    return table


def _print_time(result: Plan, chip: Chip | None, console: Console) -> None:
    ratio = f" ({result.flops / result.model_flops:.2f} x)" if result.model_flops else ""
    console.print(
        f"arithmetic per step: {number(result.model_flops)}FLOPs of the model, "
        f"{number(result.flops)}FLOPs as compiled{ratio}"
    )
    if result.unknown_loops:
        console.print(f"{result.unknown_loops} loops of unknown length are counted once")
    time = result.roofline
    if chip is None or time is None:
        console.print("no estimate of time: train/plan/chips.py does not list this device")
        return
    tokens = result.compiled.shape.rows * result.compiled.shape.lengths[-1]
    console.print(
        f"at least {milliseconds(time.step)} per step: compute {milliseconds(time.compute)}, "
        f"memory bandwidth {milliseconds(time.memory)}, waiting for the interconnect "
        f"{milliseconds(time.waiting)} (overlapped {milliseconds(time.hidden)})\n"
        f"bottleneck: {time.bottleneck}; {tokens / time.step:,.0f} tokens/s; utilisation at most "
        f"{result.utilisation(chip):.1%} (an estimate from the compiled program, not a measurement)"
    )
