"""Translate sentences: encode once, decode on the device, one line out per line in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from heedful.data.text_files import one_line
from heedful.data.tokenizer import Tokenizer
from heedful.model.config import ModelConfig, ModelError
from heedful.model.decoding.beam_search import beam_search
from heedful.model.decoding.parameters import DecodeParams, prepare
from heedful.model.decoding.sampling import Decoded, sample
from heedful.train.config import DecodeConfig, require_tokens
from heedful.train.errors import TrainError
from heedful.train.inference import rules
from heedful.train.inference.batching import PromptBatch, batches, require_length
from heedful.train.sharding import replicated


class Translator:
    """A translator with the parameters of one model.

    Texts are sorted by length and batched; the translations keep the order of the texts. longest:
    largest length of a text in training, in tokens; None: unknown. tell: function that is called
    with warnings.
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
        longest: int | None = None,
        tell: Callable[[str], object] = lambda _: None,
    ):
        if model.architecture != "encoder_decoder":
            raise TrainError(
                f"model.architecture {model.architecture} does not translate: use a run with "
                "encoder_decoder"
            )
        if decode.stop:
            raise TrainError(
                f"decode.stop = {decode.stop} is only for texts that continue a prompt: leave "
                "decode.stop out"
            )
        if tokenizer.bos is None or tokenizer.eos is None:
            raise TrainError(
                "the tokenizer lacks the begin or end token of a translation: use a run whose "
                "tokenizer has both"
            )
        require_tokens(decode, model.vocab_size or 0)
        self.tokenizer, self.mesh = tokenizer, mesh
        self.model, self.decode, self.seed = model, decode, seed
        self.longest, self.tell = longest, tell
        self.bos, self.eos = tokenizer.bos, tokenizer.eos
        with jax.set_mesh(mesh):
            self.params = jax.jit(partial(prepare, model))(params)
        self._run = jax.jit(self._translate, out_shardings=replicated(mesh))

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """Return the translation of each text; the translation of a blank text is empty.

        Raises TrainError with the line for a text with too many tokens for the positions of the
        model, or for decode.batch_tokens.
        """
        special = self.decode.special_tokens
        encoded = self.tokenizer.encode_batch(texts, special_tokens=special)
        sources = [np.append(ids, self.eos) for ids in encoded]
        sizes = [
            len(source) if text.strip() else 0 for source, text in zip(sources, texts, strict=True)
        ]
        require_positions(self.model, self.decode, sizes)
        beyond = [i for i, size in enumerate(sizes, 1) if size > (self.longest or size)]
        if beyond:
            self.tell(
                f"{len(beyond)} of {len(texts)} lines have more than data.max_length = "
                f"{self.longest} tokens of the training run, the first in line {beyond[0]}: their "
                "translations may lack parts; give one sentence per line"
            )
        results = [""] * len(texts)
        todo = {i: sources[i] for i, text in enumerate(texts) if text.strip()}
        for i, tokens in self.tokens(todo):
            results[i] = one_line(self.tokenizer.decode(tokens))
        return results

    def tokens(self, sources: Mapping[int, np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index of a source, tokens of its translation with the end token), by length."""
        longest = longest_source(self.model, self.decode)
        for numbers, rows in batches(sources, self.decode, self.mesh, longest):
            with jax.set_mesh(self.mesh):
                tokens, lengths, _ = jax.device_get(self._run(self.params, rows))
            for row, i in enumerate(numbers):
                yield i, tokens[row, : lengths[row]]

    def _translate(self, params: DecodeParams, rows: PromptBatch) -> Decoded:
        """Translate sources; a row of length 0 gets an empty translation."""
        config = self.decode
        inputs, lengths, lines = rows
        batch, length = inputs.shape
        max_steps = length + config.extra_length
        segments = (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)
        encoded = params.apply(inputs, segments, method="encode")
        last = jnp.full(batch, self.bos, jnp.int32)
        start = jnp.int32(0)
        # This call writes only the projected source to the cache.
        _, cache = params.decode(
            last[:, None],
            encoded,
            segments,
            cache=params.empty_cache(batch, max_steps),
            cache_write_mask=jnp.zeros((batch, 1), bool),
            offset=start,
        )

        def step(tokens: jax.Array, cache: Any, position: jax.Array):
            return params.step(tokens, cache, position, None, segments)

        common = {
            "start": start,
            "limits": jnp.where(lengths > 0, lengths + config.extra_length, 0),
            "max_steps": max_steps,
            "eos_id": self.tokenizer.ends,
            "seen": None,
        }
        if config.repetition_penalty != 1:
            common["seen"] = jnp.zeros((batch, self.model.vocab_size or 0), bool)
        if config.beam > 1:
            return beam_search(step, last, cache, **common, **rules.beam(config))
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(self.seed), i))(lines)
        return sample(step, last, cache, sampling=rules.sampling(config), keys=keys, **common)


def longest_source(model: ModelConfig, decode: DecodeConfig) -> int | None:
    """Return the largest source length for which learned positions suffice; None: no limit.

    The output, up to decode.extra_length longer than the source, needs positions, too.
    """
    if not model.positions.has_table:
        return None
    return model.positions.max_length - decode.extra_length


def require_positions(
    model: ModelConfig, decode: DecodeConfig, sizes: Sequence[int], what: str = "sentences"
) -> None:
    """Raise TrainError with the line for a source that is too long.

    The limits are the positions of the model, and decode.batch_tokens. `sizes` has the number of
    tokens of each source; `what` names the sources in the message.
    """
    for line, size in enumerate(sizes, 1):
        require_length(f"line {line} of the {what}", size, decode)
    limit = longest_source(model, decode)
    if limit is None:
        return
    if limit < 1:
        raise ModelError(
            f"model.positions.max_length = {model.positions.max_length} leaves no room "
            f"for decode.extra_length = {decode.extra_length}: lower decode.extra_length"
        )
    too_long = [i for i, size in enumerate(sizes) if size > limit]
    if too_long:
        raise TrainError(
            f"{len(too_long)} {what} have more than {limit} tokens, the first in line "
            f"{too_long[0] + 1}: split them, or lower decode.extra_length (the limit is "
            "model.positions.max_length - decode.extra_length)"
        )
