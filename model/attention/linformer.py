"""Attention to keys and values that are projected along the length (arXiv:2006.04768)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from heedful.model.attention.dense import require_shapes
from heedful.model.axes import mesh_axes, partitioned
from heedful.model.config import LinformerConfig, ModelError
from heedful.model.dropout import dropout_words, keep_at
from heedful.model.masks import AttentionMask, MaskNotSupported
from heedful.model.positions import PositionBias

BLOCK = 512  # Queries whose weights are held at once; from 512 on a CPU shares the products.


class Linformer(nn.Module):
    """softmax(scale q (E k)^T) F v, where E and F mix S positions into R (arXiv:2006.04768 §4).

    Row s of a projection [max_length, R] belongs to position s: shorter inputs use the first rows.
    Masks: full and padding, whose keys count 0; a row with several documents, which is not known
    while tracing, becomes NaN, as each of the R columns holds a part of all of them. Dropout is of
    the weights [B, K, G, T, R]. A given `projection` is used instead of own parameters. Time and
    memory are O(T R), the weights' memory O(R), or O(T R) by device where the mesh splits T.
    """

    config: LinformerConfig

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: AttentionMask,
        *,
        bias: PositionBias | None = None,
        scale: float | None = None,
        dropout_rate: float = 0.0,
        dropout_key: jax.Array | None = None,
        projection: Float[Array, "L R"] | None = None,
    ) -> Float[Array, "B T N H"]:
        (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
        require_shapes(q, k, v)
        _require_supported(mask, bias)
        mask.require_lengths(T, S)
        if self.config.max_length < S:
            raise ModelError(
                f"{S} tokens are more than model.attention.linformer.max_length = "
                f"{self.config.max_length}: its projections end there"
            )
        keys, values = self._projections(K, projection)
        if mask.kv_segment_ids is not None:
            cache_write_mask = (mask.kv_segment_ids != 0)[:, :, None, None]
            k, v = jnp.where(cache_write_mask, k, 0), jnp.where(cache_write_mask, v, 0)
        k, v = (
            jnp.einsum(
                "BSKH,SKR->BRKH" if p.ndim == 3 else "BSKH,SR->BRKH", x, p[:S].astype(x.dtype)
            )
            for x, p in ((k, keys), (v, values))
        )
        words = dropout_words(dropout_rate, dropout_key)
        out = _attend(q.reshape(B, T, K, N // K, H), k, v, scale, words, dropout_rate)
        out = out.reshape(q.shape)
        return out if mask.q_segment_ids is None else _only_known(out, mask)

    def _projections(
        self, heads: int, shared: jax.Array | None
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Of keys and of values: [max_length, R], or [max_length, K, R] for each head its own."""
        config = self.config
        if shared is not None:
            return shared, shared
        if config.sharing == "layers":
            raise ModelError(
                "model.attention.linformer.sharing layers needs the projection of the stack"
            )
        axes = {"position": config.max_length, "rank": config.rank}
        if config.sharing == "none":
            axes = {"position": config.max_length, "kv_heads": heads, "rank": config.rank}
        names = ("both",) if config.sharing == "key_value" else ("keys", "values")
        made = [
            self.param(name, projection_init(config, *axes), (*axes.values(),)) for name in names
        ]
        return jnp.asarray(made[0]), jnp.asarray(made[-1])


def _attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B R K H"],
    v: Float[Array, "B R K H"],
    scale: float | None,
    words: jax.Array | None,
    dropout_rate: float,
) -> Float[Array, "B T K G H"]:
    """By blocks of queries, whose weights [B, K, G, C, R] are computed again backward."""
    B, T, K, G, H = q.shape
    R = k.shape[1]
    factor = H**-0.5 if scale is None else scale
    C = math.ceil(T / math.ceil(T / BLOCK))

    @jax.checkpoint
    def block(i, q):
        scores = jnp.einsum("BCKGH,BRKH->BKGCR", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * factor)
        if words is not None:
            rows = i * C + jnp.arange(C)
            index = jnp.ix_(jnp.arange(B), jnp.arange(K), jnp.arange(G), rows, jnp.arange(R))
            stay = keep_at(words, index, (B, K, G, T, R), dropout_rate)
            weights = jnp.where(stay, weights / (1 - dropout_rate), 0)
        return jnp.einsum("BKGCR,BRKH->BCKGH", weights.astype(v.dtype), v)

    if T <= BLOCK or any(mesh_axes("act_length")):  # what is split is not taken in turn
        return block(0, q)
    padded = jnp.pad(q, [(0, 0), (0, -T % C), (0, 0), (0, 0), (0, 0)])
    blocks = jnp.moveaxis(padded.reshape(B, -1, C, *q.shape[2:]), 1, 0)
    out = jax.lax.map(lambda x: block(*x), (jnp.arange(len(blocks)), blocks))
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :T]


def projection_init(config: LinformerConfig, *axes: str):
    """Normal of variance 1 / R, as in the proof of arXiv:2006.04768 §4, Theorem 2."""
    return partitioned(nn.initializers.normal(config.rank**-0.5), *axes)


def _only_known(out: Float[Array, "B T N H"], mask: AttentionMask) -> Float[Array, "B T N H"]:
    """0 for queries that are padding, NaN for rows of several documents."""
    assert mask.q_segment_ids is not None
    out = jnp.where((mask.q_segment_ids != 0)[:, :, None, None], out, 0)
    return jnp.where(mask.has_one_segment()[:, None, None, None], out, jnp.nan)


def _require_supported(mask: AttentionMask, bias: PositionBias | None) -> None:
    """Each projected key is a mixture of all positions."""
    if mask.causal:
        raise MaskNotSupported(
            "linformer",
            "its keys mix what comes later with what came before: for a decoder choose another "
            "model.attention.core or, beside an encoder, model.attention.decoder_core",
        )
    if mask.window is not None:
        raise MaskNotSupported(
            "linformer",
            f"its keys mix all positions, there is no window {mask.window} among them: leave "
            "model.attention.window out, or choose the core longformer",
        )
    if bias is not None:
        raise MaskNotSupported(
            "linformer",
            "its keys mix all positions and have no distance: choose a model.positions.kind other "
            "than alibi and relative",
        )
