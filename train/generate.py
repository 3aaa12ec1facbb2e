"""Going on with a text: token by token to a terminal, or many prompts at once."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.decoding import Decoded, Sampling, Writing, advance, beam_search, begin
from model.transformer import build, empty_cache, put_together, take_apart
from train.config import DecodeConfig, TrainError
from train.rows import Rows, batches
from train.sharding import whole

CHUNK = 256  # positions of a prompt that are read at once
PIECE = 16  # tokens that a batch writes between two looks for stop strings


class Generator:
    """Goes on with prompts, with one set of parameters of a decoder.

    `prefix` says that the model was trained to see its prompt as a whole (prefix_lm).
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
    ):
        _require_decoder(model)
        self.model, self.decode, self.tokenizer = model, decode, tokenizer
        self.mesh, self.seed, self.prefix = mesh, seed, prefix
        with jax.set_mesh(mesh):
            self.params = jax.jit(partial(take_apart, model))(params)
        self._begin = jax.jit(self._read_prompts)
        self._advance = jax.jit(
            self._write_on, donate_argnames="writing", out_shardings=(None, whole(mesh))
        )
        self._search = jax.jit(self._beam_search, out_shardings=whole(mesh))

    def stream(self, prompt: str) -> Iterator[str]:
        """Yields the text after `prompt` piece by piece, as it is written.

        Pieces are whole characters and hold nothing of a stop string. Together they are the text
        that `self([prompt])` gives.
        """
        if self.decode.beam > 1:
            raise TrainError(
                f"decode.beam = {self.decode.beam} knows its text only at the end: "
                "set decode.beam = 1 to see it grow"
            )
        prompts = self._encode([prompt])
        (_, rows) = next(self._batches(prompts))
        pieces = self._write(prompts, rows, every=1)
        return (piece for (piece,) in pieces if piece)

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """The text after each prompt, in their order; an empty prompt begins a new text.

        A text does not depend on the other prompts, except that line i has its own random key.
        Raises TrainError, naming the line, when a text may need more positions than there are.
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
        """Each prompt's tokens after the begin token, as a document is in training."""
        bos = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        encoded = [
            np.append(bos, ids).astype(np.int32) for ids in self.tokenizer.encode_batch(prompts)
        ]
        for number, ids in enumerate(encoded, 1):
            if not len(ids):
                raise TrainError(f"prompt {number} is empty: the tokenizer has no begin token")
            longest, more = self._longest(), self.decode.max_tokens
            if longest is not None and len(ids) > longest:
                raise TrainError(
                    f"prompt {number} has {len(ids)} tokens, and with decode.max_tokens = {more} "
                    f"after them it goes beyond model.positions.max_length = "
                    f"{self.model.positions.max_length}: shorten it or lower decode.max_tokens"
                )
        return encoded

    def _longest(self) -> int | None:
        """Most tokens of a prompt, where positions are learned: its text needs room there too."""
        positions = self.model.positions
        return (
            None if positions.kind != "learned" else positions.max_length - self.decode.max_tokens
        )

    def _batches(self, prompts: Sequence[np.ndarray]) -> Iterator[tuple[list[int], Rows]]:
        sequences = dict(enumerate(prompts))
        return batches(sequences, self.decode, self.mesh, self._longest())

    def _write(self, prompts: Sequence[np.ndarray], rows: Rows, every: int) -> Iterator[list[str]]:
        """Yields the next piece of each text, after every `every` tokens."""
        texts = [Text(self.tokenizer, prompt, self.decode.stop) for prompt in prompts]
        for decoded in self._decode(rows, every):
            tokens, lengths, _ = jax.device_get(decoded)
            written = zip(texts, tokens, lengths, strict=False)  # The last rows may be empty.
            yield [text.read(row[:length]) for text, row, length in written]
            if all(text.ended for text in texts):
                break
        yield [text.rest() for text in texts]

    def _decode(self, rows: Rows, every: int) -> Iterator[Decoded]:
        """Yields all tokens written so far; the devices are a piece ahead of the caller."""
        if self.decode.beam > 1:
            with jax.set_mesh(self.mesh):
                decoded = self._search(self.params, rows)
            yield decoded
            return
        previous = None
        with jax.set_mesh(self.mesh):
            writing = self._begin(self.params, rows)
        for until in range(every, self.decode.max_tokens + every, every):
            with jax.set_mesh(self.mesh):
                writing, decoded = self._advance(self.params, writing, until)
            if previous is not None:
                yield previous
            previous = decoded
        assert previous is not None
        yield previous

    # On the devices -----------------------------------------------------------------------------

    def _read_prompts(self, params: Any, rows: Rows) -> Writing:
        lines = jax.vmap(lambda line: jax.random.fold_in(jax.random.key(self.seed), line))
        keys = lines(rows.lines) if self.decode.temperature > 0 else None
        return begin(**self._prompts(params, rows), keys=keys)

    def _write_on(self, params: Any, writing: Writing, until: jax.Array) -> tuple[Writing, Decoded]:
        sampling = Sampling(**{name: getattr(self.decode, name) for name in Sampling._fields})
        step = self._step(params)
        writing = advance(step, writing, until, eos_id=self._eos, sampling=sampling)
        return writing, writing.decoded

    def _beam_search(self, params: Any, rows: Rows) -> Decoded:
        return beam_search(
            self._step(params),
            **self._prompts(params, rows),
            eos_id=self._eos,
            width=self.decode.beam,
            exponent=self.decode.length_penalty,
            offset=self.decode.length_penalty_offset,
            early_stopping=self.decode.early_stopping,
            repetition_penalty=self.decode.repetition_penalty,
        )

    @property
    def _eos(self) -> int:
        return -1 if self.tokenizer.eos is None else self.tokenizer.eos

    def _step(self, params: Any):
        model = build(self.model)

        def step(tokens: jax.Array, cache: Any, position: jax.Array):
            options = {"cache": put_together(cache), "offset": position, "method": "decode"}
            logits, cache = model.apply({"params": put_together(params)}, tokens, **options)
            return logits[:, -1], take_apart(self.model, cache)

        return step

    def _prompts(self, params: Any, rows: Rows) -> dict[str, Any]:
        """The prompts as both ways of decoding begin with them."""
        inputs, lengths, _ = rows
        index, last = jnp.arange(len(lengths)), jnp.maximum(lengths - 1, 0)
        seen = None
        if self.decode.repetition_penalty != 1:
            position = jnp.arange(inputs.shape[1])
            real = (position < lengths[:, None]) & (position >= (self.tokenizer.bos is not None))
            seen = jnp.zeros((len(lengths), self.model.vocab_size or 0), bool)
            seen = seen.at[index[:, None], inputs].max(real)
        return {
            "last": inputs[index, last],
            "cache": self._prefill(params, inputs, lengths),
            "start": last,
            "limits": jnp.where(lengths > 0, self.decode.max_tokens, 0),
            "max_steps": self.decode.max_tokens,
            "seen": seen,
        }

    def _prefill(self, params: Any, inputs: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Any:
        """A cache of all tokens of each row but the last, with room for what will be written.

        It is filled chunk by chunk, so that attention needs memory for chunk x length pairs. The
        last chunk may begin with tokens that were read before; each is remembered once.
        """
        model, length = build(self.model), inputs.shape[1]
        params = put_together(params)
        # A token that sees the whole prompt cannot be read before the rest of it.
        chunk = length if self.prefix else min(CHUNK, length)
        prefix = {"prefix_len": lengths} if self.prefix else {}

        def read(i: jax.Array, cache: Any) -> Any:
            start = jnp.minimum(i * chunk, length - chunk)
            tokens = jax.lax.dynamic_slice_in_dim(inputs, start, chunk, axis=1)
            position = start + jnp.arange(chunk)
            is_real = (position >= i * chunk) & (position < lengths[:, None] - 1)
            options = {"cache": cache, "is_real": is_real, "offset": start, "method": "decode"}
            return model.apply({"params": params}, tokens, **prefix, **options)[1]

        cache = empty_cache(self.model, len(lengths), length + self.decode.max_tokens)
        chunks = (jnp.max(lengths) - 1 + chunk - 1) // chunk
        return take_apart(self.model, jax.lax.fori_loop(0, chunks, read, cache))


class Text:
    """The text of tokens that arrive one after the other, as far as it is certain.

    The tokens of a character that is not complete wait for the rest of it, and what may be the
    beginning of a stop string waits until it is not; the text ends before a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self.ended = False
        self._count = 0
        # How a token is spelled may depend on those before: the first of a text lacks its space.
        self._before, self._new = prompt.tolist(), []
        self._waiting = ""

    def read(self, tokens: np.ndarray) -> str:
        """What the tokens, all that are written so far, add to the text."""
        certain = ""
        for token in tokens[self._count :].tolist():
            if self.ended:
                break
            certain += self._add(token)
        self._count = len(tokens)
        return certain

    def rest(self) -> str:
        """What waited for a stop string that has not come."""
        waiting, self._waiting = self._waiting, ""
        return waiting

    def _add(self, token: int) -> str:
        if token == self.tokenizer.eos:
            self.ended = True
            return self.rest()
        self._new.append(token)
        known = self.tokenizer.decode(self._before)
        text = self.tokenizer.decode(self._before + self._new)
        if len(text) <= len(known) or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._before, self._new = self._new, []
        self._waiting += text[len(known) :]
        found = [i for i in map(self._waiting.find, self.stop) if i >= 0]
        if found:
            self.ended = True
            certain, self._waiting = self._waiting[: min(found)], ""
            return certain
        held = max((_overlap(self._waiting, stop) for stop in self.stop), default=0)
        border = len(self._waiting) - held
        certain, self._waiting = self._waiting[:border], self._waiting[border:]
        return certain


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _require_decoder(model: ModelConfig) -> None:
    if model.architecture == "encoder_decoder":
        raise TrainError(
            "model.architecture encoder_decoder writes a text for a source: use heedful translate"
        )
    if model.architecture != "decoder_only" or model.head.kind != "language_model":
        raise TrainError(
            f"model.architecture {model.architecture} with model.head.kind {model.head.kind} does "
            "not write texts: use a decoder_only with head language_model"
        )
