"""Attention masks: the keys to which each query may attend, in a form that every core reads.

An `AttentionMask` holds static values, and arrays with one entry per token: O(B * T) memory in all.
Its method `tile` defines its meaning. Masks are only combined with `&`, so a further mask can only
forbid pairs.

Axes: B rows of the batch, T queries, S keys, g global tokens.

Example:
    >>> import heedful as hf
    >>> hf.masks.causal() & hf.masks.sliding(2, 0)
    AttentionMask(causal=True, window=(2, 0))
    >>> import numpy as np
    >>> print(hf.show(hf.masks.causal() & hf.masks.packed(np.array([[1, 1, 2, 2, 0]])), 5))
    ██········
    ████······
    ····██····
    ····████··
    ··········
"""

from collections.abc import Sequence
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from heedful.model import mask_picture
from heedful.model.config import ModelError
from heedful.model.segment_blocks import only_id, range_of_ids

Window = tuple[int | None, int | None]
PICTURED = 16
"""Number of queries and keys in a notebook's picture of a mask that has no length."""


class MaskNotSupported(ModelError):
    """Error of an attention core that does not support the mask, bias or dropout of a call.

    core: name of the core; reason: the problem and the fix.

    Example:
        >>> import jax.numpy as jnp, heedful as hf
        >>> q = jnp.ones((1, 4, 2, 8))
        >>> try:
        ...     hf.attention(q, q, q, hf.masks.sliding(1, 0, dilation=(1, 2)), core="splash")
        ... except hf.MaskNotSupported as error:
        ...     print(error.core)
        splash
    """

    def __init__(self, core: str, reason: str):
        super().__init__(f"attention core '{core}' does not support this call: {reason}")
        self.core, self.reason = core, reason


