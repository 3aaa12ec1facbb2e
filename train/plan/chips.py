"""Published specifications of accelerator chips."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Specification of one device, in bytes and seconds."""

    name: str
    kind: str
    """Value of `device_kind` of its jax device."""
    flops: float
    """Peak FLOPs per second of bfloat16 matrix products."""
    memory: int
    """Bytes that a program can use."""
    bandwidth: float
    """Bytes per second between the chip and its memory."""
    link: float
    """Bytes per second in one direction: TPU to one neighbour, GPU to all GPUs of its host."""
    wraps: int = 0
    """An axis of the torus is a ring if its length is a multiple of this; 0: no torus."""


GIB = 2.0**30

# TPUs: compute and bandwidth from https://cloud.google.com/tpu/docs/v5e, /v5p and /v6e; links and
# rings from https://jax-ml.github.io/scaling-book/tpus. The memory is the limit that libtpu's
# compiler states, which is less than the chip has.
# GPUs: data sheets of NVIDIA A100 80GB SXM, H100 SXM and H200 SXM (dense rates; links in one host).
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
    """Return the specification of a jax device, or None for an unknown device."""
    kind = device.device_kind
    return next((chip for chip in CHIPS if kind in (chip.kind, f"{chip.kind}p")), None)
