"""The batch contract: what the arrays that reach a model are called, hold and mean."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data.config import DataError


class Field(NamedTuple):
    dtype: type[np.generic]
    meaning: str


# Every array is [B, T]. A padding position is 0 in all of them.
FIELDS = {
    "inputs": Field(np.int32, "token ids that the decoder reads"),
    "targets": Field(np.int32, "token ids to predict, position by position (already shifted)"),
    "weights": Field(np.float32, "how much each target counts in the loss; 0 leaves it out"),
    "segment_ids": Field(np.int32, "number of the example within its row, from 1; 0 is padding"),
    "positions": Field(np.int32, "position of the token within its example, from 0"),
    "encoder_inputs": Field(np.int32, "token ids that the encoder reads"),
    "encoder_segment_ids": Field(np.int32, "like segment_ids, for encoder_inputs"),
    "encoder_positions": Field(np.int32, "like positions, for encoder_inputs"),
}


def pad_and_stack(
    rows: Sequence[Mapping[str, np.ndarray]], n_rows: int, length: int
) -> dict[str, np.ndarray]:
    """Stacks unpadded rows of arrays [T <= length] into arrays [n_rows, length].

    `rows` holds at least one row and may hold fewer than `n_rows`; the others stay padding.
    """
    names = rows[0].keys()
    batch = {name: np.zeros((n_rows, length), FIELDS[name].dtype) for name in names}
    for i, row in enumerate(rows):
        for name, values in row.items():
            batch[name][i, : len(values)] = values
    return batch


def check(batch: Mapping[str, np.ndarray]) -> None:
    """Raises DataError when a batch breaks the contract."""
    shapes = {array.shape for array in batch.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise DataError(f"the arrays of a batch have the shapes {shapes}: all must be one [B, T]")
    for name, array in batch.items():
        if name not in FIELDS:
            raise DataError(f"batch has an unknown array {name!r}: add it to batch.FIELDS")
        if array.dtype != FIELDS[name].dtype:
            raise DataError(f"{name} has dtype {array.dtype}: use {FIELDS[name].dtype.__name__}")
        if (array < 0).any():
            raise DataError(f"{name} has a negative value: ids, positions and weights are never so")
        side = "encoder_" if name.startswith("encoder_") else ""
        padding = batch[side + "segment_ids"] == 0
        if array[padding].any():
            raise DataError(f"{name} is not 0 at a padding position: padding must be all 0")
        if (np.diff(padding.astype(np.int8), axis=1) < 0).any():
            raise DataError(f"{side}segment_ids has padding before a token: pad at the end")
