"""The three architectures: embeddings, one or two stacks of blocks, a head."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from heedful.model import masks
from heedful.model.axes import constrain, partitioned
from heedful.model.cache import new_cache
from heedful.model.config import ModelConfig, ModelError
from heedful.model.heads import HEADS
from heedful.model.layers import Dropout, Embedding, Norm
from heedful.model.masks import AttentionMask
from heedful.model.positions import PositionEmbedding, lookup
from heedful.model.stack import BlockCache, Stack

Tokens = Int[Array, "B T"]
Positions = Int[Array, "b T"]  # b is B, or 1 where all rows agree


class InputEmbedding(nn.Module):
    """Adds position and type to embedded tokens, norms if asked, drops out (§5.4)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        embedded: Float[Array, "B T D"],
        positions: Positions,
        type_ids: Tokens | None = None,
        *,
        deterministic: bool,
    ) -> Float[Array, "B T D"]:
        config = self.config
        x = embedded + PositionEmbedding(config, name="positions")(positions)
        if type_ids is not None and not config.type_vocab_size:
            raise ModelError(
                "type_ids are given, but model.type_vocab_size is 0: set it to their number"
            )
        if config.type_vocab_size:
            deviation = config.width**-0.5 if config.init == "glorot" else 0.02
            init = partitioned(nn.initializers.normal(deviation), "position", "embed")
            table = jnp.asarray(self.param("types", init, (config.type_vocab_size, config.width)))
            x += table[0] if type_ids is None else lookup(table, type_ids)
        if config.norm.embeddings:
            x = Norm(config, name="norm")(x)
        x = Dropout(config.dropout)(x, deterministic)
        return constrain(x.astype(config.dtype), "act_batch", "act_length", "act_embed")


