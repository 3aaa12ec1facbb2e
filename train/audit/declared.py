"""Dependences that a config allows, computed from the config and a batch in plain numpy.

This second implementation shares no code with model/masks.py and model/transformer.py, so that
the audit notices mistakes there.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from heedful.model.config import ModelConfig

Batch = Mapping[str, np.ndarray]
"""Arrays by the names of data/batch.py."""
Pairs = Bool[np.ndarray, "B N T S"]
"""True where a query may attend to a key: [rows, heads, queries, keys]."""
Reach = Bool[np.ndarray, "B T S"]
"""True where an output may depend on an input: [rows, outputs, inputs]."""


def attentions(config: ModelConfig, batch: Batch, layer: int = 0) -> dict[str, Pairs]:
    """Return the pairs that layer `layer` allows, by kind of attention.

    Kinds are the keys of `attention_weights.attention_kinds`; layers count from 0 in each stack.
    """
    window = window_of(config, layer)
    own, prefix = batch["segment_ids"], batch.get("prefix_len", np.zeros(1, int))
    if config.architecture == "encoder_only":
        return {"self": self_pairs(config, window, own)}
    if config.architecture == "decoder_only":
        return {"self": self_pairs(config, window, own, prefix)}
    source = batch["encoder_segment_ids"]
    return {
        "encoder": self_pairs(config, window, source),
        "self": self_pairs(config, window, own, prefix),
        "cross": same_document(own, source)[:, None],
    }


def window_of(config: ModelConfig, layer: int) -> int | None:
    """Return the window of a layer's self-attention; None: no limit."""
    window = config.pattern[layer % len(config.pattern)].window if config.pattern else None
    if window is None:
        return config.attention.window
    return window if isinstance(window, int) else None


def self_pairs(
    config: ModelConfig,
    window: int | None,
    segments: Int[np.ndarray, "B T"],
    prefix: np.ndarray | None = None,
) -> Pairs:
    """Return the allowed pairs of self-attention: the same document, and the window if any.

    With `prefix` (lengths [B] of prefixes, 0 for none) attention is causal outside of the prefix.
    """
    attention, position = config.attention, np.arange(segments.shape[1])
    distance = position[:, None] - position  # From the key to the query.
    allowed = same_document(segments, segments)[:, None]
    if prefix is not None:
        allowed = allowed & ((distance >= 0) | (position < prefix[:, None, None, None]))
    if window is not None:
        step = np.reshape(attention.dilation or (1,), (-1, 1, 1))
        near = (abs(distance) <= window * step) & (distance % step == 0)
        is_global = position < attention.global_tokens
        allowed = allowed & (near | is_global | is_global[:, None])
    return allowed


def same_document(queries: np.ndarray, keys: np.ndarray) -> Reach:
    """Tell which query and key belong to the same document; padding belongs to no document."""
    return (queries[:, :, None] == keys[:, None]) & (keys[:, None] > 0)


def reaches(config: ModelConfig, batch: Batch) -> dict[tuple[str, str], Reach]:
    """Return the inputs on which each output may depend through all layers, by (output, input).

    In each layer a position depends on itself and on the positions that it attends to; all layers
    together give the product of these relations. The logits of a classifier are one position.
    """
    period = [attentions(config, batch, layer) for layer in range(len(config.pattern) or 1)]

    def pairs(kind: str, layers: int) -> list[Reach]:
        return [np.asarray(period[i % len(period)][kind].any(1)) for i in range(layers)]

    layers = pairs("self", config.layers)
    own = through(layers, itself(batch["segment_ids"]))
    if config.architecture == "encoder_decoder":
        depth = config.encoder_layers or config.layers
        source = through(pairs("encoder", depth), itself(batch["encoder_segment_ids"]))
        # The first layer attends to the source; later layers pass this dependence on.
        (cross,) = pairs("cross", 1)
        across = through(layers[1:], cross @ source)
        return {
            ("encoder", "encoder_inputs"): source,
            ("logits", "inputs"): own,
            ("logits", "encoder_inputs"): across,
        }
    if config.head.kind == "classifier":
        stack = config.architecture.removesuffix("_only")
        logits = pooled(config.head.pooling, batch["segment_ids"], own)
        return {(stack, "inputs"): own, ("logits", "inputs"): logits}
    return {("logits", "inputs"): own}


def through(layers: Sequence[np.ndarray], reach: Reach) -> Reach:
    """Return the inputs on which positions depend after these layers; `reach`: before them."""
    for pairs in layers:
        reach = (pairs | itself(pairs)) @ reach
    return reach


def itself(rows: np.ndarray) -> Bool[np.ndarray, "B T T"]:
    """Return the relation of each position to itself, for rows [B, T, ...]."""
    batch, length = rows.shape[:2]
    return np.broadcast_to(np.eye(length, dtype=bool), (batch, length, length))


def pooled(
    pooling: str, segments: Int[np.ndarray, "B T"], reach: Reach
) -> Bool[np.ndarray, "B 1 S"]:
    """Return the inputs on which the single output of each row may depend."""
    real = segments > 0
    if pooling == "first":
        chosen = np.broadcast_to(np.arange(real.shape[1]) == 0, real.shape)
    elif pooling == "last":
        last = np.where(real, np.arange(real.shape[1]), 0).max(1)
        chosen = np.arange(real.shape[1]) == last[:, None]
    else:
        chosen = real
    return chosen[:, None] @ reach
