"""Attention to keys and values that are projected along the length (arXiv:2006.04768)."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from heedful.model.attention.core import AttentionCall, CoreSpec
from heedful.model.axes import mesh_axes, partitioned
from heedful.model.config import AttentionConfig, LinformerConfig, ModelConfig, ModelError
from heedful.model.masks import AttentionMask
from heedful.model.ops.dropout import dropout_words, keep_at

BLOCK = 512  # Queries whose weights are held at once; from 512 on, CPU cores share a product.


class Linformer(nn.Module):
    """softmax(scale * q @ (E k)^T) @ F v; E and F project S positions to R (arXiv:2006.04768 §4).

    Row s of a projection [max_length, R] belongs to position s: shorter inputs use the first rows.
    Supported masks are full and padding, which sets keys and values to 0. A row with several
    documents gives NaN, because each of the R projected keys mixes all documents; documents are not
    known while tracing. Dropout acts on the weights [B, K, G, T, R]. Time and memory are O(T R);
    the weights take O(R) memory, or O(T R) on each device if the mesh splits the sequence.
    """

    config: LinformerConfig
    projection: Float[Array, "L R"] | None = None
    """Projection [max_length, R] of both keys and values that all layers of a stack share; None:
    the layer has its own."""

    @nn.compact
    def __call__(self, call: AttentionCall) -> Float[Array, "B T N H"]:
        SPEC.require(call)
        q, k, v, mask = call.q, call.k, call.v, call.mask
        (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
        if self.config.max_length < S:
            raise ModelError(
                f"{S} tokens are more than model.attention.linformer.max_length = "
                f"{self.config.max_length}, where the projections end: give fewer tokens, or train "
                "a model with a larger max_length"
            )
        keys, values = self._projections(K)
        if mask.kv_segment_ids is not None:
            is_token = (mask.kv_segment_ids != 0)[:, :, None, None]
            k, v = jnp.where(is_token, k, 0), jnp.where(is_token, v, 0)
        k, v = (
            jnp.einsum(
                "BSKH,SKR->BRKH" if p.ndim == 3 else "BSKH,SR->BRKH", x, p[:S].astype(x.dtype)
            )
            for x, p in ((k, keys), (v, values))
        )
        words = dropout_words(call.dropout_rate, call.dropout_key)
        q = q.reshape(B, T, K, N // K, H)
        out = _attend(q, k, v, call.factor, words, call.dropout_rate)
        out = out.reshape(B, T, N, H)
        return out if mask.q_segment_ids is None else _only_known(out, mask)

    def _projections(self, heads: int) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Return the projections [max_length, R], or [max_length, K, R], of keys and of values."""
        config = self.config
        if self.projection is not None:
            return self.projection, self.projection
        if config.sharing == "layers":
            raise ModelError(
                "model.attention.linformer.sharing = layers needs the projection of the stack: "
                "give it in StackContext.core_params, or choose another sharing"
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
    scale: float,
    words: jax.Array | None,
    dropout_rate: float,
) -> Float[Array, "B T K G H"]:
    """Attend by blocks of C queries; the backward pass recomputes the weights [B, K, G, C, R]."""
    B, T, K, G, _ = q.shape
    R = k.shape[1]
    C = math.ceil(T / math.ceil(T / BLOCK))

    @jax.checkpoint
    def block(i, q):
        scores = jnp.einsum("BCKGH,BRKH->BKGCR", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * scale)
        if words is not None:
            rows = i * C + jnp.arange(C)
            index = jnp.ix_(jnp.arange(B), jnp.arange(K), jnp.arange(G), rows, jnp.arange(R))
            stay = keep_at(words, index, (B, K, G, T, R), dropout_rate)
            weights = jnp.where(stay, weights / (1 - dropout_rate), 0)
        return jnp.einsum("BKGCR,BRKH->BCKGH", weights.astype(v.dtype), v)

    if T <= BLOCK or any(mesh_axes("act_length")):  # a sequence that the mesh splits has no blocks
        return block(0, q)
    padded = jnp.pad(q, [(0, 0), (0, -T % C), (0, 0), (0, 0), (0, 0)])
    blocks = jnp.moveaxis(padded.reshape(B, -1, C, *q.shape[2:]), 1, 0)
    out = jax.lax.map(lambda x: block(*x), (jnp.arange(len(blocks)), blocks))
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :T]


def projection_init(config: LinformerConfig, *axes: str):
    """Return a normal initializer of variance 1 / R (proof of arXiv:2006.04768 §4, Theorem 2)."""
    return partitioned(nn.initializers.normal(config.rank**-0.5), *axes)


def _only_known(out: Float[Array, "B T N H"], mask: AttentionMask) -> Float[Array, "B T N H"]:
    """Set the outputs of padding to 0, and those of rows with several documents to NaN."""
    assert mask.q_segment_ids is not None
    out = jnp.where((mask.q_segment_ids != 0)[:, :, None, None], out, 0)
    return jnp.where(mask.has_one_segment()[:, None, None, None], out, jnp.nan)


def _refusal(call: AttentionCall) -> str | None:
    if call.mask.causal:
        return (
            "its keys mix earlier and later positions, so it cannot be causal: for a decoder "
            "choose another model.attention.core or, in an encoder_decoder, another "
            "model.attention.decoder_core"
        )
    if call.mask.window is not None:
        return (
            f"its keys mix all positions, so it has no window {call.mask.window}: leave "
            "model.attention.window out, or choose model.attention.core longformer"
        )
    if call.bias is not None:
        return (
            "its keys mix all positions, so they have no distance: choose a model.positions.kind "
            "other than alibi and relative"
        )
    return None


def _make(config: ModelConfig, shared: Mapping[str, jax.Array]) -> Linformer:
    return Linformer(config.attention.linformer, shared.get("projection"), name="linformer")


def _shared_params(config: ModelConfig) -> Mapping[str, Any]:
    linformer = config.attention.linformer
    if linformer.sharing != "layers":
        return {}
    init = projection_init(linformer, "position", "rank")
    return {"projection": (init, (linformer.max_length, linformer.rank))}


def _shrunk(attention: AttentionConfig, length: int) -> Mapping[str, Any]:
    return {"linformer": replace(attention.linformer, rank=8, max_length=length)}


def _sizes(config: ModelConfig) -> Mapping[str, int]:
    linformer = config.attention.linformer
    name = "model.attention.linformer.rank x model.attention.linformer.max_length"
    return {name: linformer.rank * linformer.max_length}


SPEC = CoreSpec(
    name="linformer",
    make=_make,
    is_exact=False,
    has_weights=False,
    refusal=_refusal,
    one_document_at=("self", "decoder", "cross"),
    # The projections take as many FLOPs as the products with them (arXiv:2006.04768 §4).
    keys=lambda config: 2 * config.attention.linformer.rank,
    sizes=_sizes,
    shrunk=_shrunk,
    shared_params=_shared_params,
)
