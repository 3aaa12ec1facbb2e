"""The three architectures: embeddings, one or two stacks of blocks, a head."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from heedful.model.attention_masks import cross_mask, decoder_mask, encoder_mask
from heedful.model.axes import constrain, partitioned
from heedful.model.config import ModelConfig, ModelError
from heedful.model.heads import HEADS
from heedful.model.layers import Dropout, Embedding, Norm
from heedful.model.masks import AttentionMask
from heedful.model.positions import PositionEmbedding, lookup
from heedful.model.stack import Stack
from heedful.model.stack_cache import StackCache, new_stack_cache

Tokens = Int[Array, "B T"]
Positions = Int[Array, "b T"]  # b is B, or 1 where all rows agree


class InputEmbedding(nn.Module):
    """Embedded tokens plus position and type, then norm and dropout as the config asks (§5.4)."""

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


class Transformer(nn.Module):
    """The parts that all architectures share: an embedding, a head, and the way between them."""

    config: ModelConfig

    def setup(self):
        self.embedding = Embedding(self.config)
        self.setup_stacks()
        self.head = HEADS[self.config.head.kind](self.config)

    def setup_stacks(self) -> None:
        """Make what stands between the embedding and the head."""
        raise NotImplementedError

    def score(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Tokens | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B *T C"]:
        """Return logits [B, T, V] or [B, C], as the head gives them, of hidden states."""
        return self.head(x, self.embedding, segment_ids, deterministic=deterministic)

    def hidden(
        self,
        embed: InputEmbedding,
        stack: Stack,
        inputs: Tokens,
        positions: Tokens | None,
        mask: Callable[[ModelConfig], AttentionMask],
        *,
        type_ids: Tokens | None = None,
        offset: jax.Array | int | None = None,
        deterministic: bool,
        **options: Any,
    ) -> tuple[Float[Array, "B T D"], StackCache | None]:
        """Return hidden states of tokens, and the cache; `options` are those of the stack."""
        _require_cache(offset, options.get("cache"))
        positions = _or_range(positions, inputs, offset)
        x = embed(self.embedding(inputs), positions, type_ids, deterministic=deterministic)
        masks = tuple(map(mask, stack.config.period))
        return stack(x, positions, masks, deterministic=deterministic, **options)


class EncoderOnly(Transformer):
    """Logits of tokens that each see all of their own segment (BERT, arXiv:1810.04805)."""

    def setup_stacks(self) -> None:
        self.inputs = InputEmbedding(self.config)
        self.encoder = Stack(self.config, self.config.layers)

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
        """Return logits, [B, T, V] of a language model or [B, C] of a classifier.

        Without `return_logits` these are hidden states, which `score` takes.
        """
        x = self.encode(inputs, segment_ids, positions, type_ids, deterministic=deterministic)
        return self.score(x, segment_ids, deterministic=deterministic) if return_logits else x

    def encode(
        self,
        inputs: Tokens,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        type_ids: Tokens | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """Return hidden states."""
        mask = partial(encoder_mask, segment_ids=segment_ids)
        x, _ = self.hidden(
            self.inputs,
            self.encoder,
            inputs,
            positions,
            mask,
            type_ids=type_ids,
            deterministic=deterministic,
        )
        return x


class DecoderOnly(Transformer):
    """Logits of tokens that each see their own past (GPT).

    The first `prefix_len` tokens of a row, where given, see one another (arXiv:1910.10683 §3.2.1).
    """

    def setup_stacks(self) -> None:
        self.inputs = InputEmbedding(self.config)
        self.decoder = Stack(self.config, self.config.layers, is_causal=True)

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
        """Return logits of the next tokens [B, T, V], or [B, C] of a classifier.

        Without `return_logits` these are hidden states.
        """
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

    def decode(
        self,
        inputs: Tokens,
        *,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        type_ids: Tokens | None = None,
        prefix_len: Int[Array, " B"] | None = None,
        cache: StackCache | None = None,
        cache_write_mask: Bool[Array, "B T"] | None = None,
        offset: jax.Array | int | None = None,
        deterministic: bool = True,
        return_logits: bool = True,
    ) -> tuple[Float[Array, "B *T C"], StackCache | None]:
        """Return logits for the token after each of `inputs`, and the cache with these added.

        `inputs` start at position `offset`. The cache remembers those in `cache_write_mask`, None:
        all. The others are padding, or are read once more, after or before they are remembered.
        Without `return_logits` there are hidden states in place of logits.
        """
        mask = partial(decoder_mask, segment_ids=segment_ids, prefix_len=prefix_len, offset=offset)
        x, cache = self.hidden(
            self.inputs,
            self.decoder,
            inputs,
            positions,
            mask,
            type_ids=type_ids,
            offset=offset,
            cache=cache,
            cache_write_mask=cache_write_mask,
            deterministic=deterministic,
        )
        if return_logits:
            x = self.score(x, segment_ids, deterministic=deterministic)
        return x, cache


class EncoderDecoder(Transformer):
    """Logits of target tokens that see their own past and all of a source (arXiv:1706.03762 §3)."""

    def setup_stacks(self) -> None:
        config = self.config
        self.encoder_inputs = InputEmbedding(config)
        self.decoder_inputs = InputEmbedding(config)
        depth = config.encoder_layers or config.layers  # which `init` looks at, too
        encoder = replace(config, layers=depth, pattern=config.pattern[:depth])
        self.encoder = Stack(encoder, depth)
        self.decoder = Stack(config, config.layers, is_causal=True, has_cross=True)

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
        """Return logits of the next tokens [B, T, V]; without `return_logits` hidden states."""
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

    def encode(
        self,
        inputs: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B S D"]:
        """Return hidden states of the source."""
        mask = partial(encoder_mask, segment_ids=segment_ids)
        x, _ = self.hidden(
            self.encoder_inputs, self.encoder, inputs, positions, mask, deterministic=deterministic
        )
        return x

    def decode(
        self,
        inputs: Tokens,
        encoded: Float[Array, "B S D"] | None,
        encoder_segment_ids: Int[Array, "b S"] | None = None,
        *,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        cache: StackCache | None = None,
        cache_write_mask: Bool[Array, "B T"] | None = None,
        offset: jax.Array | int | None = None,
        deterministic: bool = True,
        return_logits: bool = True,
    ) -> tuple[Float[Array, "B T C"], StackCache | None]:
        """Return logits for the token after each of `inputs`, and the cache with these added.

        As `DecoderOnly.decode`. With a cache, its first call takes `encoded` and later ones None:
        the projected source is in the cache then.
        """
        x, cache = self.hidden(
            self.decoder_inputs,
            self.decoder,
            inputs,
            positions,
            partial(decoder_mask, segment_ids=segment_ids, offset=offset),
            offset=offset,
            encoded=encoded,
            cross_mask=cross_mask(inputs, segment_ids, encoder_segment_ids),
            cache=cache,
            cache_write_mask=cache_write_mask,
            deterministic=deterministic,
        )
        return self.score(x) if return_logits else x, cache


ARCHITECTURES: dict[str, type[Transformer]] = {
    "encoder_only": EncoderOnly,
    "decoder_only": DecoderOnly,
    "encoder_decoder": EncoderDecoder,
}


def build(config: ModelConfig) -> nn.Module:
    """Return the model that a config describes."""
    return ARCHITECTURES[config.architecture](config)


def empty_cache(config: ModelConfig, batch: int, length: int) -> StackCache:
    """Return a cache for `length` decoder positions.

    Raises ModelError for more positions than a learned table has.
    """
    limit = config.positions.max_length
    if config.positions.kind == "learned" and length > limit:
        raise ModelError(
            f"cannot decode {length} positions: model.positions.max_length is {limit}, "
            "and learned positions end there"
        )
    return new_stack_cache(config, batch, length)


def _require_cache(offset: jax.Array | int | None, cache: StackCache | None) -> None:
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