class EncoderOnly(nn.Module):
    """Tokens, each seeing all of its own segment, to scores (BERT, arXiv:1810.04805)."""

    config: ModelConfig

    def setup(self):
        config = self.config
        self.embedding = Embedding(config)
        self.inputs = InputEmbedding(config)
        self.encoder = Stack(config, config.layers)
        self.head = HEADS[config.head.kind](config)

    def __call__(
        self,
        inputs: Tokens,
        *,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        type_ids: Tokens | None = None,
        deterministic: bool = True,
        return_logits: bool = True,
    ) -> Float[Array, "B *T C"]:
        """Scores [B, T, V] of a language model, [B, C] of a classifier; or what they are made of.

        That is hidden states, to be given to `score`.
        """
        x = self.encode(inputs, segment_ids, positions, type_ids, deterministic=deterministic)
        return self.score(x, segment_ids, deterministic=deterministic) if return_logits else x

    def score(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Tokens | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B *T C"]:
        """Scores of hidden states."""
        return self.head(x, self.embedding, segment_ids, deterministic=deterministic)

    def encode(
        self,
        inputs: Tokens,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        type_ids: Tokens | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """Hidden states."""
        positions = _or_range(positions, inputs)
        x = self.inputs(self.embedding(inputs), positions, type_ids, deterministic=deterministic)
        mask = encoder_mask(self.config, segment_ids)
        x, _ = self.encoder(x, positions, mask, deterministic=deterministic)
        return x


class DecoderOnly(nn.Module):
    """Tokens, each seeing its own past, to scores (GPT).

    The first `prefix_len` tokens of a row, where given, see one another (arXiv:1910.10683 §3.2.1).
    """

    config: ModelConfig

    def setup(self):
        config = self.config
        self.embedding = Embedding(config)
        self.inputs = InputEmbedding(config)
        self.decoder = Stack(config, config.layers, is_causal=True)
        self.head = HEADS[config.head.kind](config)

    def __call__(
        self,
        inputs: Tokens,
        *,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        type_ids: Tokens | None = None,
        prefix_len: Int[Array, " B"] | None = None,
        deterministic: bool = True,
        return_logits: bool = True,
    ) -> Float[Array, "B *T C"]:
        """Scores for the next tokens [B, T, V], or [B, C] of a classifier; or hidden states."""
        outputs, _ = self.decode(
            inputs,
            segment_ids=segment_ids,
            positions=positions,
            type_ids=type_ids,
            prefix_len=prefix_len,
            deterministic=deterministic,
            return_logits=return_logits,
        )
        return outputs

    score = EncoderOnly.score

    def decode(
        self,
        inputs: Tokens,
        *,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        type_ids: Tokens | None = None,
        prefix_len: Int[Array, " B"] | None = None,
        cache: BlockCache | None = None,
        cache_write_mask: Bool[Array, "B T"] | None = None,
        offset: jax.Array | int | None = None,
        deterministic: bool = True,
        return_logits: bool = True,
    ) -> tuple[Float[Array, "B *T C"], BlockCache | None]:
        """Scores for the token after each of `inputs`, which start at position `offset`.

        A cache remembers those that are real; None: all. The others are padding, or are read again
        after they were, or before they will be.
        """
        _require_cache(offset, cache)
        positions = _or_range(positions, inputs, offset)
        x = self.inputs(self.embedding(inputs), positions, type_ids, deterministic=deterministic)
        mask = decoder_mask(self.config, segment_ids, prefix_len, offset)
        x, cache = self.decoder(
            x,
            positions,
            mask,
            cache=cache,
            cache_write_mask=cache_write_mask,
            deterministic=deterministic,
        )
        return self.score(
            x, segment_ids, deterministic=deterministic
        ) if return_logits else x, cache


class EncoderDecoder(nn.Module):
    """Source tokens and target tokens so far to scores for the next one (arXiv:1706.03762 §3)."""

    config: ModelConfig

    def setup(self):
        config = self.config
        self.embedding = Embedding(config)
        self.encoder_inputs = InputEmbedding(config)
        self.decoder_inputs = InputEmbedding(config)
        depth = config.encoder_layers or config.layers  # which `init` looks at, too
        self.encoder = Stack(replace(config, layers=depth), depth)
        self.decoder = Stack(config, config.layers, is_causal=True, has_cross=True)
        self.head = HEADS[config.head.kind](config)

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
        return_logits: bool = True,
    ) -> Float[Array, "B T C"]:
        """Scores for the next tokens [B, T, V], or hidden states."""
        encoded = self.encode(
            encoder_inputs, encoder_segment_ids, encoder_positions, deterministic=deterministic
        )
        outputs, _ = self.decode(
            inputs,
            encoded,
            encoder_segment_ids,
            segment_ids=segment_ids,
            positions=positions,
            deterministic=deterministic,
            return_logits=return_logits,
        )
        return outputs

    score = EncoderOnly.score

    def encode(
        self,
        inputs: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B S D"]:
        """Hidden states of the source."""
        positions = _or_range(positions, inputs)
        x = self.encoder_inputs(self.embedding(inputs), positions, deterministic=deterministic)
        mask = encoder_mask(self.config, segment_ids)
        x, _ = self.encoder(x, positions, mask, deterministic=deterministic)
        return x

    def decode(
        self,
        inputs: Tokens,
        encoded: Float[Array, "B S D"] | None,
        encoder_segment_ids: Int[Array, "b S"] | None = None,
        *,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        cache: BlockCache | None = None,
        cache_write_mask: Bool[Array, "B T"] | None = None,
        offset: jax.Array | int | None = None,
        deterministic: bool = True,
        return_logits: bool = True,
    ) -> tuple[Float[Array, "B T C"], BlockCache | None]:
        """Scores for the token after each of `inputs`, which start at position `offset`.

        With a cache, its first call takes `encoded` and later ones None: the projected source is in
        the cache then. It remembers those of `inputs` that are real; None: all.
        """
        _require_cache(offset, cache)
        positions = _or_range(positions, inputs, offset)
        x = self.decoder_inputs(self.embedding(inputs), positions, deterministic=deterministic)
        x, cache = self.decoder(
            x,
            positions,
            decoder_mask(self.config, segment_ids, offset=offset),
            encoded=encoded,
            cross_mask=cross_mask(inputs, segment_ids, encoder_segment_ids),
            cache=cache,
            cache_write_mask=cache_write_mask,
            deterministic=deterministic,
        )
        return self.score(x) if return_logits else x, cache


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
    one = new_cache(config, batch, length)
    repeat = lambda x: jnp.broadcast_to(x, (config.layers, *x.shape))  # noqa: E731
    return BlockCache(self_attention=jax.tree.map(repeat, one))


def _require_cache(offset: jax.Array | int | None, cache: BlockCache | None) -> None:
    if offset is not None and cache is None:
        raise ValueError(
            "tokens at an offset need a cache of those before them: give `cache`, or `positions` "
            "where nothing is before them"
        )


def _or_range(positions: Positions | None, inputs: Tokens, offset=None) -> Positions:
    if positions is not None:
        return positions
    steps = jnp.arange(inputs.shape[1])[None]
    return steps if offset is None else steps + jnp.reshape(offset, (-1, 1))


# Who may look at whom in each of the three attentions ------------------------------------


def encoder_mask(config: ModelConfig, segment_ids: Int[Array, "B S"] | None) -> AttentionMask:
    """All tokens of a token's segment, in its window."""
    mask = _window(config)
    return mask if segment_ids is None else mask & masks.packed(segment_ids)


def decoder_mask(
    config: ModelConfig,
    segment_ids: Tokens | None,
    prefix_len: Int[Array, " B"] | None = None,
    offset: jax.Array | int | None = None,
) -> AttentionMask:
    """A token's own past, and the prefix, in its segment and window."""
    mask = masks.causal() if prefix_len is None else masks.prefix(prefix_len)
    mask &= _window(config)
    mask = mask if offset is None else mask.at(offset)
    return mask if segment_ids is None else mask & masks.packed(segment_ids)


def cross_mask(
    inputs: Tokens, segment_ids: Tokens | None, encoder_segment_ids: Int[Array, "b S"] | None
) -> AttentionMask:
    """The source of a token's segment, which B / b rows in succession may share."""
    if encoder_segment_ids is None:
        return masks.full()
    own = jnp.ones_like(inputs) if segment_ids is None else segment_ids
    return masks.cross(own.reshape(len(encoder_segment_ids), -1), encoder_segment_ids)


def _window(config: ModelConfig) -> AttentionMask:
    attention = config.attention
    if attention.window is None:
        return masks.full()
    steps = attention.dilation or None
    if not attention.global_tokens:
        return masks.sliding(attention.window, attention.window, steps)
    first = jnp.arange(attention.global_tokens)[None]
    return masks.longformer(attention.window, first, steps)
