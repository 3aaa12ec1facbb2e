"""Check the arrays of batches: positions, segments, weights, and targets among visible inputs."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool

from heedful.data.objectives import Arrays
from heedful.data.pipeline import Dataset
from heedful.model.config import ModelConfig
from heedful.train.audit.declared import reaches
from heedful.train.audit.findings import Finding, finding_at

BATCHES = 16
"""Number of batches that are checked; several, as objectives are random."""
MAX_UNCHANGED = 0.3
"""Largest share of unchanged tokens among those that masked_lm chooses; 0.1 is expected."""


def check_data(model: ModelConfig, dataset: Dataset) -> list[Finding]:
    """Return findings about the batches of a dataset: one for each kind and array."""
    found: dict[tuple[str, str], Finding] = {}
    documents = _documents(dataset)
    kept, chosen = 0, 0
    batches = [dataset.batch(dataset.eval_plan, 0)]
    batches += [dataset.batch(dataset.train_plan, i) for i in range(BATCHES)]
    for batch in batches:
        for finding in _in_batch(model, dataset, batch, documents):
            found.setdefault((finding.kind, finding.where), finding)
        if dataset.config.objective_spec.needs_mask:
            weighted = batch["weights"] > 0
            kept += int((batch["inputs"] == batch["targets"])[weighted].sum())
            chosen += int(weighted.sum())
    findings = list(found.values())
    if kept > MAX_UNCHANGED * chosen:
        reason = (
            f"{kept} of {chosen} tokens to predict are unchanged in the input: expected are 10 %"
        )
        findings.append(Finding("leak", "targets", "data", reason))
    return findings


def _documents(dataset: Dataset) -> np.ndarray:
    """Return the index of the document of each token id; -1: no document has this token."""
    numbers = np.full(dataset.tokenizer.vocab_size, -1)
    for i in range(len(dataset.store.blank)):
        for tokens in dataset.store[i].values():
            numbers[tokens] = i
    return numbers


def _in_batch(
    model: ModelConfig, dataset: Dataset, batch: Arrays, documents: np.ndarray
) -> Iterator[Finding]:
    is_masked = dataset.config.objective_spec.needs_mask
    has_tokens = batch["targets"].ndim == 2
    counted = batch["weights"] > 0 if has_tokens else np.zeros(batch["inputs"].shape, bool)
    for side in ("", "encoder_") if "encoder_inputs" in batch else ("",):
        segments, tokens = batch[f"{side}segment_ids"], batch[f"{side}inputs"]
        if not side and is_masked:
            tokens = np.where(counted, batch["targets"], tokens)
        yield from finding_at(
            f"{side}positions", "data", batch[f"{side}positions"] != _positions(segments),
            "the position of a token is not its index in its document",
        )  # fmt: skip
        document = np.where(segments > 0, documents[tokens], -1)
        yield from finding_at(
            f"{side}segment_ids", "data", _mixed(segments, document),
            "a segment is not exactly one document",
        )  # fmt: skip
    if not has_tokens:
        return
    yield from finding_at(
        "weights", "data", counted & (batch["segment_ids"] == 0), "padding has a weight"
    )
    if model.architecture != "encoder_only":
        segments = batch["segment_ids"]
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        wrong = same & (batch["inputs"][:, 1:] != batch["targets"][:, :-1])
        yield from finding_at("targets", "data", wrong, "the target is not the next input")
    ordinary = counted & ~dataset.tokenizer.is_special[batch["targets"]]
    for (output, stream), may in reaches(model, batch).items():
        if output != "logits":
            continue
        given = (batch["targets"][:, :, None] == batch[stream][:, None]) & ordinary[:, :, None]
        if is_masked:  # `check_data` counts unchanged inputs at chosen positions.
            given &= ~counted[:, None]
        pairs = tuple(map(tuple, np.argwhere(given & may).tolist()))
        if pairs:
            b, t, s = pairs[0]
            side = "" if stream == "inputs" else " of the encoder"
            reason = f"position {t} of row {b} sees its target, which is input {s}{side}"
            yield Finding("leak", "targets", "data", reason, pairs)


def _positions(segments: np.ndarray) -> np.ndarray:
    """Return the index of each position in its segment, 0 for padding."""
    index = np.arange(segments.shape[1])
    starts = np.diff(segments, axis=1, prepend=-1) != 0
    first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return np.where(segments > 0, index - first, 0)


def _mixed(segments: np.ndarray, documents: np.ndarray) -> Bool[np.ndarray, "B T"]:
    """Return the positions with a wrong segment.

    A segment is wrong if it has tokens of two documents, or if a neighbouring token of the same
    document is in another segment.
    """
    known = documents >= 0
    both = known[:, :, None] & known[:, None]
    same = segments[:, :, None] == segments[:, None]
    alike = documents[:, :, None] == documents[:, None]
    # Only neighbours are compared: a row may begin and end with parts of one document.
    next_to = abs(np.subtract.outer(*[np.arange(segments.shape[1])] * 2)) == 1
    return (both & ((same & ~alike) | (alike & ~same & next_to))).any(2)
