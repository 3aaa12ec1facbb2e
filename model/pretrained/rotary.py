"""Rotary positions in the config.json of transformers."""

from typing import Any

import numpy as np

from heedful.model.config import ModelConfig, RotaryConfig
from heedful.model.positions import rotary_frequencies
from heedful.model.pretrained.family import is_close
from heedful.model.pretrained.keys import Keys

SCALINGS = ("linear", "llama3")
OF_SCALINGS = frozenset({"factor", "low_freq_factor", "high_freq_factor"})
"""Keys of rope_scaling that only some types of scaling have."""


def read_rotary(
    keys: Keys, longest: int, base: float = 10_000.0, scalings: tuple[str, ...] = SCALINGS
) -> RotaryConfig:
    """Read `rope_theta` and `rope_scaling`, or `rope_parameters` (transformers 5).

    `longest` and `base` are the family's defaults of max_position_embeddings and rope_theta,
    `scalings` the types of scaling that it has.
    """
    given = {key: keys.value(key) for key in ("rope_parameters", "rope_scaling")}
    key = "rope_scaling" if given["rope_scaling"] else "rope_parameters"
    values = given[key] or {}
    if not isinstance(values, dict):
        raise keys.unsupported(key, values, "an object")
    rope = Keys(values, f"{key} in {keys.name}")
    base = rope.get("rope_theta", keys.get("rope_theta", base))
    for where in (keys, rope):
        where.only("partial_rotary_factor", 1.0)
    # As in transformers, the key outside of the object overrides the key in it.
    longest = keys.get("max_position_embeddings", longest)
    length = rope.get("original_max_position_embeddings", longest)
    length = keys.get("original_max_position_embeddings", length)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *scalings):
        raise rope.unsupported("rope_type", kind, " or ".join(("default", *scalings)))
    rope.refuse_others(OF_SCALINGS, {})
    factor = 1.0 if kind == "default" else rope.required("factor", float)
    if factor == 1:  # No scaling.
        return RotaryConfig(base=base)
    if kind == "linear":
        return RotaryConfig(base=base, scaling="linear", factor=factor)
    return RotaryConfig(
        base=base,
        scaling="llama3",
        factor=factor,
        low_frequency_factor=rope.required("low_freq_factor", float),
        high_frequency_factor=rope.required("high_freq_factor", float),
        original_length=length,
    )


def rotary_values(rotary: RotaryConfig) -> dict[str, Any]:
    """Return the values of config.json, which transformers before and after version 5 reads."""
    scaling: dict[str, Any] = {"rope_type": rotary.scaling, "factor": rotary.factor}
    if rotary.scaling == "llama3":
        scaling["low_freq_factor"] = rotary.low_frequency_factor
        scaling["high_freq_factor"] = rotary.high_frequency_factor
        scaling["original_max_position_embeddings"] = rotary.original_length
    return {
        "rope_theta": rotary.base,
        "rope_scaling": None if rotary.scaling == "none" else scaling,
    }


def are_frequencies(values: np.ndarray, config: ModelConfig) -> bool:
    """Return True for the rotary frequencies, scaled or (in older files) unscaled."""
    rotary = config.positions.rotary
    return any(
        is_close(values, rotary_frequencies(config.head_dim, each))
        for each in (rotary, RotaryConfig(base=rotary.base))
    )
