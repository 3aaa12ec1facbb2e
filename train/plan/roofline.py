"""Lower bound on the time of a step, and its bottleneck."""

from collections.abc import Sequence
from dataclasses import dataclass

from heedful.train.plan.chips import Chip
from heedful.train.plan.collectives import Collective, seconds
from heedful.train.plan.work import InstructionCost


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of a step on each chip by the roofline model (doi:10.1145/1498765.1498785)."""

    compute: float
    """Time of instructions that are bound by arithmetic."""
    memory: float
    """Time of instructions that are bound by memory bandwidth."""
    hidden: float
    """Time of collectives that overlap with other instructions."""
    exposed: float
    """Time of collectives that overlap with nothing."""

    @property
    def step(self) -> float:
        return max(self.compute + self.memory, self.hidden) + self.exposed

    @property
    def waiting(self) -> float:
        """Time in which only collectives run."""
        return self.step - self.compute - self.memory

    @property
    def bottleneck(self) -> str:
        shares = {
            "compute": self.compute,
            "memory bandwidth": self.memory,
            "interconnect": self.waiting,
        }
        return max(shares, key=lambda name: shares[name])


def roofline(
    costs: Sequence[InstructionCost],
    exchanges: Sequence[Collective],
    chip: Chip,
    coordinates: Sequence[tuple[int, ...]],
) -> Roofline:
    """Add up the time of all instructions: for each, the longer of compute and memory traffic."""
    compute = memory = hidden = exposed = 0.0
    for cost in costs:
        arithmetic, traffic = cost.flops / chip.flops, cost.bytes / chip.bandwidth
        if arithmetic >= traffic:
            compute += arithmetic * cost.times
        else:
            memory += traffic * cost.times
    for exchange in exchanges:
        time = seconds(exchange, chip, coordinates) * exchange.times
        if exchange.is_async:
            hidden += time
        else:
            exposed += time
    return Roofline(compute=compute, memory=memory, hidden=hidden, exposed=exposed)


def milliseconds(time: float) -> str:
    """Format seconds as milliseconds with three digits or more."""
    return f"{time * 1e3:,.0f} ms" if time >= 0.1 else f"{time * 1e3:.3g} ms"
