"""Blocks, and stacks of equal blocks."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from heedful.model.attention import FEATURES, spec_of
from heedful.model.axes import constrain
from heedful.model.cache import Cache, KVCache, reorder, repeat
from heedful.model.config import AttentionSite, ModelConfig
from heedful.model.layers import Dropout, FeedForward, Norm
from heedful.model.masks import AttentionMask
from heedful.model.multi_head_attention import MultiHeadAttention, StackContext
from heedful.model.ops.loops import layers_per_iteration
from heedful.model.positions import (
    PositionBias,
    RelativeBias,
    alibi_slopes,
    rotation,
)

OF_ATTENTION = ("query", "key", "value", "out", "global_query", "global_key", "global_value")
KEPT = {
    "full": (),
    "attention": OF_ATTENTION,
    "dots": (*OF_ATTENTION, "up", "gate", "down"),
}
"""Linear maps whose outputs the backward pass finds, by `config.remat`."""


@struct.dataclass
class BlockCache:
    """What a block remembers while decoding; in a stack each array leads with the layers."""

    self_attention: Cache
    cross_attention: KVCache | None = None

    def repeat(self, times: int) -> "BlockCache":
        """For `times` hypotheses of each text, side by side; they share their source."""
        return self._each(lambda kept: repeat(kept, times))

    def reorder(self, parents: Int[Array, "B W"]) -> "BlockCache":
        """Each hypothesis of a text continues the one of the same text that `parents` names."""
        return self._each(lambda kept: reorder(kept, parents))

    def _each(self, change: Callable[[Cache], Cache]) -> "BlockCache":
        kept = jax.vmap(change)(self.self_attention)
        return self.replace(self_attention=kept)  # type: ignore[attr-defined]


class Block(nn.Module):
    """Self-attention, cross-attention if `has_cross`, feed-forward; each with residual and norm."""

    config: ModelConfig
    has_cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: BlockCache | None,
        mask: AttentionMask,
        shared: StackContext,
        encoded: Float[Array, "B S D"] | None,
        cross_mask: AttentionMask | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "B T D"], BlockCache | None]:
        config = self.config

        def residual(name: str, x: jax.Array, sublayer):
            norm = Norm(config, name=f"{name}_norm")
            y = sublayer(norm(x) if config.norm.position == "pre" else x)
            y, state = y if isinstance(y, tuple) else (y, None)
            y = Dropout(config.dropout)(y, deterministic)
            x = x + y if config.residuals else y
            x = norm(x) if config.norm.position == "post" else x
            return constrain(x, "act_batch", "act_length", "act_embed"), state

        site = "decoder" if self.has_cross else "self"
        attend = MultiHeadAttention(config, site, name="self_attention")
        self_cache = cache.self_attention if cache else None
        x, self_cache = residual(
            "self_attention",
            x,
            lambda x: attend(x, None, mask, shared, cache=self_cache, deterministic=deterministic),
        )
        cross_cache = cache.cross_attention if cache else None
        if self.has_cross:
            assert cross_mask is not None
            look = MultiHeadAttention(config, "cross", name="cross_attention")
            x, cross_cache = residual(
                "cross_attention",
                x,
                lambda x: look(
                    x,
                    encoded,
                    cross_mask,
                    StackContext(core_params=shared.core_params),
                    cache=cross_cache,
                    deterministic=deterministic,
                ),
            )
        feed_forward = FeedForward(config, name="feed_forward")
        x, _ = residual("feed_forward", x, lambda x: feed_forward(x, deterministic=deterministic))
        self.sow("intermediates", "hidden", x)
        return x, BlockCache(self_cache, cross_cache) if cache else None  # type: ignore[arg-type]


class Stack(nn.Module):
    """Equal blocks, one after the other, scanned: parameters lead with the axis `layers`.

    The collection "intermediates", where it is mutable, gets `hidden` [L, B, T, D] (each block's
    output) and the attention weights [L, B, N, T, S].
    """

    config: ModelConfig
    layers: int
    is_causal: bool = False
    has_cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "b T"],
        mask: AttentionMask,
        *,
        encoded: Float[Array, "B S D"] | None = None,
        cross_mask: AttentionMask | None = None,
        cache: BlockCache | None = None,
        cache_write_mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], BlockCache | None]:
        scanned = nn.scan(
            self._block(),
            variable_axes={"params": 0, "decode": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True, FEATURES: True},
            in_axes=(0, *[nn.broadcast] * 5),  # type: ignore[arg-type]
            length=self.layers,
            unroll=min(self._unroll(cache is not None), self.layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        blocks = scanned(self.config, self.has_cross, name="blocks")
        shared = self._shared(positions, mask).replace(  # type: ignore[attr-defined]
            cache_write_mask=cache_write_mask, core_params=self._core_params()
        )
        x, cache = blocks(x, cache, mask, shared, encoded, cross_mask, deterministic)
        if self.config.norm.position == "pre":
            x = Norm(self.config, name="norm")(x)
        return x, cache

    def _block(self) -> type[Block]:
        """With what `config.remat` leaves of it for the backward pass."""
        if self.config.remat == "none":
            return Block
        policy = jax.checkpoint_policies.save_only_these_names(*KEPT[self.config.remat])
        # Between two loops XLA shares nothing; without them it would, and keep all after all.
        is_looped = self._unroll(decodes=False) < self.layers
        return nn.remat(Block, policy=policy, prevent_cse=not is_looped, static_argnums=7)

    def _unroll(self, decodes: bool) -> int:
        config = self.config
        return layers_per_iteration(config.unroll, remat=config.remat != "none", decodes=decodes)

    def _core_params(self) -> dict[str, jax.Array]:
        """Return the parameters that the layers' cores share."""
        sites: tuple[AttentionSite, ...] = ("decoder", "cross") if self.has_cross else ("self",)
        made: dict[str, jax.Array] = {}
        for core in dict.fromkeys(map(self.config.attention.core_of, sites)):
            for name, (init, shape) in spec_of(core).shared_params(self.config).items():
                made[name] = jnp.asarray(self.param(name, init, shape))
        return made

    def _shared(self, positions: Int[Array, "b T"], mask: AttentionMask) -> StackContext:
        """What self-attention adds or turns, where the config asks for it."""
        config, kind = self.config, self.config.positions.kind
        if kind == "rotary":
            rotary = rotation(positions, config.key_dim, config.positions.rotary)
            return StackContext(rotation=rotary)
        if kind == "alibi":
            slopes = jnp.asarray(alibi_slopes(config.attention.heads))
            return StackContext(bias=PositionBias(slopes, q_offset=mask.q_offset))
        if kind == "relative":
            bias = PositionBias(
                RelativeBias(config, name="relative_bias")(),
                bidirectional=not self.is_causal,
                max_distance=config.positions.max_distance,
                q_offset=mask.q_offset,
            )
            return StackContext(bias=bias)
        return StackContext()
