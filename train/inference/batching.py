"""Batches of token sequences of different lengths, in arrays of few different shapes."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from heedful.train.config import DecodeConfig
from heedful.train.errors import TrainError
from heedful.train.sharding import RULES, place

SHORTEST = 16  # Lengths are 16, 32, 64, ...; each needs a compilation.


class PromptBatch(NamedTuple):
    """B sequences from position 0 on, padded with 0 on the right; unused rows have length 0."""

    inputs: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    lines: UInt32[Array, " B"]
    """Index of each sequence; its random key depends on this index, not on the other sequences."""


def require_length(what: str, length: int, decode: DecodeConfig) -> None:
    """Raise TrainError if a text has more than decode.batch_tokens tokens.

    Attention takes time quadratic in the length. `what` names the text in the message.
    """
    if length > decode.batch_tokens:
        raise TrainError(
            f"{what} has {length:,} tokens, more than decode.batch_tokens = "
            f"{decode.batch_tokens:,}: split the text, or raise decode.batch_tokens"
        )


def batches(
    sequences: Mapping[int, np.ndarray],
    decode: DecodeConfig,
    mesh: Mesh,
    longest: int | None = None,
) -> Iterator[tuple[list[int], PromptBatch]]:
    """Yield (indices of sequences, their rows on the devices), sorted by length.

    A batch has at most `decode.batch_tokens` positions, but at least one row per device; a row has
    at most `longest` positions (None: no limit). On a CPU the hypotheses of a beam count as rows: a
    CPU computes finished rows too, and in small batches fewer of them wait for the last row.
    """
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    positions = decode.batch_tokens // (decode.beam if is_cpu else 1)
    sharding = NamedSharding(mesh, PartitionSpec(RULES["act_batch"]))
    sizes = {i: len(sequence) for i, sequence in sequences.items()}
    for chosen, count, length in shapes(sizes, positions, mesh, longest):
        inputs = np.zeros((count, length), np.int32)
        lengths, lines = np.zeros(count, np.int32), np.zeros(count, np.uint32)
        for row, i in enumerate(chosen):
            inputs[row, : len(sequences[i])] = sequences[i]
            lengths[row], lines[row] = sizes[i], i
        yield chosen, PromptBatch(*(place(x, sharding) for x in (inputs, lengths, lines)))


def shapes(
    lengths: Mapping[int, int], positions: int, mesh: Mesh, longest: int | None = None
) -> Iterator[tuple[list[int], int, int]]:
    """Yield (indices of sequences, number of rows, row length) of each batch; see `batches`."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    buckets: dict[int, list[int]] = {}
    for i in sorted(lengths, key=lengths.__getitem__):
        bucket = max(SHORTEST, 1 << (lengths[i] - 1).bit_length())
        buckets.setdefault(min(bucket, longest or bucket), []).append(i)
    for length, numbers in buckets.items():
        count = max(positions // length // devices, 1) * devices
        fewest = 1 << (len(numbers) - 1).bit_length()
        count = min(count, -(-fewest // devices) * devices)
        for start in range(0, len(numbers), count):
            yield numbers[start : start + count], count, length
