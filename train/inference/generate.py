"""Continue texts: one prompt token by token, or many prompts at once."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from heedful.data.tokenizer import Tokenizer
from heedful.model.config import ModelConfig
from heedful.model.decoding.beam_search import beam_search
from heedful.model.decoding.parameters import DecodeParams, prepare
from heedful.model.decoding.sampling import Decoded, DecodeState, decode_until, init_decode
from heedful.train.config import DecodeConfig, require_tokens
from heedful.train.errors import TrainError
from heedful.train.inference import rules
from heedful.train.inference.batching import PromptBatch, batches, require_length
from heedful.train.inference.text import Text
from heedful.train.sharding import replicated

CHUNK = 256  # Number of positions of a prompt that are read at once.
PIECE = 16  # Number of tokens that a batch generates between two searches for stop strings.


class Generator:
    """Generator of texts that continue prompts, with the parameters of a decoder-only model.

    prefix: the model was trained with attention to the whole prompt (prefix_lm). longest: row
    length in training, in tokens; None: unknown. tell: function that is called with warnings.

    A text that may become longer than a table of L learned positions slides: before its first new
    token, and again after every L / 4 tokens, its last 3 L / 4 + 1 tokens are read again, from
    position 0 on. So each new token depends on the last 3 L / 4 + 1 to L tokens. nanoGPT reads the
    last L tokens again for every token.
    """

    def __init__(
        self,
        model: ModelConfig,
        decode: DecodeConfig,
        tokenizer: Tokenizer,
        params: Any,
        mesh: Mesh,
        seed: int = 0,
        *,
        prefix: bool = False,
        longest: int | None = None,
        tell: Callable[[str], object] = lambda _: None,
    ):
        _require_decoder(model)
        require_tokens(decode, model.vocab_size or 0)
        self.model, self.decode, self.tokenizer = model, decode, tokenizer
        self.mesh, self.seed, self.prefix = mesh, seed, prefix
        self.longest, self.tell = longest, tell
        positions = model.positions
        self._table = positions.max_length if positions.has_table else None
        with jax.set_mesh(mesh):
            self.params = jax.jit(partial(prepare, model))(params)
        self._begin = jax.jit(self._read_prompts)
        self._advance = jax.jit(
            self._write_on, donate_argnames="state", out_shardings=(None, replicated(mesh))
        )
        self._slide = jax.jit(self._read_end, donate_argnames="state")
        self._search = jax.jit(self._beam_search, out_shardings=replicated(mesh))

    def stream(self, prompt: str) -> Iterator[str]:
        """Yield the text after `prompt` in pieces, while it is generated.

        Pieces have whole characters, and no part of a stop string. Joined, they are the text that
        `self([prompt])` returns.
        """
        if self.decode.beam > 1:
            raise TrainError(
                f"decode.beam = {self.decode.beam}: a beam search has its text only at the end; "
                "set decode.beam = 1 to print the text while it is generated"
            )
        prompts = self._encode([prompt])
        (_, rows) = next(self._batches(prompts))
        pieces = self._write(prompts, rows, every=1)
        return (piece for (piece,) in pieces if piece)

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """Return the text after each prompt; an empty prompt begins a new text.

        A text does not depend on the other prompts, except that prompt i has its own random key.
        Raises TrainError with the number of the prompt if it has more than decode.batch_tokens
        tokens, and if a beam search may need more positions than the model has.
        """
        encoded = self._encode(prompts)
        texts = [""] * len(prompts)
        for numbers, rows in self._batches(encoded):
            chosen = [encoded[i] for i in numbers]
            every = PIECE if self.decode.stop else self.decode.max_tokens
            for pieces in self._write(chosen, rows, every):
                for i, piece in zip(numbers, pieces, strict=True):
                    texts[i] += piece
        return texts

    def _encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """Return the tokens of each prompt after the begin token, as in training.

        With decode.special_tokens, a prompt may itself begin with the begin token.
        """
        bos = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        read = self.tokenizer.encode_batch(prompts, special_tokens=self.decode.special_tokens)
        encoded = [
            np.append([] if ids[:1].tolist() == bos else bos, ids).astype(np.int32) for ids in read
        ]
        for number, ids in enumerate(encoded, 1):
            if not len(ids):
                raise TrainError(
                    f"prompt {number} is empty, and the tokenizer has no begin token: give a text"
                )
            require_length(f"prompt {number}", len(ids), self.decode)
            if self._slides(len(ids)) and self.decode.beam > 1:
                raise TrainError(
                    f"prompt {number} has {len(ids)} tokens, and decode.max_tokens = "
                    f"{self.decode.max_tokens} more tokens are too many for "
                    f"model.positions.max_length = {self._table}: shorten the prompt, lower "
                    "decode.max_tokens, or set decode.beam = 1, which has no such limit"
                )
        self._tell_lengths([len(ids) for ids in encoded])
        return encoded

    def _slides(self, length: int) -> bool:
        """Tell if a prompt of `length` tokens and its continuation may exceed the table."""
        return self._table is not None and length + self.decode.max_tokens > self._table

    def _tell_lengths(self, lengths: Sequence[int]) -> None:
        longest = max(lengths, default=0) + self.decode.max_tokens
        if self._table is not None and longest > self._table:
            self.tell(
                f"up to {longest} tokens are more than model.positions.max_length = {self._table}: "
                f"beyond it, each token depends only on the last {self._table - self._stride + 1} "
                f"to {self._table} tokens"
            )
        elif self.longest is not None and longest > self.longest:
            self.tell(
                f"up to {longest} tokens are more than data.max_length = {self.longest} of the "
                "training run: the model was not trained on such long texts"
            )

    @property
    def _stride(self) -> int:
        """Number of tokens beyond the table after which the model reads the text's end again."""
        return max((self._table or 0) // 4, 1)

    def _batches(self, prompts: Sequence[np.ndarray]) -> Iterator[tuple[list[int], PromptBatch]]:
        """Yield batches of prompts; texts that slide are in batches of their own."""
        slide, stay = {}, {}
        for i, ids in enumerate(prompts):
            (slide if self._slides(len(ids)) else stay)[i] = ids
        most = None if self._table is None else self._table - self.decode.max_tokens
        yield from batches(stay, self.decode, self.mesh, most)
        yield from batches(slide, self.decode, self.mesh)

    def _write(
        self, prompts: Sequence[np.ndarray], rows: PromptBatch, every: int
    ) -> Iterator[list[str]]:
        """Yield the next piece of each text after every `every` tokens."""
        texts = [Text(self.tokenizer, prompt, self.decode.stop) for prompt in prompts]
        for decoded in self._decode(rows, every):
            tokens, lengths, _ = jax.device_get(decoded)
            written = zip(texts, tokens, lengths, strict=False)  # The last rows may be padding.
            yield [text.read(row[:length]) for text, row, length in written]
            if all(text.ended for text in texts):
                break
        yield [text.rest() for text in texts]

    def _decode(self, rows: PromptBatch, every: int) -> Iterator[Decoded]:
        """Yield all tokens so far, after every `every` tokens.

        The devices already compute the next `every` tokens while the caller reads. Beam search
        yields once, at the end.
        """
        if self.decode.beam > 1:
            with jax.set_mesh(self.mesh):
                decoded = self._search(self.params, rows)
            yield decoded
            return
        previous = None
        stride = self._stride if self._slides(rows.inputs.shape[1]) else self.decode.max_tokens
        with jax.set_mesh(self.mesh):
            state = self._begin(self.params, rows)
        for until in range(every, self.decode.max_tokens + every, every):
            since = until - every
            with jax.set_mesh(self.mesh):
                full = range(-(-since // stride) * stride or stride, until, stride)
                for time in (time for time in full if time < self.decode.max_tokens):
                    if time > since:
                        state, _ = self._advance(self.params, state, time)
                    state = self._slide(self.params, state, rows)
                state, decoded = self._advance(self.params, state, until)
            if previous is not None:
                yield previous
            previous = decoded
        assert previous is not None
        yield previous

    # On the devices -----------------------------------------------------------------------------

    def _read_prompts(self, params: DecodeParams, rows: PromptBatch) -> DecodeState:
        lines = jax.vmap(lambda line: jax.random.fold_in(jax.random.key(self.seed), line))
        keys = lines(rows.lines) if self.decode.temperature > 0 else None
        state = init_decode(**self._prompts(params, rows), keys=keys)
        slides = self._slides(rows.inputs.shape[1])
        return self._read_anew(params, state, rows) if slides else state

    def _read_end(self, params: DecodeParams, state: DecodeState, rows: PromptBatch) -> DecodeState:
        move = lambda: self._read_anew(params, state, rows)  # noqa: E731
        return jax.lax.cond(jnp.all(state.done), lambda: state, move)

    def _read_anew(
        self, params: DecodeParams, state: DecodeState, rows: PromptBatch
    ) -> DecodeState:
        """Read the last tokens of each text again, at the first positions of the table."""
        inputs, lengths, _ = rows
        table = self._table or 0
        kept, end = table - self._stride + 1, lengths + state.time
        first = jnp.maximum(end - kept, 0)
        place, own = first[:, None] + jnp.arange(kept), lengths[:, None]
        take = partial(jnp.take_along_axis, axis=1, mode="clip")
        written = take(state.decoded.tokens, jnp.maximum(place - own, 0))
        tokens = jnp.where(place < own, take(inputs, place), written)
        count = jnp.minimum(end, kept)
        prefix = jnp.maximum(lengths - first, 0)
        cache = self._prefill(params, tokens, count, table, prefix)
        start = jnp.maximum(count - 1, 0) - state.time
        return state._replace(start=start, cache=cache)

    def _write_on(
        self, params: DecodeParams, state: DecodeState, until: jax.Array
    ) -> tuple[DecodeState, Decoded]:
        options = {"eos_id": self.tokenizer.ends, "sampling": rules.sampling(self.decode)}
        state = decode_until(params.step, state, until, **options)
        return state, state.decoded

    def _beam_search(self, params: DecodeParams, rows: PromptBatch) -> Decoded:
        return beam_search(
            params.step,
            **self._prompts(params, rows),
            eos_id=self.tokenizer.ends,
            **rules.beam(self.decode),
        )

    def _prompts(self, params: DecodeParams, rows: PromptBatch) -> dict[str, Any]:
        """Prefill the prompts; return the arguments that `init_decode` and `beam_search` share."""
        inputs, lengths, _ = rows
        index, last = jnp.arange(len(lengths)), jnp.maximum(lengths - 1, 0)
        seen = None
        if self.decode.repetition_penalty != 1:
            position = jnp.arange(inputs.shape[1])
            real = (position < lengths[:, None]) & (position >= (self.tokenizer.bos is not None))
            seen = jnp.zeros((len(lengths), self.model.vocab_size or 0), bool)
            seen = seen.at[index[:, None], inputs].max(real)
        size, cache = inputs.shape[1] + self.decode.max_tokens, None
        if not self._slides(inputs.shape[1]):
            cache = self._prefill(params, inputs, lengths, size, lengths)
        return {
            "last": inputs[index, last],
            "cache": cache,
            "start": last,
            "limits": jnp.where(lengths > 0, self.decode.max_tokens, 0),
            "max_steps": self.decode.max_tokens,
            "seen": seen,
        }

    def _prefill(
        self,
        params: DecodeParams,
        inputs: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        size: int,
        prefix_len: Int[Array, " B"],
    ) -> Any:
        """Return a cache of `size` positions, filled with all tokens of each row except the last.

        The cache is filled chunk by chunk, so that attention needs memory for chunk x length pairs.
        The last chunk may begin with tokens of an earlier chunk; the cache stores each token once.
        """
        length = inputs.shape[1]
        # With a prefix, every token attends to the whole prompt: read the prompt in one chunk.
        chunk = length if self.prefix else min(CHUNK, length)
        prefix = {"prefix_len": prefix_len} if self.prefix else {}

        def read(i: jax.Array, cache: Any) -> Any:
            start = jnp.minimum(i * chunk, length - chunk)
            tokens = jax.lax.dynamic_slice_in_dim(inputs, start, chunk, axis=1)
            position = start + jnp.arange(chunk)
            cache_write_mask = (position >= i * chunk) & (position < lengths[:, None] - 1)
            options = {"cache_write_mask": cache_write_mask, "offset": start}
            return params.decode(tokens, cache=cache, **prefix, **options)[1]

        cache = params.empty_cache(len(lengths), size)
        chunks = (jnp.max(lengths) - 1 + chunk - 1) // chunk
        return jax.lax.fori_loop(0, chunks, read, cache)


def _require_decoder(model: ModelConfig) -> None:
    if model.architecture == "encoder_decoder":
        raise TrainError(
            "model.architecture encoder_decoder generates a text from a source: use heedful "
            "translate"
        )
    if model.architecture != "decoder_only" or model.head.kind != "language_model":
        raise TrainError(
            f"model.architecture {model.architecture} with model.head.kind {model.head.kind} does "
            "not generate texts: use a run with decoder_only and language_model"
        )
