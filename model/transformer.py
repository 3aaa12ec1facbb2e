"""Blocks, stacks of blocks, and the three architectures made of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from model import masks
from model.axes import constrain
from model.config import ModelConfig, ModelError
from model.heads import LanguageModelHead
from model.layers import Dropout, Embedding, FeedForward, KVCache, MultiHeadAttention, Norm
from model.masks import AttentionMask
from model.positions import PositionEmbedding

Tokens = Int[Array, "B T"]
Positions = Int[Array, "b T"]  # b is B, or 1 where all rows agree


@struct.dataclass
class BlockCache:
    """What a block remembers while decoding; in a stack each array leads with the layers."""

    self_attention: KVCache
    cross_attention: KVCache | None = None

    def repeat(self, times: int) -> "BlockCache":
        """Each row `times` times in succession, for as many hypotheses of it."""
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), self)

    def reorder(self, rows: Int[Array, " R"]) -> "BlockCache":
        """Row r of the result continues row rows[r]; hypotheses share their source, which stays."""
        kept = jax.tree.map(lambda x: jnp.take(x, rows, axis=1), self.self_attention)
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
        encoded: Float[Array, "B S D"] | None,
        cross_mask: AttentionMask | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "B T D"], BlockCache | None]:
        config = self.config

        def residual(name: str, x: jax.Array, sublayer):
            norm = Norm(config, name=f"{name}_norm")
            y = sublayer(norm(x) if config.norm.position == "pre" else x)
            y, state = y if isinstance(y, tuple) else (y, None)
            x = x + Dropout(config.dropout)(y, deterministic)
            x = norm(x) if config.norm.position == "post" else x
            return constrain(x, "act_batch", "act_length", "act_embed"), state

        attend = MultiHeadAttention(config, name="self_attention")
        self_cache = cache.self_attention if cache else None
        x, self_cache = residual(
            "self_attention",
            x,
            lambda x: attend(x, None, mask, cache=self_cache, deterministic=deterministic),
        )
        cross_cache = cache.cross_attention if cache else None
        if self.has_cross:
            assert cross_mask is not None
            look = MultiHeadAttention(config, is_cross=True, name="cross_attention")
            x, cross_cache = residual(
                "cross_attention",
                x,
                lambda x: look(
                    x, encoded, cross_mask, cache=cross_cache, deterministic=deterministic
                ),
            )
        feed_forward = FeedForward(config, name="feed_forward")
        x, _ = residual("feed_forward", x, lambda x: feed_forward(x, deterministic=deterministic))
        return x, BlockCache(self_cache, cross_cache) if cache else None  # type: ignore[arg-type]


class Stack(nn.Module):
    """Equal blocks, one after the other, scanned: parameters lead with the axis `layers`."""

    config: ModelConfig
    layers: int
    has_cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: AttentionMask,
        *,
        encoded: Float[Array, "B S D"] | None = None,
        cross_mask: AttentionMask | None = None,
        cache: BlockCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], BlockCache | None]:
        block = nn.remat(Block, prevent_cse=False, static_argnums=6) if self.config.remat else Block
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *[nn.broadcast] * 4),  # type: ignore[arg-type]
            length=self.layers,
            unroll=min(self.config.unroll, self.layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        blocks = scanned(self.config, self.has_cross, name="blocks")
        x, cache = blocks(x, cache, mask, encoded, cross_mask, deterministic)
        if self.config.norm.position == "pre":
            x = Norm(self.config, name="norm")(x)
        return x, cache


class Inputs(nn.Module):
    """Adds the position signal to embedded tokens, then drops out (arXiv:1706.03762 §5.4)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, embedded: Float[Array, "B T D"], positions: Positions, *, deterministic: bool
    ) -> Float[Array, "B T D"]:
        x = embedded + PositionEmbedding(self.config, name="positions")(positions)
        x = Dropout(self.config.dropout)(x, deterministic)
        return constrain(x.astype(self.config.dtype), "act_batch", "act_length", "act_embed")


