"""Audit a model on rows of the real pipeline: compare its dependences with the config's."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool

from heedful.model.attention import spec_of
from heedful.model.config import AttentionConfig, AttentionSite, ModelError
from heedful.train.audit import declared
from heedful.train.audit.data import check_data
from heedful.train.audit.findings import Finding, compare_pairs, finding_at, is_different
from heedful.train.audit.measured import (
    FAST,
    DecodingSchedule,
    Dependence,
    Probe,
    forward,
    leaks_at_extreme_scores,
    random_params,
    through_cache,
)
from heedful.train.audit.subject import Subject
from heedful.train.inspection.attention_weights import (
    Attention,
    attention_masks,
    attention_weights,
)
from heedful.train.model_loss import model_inputs

MIN_DROPOUT = 0.1
"""Smallest rate of attention dropout where the audit turns dropout on."""


@dataclass(frozen=True)
class Audit:
    """The result of an audit."""

    subject: Subject
    dependence: Dependence
    """Dependence of the outputs on the inputs, without dropout."""
    masks: dict[Attention, declared.Pairs]
    """Pairs that the model's masks allow; {} in a small audit."""
    findings: list[Finding]
    methods: list[str]
    unsupported: list[str]
    """Methods that the core does not support, with the error of the core."""


def audit(subject: Subject, *, small: bool = False) -> Audit:
    """Audit a model by all methods, or, with `small`, by methods that take at most two seconds.

    Raises ModelError if the model cannot run at all.
    """
    model, batch = subject.model, subject.batch
    probe = Probe(model, subject.params, forward(model, deterministic=True), batch)
    dropping = _dropout_probe(subject)
    seen = _dependence(subject, probe, batch, bits_only=small)
    findings = check_data(model, subject.dataset)
    findings += _violations(subject, seen, batch, "dropout off")
    findings += [*_other_rows(subject, probe), *_packed(subject, probe)]
    findings += _with_dropout(subject, dropping, bits_only=small)
    methods, unsupported, masks = ["the data", "dropout off", "dropout on"], [], {}
    if len(model.period) > 1:
        try:
            findings += _weights(subject)
            methods.append("weights of each layer")
        except ModelError as error:
            unsupported.append(f"weights of each layer: {error}")
    if not small:
        masks = _masks(subject)
        for attention, mask in masks.items():
            name, ids = subject.attentions[attention], _ids(batch, attention.kind)
            allowed = np.broadcast_to(subject.pairs[attention], mask.shape)
            findings += compare_pairs(name, "mask", mask, allowed, *ids)
        findings += _extreme_scores(subject)
        methods += ["masks", "extreme scores"]
        for schedule in _schedules(subject):
            try:
                findings += _cached(subject, probe, schedule)
                methods.append(str(schedule))
            except ModelError as error:
                unsupported.append(f"{schedule}: {error}")
            except ValueError as error:  # The cache itself rejects the mask.
                where = subject.where("logits", "inputs")
                findings.append(Finding("difference", where, f"cached, {schedule}", str(error)))
    return Audit(subject, seen, masks, findings, methods, unsupported)


# Dependence -------------------------------------------------------------------------------------


def _dependence(
    subject: Subject,
    probe: Probe,
    batch: declared.Batch,
    covered: Bool[np.ndarray, "B T"] | bool = True,
    *,
    bits_only: bool,
) -> Dependence:
    """Measure the inputs that outputs depend on, by bits and by gradients.

    Gradients show some dependences that rounding hides from the bits, and the reverse. With
    `bits_only`, gradients are computed only if allowed dependences at `covered` positions are
    missing.
    """
    seen, allowed = probe.by_bits(batch), declared.reaches(subject.model, batch)

    def add(more: Dependence) -> bool:
        """Add dependences; return True if an allowed dependence is still missing."""
        for key, x in more.items():
            seen[key] = seen[key] | x
        both = allowed.keys() & seen.keys()
        missing = ((allowed[key] & ~seen[key]).any(2) & covered for key in both)
        return any(x.any() for x in missing)

    if not add({}) and bits_only:
        return seen
    if add(probe.by_gradient(batch)) and subject.is_trained:
        # Trained parameters may ignore an input entirely; random parameters do not.
        params = random_params(subject.model)
        add(Probe(subject.model, params, probe.program, batch).by_gradient(batch))
    return seen