@struct.dataclass
class AttentionMask:
    """The set of (query, key) pairs that attention may use; `AttentionMask()` allows all.

    A pair is allowed if each of these conditions that is set allows the pair:
    - `causal`: the key is at or before the query, or among the first `prefix_len` positions;
    - `window = (left, right)`: the key is at most `left` positions before the query and at most
      `right` after it (None: no limit). With `dilation[n] = d`, query head n sees only every d-th
      position, `left` of them before the query and `right` after it. Pairs with a global token are
      allowed in any case;
    - segment ids: query and key have the same id, which is not 0 (padding).

    A notebook shows a mask as a picture; `show` draws it as text, for any length.

    Example:
        >>> import heedful as hf
        >>> mask = hf.AttentionMask(causal=True) & hf.AttentionMask(window=(1, None))
        >>> mask.to_bool(3, 3)[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    causal: bool = struct.field(pytree_node=False, default=False)
    window: Window | None = struct.field(pytree_node=False, default=None)
    dilation: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
    """Step of the window for each query head; None: 1 for all heads."""
    prefix_len: Int[Array, " B"] | None = None
    q_segment_ids: Int[Array, "B T"] | None = None
    kv_segment_ids: Int[Array, "B S"] | None = None
    global_index: Int[Array, "B g"] | None = None
    """Positions of the global tokens of each row, padded with -1; None: no global tokens."""
    q_offset: Int[Array, ""] | Int[Array, " B"] | None = None
    """Position of the first query, for decoding with a cache; None: 0."""

    def at(self, offset: jax.Array | int) -> "AttentionMask":
        """Return the mask for queries of which the first is at position `offset` ([] or [B])."""
        return self.replace(q_offset=jnp.asarray(offset))  # type: ignore[attr-defined]

    @property
    def is_full(self) -> bool:
        """True if every pair is allowed."""
        return not self.causal and self.window is None and self.q_segment_ids is None

    def tile(self, q_index: Int[Array, " t"], kv_index: Int[Array, " s"]) -> Bool[Array, "b n t s"]:
        """Return True for each allowed pair of a query in `q_index` and a key in `kv_index`.

        b is B, or 1 if the tile is the same for all rows; n is the number of query heads, or 1 if
        the tile is the same for all heads. `q_index` counts from the first query (`q_offset` is
        added here); `kv_index` has positions.
        """
        rows = q_index[None, None, :, None]
        columns = kv_index[None, None, None, :]
        positions = rows
        if self.q_offset is not None:
            positions = rows + jnp.reshape(self.q_offset, (-1, 1, 1, 1))
        allowed = jnp.ones((1, 1, q_index.shape[0], kv_index.shape[0]), bool)
        if self.causal:
            past = columns <= positions
            if self.prefix_len is not None:
                past |= columns < self.prefix_len[:, None, None, None]
            allowed &= past
        if self.window is not None:
            left, right = self.window
            step = jnp.reshape(jnp.asarray(self.dilation or (1,)), (1, -1, 1, 1))
            near = (columns - positions) % step == 0 if self.dilation else jnp.ones_like(allowed)
            if left is not None:
                near &= columns >= positions - left * step
            if right is not None:
                near &= columns <= positions + right * step
            if self.global_index is not None:
                places = self.global_index[:, None, None, None, :]
                near |= (positions[..., None] == places).any(-1)
                near |= (columns[..., None] == places).any(-1)
            allowed &= near
        if self.q_segment_ids is not None and self.kv_segment_ids is not None:
            queries = self.q_segment_ids[:, None, q_index, None]
            keys = self.kv_segment_ids[:, None, None, kv_index]
            allowed &= (queries == keys) & (keys != 0)
        return allowed

    def blocks(
        self, q_length: int, kv_length: int, q_size: int, kv_size: int
    ) -> tuple[Bool[Array, "b i j"], Bool[Array, "c i j"]]:
        """Tell which blocks of `q_size` queries and `kv_size` keys have any or only allowed pairs.

        False in the first array is certain: the block has no allowed pair and need not be computed.
        True in the second array is certain: all pairs of the block are allowed, so it needs no
        mask. i counts blocks of queries, j blocks of keys; the last blocks may be shorter. b and c
        are B, or 1 if the array is the same for all rows.
        """
        self.require_lengths(q_length, kv_length)
        first = jnp.arange(0, q_length, q_size)[None, :, None]
        last = jnp.minimum(first + q_size, q_length) - 1
        if self.q_offset is not None:
            offset = jnp.reshape(self.q_offset, (-1, 1, 1))
            first, last = first + offset, last + offset
        begin = jnp.arange(0, kv_length, kv_size)[None, None, :]
        end = jnp.minimum(begin + kv_size, kv_length) - 1
        some = every = jnp.ones((1, first.shape[1], begin.shape[2]), bool)
        if self.causal:
            past, all_past = begin <= last, end <= first
            if self.prefix_len is not None:
                past |= begin < self.prefix_len[:, None, None]
                all_past |= end < self.prefix_len[:, None, None]
            some, every = some & past, every & all_past
        if self.window is not None:
            left, right = self.window
            step = max(self.dilation or (1,))
            near, all_near = jnp.ones_like(some), jnp.full_like(every, step == 1)
            if left is not None:
                near &= end >= first - left * step
                all_near &= begin >= last - left
            if right is not None:
                near &= begin <= last + right * step
                all_near &= end <= first + right
            if self.global_index is not None:
                places = self.global_index[:, None, None, :]
                for low, high in ((first, last), (begin, end)):
                    near |= ((low[..., None] <= places) & (places <= high[..., None])).any(-1)
            some, every = some & near, every & all_near
        if self.q_segment_ids is not None and self.kv_segment_ids is not None:
            low, high = range_of_ids(self.q_segment_ids, q_size)
            begin, end = range_of_ids(self.kv_segment_ids, kv_size)
            some &= (low[:, :, None] <= end[:, None]) & (begin[:, None] <= high[:, :, None])
            queries = only_id(self.q_segment_ids, q_size)[:, :, None]
            keys = only_id(self.kv_segment_ids, kv_size)[:, None]
            every &= (queries == keys) & (keys != 0)
        return some, every

    def has_one_segment(self) -> Bool[Array, " B"]:
        """Return True for rows with one segment and any padding; the mask must have segments."""
        assert self.q_segment_ids is not None and self.kv_segment_ids is not None
        ids = jnp.concatenate([self.q_segment_ids, self.kv_segment_ids], 1)
        return jnp.all((ids == 0) | (ids == jnp.max(ids, 1, keepdims=True)), 1)

    def require_lengths(self, q_length: int, kv_length: int) -> None:
        """Raise ValueError if the mask was made for other lengths."""
        for name, length in (("q", q_length), ("kv", kv_length)):
            ids = getattr(self, f"{name}_segment_ids")
            # Indexing beyond the end would silently repeat the last id.
            if ids is not None and ids.shape[1] != length:
                raise ValueError(
                    f"the mask describes {ids.shape[1]} {name} positions, there are {length}: "
                    f"make the mask with {length} segment ids"
                )

    def to_bool(self, q_length: int, kv_length: int) -> Bool[Array, "b n T S"]:
        """Return the mask of all pairs as an array, for pictures, tests and dense attention.

        Raises ValueError if the mask was made for other lengths.
        """
        self.require_lengths(q_length, kv_length)
        return self.tile(jnp.arange(q_length), jnp.arange(kv_length))

    def __repr__(self) -> str:
        parts = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if hasattr(value, "dtype"):
                value = f"{value.dtype}{list(value.shape)}"
            if value is not None and value is not False:
                parts.append(f"{entry.name}={value}")
        return f"AttentionMask({', '.join(parts)})"

    def _repr_png_(self) -> bytes:
        """Draw the first row of the batch for a notebook: queries down, keys across."""
        ids = (self.q_segment_ids, self.kv_segment_ids)
        lengths = [PICTURED if x is None else x.shape[1] for x in ids]
        return mask_picture.as_png(np.asarray(self.to_bool(*lengths))[0])

    def __and__(self, other: "AttentionMask") -> "AttentionMask":
        """Return the mask of the pairs that both masks allow.

        Raises ModelError if no AttentionMask can express the result: windows with different
        dilations, global tokens and a second window, or queries at two different positions.
        """
        return AttentionMask(
            causal=self.causal or other.causal,
            prefix_len=_both_prefixes(self, other),
            q_offset=_both_offsets(self, other),
            **_both_windows(self, other),
            **_both_segments(self, other),
        )


def full() -> AttentionMask:
    """Allow all pairs."""
    return AttentionMask()


def causal() -> AttentionMask:
    """Allow keys at or before the query; the first query has position 0, or p after `.at(p)`."""
    return AttentionMask(causal=True)


def prefix(lengths: Int[Array, " B"]) -> AttentionMask:
    """Allow keys at or before the query, or among the first `lengths` (arXiv:1910.10683 §3.2.1)."""
    return AttentionMask(causal=True, prefix_len=_counts("prefix lengths", lengths))


def padding(lengths: Int[Array, " B"], length: int) -> AttentionMask:
    """Allow the first lengths[b] of the `length` keys of row b; the other tokens are padding.

    For self-attention, T = S = `length`: queries that are padding see nothing. For other queries
    use `cross`.
    """
    lengths = _counts("padding lengths", lengths)
    return packed((jnp.arange(length)[None] < lengths[:, None]).astype(jnp.int32))


def packed(segment_ids: Int[Array, "B T"]) -> AttentionMask:
    """Allow keys of the query's document, for rows with several documents; id 0 is padding."""
    return cross(segment_ids, segment_ids)


