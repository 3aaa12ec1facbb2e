"""Figures of chips, as their makers publish them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What one device can do; bytes are bytes and times are seconds."""

    name: str
    kind: str
    """What its jax device calls itself (`device_kind`)."""
    flops: float
    """Of bfloat16 matrix products, a second."""
    memory: int
    """Bytes that a program may use."""
    bandwidth: float
    """Bytes a second between the chip and its memory."""
    link: float
    """Bytes a second to one neighbour, one way; of a GPU to all others of its host together."""
    wraps: int = 0
    """An axis of the torus closes to a ring when its length is a multiple of this; 0: no torus."""


GIB = 2.0**30

# TPUs: compute and memory from https://cloud.google.com/tpu/docs/v5e, /v5p and /v6e; links and
# where they close to rings from https://jax-ml.github.io/scaling-book/tpus. The memory that a
# program may use is less than the chip's: it is what libtpu's compiler gives as its limit.
# GPUs: the data sheets of NVIDIA A100 80GB SXM, H100 SXM and H200 SXM (dense, not sparse, rates;
# links of one host).
CHIPS = (
    Chip(
        name="v5e", kind="TPU v5 lite", flops=197e12, memory=int(15.75 * GIB),
        bandwidth=8.19e11, link=4.5e10, wraps=16,
    ),
    Chip(
        name="v5p", kind="TPU v5", flops=459e12, memory=int(95.74 * GIB),
        bandwidth=2.765e12, link=9e10, wraps=4,
    ),
    Chip(
        name="v6e", kind="TPU v6 lite", flops=918e12, memory=int(31.25 * GIB),
        bandwidth=1.638e12, link=9e10, wraps=16,
    ),
    Chip(
        name="a100", kind="NVIDIA A100-SXM4-80GB", flops=312e12, memory=80 * 10**9,
        bandwidth=2.039e12, link=3e11,
    ),
    Chip(
        name="h100", kind="NVIDIA H100 80GB HBM3", flops=989e12, memory=80 * 10**9,
        bandwidth=3.35e12, link=4.5e11,
    ),
    Chip(
        name="h200", kind="NVIDIA H200", flops=989e12, memory=141 * 10**9,
        bandwidth=4.8e12, link=4.5e11,
    ),
)  # fmt: skip


def chip_of(device: Any) -> Chip | None:
    """The figures of a jax device; None where the table has none."""
    kind = device.device_kind
    return next((chip for chip in CHIPS if kind in (chip.kind, f"{chip.kind}p")), None)
