"""What is wrong: leaks, blindness, and values that differ, each with where and for which pair."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

Kind = Literal["leak", "blindness", "difference"]
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of rounding, as a share of the largest value


@dataclass(frozen=True)
class Finding:
    """Something that is not as declared, and every place where it is not."""

    kind: Kind
    where: str
    """The attention, or the array of the data."""
    how: str
    """In which way it was found."""
    reason: str
    """About the first place."""
    places: tuple[tuple[int, ...], ...] = ()
    """(row, output, input), with the head before the output in a mask; or (row, position)."""

    def __str__(self) -> str:
        more = f"; {len(self.places) - 1:,} more" if len(self.places) > 1 else ""
        return f"{self.kind}: {self.where} ({self.how}): {self.reason}{more}"


def compared(
    where: str,
    how: str,
    seen: Bool[np.ndarray, "B *N T S"],
    may: Bool[np.ndarray, "B *N T S"],
    queries: np.ndarray,
    keys: np.ndarray,
    *,
    can_be_blind: bool = True,
) -> Iterator[Finding]:
    """Leaks and blindness, of positions whose segment ids [B, T] and [B, S] these are."""
    for kind, wrong in (("leak", seen & ~may), ("blindness", may & ~seen)):
        places = tuple(map(tuple, np.argwhere(wrong).tolist()))
        if not places or (kind == "blindness" and not can_be_blind):
            continue
        b, *head, t, s = places[0]
        is_pooled = seen.shape[-2] == 1 < seen.shape[-1]
        query = "the output" if is_pooled else f"position {t}"
        of_head = f", head {head[0]}," if head and seen.shape[1] > 1 else ""
        reason = f"{query} of row {b}{of_head} "
        if kind == "leak":
            own = 0 if is_pooled else int(queries[b, t])
            why = _relation(own, int(keys[b, s]), s - t)
            reason += f"sees position {s}, which {'is not pooled' if is_pooled else why}"
        else:
            reason += f"does not see position {s}"
        yield Finding(kind, where, how, reason, places)  # type: ignore[arg-type]


def _relation(query: int, key: int, ahead: int) -> str:
    """Why a query may not see a key."""
    if key == 0:
        return "is padding"
    if query == 0:
        return "is no padding as it is itself"
    if query != key:
        return "is of another document"
    return "comes later" if ahead > 0 else "is out of reach"


def differing(
    where: str, how: str, wrong: Bool[np.ndarray, "B T"], reason: str, kind: Kind = "difference"
) -> Iterator[Finding]:
    """A finding if anything is wrong."""
    places = tuple(map(tuple, np.argwhere(wrong).tolist()))
    if places:
        b, t = places[0]
        yield Finding(kind, where, how, f"{reason}: position {t} of row {b}", places)


def unlike(a: np.ndarray, b: np.ndarray, dtype: str) -> Bool[np.ndarray, "*n"]:
    """Which vectors differ by more than rounding."""
    scale = max(float(np.abs(b).max(initial=0)), 1e-6)
    wrong = ~(np.abs(a - b) <= TOLERANCE[dtype] * scale)  # NaN differs from all
    return np.asarray(wrong.any(-1))
