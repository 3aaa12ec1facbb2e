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
from heedful.model.linear import Linear
from heedful.model.masks import AttentionMask
from heedful.model.positions import PositionEmbedding, lookup
from heedful.model.stack import Stack
from heedful.model.stack_cache import StackCache, new_stack_cache

Tokens = Int[Array, "B T"]
Positions = Int[Array, "b T"]  # b is B, or 1 if all rows have the same positions


class InputEmbedding(nn.Module):
    """Embeddings of token, position and type, added up; then norm and dropout, if configured.

    Embeddings of E features that are not those of the model, D, are mapped to D.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        embedded: Float[Array, "B T E"],
        positions: Positions,
        type_ids: Tokens | None = None,
        *,
        deterministic: bool,
    ) -> Float[Array, "B T D"]:
        config = self.config
        x = embedded + PositionEmbedding(config, name="positions")(positions)
        if type_ids is not None and not config.type_vocab_size:
            raise ModelError(
                "model.type_vocab_size = 0, but type_ids are given: set it to the number of token "
                "types (BERT: 2), or leave type_ids out"
            )
        if config.type_vocab_size:
            deviation = config.input_width**-0.5 if config.init == "glorot" else 0.02
            init = partitioned(nn.initializers.normal(deviation), "position", "embed")
            shape = (config.type_vocab_size, config.input_width)
            table = jnp.asarray(self.param("types", init, shape))
            x += table[0] if type_ids is None else lookup(table, type_ids)
        if config.norm.embeddings:
            x = Norm(config, name="norm")(x)
        x = Dropout(config.dropout)(x, deterministic)
        if config.embedding_width is not None:
            narrow = {"features": config.embedding_width}
            x = Linear(config, narrow, {"embed": config.width}, True, name="projection")(x)
        return constrain(x.astype(config.dtype), "act_batch", "act_length", "act_embed")


class Transformer(nn.Module):
    """The parts that all architectures share: embedding, head, and how hidden states are made."""

    config: ModelConfig

    def setup(self):
        self.embedding = Embedding(self.config)
        self.setup_stacks()
        self.head = HEADS[self.config.head.kind](self.config)

    def setup_stacks(self) -> None:
        """Make the modules between the embedding and the head."""
        raise NotImplementedError

    def score(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Tokens | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B *T C"]:
        """Return logits of hidden states: [B, T, V] of a language model, [B, C] of a classifier."""
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
        """Return hidden states of `inputs` and the cache; `options` are passed on to the stack.

        `mask` makes the mask from the config of a layer. `positions` None: 0, 1, 2, ..., counted
        from `offset`.
        """
        _require_tokens(inputs)
        _require_cache(offset, options.get("cache"))
        positions = _or_range(positions, inputs, offset)
        x = embed(self.embedding(inputs), positions, type_ids, deterministic=deterministic)
        masks = tuple(map(mask, stack.config.period))
        return stack(x, positions, masks, deterministic=deterministic, **options)


class EncoderOnly(Transformer):
    """An encoder, in which each token sees all of its segment (BERT, arXiv:1810.04805)."""

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

        If `return_logits` is False, return hidden states [B, T, D], which `score` takes.
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
        """Return hidden states [B, T, D]."""
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
    """A decoder, in which each token sees itself and the tokens before it (GPT).

    If `prefix_len` is given, the first `prefix_len` tokens of a row also see one another
    (arXiv:1910.10683 §3.2.1).
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

        If `return_logits` is False, return hidden states [B, T, D] instead.
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
        """Return the logits for the token after each input, and the cache with the inputs added.

        The cache is None if None is given. `offset` is the position of the first input; None: 0.
        `cache_write_mask` is True for the inputs to add; None: all. The other inputs are padding,
        or tokens that another call adds. If `return_logits` is False, return hidden states
        [B, T, D] instead of logits.
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
    """An encoder of a source and a decoder, which sees all of the source (arXiv:1706.03762 §3)."""

    def setup_stacks(self) -> None:
        config = self.config
        self.encoder_inputs = InputEmbedding(config)
        self.decoder_inputs = InputEmbedding(config)
        depth = (
            config.encoder_layers or config.layers
        )  # initial values depend on config.layers, too
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
        """Return logits of the next tokens [B, T, V]; if not `return_logits`, hidden states."""
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
        """Return hidden states [B, S, D] of the source."""
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
        """Return the logits for the token after each input, and the cache with the inputs added.

        The arguments are those of `DecoderOnly.decode`. The first call with a cache takes the
        source as `encoded`; later calls take None, because the cache has the projected source.
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
    """Return the model that a config describes, a flax.linen.Module.

    `model.apply({"params": params}, inputs)` returns logits [B, T, V] for tokens [B, T], or [B, C]
    of a classifier; an encoder_decoder takes (inputs, encoder_inputs). B rows, T tokens, V size of
    the vocabulary, C outputs. Further arguments, by name: `segment_ids` [B, T], 0 for padding and
    1, 2, ... for the documents of a packed row (None: there is no padding), `positions` [B, T] of
    packed rows, `type_ids` [B, T] of pairs, `prefix_len` [B] of a decoder_only,
    `encoder_segment_ids` and `encoder_positions` [B, S], `deterministic=False` with
    `rngs={"dropout": key}` in training, and `return_logits=False` for hidden states [B, T, D] (D
    width). `init` makes parameters as a plain tree.

    Example:
        >>> import jax, heedful as hf
        >>> model = hf.build(hf.ModelConfig(vocab_size=64, width=32, layers=1, dropout=0.0))
        >>> params = hf.init(model, jax.random.key(0))
        >>> source, target = jax.numpy.ones((2, 7), int), jax.numpy.ones((2, 5), int)
        >>> model.apply({"params": params}, target, source).shape
        (2, 5, 64)
    """
    return ARCHITECTURES[config.architecture](config)


def empty_cache(config: ModelConfig, batch: int, length: int) -> StackCache:
    """Return an empty cache for `batch` rows of `length` decoder positions.

    Raises ModelError if positions are learned and `length` exceeds model.positions.max_length.
    """
    limit = config.positions.max_length
    if config.positions.has_table and length > limit:
        raise ModelError(
            f"cannot decode {length} positions: the table of learned positions ends at "
            f"model.positions.max_length = {limit}; decode at most {limit}"
        )
    return new_stack_cache(config, batch, length)


def _require_tokens(inputs: jax.Array) -> None:
    if jnp.ndim(inputs) != 2 or not jnp.issubdtype(jnp.asarray(inputs).dtype, jnp.integer):
        found = jnp.asarray(inputs)
        raise ModelError(
            f"tokens are {found.dtype}{list(found.shape)}: give integers [rows, positions]"
            + ("; tokens[None] adds the axis of rows" if found.ndim == 1 else "")
        )


def _require_cache(offset: jax.Array | int | None, cache: StackCache | None) -> None:
    if offset is not None and cache is None:
        raise ValueError(
            "tokens at an offset need a cache of the tokens before them: give `cache`, or leave "
            "`offset` out and give `positions`"
        )


def _or_range(positions: Positions | None, inputs: Tokens, offset=None) -> Positions:
    if positions is not None:
        return positions
    steps = jnp.arange(inputs.shape[1])[None]
    return steps if offset is None else steps + jnp.reshape(offset, (-1, 1))
