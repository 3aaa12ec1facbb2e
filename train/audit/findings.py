"""Findings of an audit: leaks, blindness and differing values, each with its positions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

Kind = Literal["leak", "blindness", "difference"]
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest difference due to rounding, relative to the largest value."""


@dataclass(frozen=True)
class Finding:
    """A deviation from what the config declares, with all positions that deviate.

    A leak is a dependence that the config forbids; blindness is a dependence that the config allows
    and the model lacks.

    Example:
        >>> import heedful as hf
        >>> print(hf.Finding("leak", "self-attention", "masks", "position 0 sees position 1"))
        leak: self-attention (masks): position 0 sees position 1
    """

    kind: Kind
    where: str
    """Name of the attention, or of the array of the batch."""
    method: str
    """Method of the audit that has this finding."""
    reason: str
    """Description of the deviation at the first of `positions`."""
    positions: tuple[tuple[int, ...], ...] = ()
    """(row, output, input), or (row, head, output, input) of a mask, or (row, position)."""

    def __str__(self) -> str:
        more = f"; {len(self.positions) - 1:,} more" if len(self.positions) > 1 else ""
        return f"{self.kind}: {self.where} ({self.method}): {self.reason}{more}"


def compare_pairs(
    where: str,
    method: str,
    depends: Bool[np.ndarray, "B *N T S"],
    allowed: Bool[np.ndarray, "B *N T S"],
    queries: np.ndarray,
    keys: np.ndarray,
    *,
    can_be_blind: bool = True,
) -> Iterator[Finding]:
    """Yield leaks and blindness: deviations of `depends` from `allowed`.

    `queries` [B, T] and `keys` [B, S] are segment ids. B rows, N heads, T queries, S keys.
    """
    for kind, wrong in (("leak", depends & ~allowed), ("blindness", allowed & ~depends)):
        positions = tuple(map(tuple, np.argwhere(wrong).tolist()))
        if not positions or (kind == "blindness" and not can_be_blind):
            continue
        b, *head, t, s = positions[0]
        is_pooled = depends.shape[-2] == 1 < depends.shape[-1]
        query = "the output" if is_pooled else f"position {t}"
        of_head = f", head {head[0]}," if head and depends.shape[1] > 1 else ""
        reason = f"{query} of row {b}{of_head} "
        if kind == "leak":
            own = 0 if is_pooled else int(queries[b, t])
            why = _relation(own, int(keys[b, s]), s - t)
            reason += f"sees position {s}, which {'is not pooled' if is_pooled else why}"
        else:
            reason += f"does not see position {s}"
        yield Finding(kind, where, method, reason, positions)  # type: ignore[arg-type]


def _relation(query: int, key: int, ahead: int) -> str:
    """Describe why a query must not see a key."""
    if key == 0:
        return "is padding"
    if query == 0:
        return "is not padding, as the query is"
    if query != key:
        return "is of another document"
    return "comes later" if ahead > 0 else "is outside the window"


def finding_at(
    where: str, method: str, wrong: Bool[np.ndarray, "B T"], reason: str, kind: Kind = "difference"
) -> Iterator[Finding]:
    """Yield one finding if any position is wrong."""
    positions = tuple(map(tuple, np.argwhere(wrong).tolist()))
    if positions:
        b, t = positions[0]
        yield Finding(kind, where, method, f"{reason}: position {t} of row {b}", positions)


def is_different(a: np.ndarray, b: np.ndarray, dtype: str) -> Bool[np.ndarray, "*n"]:
    """Tell which vectors differ by more than rounding."""
    scale = max(float(np.abs(b).max(initial=0)), 1e-6)
    wrong = ~(np.abs(a - b) <= TOLERANCE[dtype] * scale)  # NaN differs from everything.
    return np.asarray(wrong.any(-1))
