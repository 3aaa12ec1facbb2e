"""The batch contract: names, types and meaning of the arrays that a model gets."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from heedful.data.errors import DataError


class Field(NamedTuple):
    """An array of a batch."""

    dtype: type[np.generic]
    meaning: str


# Arrays are [B, T] (rows, positions), those of the encoder [B, S], unless the meaning says [B].
# Padding is 0 in all arrays: positions at the end of a row, and whole rows at the end of a batch.
FIELDS = {
    "inputs": Field(np.int32, "token ids for the decoder, or for the only stack"),
    "targets": Field(
        np.int32,
        "token ids to predict, position by position (already shifted); "
        "[B] the class of a row, or the number to predict (float32)",
    ),
    "weights": Field(np.float32, "weight of each target in the loss; 0 for no target"),
    "segment_ids": Field(np.int32, "number of the example within its row, from 1; 0 is padding"),
    "positions": Field(np.int32, "position of the token within its example, from 0"),
    "type_ids": Field(np.int32, "0 in the first text of an example, 1 in the second"),
    "prefix_len": Field(np.int32, "[B] length of the prefix that all positions attend to"),
    "encoder_inputs": Field(np.int32, "token ids for the encoder"),
    "encoder_segment_ids": Field(np.int32, "like segment_ids, for encoder_inputs"),
    "encoder_positions": Field(np.int32, "like positions, for encoder_inputs"),
}
# Arrays of each side of the model. The side is a prefix of these names: empty for the decoder or
# the only stack, `encoder_` for the encoder, or another prefix that an objective declares.
PER_SIDE = ("inputs", "segment_ids", "positions", "type_ids")
PER_ROW = ("prefix_len",)  # These arrays are [B]; targets and weights also are, if per row.


def pad_and_stack(
    rows: Sequence[Mapping[str, np.ndarray]],
    n_rows: int,
    length: int,
    encoder_length: int | None = None,
) -> dict[str, np.ndarray]:
    """Stack unpadded rows of arrays [T <= length] or [] into arrays [n_rows, length] or [n_rows].

    Arrays of a side with a prefix, such as `encoder_`, are [n_rows, encoder_length]; None: as
    `length`. `rows` has 1 to `n_rows` rows; the remaining rows are padding. Missing segment ids
    become 1, missing positions count from 0, and missing weights become 1.
    """
    batch = {}
    for name, values in rows[0].items():
        shape = n_rows, (side(name) and encoder_length) or length
        batch[name] = np.zeros(shape[: 1 + values.ndim], values.dtype)
    for i, row in enumerate(rows):
        for name, values in row.items():
            if values.ndim:
                batch[name][i, : len(values)] = values
            else:
                batch[name][i] = values
    for inputs in [name for name in batch if name.endswith("inputs")]:
        ids = f"{side(inputs)}segment_ids"
        if ids not in batch:
            lengths = np.zeros((n_rows, 1), np.int32)
            lengths[: len(rows), 0] = [len(row[inputs]) for row in rows]
            positions = np.arange(batch[inputs].shape[1], dtype=np.int32)
            batch[ids] = (positions < lengths).astype(np.int32)
            batch.setdefault(f"{side(inputs)}positions", positions * batch[ids])
    if "targets" in batch and "weights" not in batch:
        batch["weights"] = (batch["segment_ids"] > 0).astype(np.float32)
    return batch


def side(name: str) -> str:
    """Return the prefix in the name of an array, such as `encoder_` in `encoder_inputs`."""
    base = next((each for each in PER_SIDE if name.endswith(each)), name)
    return name.removesuffix(base)


def check(batch: Mapping[str, np.ndarray]) -> None:
    """Raise DataError with the name of the array if a batch breaks the contract."""
    per_row = set(PER_ROW)
    if "targets" not in batch or batch["targets"].ndim == 1:
        per_row |= {"targets", "weights"}
    for name, array in batch.items():
        field = FIELDS.get(name.removeprefix(side(name)))
        if field is None:
            raise DataError(f"batch has an unknown array {name!r}: add it to batch.FIELDS")
        inputs = f"{side(name)}inputs"
        shape = batch[inputs].shape
        expected = shape[:1] if name in per_row else shape
        if array.shape != expected or len(shape) != 2 or len(array) != len(batch["inputs"]):
            raise DataError(
                f"{name} has shape {array.shape}, but {inputs} has {shape}: give the shapes in "
                "batch.FIELDS"
            )
        is_number = name == "targets" and array.ndim == 1 and array.dtype == np.float32
        if array.dtype != field.dtype and not is_number:
            raise DataError(f"{name} has dtype {array.dtype}: use {field.dtype.__name__}")
        if (array < 0).any() and not is_number:
            raise DataError(
                f"{name} has a negative value: give ids, positions and weights of 0 or more"
            )
        segment_ids = f"{side(name)}segment_ids"
        padding = batch[segment_ids] == 0
        if array[padding[:, 0] if name in per_row else padding].any():
            raise DataError(f"{name} is not 0 at a padding position: set all padding to 0")
        if (np.diff(padding.astype(np.int8), axis=1) < 0).any():
            raise DataError(f"{segment_ids} has padding before a token: pad at the end")
