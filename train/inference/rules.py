"""Convert a DecodeConfig to arguments of `heedful.model.decoding`."""

from typing import Any

from heedful.model.decoding.sampling import Sampling
from heedful.train.config import DecodeConfig


def sampling(decode: DecodeConfig) -> Sampling:
    """Return the settings of sampling, for decoding without beam search."""
    return Sampling(**{name: getattr(decode, name) for name in Sampling._fields})


def beam(decode: DecodeConfig) -> dict[str, Any]:
    """Return the arguments of `beam_search` that decide which hypotheses are kept."""
    return {
        "width": decode.beam,
        "exponent": decode.length_penalty,
        "offset": decode.length_penalty_offset,
        "early_stopping": decode.early_stopping,
        "repetition_penalty": decode.repetition_penalty,
        "never": decode.never,
    }
