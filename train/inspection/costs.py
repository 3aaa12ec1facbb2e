"""Costs of a model, from shapes alone: parameters, memory and FLOPs."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from heedful.data.config import DataConfig
from heedful.model.attention import spec_of
from heedful.model.cache import WindowCache
from heedful.model.config import AttentionSite, ModelConfig
from heedful.model.stack_cache import PatternCache, StackCache
from heedful.model.transformer import build, empty_cache
from heedful.train.config import TrainConfig
from heedful.train.sharding import resolve
from heedful.train.state import Setup
from heedful.train.trainable import named, split

BACKWARD = 2
"""FLOPs of a backward pass, divided by the FLOPs of a forward pass."""

STACKED = ("encoder", "decoder")
STACKS = {"encoder": "encoder", "decoder": "decoder", "head": "output"}
PARTS = {
    "embedding": "embeddings",
    "types": "embeddings",
    "projection": "embeddings",
    "positions": "positions",
    "relative_bias": "positions",
    "self_attention": "self-attention",
    "cross_attention": "cross-attention",
    "feed_forward": "feed-forward",
    "head": "head",
}
ORDER = (
    "embeddings", "positions", "self-attention", "self-attention scores", "cross-attention",
    "cross-attention scores", "feed-forward", "low-rank updates", "norms", "head", "other",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Part:
    """Costs of one kind of layer in a stack."""

    stack: str
    """input, encoder, decoder or output."""
    name: str
    parameters: int
    flops: float
    """FLOPs of one forward pass, per token."""
    masked: float
    """Part of `flops` for scores that a causal mask excludes: half of the scores; 0 with a
    window."""


def parts(config: ModelConfig, params: Any, length: int) -> list[Part]:
    """Return parameters and FLOPs by part, in the order of the forward pass.

    A multiply-add in a matrix product counts as two FLOPs. FLOPs are per token of a row of `length`
    tokens (arXiv:2001.08361 §2.1); lookups, norms, softmax and activations are left out. Every
    query is multiplied with all `length` keys, or with the keys of its window, including masked
    keys. Logits are computed for every token. In an encoder-decoder, a token means one target token
    together with one source token.
    """
    counts: dict[tuple[str, str], list[float]] = {}

    def add(stack: str, part: str, parameters: int, flops: float, masked: float = 0.0) -> None:
        total = counts.setdefault((stack, part), [0, 0.0, 0.0])
        total[0] += parameters
        total[1] += flops
        total[2] += masked

    for name, leaf in named(params):
        stack, part = _stack_and_part(name)
        is_matrix = name.rpartition(".")[2] in ("kernel", "lora_a", "lora_b")
        flops = 2.0 * leaf.size if is_matrix else 0.0
        if part == "head" and config.head.kind == "classifier":
            flops /= length  # A classifier head computes one vector per row.
        add(stack, part, leaf.size, flops)
        if name.endswith("_attention.out.kernel"):
            site, layers = _site(config, stack, part), leaf.shape[0]
            features = leaf.size // (layers * config.width)  # Heads x head size.
            for layer in map(config.layer, range(layers)):
                scores = 2 * 2.0 * _keys(layer, site, length) * features
                is_causal = stack == "decoder" and part == "self-attention"
                is_masked = is_causal and layer.attention.window is None
                add(stack, f"{part} scores", 0, scores, scores / 2 if is_masked else 0.0)
        if name == "embedding.table" and _is_tied(config):
            add("output", "head", 0, 2.0 * leaf.size)
    stacks = ("input", *STACKS.values())
    ordered = sorted(counts, key=lambda key: (stacks.index(key[0]), ORDER.index(key[1])))
    return [
        Part(stack=stack, name=name, parameters=int(counts[stack, name][0]),
             flops=counts[stack, name][1], masked=counts[stack, name][2])
        for stack, name in ordered
    ]  # fmt: skip


def recomputed(config: ModelConfig, all_parts: list[Part]) -> float:
    """Return the FLOPs per token that the backward pass recomputes with `config.remat`."""
    scores = ("self-attention scores", "cross-attention scores")
    again = {"none": (), "dots": scores, "attention": (*scores, "feed-forward"), "full": ORDER}
    names = again[config.remat]
    return sum(part.flops for part in all_parts if part.stack in STACKED and part.name in names)


def _site(config: ModelConfig, stack: str, part: str) -> AttentionSite:
    if part == "cross-attention":
        return "cross"
    is_beside = stack == "decoder" and config.architecture == "encoder_decoder"
    return "decoder" if is_beside else "self"


def _keys(config: ModelConfig, site: AttentionSite, length: int) -> int:
    """Return the number of keys that a query is multiplied with."""
    attention = config.attention
    own = spec_of(attention.core_of(site)).keys
    if own is not None:
        return own(config)
    if attention.window is None or site == "cross":
        return length
    is_causal = site == "decoder" or config.architecture == "decoder_only"
    sides = 1 if is_causal else 2
    return min(length, sides * attention.window + 1 + attention.global_tokens)


def _stack_and_part(name: str) -> tuple[str, str]:
    """Return (stack, part) of the parameter with this dotted name."""
    keys = name.split(".")
    stack = STACKS.get(keys[0], "input")
    if stack != "output" and keys[-1].startswith("lora_"):
        return stack, "low-rank updates"
    if stack != "output" and any(key == "norm" or key.endswith("_norm") for key in keys):
        return stack, "norms"
    return stack, next((PARTS[key] for key in keys if key in PARTS), "other")


def _is_tied(config: ModelConfig) -> bool:
    return config.head.kind == "language_model" and config.tie_embeddings


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device of the mesh."""

    parameters: int
    gradients: int
    moments: int
    """Bytes of the optimizer's state, with its counters."""
    outputs: int
    """Float32 logits that exist at the same time: [rows, positions, vocabulary], or [rows, classes]
    of a classifier."""
    cache: int
    """Decoding cache of one token of one text, or of a whole text if the size does not depend on
    the number of tokens; 0 for models that do not decode."""
    source_cache: int
    """Decoding cache of one source token of an encoder-decoder."""


