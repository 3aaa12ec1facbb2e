"""From sentences to sentences: encode once, decode on the device, one line out per line in."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.tokenizer import BOS, EOS, Tokenizer
from model.config import ModelConfig, ModelError
from model.decoding import Decoded, beam_search, sample
from model.transformer import build, empty_cache
from train.config import DecodeConfig, TrainError
from train.sharding import RULES

SHORTEST = 16  # source lengths are 16, 32, 64, ...: one compilation each


class Translator:
    """Translates with one set of parameters, sorted by length and batched, order kept."""

    def __init__(
        self,
        model: ModelConfig,
        decode: DecodeConfig,
        tokenizer: Tokenizer,
        params: Any,
        mesh: Mesh,
        seed: int = 0,
    ):
        if model.architecture != "encoder_decoder":
            raise TrainError(f"model.architecture {model.architecture} does not translate")
        self.tokenizer, self.params, self.mesh = tokenizer, params, mesh
        self.model, self.decode, self.seed = model, decode, seed
        self._run = jax.jit(self._translate)

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The translation of each text; of a blank one, a blank one.

        Raises TrainError, naming the line, when a text is longer than the model's positions.
        """
        sources = [np.append(ids, EOS) for ids in self.tokenizer.encode_batch(texts)]
        self._require_positions(sources)
        results = [""] * len(texts)
        todo = [i for i, text in enumerate(texts) if text.strip()]
        for indices, length, rows in self._batches(sources, todo):
            inputs = np.zeros((rows, length), np.int32)
            lengths = np.zeros(rows, np.int32)
            for row, i in enumerate(indices):
                inputs[row, : len(sources[i])] = sources[i]
                lengths[row] = len(sources[i])
            # A row's random key comes from its line, so that it does not depend on its neighbours.
            lines = np.zeros(rows, np.uint32)
            lines[: len(indices)] = indices
            sharding = NamedSharding(self.mesh, PartitionSpec(RULES["act_batch"]))
            arrays = jax.device_put((inputs, lengths, lines), sharding)
            with jax.set_mesh(self.mesh):
                tokens = np.asarray(self._run(self.params, *arrays).tokens)
            for row, i in enumerate(indices):
                results[i] = self.tokenizer.decode(tokens[row]).replace("\n", " ")
        return results

    def _translate(
        self, params: Any, inputs: jax.Array, lengths: jax.Array, lines: jax.Array
    ) -> Decoded:
        """`inputs` [B, S] of `lengths` [B], 0 for an empty row, to tokens [B, T]."""
        config, model = self.decode, build(self.model)
        batch, length = inputs.shape
        max_steps = length + config.extra_length
        segments = (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)
        encoded = model.apply({"params": params}, inputs, segments, method="encode")

        def step(tokens: jax.Array, cache: Any, position: jax.Array, encoded: Any = None):
            times = tokens.shape[0] // batch
            logits, cache = model.apply(
                {"params": params},
                tokens,
                encoded,
                jnp.repeat(segments, times, axis=0),
                cache=cache,
                offset=position,
                method="decode",
            )
            return logits[:, -1], cache

        begin = jnp.full((batch, 1), BOS, jnp.int32)
        cache = empty_cache(self.model, batch, max_steps + 1)
        logits, cache = step(begin, cache, jnp.int32(0), encoded)
        limits = jnp.where(lengths > 0, lengths + config.extra_length, 0)
        common = {"start": 1, "limits": limits, "max_steps": max_steps, "eos_id": EOS}
        if config.beam > 1:
            return beam_search(
                step, logits, cache, width=config.beam, exponent=config.length_penalty, **common
            )
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(self.seed), i))(lines)
        return sample(
            step,
            logits,
            cache,
            keys=keys,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            **common,
        )

    def _batches(
        self, sources: Sequence[np.ndarray], todo: list[int]
    ) -> Iterator[tuple[list[int], int, int]]:
        """Yields (indices of texts, source length, rows), few distinct shapes."""
        devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        buckets: dict[int, list[int]] = {}
        for i in sorted(todo, key=lambda i: len(sources[i])):
            buckets.setdefault(self._bucket(len(sources[i])), []).append(i)
        for length, indices in buckets.items():
            rows = max(self.decode.batch_tokens // length, 1)
            rows = min(rows, 1 << (len(indices) - 1).bit_length())
            rows = -(-rows // devices) * devices
            for start in range(0, len(indices), rows):
                yield indices[start : start + rows], length, rows

    def _bucket(self, length: int) -> int:
        bucket = max(SHORTEST, 1 << (length - 1).bit_length())
        limit = self._longest()
        return bucket if limit is None else min(bucket, limit)

    def _longest(self) -> int | None:
        """Most source tokens, where positions are learned: the output needs room there too."""
        if self.model.positions.kind != "learned":
            return None
        return self.model.positions.max_length - self.decode.extra_length - 1

    def _require_positions(self, sources: Sequence[np.ndarray]) -> None:
        limit = self._longest()
        if limit is None:
            return
        if limit < 1:
            raise ModelError(
                f"model.positions.max_length = {self.model.positions.max_length} leaves no room "
                f"for decode.extra_length = {self.decode.extra_length}: lower the latter"
            )
        too_long = [i for i, ids in enumerate(sources) if len(ids) > limit]
        if too_long:
            raise TrainError(
                f"{len(too_long)} sentences have more than {limit} tokens, the first in line "
                f"{too_long[0] + 1}: split them; model.positions.max_length ends there"
            )