class EncoderOnly(nn.Module):
    """Tokens to hidden states, each seeing all of its own segment (BERT, arXiv:1810.04805)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        inputs: Tokens,
        *,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T V"]:
        config = self.config
        embedding = Embedding(config, name="embedding")
        mask = masks.full() if segment_ids is None else masks.packed(segment_ids)
        x = Inputs(config, name="inputs")(
            embedding(inputs), _or_range(positions, inputs), deterministic=deterministic
        )
        x, _ = Stack(config, config.layers, name="encoder")(x, mask, deterministic=deterministic)
        return LanguageModelHead(config, name="head")(x, embedding)


class DecoderOnly(nn.Module):
    """Tokens to scores for the next token, each seeing its own past (GPT)."""

    config: ModelConfig

    def setup(self):
        config = self.config
        self.embedding = Embedding(config)
        self.inputs = Inputs(config)
        self.decoder = Stack(config, config.layers)
        self.head = LanguageModelHead(config)

    def __call__(
        self,
        inputs: Tokens,
        *,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T V"]:
        logits, _ = self.decode(
            inputs, segment_ids=segment_ids, positions=positions, deterministic=deterministic
        )
        return logits

    def decode(
        self,
        inputs: Tokens,
        *,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        cache: BlockCache | None = None,
        offset: jax.Array | int | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T V"], BlockCache | None]:
        """Scores for the token after each of `inputs`, which start at position `offset`."""
        x = self.inputs(
            self.embedding(inputs),
            _or_range(positions, inputs, offset),
            deterministic=deterministic,
        )
        mask = _causal(segment_ids, offset)
        x, cache = self.decoder(x, mask, cache=cache, deterministic=deterministic)
        return self.head(x, self.embedding), cache


class EncoderDecoder(nn.Module):
    """Source tokens and target tokens so far to scores for the next one (arXiv:1706.03762 §3)."""

    config: ModelConfig

    def setup(self):
        config = self.config
        self.embedding = Embedding(config)
        self.encoder_inputs = Inputs(config)
        self.decoder_inputs = Inputs(config)
        self.encoder = Stack(config, config.encoder_layers or config.layers)
        self.decoder = Stack(config, config.layers, has_cross=True)
        self.head = LanguageModelHead(config)

    def __call__(
        self,
        inputs: Tokens,
        encoder_inputs: Int[Array, "B S"],
        *,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        encoder_positions: Int[Array, "B S"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T V"]:
        encoded = self.encode(
            encoder_inputs, encoder_segment_ids, encoder_positions, deterministic=deterministic
        )
        logits, _ = self.decode(
            inputs,
            encoded,
            encoder_segment_ids,
            segment_ids=segment_ids,
            positions=positions,
            deterministic=deterministic,
        )
        return logits

    def encode(
        self,
        inputs: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B S D"]:
        """Hidden states of the source."""
        mask = masks.full() if segment_ids is None else masks.packed(segment_ids)
        x = self.encoder_inputs(
            self.embedding(inputs), _or_range(positions, inputs), deterministic=deterministic
        )
        x, _ = self.encoder(x, mask, deterministic=deterministic)
        return x

    def decode(
        self,
        inputs: Tokens,
        encoded: Float[Array, "B S D"] | None,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        *,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        cache: BlockCache | None = None,
        offset: jax.Array | int | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T V"], BlockCache | None]:
        """Scores for the token after each of `inputs`, which start at position `offset`.

        With a cache, its first call takes `encoded` and later ones None: the projected source is in
        the cache then.
        """
        cross_mask = masks.full()
        if encoder_segment_ids is not None:
            own = jnp.ones_like(inputs) if segment_ids is None else segment_ids
            cross_mask = masks.cross(own, encoder_segment_ids)
        x = self.decoder_inputs(
            self.embedding(inputs),
            _or_range(positions, inputs, offset),
            deterministic=deterministic,
        )
        x, cache = self.decoder(
            x,
            _causal(segment_ids, offset),
            encoded=encoded,
            cross_mask=cross_mask,
            cache=cache,
            deterministic=deterministic,
        )
        return self.head(x, self.embedding), cache


ARCHITECTURES: dict[str, type[nn.Module]] = {
    "encoder_only": EncoderOnly,
    "decoder_only": DecoderOnly,
    "encoder_decoder": EncoderDecoder,
}


def build(config: ModelConfig) -> nn.Module:
    """The model that a config describes."""
    return ARCHITECTURES[config.architecture](config)


def empty_cache(config: ModelConfig, batch: int, length: int) -> BlockCache:
    """A cache for `length` decoder positions; raises ModelError beyond a table of positions."""
    limit = config.positions.max_length
    if config.positions.kind == "learned" and length > limit:
        raise ModelError(
            f"cannot decode {length} positions: model.positions.max_length is {limit}, "
            "and learned positions end there"
        )
    one = KVCache.zeros(config, batch, length)
    repeat = lambda x: jnp.broadcast_to(x, (config.layers, *x.shape))  # noqa: E731
    return BlockCache(self_attention=jax.tree.map(repeat, one))


def _or_range(positions: Positions | None, inputs: Tokens, offset=None) -> Positions:
    if positions is not None:
        return positions
    steps = jnp.arange(inputs.shape[1])[None]
    return steps if offset is None else steps + jnp.reshape(offset, (-1, 1))


def _causal(segment_ids: Tokens | None, offset) -> AttentionMask:
    mask = masks.causal() if offset is None else masks.causal().at(offset)
    return mask if segment_ids is None else mask & masks.packed(segment_ids)