def _violations(
    subject: Subject,
    seen: Dependence,
    batch: declared.Batch,
    method: str,
    covered: np.ndarray | None = None,
    *,
    can_be_blind: bool = True,
) -> Iterator[Finding]:
    """Yield findings where `seen` differs from what the config allows, at `covered` positions.

    `covered` None: all positions.
    """
    allowed = declared.reaches(subject.model, batch)
    for output, stream in (key for key in allowed if key in seen):
        where, measured = subject.where(output, stream), seen[output, stream]
        counted = np.ones(measured.shape[:2], bool) if covered is None else covered
        keys = batch[f"{stream.removesuffix('inputs')}segment_ids"]
        queries = keys if output == "encoder" else batch["segment_ids"]
        depends, may = (x & counted[..., None] for x in (measured, allowed[output, stream]))
        yield from compare_pairs(
            where, method, depends, may, queries, keys, can_be_blind=can_be_blind
        )


def _dropout_probe(subject: Subject) -> Probe:
    """Return a probe of the model in training mode, with a dropout rate of at least MIN_DROPOUT."""
    attention = subject.model.attention
    more = dataclasses.replace(attention, dropout=max(attention.dropout, MIN_DROPOUT))

    def probe(config: AttentionConfig) -> Probe:
        model = dataclasses.replace(subject.model, attention=config)
        return Probe(model, subject.params, forward(model, deterministic=False), subject.batch)

    try:
        return probe(more)
    except ModelError:  # The core does not drop attention weights.
        return probe(attention)


def _with_dropout(subject: Subject, probe: Probe, *, bits_only: bool) -> Iterator[Finding]:
    """Yield leaks with dropout on; blindness is not checked, as dropout removes weights."""
    seen = probe.by_bits(subject.batch)
    if not bits_only:
        seen = {key: seen[key] | x for key, x in probe.by_gradient(subject.batch).items()}
    return _violations(subject, seen, subject.batch, "dropout on", can_be_blind=False)


# Values -----------------------------------------------------------------------------------------


def _other_rows(subject: Subject, probe: Probe) -> Iterator[Finding]:
    """Yield a finding if a row depends on another row of the batch."""
    wrong = probe.by_other_rows(subject.batch)
    reason = "another row of the batch changes the logits"
    yield from finding_at(subject.where("logits", "inputs"), "rows", wrong, reason, "leak")


def _packed(subject: Subject, probe: Probe) -> Iterator[Finding]:
    """Yield a finding if a document has other logits in a packed row than in a row of its own."""
    batch, attention = subject.batch, subject.model.attention
    # Global tokens are the first tokens of the row, not of each document.
    if batch["segment_ids"].max() < 2 or attention.global_tokens:
        return
    packed = probe.outputs(batch)["logits"]
    wrong = np.zeros(packed.shape[:2], bool)
    for alone, documents in _documents_alone(batch):
        logits = probe.outputs(alone)["logits"]
        for row, (b, at) in enumerate(documents):
            wrong[b, at] = is_different(logits[row, : len(at)], packed[b, at], subject.model.dtype)
    reason = "a document has other logits than in a row of its own"
    yield from finding_at(subject.where("logits", "inputs"), "packed", wrong, reason)


def _documents_alone(batch: declared.Batch) -> Iterator[tuple[dict, list[tuple]]]:
    """Yield batches of the same shape with one document per row, and (row, positions) of each.

    Positions of each document begin at 0.
    """
    segments = batch["segment_ids"]
    documents = [
        (b, np.flatnonzero(segments[b] == i))
        for b in range(len(segments))
        for i in range(1, segments[b].max() + 1)
    ]
    for start in range(0, len(documents), len(segments)):
        chosen = documents[start : start + len(segments)]
        alone = {name: np.zeros_like(array) for name, array in batch.items()}
        for row, (b, at) in enumerate(chosen):
            for name, array in batch.items():
                alone[name][row, : len(at)] = array[b, at]
            alone["segment_ids"][row, : len(at)] = 1
            alone["positions"][row, : len(at)] = np.arange(len(at))
        yield alone, chosen


# Decoding ---------------------------------------------------------------------------------------


def _schedules(subject: Subject) -> list[DecodingSchedule]:
    """Return the schedules of decoding to audit; none for models that do not generate."""
    model, (rows, length) = subject.model, subject.batch["inputs"].shape
    if model.architecture == "encoder_only" or model.head.kind == "classifier" or length < 8:
        return []
    return [DecodingSchedule((1,) * rows, 1, 1), DecodingSchedule((5, 3, 4)[:rows], 5, 3)]


def _cached(subject: Subject, probe: Probe, schedule: DecodingSchedule) -> Iterator[Finding]:
    """Yield findings of decoding with a cache: dependences, and logits that differ without it."""
    model, length = subject.model, subject.batch["inputs"].shape[1]
    batch = _whole_rows(subject, schedule)
    reader = Probe(model, subject.params, through_cache(model, schedule), batch)
    covered, method = schedule.covered(length), f"cached, {schedule}"
    # Gradients are not needed: no model is trained through a cache.
    seen = _dependence(subject, reader, batch, covered, bits_only=True)
    yield from _violations(subject, seen, batch, method, covered)
    cached, whole = reader.outputs(batch)["logits"], probe.outputs(batch)["logits"]
    wrong = is_different(cached, whole, model.dtype) & covered
    reason = "a token has other logits than without a cache"
    yield from finding_at(subject.where("logits", "inputs"), method, wrong, reason)


