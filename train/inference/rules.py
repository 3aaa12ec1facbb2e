"""The rules of decoding that a DecodeConfig sets, as `heedful.model.decoding` takes them."""

from typing import Any

from heedful.model.decoding.sampling import Sampling
from heedful.train.config import DecodeConfig


def sampling(decode: DecodeConfig) -> Sampling:
    """Return how the next token is chosen without a beam."""
    return Sampling(**{name: getattr(decode, name) for name in Sampling._fields})


def beam(decode: DecodeConfig) -> dict[str, Any]:
    """Return the arguments of `beam_search` that say which hypotheses it keeps."""
    return {
        "width": decode.beam,
        "exponent": decode.length_penalty,
        "offset": decode.length_penalty_offset,
        "early_stopping": decode.early_stopping,
        "repetition_penalty": decode.repetition_penalty,
        "never": decode.never,
    }
