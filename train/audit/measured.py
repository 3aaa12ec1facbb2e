"""Measure which outputs of a model depend on which inputs, by bits and by gradients."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from heedful.model.attention import FEATURES, spec_of
from heedful.model.config import AttentionSite, ModelConfig
from heedful.model.linear import Linear
from heedful.model.masks import AttentionMask
from heedful.model.multi_head_attention import MultiHeadAttention, StackContext
from heedful.model.stack import Stack
from heedful.model.transformer import InputEmbedding, build, empty_cache
from heedful.train.audit.findings import TOLERANCE
from heedful.train.model_loss import model_inputs

# An audit compiles for seconds and runs for milliseconds: compile without optimisations.
FAST: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # Later versions lack this option.
    FAST["xla_cpu_use_fusion_emitters"] = False
STREAMS = ("inputs", "encoder_inputs")
STRENGTHS = (1e20, 8.0)
"""Attention scores of forbidden keys; allowed keys have the negative scores."""

Batch = Mapping[str, np.ndarray]
Dependence = dict[tuple[str, str], Bool[np.ndarray, "B T S"]]
"""{(output, input): true where an output position depends on an input position}."""
Outputs = dict[str, Float[Array, "B T D"]]
Program = Callable[[Any, dict, dict], Outputs]
"""(parameters, batch, changes of the input embeddings) -> outputs."""


class DecodingSchedule(NamedTuple):
    """Schedule of decoding with a cache: prefill `first` positions, then `chunk` tokens per call.

    Row b has `lengths[b]` tokens in the prefill, and padding after them.
    """

    lengths: tuple[int, ...]
    first: int
    chunk: int

    def __str__(self) -> str:
        return (
            "token by token"
            if self.chunk == 1
            else f"{self.first} tokens, then {self.chunk} at a time"
        )

    def covered(self, length: int) -> Bool[np.ndarray, "B T"]:
        """Tell which positions the schedule decodes."""
        more = (length - self.first) // self.chunk * self.chunk
        return np.arange(length) < np.array(self.lengths)[:, None] + more


def shapes(config: ModelConfig) -> Any:
    """Return shapes and types of the parameters."""
    tokens = {name: jnp.zeros((1, 1), jnp.int32) for name in streams(config)}
    return nn.unbox(jax.eval_shape(build(config).init, jax.random.key(0), **tokens))["params"]


def random_params(config: ModelConfig) -> Any:
    """Return random parameters, biases and low-rank updates (usually 0) included."""
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda x: draw(0, 0.3, x.shape).astype(x.dtype), shapes(config))


def streams(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the model's inputs."""
    return STREAMS if config.architecture == "encoder_decoder" else STREAMS[:1]


# Programs ---------------------------------------------------------------------------------------


def forward(config: ModelConfig, deterministic: bool) -> Program:
    """Return the program of training or evaluation.

    Its outputs are the logits, and the hidden states of the encoder or of a classifier's stack.
    """
    is_pair, is_pooled = config.architecture == "encoder_decoder", config.head.kind == "classifier"
    shown = ("encoder",) if is_pair else ("encoder", "decoder") if is_pooled else ()

    def run(params: Any, batch: dict, deltas: dict) -> Outputs:
        found: Outputs = {}
        key = jax.random.key(1)

        def added(call, args, kwargs, context):
            module = context.module
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if isinstance(module, InputEmbedding):
                stream = "encoder_inputs" if module.name == "encoder_inputs" else "inputs"
                args = (args[0] + deltas[stream].astype(args[0].dtype), *args[1:])
            result = call(*args, **kwargs)
            if isinstance(module, Stack) and module.name in shown:
                found[str(module.name)] = result[0]
            return result

        with nn.intercept_methods(added):
            logits: Any = build(config).apply(
                {"params": params},
                **batch,
                deterministic=deterministic,
                rngs={} if deterministic else dict.fromkeys(("dropout", FEATURES), key),
            )
        # The output of a classifier becomes one position.
        return {**found, "logits": logits if logits.ndim == 3 else logits[:, None]}

    return run


