"""What a model may see: written down from its config and the facts of a batch, in plain numpy.

Nothing of model/masks.py or model/transformer.py is used, or a mistake there would be made here as
well, and not be noticed.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Int

from heedful.model.config import ModelConfig

Batch = Mapping[str, np.ndarray]  # by the names of data/batch.py
Pairs = Bool[np.ndarray, "B N T S"]  # whether a query may look at a key, by head
Reach = Bool[np.ndarray, "B T S"]  # whether an output may depend on an input


def attentions(config: ModelConfig, batch: Batch) -> dict[str, Pairs]:
    """The pairs of each attention, by the names of `attention_weights.attention_kinds`."""
    own, prefix = batch["segment_ids"], batch.get("prefix_len", np.zeros(1, int))
    if config.architecture == "encoder_only":
        return {"self": self_pairs(config, own)}
    if config.architecture == "decoder_only":
        return {"self": self_pairs(config, own, prefix)}
    source = batch["encoder_segment_ids"]
    return {
        "encoder": self_pairs(config, source),
        "self": self_pairs(config, own, prefix),
        "cross": same_document(own, source)[:, None],
    }


def self_pairs(
    config: ModelConfig, segments: Int[np.ndarray, "B T"], prefix: np.ndarray | None = None
) -> Pairs:
    """The tokens of one's document: its past and the prefix if there is a prefix, in the window."""
    attention, place = config.attention, np.arange(segments.shape[1])
    back = place[:, None] - place  # how far behind the query the key lies
    may = same_document(segments, segments)[:, None]
    if prefix is not None:
        may = may & ((back >= 0) | (place < prefix[:, None, None, None]))
    if attention.window is not None:
        step = np.reshape(attention.dilation or (1,), (-1, 1, 1))
        near = (abs(back) <= attention.window * step) & (back % step == 0)
        is_global = place < attention.global_tokens
        may = may & (near | is_global | is_global[:, None])
    return may


def same_document(queries: np.ndarray, keys: np.ndarray) -> Reach:
    """Both belong to one document; padding belongs to none."""
    return (queries[:, :, None] == keys[:, None]) & (keys[:, None] > 0)


def reaches(config: ModelConfig, batch: Batch) -> dict[tuple[str, str], Reach]:
    """What each output may depend on through all layers, {(output, input): pairs}.

    In each layer a position sees itself and what attention lets it see, so that L layers reach the
    L-th power of that. The logits of a classifier are one position.
    """
    pairs = {name: np.asarray(heads.any(1)) for name, heads in attentions(config, batch).items()}
    own = closure(pairs["self"], config.layers)
    if config.architecture == "encoder_decoder":
        source = closure(pairs["encoder"], config.encoder_layers or config.layers)
        # A position looks across in its last layer too, after it has looked at its own side.
        across = closure(pairs["self"], config.layers - 1) @ pairs["cross"] @ source
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


def closure(pairs: Reach, layers: int) -> Reach:
    """(pairs or identity) ^ layers."""
    one = np.eye(pairs.shape[1], dtype=bool)
    reach = np.broadcast_to(one, pairs.shape)
    for _ in range(min(layers, pairs.shape[1])):
        reach = reach @ (pairs | one)
    return reach


def pooled(
    pooling: str, segments: Int[np.ndarray, "B T"], reach: Reach
) -> Bool[np.ndarray, "B 1 S"]:
    """What the one output of each row may depend on."""
    real = segments > 0
    if pooling == "first":
        chosen = np.broadcast_to(np.arange(real.shape[1]) == 0, real.shape)
    elif pooling == "last":
        last = np.where(real, np.arange(real.shape[1]), 0).max(1)
        chosen = np.arange(real.shape[1]) == last[:, None]
    else:
        chosen = real
    return chosen[:, None] @ reach
