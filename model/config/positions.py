"""Options of position signals."""

from dataclasses import dataclass, field
from typing import Literal

from heedful.model.config.checks import require, require_choices, require_idle
from heedful.readable import Readable


@dataclass(frozen=True, kw_only=True, repr=False)
class RotaryConfig(Readable):
    """Frequencies of rotary positions.

    Example:
        >>> import heedful as hf
        >>> hf.RotaryConfig(base=500_000)
        RotaryConfig(base=500000)
    """

    base: float = 10_000.0
    """Base of the wavelengths 2 pi base^(2i/H)."""
    scaling: Literal["none", "linear", "llama3"] = "none"
    """linear: divide all positions by `factor` (arXiv:2306.15595); llama3: divide them for long
    wavelengths only (LLaMA 3.1)."""
    factor: float = 1.0
    """Number by which positions are divided: longest input / original longest input."""
    low_frequency_factor: float = 1.0
    """For llama3: wavelengths above original_length / this factor are scaled in full."""
    high_frequency_factor: float = 4.0
    """For llama3: wavelengths below original_length / this factor are not scaled."""
    original_length: int = 8192
    """For llama3: length of the longest input before the scaling."""

    def __post_init__(self):
        require_choices("model.positions.rotary", self)
        for name in ("base", "factor", "low_frequency_factor", "original_length"):
            value = getattr(self, name)
            require(value > 0, f"model.positions.rotary.{name} must be positive, not {value}")
        require(
            self.high_frequency_factor > self.low_frequency_factor,
            f"model.positions.rotary.high_frequency_factor = {self.high_frequency_factor} must be "
            f"above model.positions.rotary.low_frequency_factor = {self.low_frequency_factor}",
        )
        require(
            self.scaling != "none" or self.factor == 1,
            f"model.positions.rotary.factor = {self.factor} needs model.positions.rotary.scaling "
            "linear or llama3, not none: set it, or leave the factor out",
        )
        require(
            self.scaling == "none" or self.factor != 1,
            f"model.positions.rotary.scaling = {self.scaling} needs model.positions.rotary.factor "
            "other than 1: set the factor, or leave the scaling out",
        )
        if self.scaling != "llama3":
            names = "low_frequency_factor", "high_frequency_factor", "original_length"
            need = f"model.positions.rotary.scaling llama3, not {self.scaling}"
            require_idle("model.positions.rotary", self, names, need)


@dataclass(frozen=True, kw_only=True, repr=False)
class PositionConfig(Readable):
    """Position signals, which tell the model the order of its input.

    Example:
        >>> import heedful as hf
        >>> hf.PositionConfig(kind="rotary")
        PositionConfig(kind='rotary')
    """

    kind: Literal["none", "sinusoidal", "learned", "rotary", "alibi", "relative"] = "sinusoidal"
    """none, sinusoidal (arXiv:1706.03762 §3.5), learned (arXiv:1705.03122), rotary
    (arXiv:2104.09864), alibi (arXiv:2108.12409) or relative, T5's bias (arXiv:1910.10683 §2.1)."""
    learned: bool = False
    """For relative: add learned positions to the embeddings, too (MPNet, arXiv:2004.09297)."""
    max_length: int = 512
    """Number of learned positions, the longest input that is accepted. Other kinds of positions
    only write this number to exported files."""
    buckets: int = 32
    """For relative: number of buckets of distances. Half of the buckets have one distance each; the
    ranges of the other buckets grow exponentially."""
    max_distance: int = 128
    """For relative: all distances from this number on share the last bucket."""
    rotary: RotaryConfig = field(default_factory=RotaryConfig)

    def __post_init__(self):
        require_choices("model.positions", self)
        for name in ("max_length", "buckets", "max_distance"):
            value = getattr(self, name)
            require(value > 0, f"model.positions.{name} must be positive, not {value}")
        require(
            self.buckets % 4 == 0 and self.max_distance > self.buckets // 2,
            f"model.positions.buckets = {self.buckets} must be a multiple of 4, and "
            f"model.positions.max_distance = {self.max_distance} must be above half of the "
            f"buckets, {self.buckets // 2}",
        )
        if self.kind != "relative":
            need = f"model.positions.kind relative, not {self.kind}"
            require_idle("model.positions", self, ("learned", "buckets", "max_distance"), need)
        require(
            self.kind == "rotary" or self.rotary == RotaryConfig(),
            f"model.positions.rotary is set, but model.positions.kind is {self.kind}: set the kind "
            "to rotary, or leave model.positions.rotary out",
        )

    @property
    def has_table(self) -> bool:
        """True if the embeddings get learned positions, which end at `max_length`."""
        return self.kind == "learned" or self.learned
