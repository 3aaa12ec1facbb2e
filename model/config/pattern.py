"""Options that may differ between the layers of a stack."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from heedful.model.config.checks import require
from heedful.model.config.positions import RotaryConfig
from heedful.readable import Readable


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerConfig(Readable):
    """One layer of `model.pattern`: the options that differ from those of the model.

    Example:
        >>> import heedful as hf
        >>> hf.ModelConfig(pattern=(hf.LayerConfig(window=16), hf.LayerConfig())).pattern[0].window
        16
    """

    window: int | Literal["all"] | None = None
    """Window of this layer's self-attention; all: no limit; None: model.attention.window."""
    rotary: RotaryConfig | None = None
    """Frequencies of this layer's rotary positions; None: model.positions.rotary."""
    positions: bool = True
    """Apply the positions of the model, a rotation or a bias by distance, in this layer
    (arXiv:2501.18795 has layers without positions)."""

    def __post_init__(self):
        require(
            self.window in (None, "all") or (isinstance(self.window, int) and self.window >= 0),
            f"model.pattern.window = {self.window}: give at least 0, all, or None",
        )
        require(
            self.positions or self.rotary is None,
            "model.pattern.rotary is set, but model.pattern.positions is False: leave one of the "
            "two fields out",
        )

    def __str__(self) -> str:
        """Return the text for the command line: window=16,rotary.base=10000.0, or model."""
        return ",".join(_settings(self, LayerConfig())) or "model"


def _settings(config: Any, default: Any, prefix: str = "") -> Iterator[str]:
    """Yield name=value for each field that is not at its default."""
    for entry in fields(config):
        value, usual = getattr(config, entry.name), getattr(default, entry.name)
        if value != usual and is_dataclass(value):
            yield from _settings(value, type(value)(), f"{prefix}{entry.name}.")
        elif value != usual:
            yield f"{prefix}{entry.name}={value}"