def cross(q_segments: Int[Array, "B T"], kv_segments: Int[Array, "B S"]) -> AttentionMask:
    """Allow keys with the query's segment id, in two different sequences; id 0 is padding."""
    q_segments, kv_segments = jnp.asarray(q_segments), jnp.asarray(kv_segments)
    if q_segments.ndim != 2 or kv_segments.ndim != 2:
        raise ModelError(
            f"segment ids must have shapes [B, T] and [B, S], not {q_segments.shape} and "
            f"{kv_segments.shape}"
        )
    return AttentionMask(q_segment_ids=q_segments, kv_segment_ids=kv_segments)


def sliding(
    left: int | None, right: int | None, dilation: Sequence[int] | None = None
) -> AttentionMask:
    """Allow `left` positions before and `right` positions after the query; None: no limit.

    The query's own position is allowed and not counted. With dilation[n] = d, query head n sees
    every d-th position (arXiv:2004.05150 §3.1); None: every position.
    """
    for side in (left, right):
        if side is not None and side < 0:
            raise ModelError(f"a window side must be None or at least 0, not {side}")
    if dilation is not None and (not dilation or min(dilation) < 1):
        raise ModelError(f"dilation needs steps of at least 1, not {tuple(dilation)}")
    steps = tuple(dilation) if dilation and max(dilation) > 1 else None
    return AttentionMask(window=(left, right), dilation=steps)


