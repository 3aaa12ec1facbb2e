"""How long a step takes at least, and what it waits for."""

from collections.abc import Sequence
from dataclasses import dataclass

from heedful.train.plan.chips import Chip
from heedful.train.plan.collectives import Collective, seconds
from heedful.train.plan.work import Work


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of a step on each chip (doi:10.1145/1498765.1498785)."""

    compute: float
    """Of instructions that the matrix units hold up."""
    memory: float
    """Of those that the memory holds up."""
    hidden: float
    """Of exchanges that go on beside other work."""
    exposed: float
    """Of exchanges that all wait for."""

    @property
    def step(self) -> float:
        return max(self.compute + self.memory, self.hidden) + self.exposed

    @property
    def waiting(self) -> float:
        """For exchanges: those exposed, and those hidden behind too little."""
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
    works: Sequence[Work],
    exchanges: Sequence[Collective],
    chip: Chip,
    coordinates: Sequence[tuple[int, ...]],
) -> Roofline:
    """Each instruction takes as long as its arithmetic or its traffic, whichever is longer."""
    compute = memory = hidden = exposed = 0.0
    for work in works:
        arithmetic, traffic = work.flops / chip.flops, work.bytes / chip.bandwidth
        if arithmetic >= traffic:
            compute += arithmetic * work.times
        else:
            memory += traffic * work.times
    for exchange in exchanges:
        time = seconds(exchange, chip, coordinates) * exchange.times
        if exchange.is_async:
            hidden += time
        else:
            exposed += time
    return Roofline(compute=compute, memory=memory, hidden=hidden, exposed=exposed)


def milliseconds(time: float) -> str:
    """Three digits or more."""
    return f"{time * 1e3:,.0f} ms" if time >= 0.1 else f"{time * 1e3:.3g} ms"