def memory(config: ModelConfig, data: DataConfig, train: TrainConfig, setup: Setup) -> Memory:
    """Return the memory of a training step and of decoding, without activations.

    Raises TrainError with the name of an array whose shape the mesh does not divide.
    """
    state = setup.abstract
    trainable, _ = split(state.params, setup.factors)
    if config.head.kind == "classifier":
        rows = math.ceil(data.batch_tokens / train.accumulate / data.max_length)
        outputs = rows * (config.head.outputs or 1)
    else:
        positions = data.batch_tokens // train.accumulate
        outputs = logits_at_once(positions, data, train) * (config.vocab_size or 1)
    cache = _cache(config, state.params)
    groups = cache.groups if isinstance(cache, PatternCache) else (cache,) if cache else ()

    def cached(rows: Any) -> int:
        heads = (None, "kv_heads") if isinstance(rows, WindowCache) else ("kv_heads",)
        axes = ("layers", None, *heads, None, None)
        return sum(
            math.prod(
                resolve("the cache", axes[: x.ndim], x.shape, setup.mesh).shard_shape(x.shape)
            )
            * x.dtype.itemsize
            for x in jax.tree.leaves(rows)
        )

    return Memory(
        parameters=device_bytes(state.params),
        gradients=device_bytes(trainable),
        moments=device_bytes(state.opt_state),
        # Rows are sharded over data and fsdp, the length over seq, the vocabulary over tensor.
        outputs=math.ceil(outputs / setup.mesh.size) * 4,
        cache=sum(cached(group.self_attention) for group in groups),
        source_cache=sum(cached(group.cross_attention) for group in groups),
    )


def logits_at_once(positions: float, data: DataConfig, train: TrainConfig) -> int:
    """Return the number of positions of a batch that have logits at the same time."""
    chunk = min(train.loss_chunk or data.max_length, data.max_length)
    return math.ceil(positions * chunk / data.max_length)


def device_bytes(tree: Any) -> int:
    """Return the bytes that one device holds of all arrays in a tree."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _cache(config: ModelConfig, params: Any) -> StackCache | None:
    """Return the shapes of the decoding cache for one target token; None: no decoding.

    In an encoder-decoder, the cache also has one source token.
    """
    if config.architecture == "encoder_only":
        return None
    encoded = ()
    if config.architecture == "encoder_decoder":
        encoded = (jax.ShapeDtypeStruct((1, 1, config.width), config.dtype),)

    def decode(params: Any, *encoded: jax.Array) -> Any:
        tokens, cache = jnp.zeros((1, 1), jnp.int32), empty_cache(config, 1, 1)
        return build(config).apply(
            {"params": params}, tokens, *encoded, cache=cache, offset=0, method="decode"
        )

    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return jax.eval_shape(decode, plain, *encoded)[1]