def _whole_rows(subject: Subject, schedule: DecodingSchedule) -> declared.Batch:
    """Return rows as in generation: each has one text of distinct tokens, and perhaps a source."""
    batch = {
        name: np.zeros_like(subject.batch[name])
        for name in model_inputs(subject.model, subject.batch)
    }
    ordinary = subject.dataset.tokenizer.ordinary
    for side in ("", "encoder_") if "encoder_inputs" in batch else ("",):
        shape = rows, length = batch[f"{side}inputs"].shape
        batch[f"{side}inputs"][:] = np.resize(ordinary, shape)
        batch[f"{side}positions"][:] = np.arange(length)
        batch[f"{side}segment_ids"][:] = 1
        if side:
            ends = length - 3 * np.arange(rows)[:, None]
            batch["encoder_segment_ids"][np.arange(length) >= ends] = 0
    if "prefix_len" in batch:
        batch["prefix_len"][:] = schedule.lengths
    return batch


# Masks and cores --------------------------------------------------------------------------------


def _masks(subject: Subject) -> dict[Attention, declared.Pairs]:
    """Return the pairs that the masks of the model's attention cores allow."""

    def all_pairs(batch: dict) -> dict:
        pairs = {}
        for kind, layer in subject.attentions:
            lengths = (ids.shape[1] for ids in _ids(subject.batch, kind))
            mask = attention_masks(subject.model, batch, layer)[kind]
            pairs[Attention(kind, layer)] = mask.to_bool(*lengths)
        return pairs

    masks = jax.jit(all_pairs, compiler_options=FAST)(model_inputs(subject.model, subject.batch))
    rows = len(subject.batch["inputs"])
    return {k: np.broadcast_to(masks[k], (rows, *masks[k].shape[1:])) for k in subject.attentions}


def _weights(subject: Subject) -> Iterator[Finding]:
    """Yield findings about layers of a pattern that give weight to other keys than declared.

    Outputs do not show that: after a layer that attends to all positions, outputs depend on all
    inputs.
    """
    model, batch = subject.model, subject.batch
    inputs = {name: jax.numpy.asarray(x) for name, x in model_inputs(model, batch).items()}
    for kind, layers in attention_weights(model, subject.params, inputs).items():
        for layer, weights in enumerate(np.asarray(layers)):
            allowed = declared.attentions(model, batch, layer)[kind]
            yield from compare_pairs(
                f"{subject.names[kind]} of layer {layer + 1}",
                "weights",
                weights > 0,
                np.broadcast_to(allowed, weights.shape),
                *_ids(batch, kind),
                can_be_blind=not subject.is_trained,  # Trained weights may be rounded to 0.
            )


def _ids(batch: declared.Batch, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the segment ids of the queries and the keys of an attention."""
    own, source = batch["segment_ids"], batch.get("encoder_segment_ids", batch["segment_ids"])
    return {"self": (own, own), "encoder": (source, source), "cross": (own, source)}[kind]


def _extreme_scores(subject: Subject) -> Iterator[Finding]:
    """Yield leaks of single attention layers when forbidden keys have extreme scores."""
    model, batch = subject.model, model_inputs(subject.model, subject.batch)
    stack = "encoder" if model.architecture == "encoder_only" else "decoder"
    sites: dict[str, tuple[str, str, AttentionSite]] = {
        "encoder": ("encoder", "self_attention", "self"),
        "self": (stack, "self_attention", "decoder" if "encoder" in subject.names else "self"),
        "cross": ("decoder", "cross_attention", "cross"),
    }
    inputs = {name: jax.numpy.asarray(x) for name, x in batch.items()}
    for (kind, layer), where in subject.attentions.items():
        stack, attention, site = sites[kind]
        mask = attention_masks(model, inputs, layer)[kind]
        params = jax.tree.map(lambda x, i=layer: x[i], subject.params[stack]["blocks"][attention])
        shared = spec_of(model.attention.core_of(site)).shared_params(model)
        core_params = {name: subject.params[stack][name] for name in shared}
        allowed = np.asarray(subject.pairs[Attention(kind, layer)].any(1))
        wrong = leaks_at_extreme_scores(
            model.layer(layer), params, site, mask, allowed, core_params
        )
        reason = "forbidden keys with extreme scores change the result"
        yield from finding_at(where, "extreme scores", wrong, reason, "leak")