def through_cache(config: ModelConfig, schedule: DecodingSchedule) -> Program:
    """Return the program of `generate` and `translate`, with this schedule."""

    def run(params: Any, batch: dict, deltas: dict) -> Outputs:
        model, (B, T) = build(config), batch["inputs"].shape
        lengths, first, chunk = jnp.array(schedule.lengths), schedule.first, schedule.chunk
        # As in `generate`, a position that is the same for all rows is a scalar.
        start = lengths if len(set(schedule.lengths)) > 1 else lengths[0]
        is_pair = config.architecture == "encoder_decoder"

        def call(method: str, delta: jax.Array, *args: Any, **kwargs: Any) -> Any:
            def added(call, args, kwargs, context):
                if isinstance(context.module, InputEmbedding) and context.method_name == "__call__":
                    args = (args[0] + delta.astype(args[0].dtype), *args[1:])
                return call(*args, **kwargs)

            with nn.intercept_methods(added):
                return model.apply({"params": params}, *args, **kwargs, method=method)

        source, begin = (), {"cache_write_mask": jnp.arange(first) < lengths[:, None]}
        if is_pair:
            segments = batch["encoder_segment_ids"]
            delta = deltas["encoder_inputs"]
            source = (call("encode", delta, batch["encoder_inputs"], segments), segments)
        elif "prefix_len" in batch:
            begin["prefix_len"] = lengths
        logits, cache = call(
            "decode", deltas["inputs"][:, :first], batch["inputs"][:, :first], *source, **begin,
            cache=empty_cache(config, B, T), offset=jnp.int32(0),
        )  # fmt: skip

        def step(cache: Any, i: jax.Array):
            at = jnp.reshape(start + i * chunk, (-1, 1)) + jnp.arange(chunk)
            at = jnp.broadcast_to(at, (B, chunk))
            tokens = jnp.take_along_axis(batch["inputs"], at, axis=1)
            delta = jnp.take_along_axis(deltas["inputs"], at[..., None], axis=1)
            source = (None, batch["encoder_segment_ids"]) if is_pair else ()
            offset = start + i * chunk
            logits, cache = call("decode", delta, tokens, *source, cache=cache, offset=offset)
            return cache, logits

        _, more = jax.lax.scan(step, cache, jnp.arange((T - first) // chunk))
        more = jnp.moveaxis(more, 0, 1).reshape(B, -1, logits.shape[-1])
        whole = jnp.zeros((B, T, logits.shape[-1])).at[:, :first].set(logits)
        put = lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at, 0))  # noqa: E731
        return {"logits": jax.vmap(put)(whole, more, lengths)}

    return run


class Probe:
    """A program with its parameters, compiled for batches with the shapes of `batch`."""

    def __init__(self, config: ModelConfig, params: Any, program: Program, batch: Batch):
        self.config, self.params, self.program = config, jax.device_put(params), program
        arguments = (self.params, model_inputs(config, batch), self._zeros(batch))
        traced = jax.jit(program, compiler_options=FAST).lower(*arguments)
        # XLA compiles one program while Python traces the next.
        compiler = ThreadPoolExecutor(1)
        self._compiled = compiler.submit(traced.compile)
        compiler.shutdown(wait=False)

    def outputs(self, batch: Batch, deltas: dict | None = None) -> dict[str, np.ndarray]:
        """Run the program, with `deltas` added to the input embeddings."""
        inputs = model_inputs(self.config, batch)
        run = self._compiled.result()
        return jax.device_get(run(self.params, inputs, deltas or self._zeros(batch)))

    def by_bits(self, batch: Batch) -> Dependence:
        """Measure which outputs change in any bit when an input embedding changes.

        Embeddings at one position change in all rows at once; see `by_other_rows`.
        """
        before, zeros = self.outputs(batch), self._zeros(batch)
        seen = {
            (name, stream): np.zeros((*x.shape[:2], zero.shape[1]), bool)
            for stream, zero in zeros.items()
            for name, x in before.items()
        }
        for stream, zero in zeros.items():
            for s in range(zero.shape[1]):
                for name, changed in self._changed(batch, before, stream, np.s_[:, s]).items():
                    seen[name, stream][:, :, s] = changed
        return seen

    def by_other_rows(self, batch: Batch) -> Bool[np.ndarray, "B T"]:
        """Measure which logits change in any bit when all inputs of another row change."""
        before, rows = self.outputs(batch), np.arange(len(batch["inputs"]))
        found = np.zeros(before["logits"].shape[:2], bool)
        for stream in streams(self.config):
            for b in rows:
                changed = self._changed(batch, before, stream, np.s_[b])["logits"]
                found |= changed & (rows != b)[:, None]
        return found

    def _changed(self, batch: Batch, before: dict, stream: str, positions: Any) -> dict:
        """Tell which outputs change or are not finite when embeddings at `positions` change."""
        deltas = self._zeros(batch)
        deltas[stream][positions] = np.random.default_rng(0).normal(size=self.config.width)
        after = self.outputs(batch, deltas)
        return {k: ((x != before[k]) | ~np.isfinite(x)).any(-1) for k, x in after.items()}

    def by_gradient(self, batch: Batch) -> Dependence:
        """Measure which outputs have a gradient other than 0 with respect to an input embedding.

        Each output vector is multiplied with a random direction; the products at one position are
        summed over the rows.
        """

        def jacobian(params: Any, inputs: dict, zeros: dict) -> Any:
            def directed(deltas: dict) -> dict:
                rng = np.random.default_rng(1)
                return {
                    name: x.astype(jnp.float32) @ rng.normal(size=x.shape[-1]).astype(np.float32)
                    for name, x in self.program(params, inputs, deltas).items()
                }

            outputs, pull = jax.vjp(directed, zeros)

            def reach(name: str) -> dict:
                def one(t: jax.Array) -> dict:
                    ones = jax.tree.map(jnp.zeros_like, outputs)
                    ones[name] = ones[name].at[:, t].set(1)
                    return jax.tree.map(lambda g: jnp.any(g != 0, axis=-1), pull(ones)[0])

                # map, not vmap: with vmap jaxlib 0.10 computes wrong gradients of norms on a CPU
                # (64 cotangents of a layer norm of [3, 64, 16] differ in the first digit).
                found = jax.lax.map(one, jnp.arange(outputs[name].shape[1]))
                return {(name, stream): x.swapaxes(0, 1) for stream, x in found.items()}

            return {key: x for name in outputs for key, x in reach(name).items()}

        run = jax.jit(jacobian, compiler_options=FAST)
        inputs = model_inputs(self.config, batch)
        return jax.device_get(run(self.params, inputs, self._zeros(batch)))

    def _zeros(self, batch: Batch) -> dict[str, np.ndarray]:
        width = self.config.width
        return {
            name: np.zeros((*batch[name].shape, width), np.float32) for name in streams(self.config)
        }


