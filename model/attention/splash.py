"""Splash attention, the Pallas kernel for TPUs that skips the blocks that a mask excludes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as lowered
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from heedful.model.attention.core import AttentionCall, CoreSpec
from heedful.model.attention.fused import TILE, band, band_refusal, fill, segment_ids
from heedful.model.axes import mesh_axes, target_platform
from heedful.model.masks import AttentionMask, Window


def splash(call: AttentionCall) -> Float[Array, "B T N H"]:
    """Compute `dense` for masks with causality, window and segments.

    Lengths are padded to multiples of 128. q is multiplied by the scale, and so rounded once more.
    On a CPU the kernel is interpreted, which is slow. Memory: O(B * N * T).
    """
    SPEC.require(call)
    q, k, v, mask = call.q, call.k, call.v, call.mask
    T, S, window = q.shape[1], k.shape[1], band(mask)
    batch, heads = mesh_axes("act_batch", "act_heads")

    q = (q.astype(jnp.float32) * call.factor).astype(q.dtype)
    ids = segment_ids(call)
    run = partial(_splash, window=window, interpret=target_platform() == "cpu")
    if batch or heads:  # the compiler cannot split a kernel by itself
        by_head = PartitionSpec(batch, None, heads)
        run = jax.shard_map(
            run,
            in_specs=(by_head, by_head, by_head, PartitionSpec(batch)),
            out_specs=by_head,
            check_vma=False,
        )
    out = run(q, k, v, ids)
    if mask.q_segment_ids is None and (window[0] is None or T <= S):
        return out
    return jnp.where(_sees(mask, T, S)[:, :, None, None], out, 0)


def _splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    window: Window,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """Compute unscaled attention; the output of a query that sees nothing is not defined."""
    T, N = q.shape[1:3]
    q, k, v = (jnp.swapaxes(fill(x), 1, 2) for x in (q, k, v))
    shape = q.shape[2], k.shape[2]
    is_full = window == (None, None)
    head = lowered.FullMask(shape) if is_full else lowered.LocalMask(shape, window, offset=0)
    block_q, block_kv = map(_block, shape)
    attend = kernel.make_splash_mha(
        lowered.MultiHeadMask([head] * N),
        block_sizes=kernel.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = None if ids is None else kernel.SegmentIds(*map(fill, ids))
    out: Any = jax.vmap(attend)(q, k, v, segments)
    return jnp.swapaxes(out, 1, 2)[:, :T]


def _sees(mask: AttentionMask, q_length: int, kv_length: int) -> Bool[Array, "b T"]:
    """Return True for queries that see any key.

    It is computed by blocks of queries; otherwise the compiler would store the mask of all pairs.
    """
    rows = jnp.arange(q_length + -q_length % TILE).reshape(-1, TILE)
    columns = jnp.arange(kv_length)
    seen = jax.lax.map(lambda rows: mask.tile(rows, columns)[:, 0].any(-1), rows)  # [i, b, TILE]
    return jnp.moveaxis(seen, 0, 1).reshape(seen.shape[1], -1)[:, :q_length]


def _block(length: int) -> int:
    """Return the largest of 512, 384, 256 and 128 that divides `length`, a multiple of 128."""
    return next(TILE * n for n in (4, 3, 2, 1) if length % (TILE * n) == 0)


SPEC = CoreSpec(
    name="splash",
    make=lambda config, shared: splash,
    refusal=band_refusal,
    platforms=("tpu", "cpu"),
    length="whole",
    saves_memory_on=("tpu",),
)
