"""Blocks, and stacks of blocks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from heedful.model.attention import FEATURES, spec_of
from heedful.model.axes import constrain
from heedful.model.config import AttentionSite, ModelConfig
from heedful.model.layer_pattern import Layer, apply_pattern
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
from heedful.model.stack_cache import BlockCache, PatternCache, StackCache

OF_ATTENTION = ("query", "key", "value", "out", "global_query", "global_key", "global_value")
KEPT = {
    "full": (),
    "attention": OF_ATTENTION,
    "dots": (*OF_ATTENTION, "up", "gate", "down"),
}
"""Linear maps whose outputs are stored for the backward pass, by `config.remat`."""


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
        context: StackContext,
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
            lambda x: attend(x, None, mask, context, cache=self_cache, deterministic=deterministic),
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
                    StackContext(core_params=context.core_params),
                    cache=cross_cache,
                    deterministic=deterministic,
                ),
            )
        feed_forward = FeedForward(config, name="feed_forward")
        x, _ = residual("feed_forward", x, lambda x: feed_forward(x, deterministic=deterministic))
        self.sow("intermediates", "hidden", x)
        return x, BlockCache(self_cache, cross_cache) if cache else None  # type: ignore[arg-type]


class Stack(nn.Module):
    """Blocks, one after the other; their parameters have a leading axis of layers [L, ...].

    Blocks are equal, or differ as `config.pattern` says; the shapes of their parameters are always
    equal. If the collection "intermediates" is mutable, it gets `hidden` [L, B, T, D] (the outputs
    of the blocks) and the attention weights [L, B, N, T, S].
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
        masks: tuple[AttentionMask, ...],
        *,
        encoded: Float[Array, "B S D"] | None = None,
        cross_mask: AttentionMask | None = None,
        cache: StackCache | None = None,
        cache_write_mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], StackCache | None]:
        """Return hidden states and the cache; `masks` has one mask for each layer of the period."""
        unroll = min(self._unroll(decodes=cache is not None), self.layers)
        contexts = self._contexts(positions, masks[0], cache_write_mask)
        of_layers = [
            (mask, context, encoded, cross_mask, deterministic)
            for mask, context in zip(masks, contexts, strict=True)
        ]
        if len(self.config.period) == 1 or self.is_initializing():
            assert not isinstance(cache, PatternCache)
            scanned = nn.scan(
                self._block(),
                variable_axes={"params": 0, "decode": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True, FEATURES: True},
                in_axes=(0, *[nn.broadcast] * 5),  # type: ignore[arg-type]
                length=self.layers,
                unroll=unroll,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            blocks = scanned(self.config.period[0], self.has_cross, name="blocks")
            x, cache = blocks(x, cache, *of_layers[0])
        else:
            assert not isinstance(cache, BlockCache)
            x, cache = self._by_pattern(x, cache, of_layers, unroll)
        if self.config.norm.position == "pre":
            x = Norm(self.config, name="norm")(x)
        return x, cache

    def _block(self) -> type[Block]:
        """Return the class of blocks, which stores only the values that `remat` keeps."""
        if self.config.remat == "none":
            return Block
        # XLA reuses no values across two loops. Without loops it would reuse them, so remat would
        # save no memory.
        is_looped = self._unroll(decodes=False) < self.layers
        return nn.remat(Block, policy=self._policy(), prevent_cse=not is_looped, static_argnums=7)

    def _policy(self) -> Any:
        return jax.checkpoint_policies.save_only_these_names(*KEPT[self.config.remat])

    def _by_pattern(
        self,
        x: Float[Array, "B T D"],
        cache: PatternCache | None,
        of_layers: list[tuple[Any, ...]],
        unroll: int,
    ) -> tuple[Float[Array, "B T D"], PatternCache | None]:
        """Apply blocks that differ, as pure functions of the parameters [L, ...] of equal blocks.

        `of_layers` holds the other arguments of each block of the period.
        """
        is_sown = self.is_mutable_collection("intermediates")
        mutable = ["intermediates"] if is_sown else []

        def make_layer(i: int, is_looped: bool) -> Layer:
            block = Block(self.config.period[i], self.has_cross, parent=None)

            def layer(variables: Any, x: jax.Array, cache: BlockCache | None, rngs: Any):
                (x, cache), sown = block.apply(
                    variables, x, cache, *of_layers[i], rngs=rngs, mutable=mutable
                )
                return x, cache, sown.get("intermediates", {})

            if self.config.remat == "none":
                return layer
            return jax.checkpoint(layer, policy=self._policy(), prevent_cse=not is_looped)

        stacked = {
            name: nn.unbox(self.variables[name]["blocks"])
            for name in ("params", "decode")
            if "blocks" in self.variables.get(name, {})
        }
        rngs = {name: self.make_rng(name) for name in ("dropout", FEATURES) if self.has_rng(name)}
        x, cache, sown = apply_pattern(make_layer, len(of_layers), stacked, x, cache, rngs, unroll)
        if is_sown:
            self.put_variable("intermediates", "blocks", sown)
        return x, cache

    def _unroll(self, decodes: bool) -> int:
        config = self.config
        return layers_per_iteration(config.unroll, remat=config.remat != "none", decodes=decodes)

    def _core_params(self) -> dict[str, jax.Array]:
        """Return the parameters of the cores that all layers share, by name."""
        sites: tuple[AttentionSite, ...] = ("decoder", "cross") if self.has_cross else ("self",)
        made: dict[str, jax.Array] = {}
        for core in dict.fromkeys(map(self.config.attention.core_of, sites)):
            for name, (init, shape) in spec_of(core).shared_params(self.config).items():
                made[name] = jnp.asarray(self.param(name, init, shape))
        return made

    def _contexts(
        self, positions: Int[Array, "b T"], mask: AttentionMask, cache_write_mask: jax.Array | None
    ) -> list[StackContext]:
        """Return the shared inputs of self-attention for each layer of the period."""
        config, bias = self.config, self._bias(mask)
        common = StackContext(core_params=self._core_params(), cache_write_mask=cache_write_mask)
        by_positions = {
            layer.positions: common.replace(  # type: ignore[attr-defined]
                rotation=rotation(positions, config.key_dim, layer.positions.rotary)
                if layer.positions.kind == "rotary"
                else None,
                bias=None if layer.positions.kind == "none" else bias,
            )
            for layer in config.period
        }
        return [by_positions[layer.positions] for layer in config.period]

    def _bias(self, mask: AttentionMask) -> PositionBias | None:
        """Return the bias of attention scores for alibi and relative positions, else None."""
        config, kind = self.config, self.config.positions.kind
        if kind == "alibi":
            slopes = jnp.asarray(alibi_slopes(config.attention.heads))
            return PositionBias(slopes, q_offset=mask.q_offset)
        if kind == "relative":
            return PositionBias(
                RelativeBias(config, name="relative_bias")(),
                bidirectional=not self.is_causal,
                max_distance=config.positions.max_distance,
                q_offset=mask.q_offset,
            )
        return None