# Extreme scores ---------------------------------------------------------------------------------


def leaks_at_extreme_scores(
    config: ModelConfig,
    params: Any,
    site: AttentionSite,
    mask: AttentionMask,
    allowed: Bool[np.ndarray, "B T S"],
    core_params: Mapping[str, jax.Array],
) -> Bool[np.ndarray, "B T"]:
    """Tell which queries depend on forbidden keys when these keys have extremely large scores.

    All queries are the same vector. Allowed keys are -strength times this vector, forbidden keys
    +strength times this vector. So a mask that adds a finite number to a score, or replaces the
    score by a finite number, does not exclude forbidden keys. Results that are not finite, such as
    overflowing random features, are not counted; the smaller strength covers these.
    """
    B, T, S = allowed.shape
    attention = config.attention
    rng = np.random.default_rng(0)
    value, noise = rng.normal(size=(2, B, S, config.kv_heads, config.head_dim)).astype(np.float32)
    module, shared = MultiHeadAttention(config, site), StackContext(core_params=dict(core_params))
    # Random features have a common factor of all keys, which changes the rounding.
    is_exact = spec_of(attention.core_of(site)).is_exact
    tolerance = 0.0 if is_exact else TOLERANCE[config.dtype]

    def attend(
        params: Any, allowed: jax.Array, mask: AttentionMask, strength, key, value
    ) -> jax.Array:
        """Return the attention output [B, T, D].

        All components of a query are head_dim^-0.5, of a forbidden key `key`, and of an allowed key
        -`strength`.
        """

        def replaced(call, args, kwargs, context):
            if not isinstance(context.module, Linear) or context.method_name != "__call__":
                return call(*args, **kwargs)
            name, dtype = str(context.module.name).removeprefix("global_"), config.dtype
            if name == "query":
                shape = (*args[0].shape[:2], attention.heads, config.head_dim)
                return jnp.full(shape, config.head_dim**-0.5, dtype)
            if name == "key":
                keys = jnp.where(allowed, -strength, key)[..., None, None]
                return jnp.broadcast_to(keys, value.shape).astype(dtype)
            return jnp.asarray(value, dtype) if name == "value" else call(*args, **kwargs)

        zeros = jnp.zeros((B, T, config.width), config.dtype)
        context = jnp.zeros((B, S, config.width), config.dtype) if site == "cross" else None
        with nn.intercept_methods(replaced):
            y, _ = module.apply({"params": params}, zeros, context, mask, shared)  # type: ignore[misc]
        return y.astype(jnp.float32)

    def changed(params: Any, mask: AttentionMask, allowed: jax.Array, strength: jax.Array):
        def one(t: jax.Array) -> jax.Array:
            seen = allowed[:, t]
            other = jnp.where(seen[..., None, None], value, noise)
            a = attend(params, seen, mask, strength, strength, value)[:, t]
            b = attend(params, seen, mask, strength, 0.0, other)[:, t]
            differ = jnp.abs(a - b) > tolerance * jnp.abs(a).max()
            return (differ & jnp.isfinite(a) & jnp.isfinite(b)).any(-1)

        return jax.lax.map(one, jnp.arange(T)).T

    run = jax.jit(changed, compiler_options=FAST)
    leaks = [run(params, mask, allowed, jnp.float32(strength)) for strength in STRENGTHS]
    return np.any(jax.device_get(leaks), axis=0)