def longformer(
    window: int, global_index: Int[Array, "B g"], dilation: Sequence[int] | None = None
) -> AttentionMask:
    """Allow `window` positions on each side, and all pairs with a global token.

    arXiv:2004.05150 §3.1. `global_index` has the positions of the global tokens of each row, padded
    with -1. For `dilation` see `sliding`.
    """
    global_index = jnp.asarray(global_index)
    if global_index.ndim != 2 or not jnp.issubdtype(global_index.dtype, jnp.integer):
        raise ModelError(
            "global_index must hold integers of shape [B, g], not "
            f"{global_index.dtype}{global_index.shape}"
        )
    mask = sliding(window, window, dilation)
    return mask.replace(global_index=global_index)  # type: ignore[attr-defined]


def all_of(masks: Sequence[AttentionMask]) -> AttentionMask:
    """Return the mask of the pairs that all masks allow."""
    result = full()
    for mask in masks:
        result = result & mask
    return result


def _counts(name: str, lengths: jax.Array) -> jax.Array:
    lengths = jnp.asarray(lengths)
    if lengths.ndim != 1 or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ModelError(
            f"{name} must be integers of shape [B], not {lengths.dtype}{lengths.shape}"
        )
    return lengths


def _both_prefixes(a: AttentionMask, b: AttentionMask) -> jax.Array | None:
    if a.causal and b.causal:  # a causal mask without a prefix forbids the other's prefix
        if a.prefix_len is None or b.prefix_len is None:
            return None
        return jnp.minimum(a.prefix_len, b.prefix_len)
    return a.prefix_len if a.causal else b.prefix_len


def _both_windows(a: AttentionMask, b: AttentionMask) -> dict:
    facts = ("window", "dilation", "global_index")
    if a.window is None or b.window is None:
        source = b if a.window is None else a
        return {name: getattr(source, name) for name in facts}
    window = tuple(
        min((s for s in sides if s is not None), default=None)
        for sides in zip(a.window, b.window, strict=True)
    )
    if a.dilation != b.dilation:
        raise ModelError(
            f"cannot combine windows of dilation {a.dilation} and {b.dilation}: give both the same "
            "dilation"
        )
    for mask, other in ((a, b), (b, a)):
        # (near | global) & narrower window = narrower window; other results need two windows.
        is_other = other.global_index is not None or window != other.window
        if mask.global_index is not None and is_other:
            raise ModelError(
                f"cannot combine windows {a.window} and {b.window} when one has global tokens: "
                "combine the windows first, then add the global tokens"
            )
    return {"window": window, "dilation": a.dilation}


def _both_segments(a: AttentionMask, b: AttentionMask) -> dict:
    if a.q_segment_ids is None or b.q_segment_ids is None:
        source = b if a.q_segment_ids is None else a
        return {"q_segment_ids": source.q_segment_ids, "kv_segment_ids": source.kv_segment_ids}
    assert a.kv_segment_ids is not None and b.kv_segment_ids is not None
    # One id for each pair of ids: equal if both ids are equal, 0 if one of the two is 0.
    stride = 1 + jnp.maximum(jnp.max(b.q_segment_ids), jnp.max(b.kv_segment_ids))

    def pair(first: jax.Array, second: jax.Array) -> jax.Array:
        return jnp.where((first == 0) | (second == 0), 0, first * stride + second)

    return {
        "q_segment_ids": pair(a.q_segment_ids, b.q_segment_ids),
        "kv_segment_ids": pair(a.kv_segment_ids, b.kv_segment_ids),
    }


def _both_offsets(a: AttentionMask, b: AttentionMask) -> jax.Array | None:
    if a.q_offset is b.q_offset:
        return a.q_offset
    for mask, other in ((a, b), (b, a)):
        # The result has one offset, which must not move a mask that was made without it.
        placed = other.q_offset is not None or other.causal or other.window is not None
        if mask.q_offset is not None and placed:
            raise ModelError(
                "cannot combine masks of queries at two positions: combine the masks first, then "
                "call .at(position) of the result"
            )
    return b.q_offset if a.q_offset is None else a.q_offset
