"""Pictures of masks: block characters for terminals, and a PNG for notebooks."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from heedful.model.config import ModelError

MAY, SOME, MAY_NOT = "██", "▒▒", "··"
SHADES = (237, 166, 77)
"""Grey of pairs that no head, some heads, and all heads may use; as in pictures of an audit."""
PNG_SIZE = 256
"""Smallest width of a PNG in pixels, if all cells are at least one pixel wide."""


def as_text(pairs: Bool[np.ndarray, "n T S"]) -> str:
    """Return one line for each query: ██ all heads may attend to the key, ▒▒ some, ·· none."""
    marks = np.where(pairs.all(0), MAY, np.where(pairs.any(0), SOME, MAY_NOT))
    return "\n".join(map("".join, marks.tolist()))


def as_png(pairs: Bool[np.ndarray, "n T S"]) -> bytes:
    """Return a PNG with a cell for each pair: queries down, keys across, dark: may attend."""
    from PIL import Image

    none, some, every = SHADES
    shades = np.where(pairs.all(0), every, np.where(pairs.any(0), some, none)).astype(np.uint8)
    cell = max(1, PNG_SIZE // max(shades.shape))
    cells = np.kron(shades, np.ones((cell, cell), np.uint8))
    if cell >= 6:  # White lines between the cells.
        cells[::cell], cells[:, ::cell] = 255, 255
    png = BytesIO()
    Image.fromarray(cells).save(png, format="png", optimize=True)
    return png.getvalue()


class MaskPicture:
    """The picture of a mask: block characters as text, and a PNG in a notebook.

    pairs: True where a query may attend to a key, bool [n, T, S]: n heads (1 if all heads have the
    same mask), T queries, S keys.

    Example:
        >>> import numpy as np, heedful as hf
        >>> hf.MaskPicture(np.array([[[True, False], [True, True]]]))
        ██··
        ████
    """

    def __init__(self, pairs: Bool[np.ndarray, "n T S"]):
        self.pairs = pairs

    def __repr__(self) -> str:
        return as_text(self.pairs)

    def _repr_png_(self) -> bytes:
        return as_png(self.pairs)

    def save(self, path: str | Path) -> None:
        """Write the picture as a PNG file; an existing file is replaced."""
        Path(path).write_bytes(as_png(self.pairs))


def show(mask: Any, length: int, kv_length: int | None = None, *, row: int = 0) -> MaskPicture:
    """Return the picture of an `AttentionMask`, for printing, or as the last line of a cell.

    `length` is the number T of queries, `kv_length` the number S of keys (None: T), `row` the row
    of the batch. Queries are drawn down, keys across: ██ all heads may attend to the key, ▒▒ some
    heads, ·· none. Raises ModelError for lengths that the mask was not made for, and for a row that
    it lacks.

    Example:
        >>> import heedful as hf
        >>> hf.show(hf.masks.causal() & hf.masks.sliding(1, 0), 4)
        ██······
        ████····
        ··████··
        ····████
    """
    if not hasattr(mask, "to_bool"):
        raise ModelError(
            f"mask is {type(mask).__name__}, not an AttentionMask: make one with heedful.masks"
        )
    try:
        pairs = np.asarray(mask.to_bool(length, length if kv_length is None else kv_length))
    except ValueError as error:
        raise ModelError(str(error)) from error
    if len(pairs) > 1 and not 0 <= row < len(pairs):
        raise ModelError(f"row = {row}: the mask has {len(pairs)} rows; give 0 to {len(pairs) - 1}")
    return MaskPicture(pairs[row if len(pairs) > 1 else 0])
