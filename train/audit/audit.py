"""The audit: a model on rows of the real pipeline, what it sees against what it may."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool

from heedful.model.attention import spec_of
from heedful.model.config import AttentionConfig, AttentionSite, ModelError
from heedful.train.audit import declared
from heedful.train.audit.data import in_data
from heedful.train.audit.findings import Finding, compared, differing, unlike
from heedful.train.audit.measured import (
    FAST,
    Probe,
    Reading,
    Seen,
    forward,
    random_params,
    tempted,
    through_cache,
)
from heedful.train.audit.subject import Subject
from heedful.train.inspection.attention_weights import attention_masks
from heedful.train.step import model_inputs

DROPPED = 0.1  # least share of attention weights that is dropped where dropout is on


@dataclass(frozen=True)
class Audit:
    """What was audited, in which ways, and what was found."""

    subject: Subject
    seen: Seen
    """What the outputs depend on in evaluation."""
    masks: dict[str, declared.Pairs]
    """What the model's masks allow; {} of a small audit."""
    findings: list[Finding]
    ways: list[str]
    left_out: list[str]
    """What the core cannot do, as it says itself."""


def audit(subject: Subject, *, small: bool = False) -> Audit:
    """Audits in all ways; `small`: in those that take no more than two seconds.

    Raises ModelError where the model cannot run at all.
    """
    model, batch = subject.model, subject.batch
    probe = Probe(model, subject.params, forward(model, deterministic=True), batch)
    dropping = _dropping(subject)
    seen = _seen(subject, probe, batch, bits_only=small)
    found = [*in_data(model, subject.dataset), *_seen_wrong(subject, seen, batch, "dropout off")]
    found += [*_mixed(subject, probe), *_packed(subject, probe)]
    found += _dropped(subject, dropping, bits_only=small)
    ways, left_out, masks = ["the data", "dropout off", "dropout on"], [], {}
    if not small:
        masks = _masks(subject)
        for kind, mask in masks.items():
            may = np.broadcast_to(subject.pairs[kind], mask.shape)
            found += compared(subject.names[kind], "mask", mask, may, *_ids(batch, kind))
        found += _tempted(subject)
        ways += ["masks", "temptation"]
        for reading in _readings(subject):
            try:
                found += _cached(subject, probe, reading)
                ways.append(str(reading))
            except ModelError as error:
                left_out.append(f"{reading}: {error}")
            except ValueError as error:  # the cache sees by itself that the mask is another
                where = subject.where("logits", "inputs")
                found.append(Finding("difference", where, f"cached, {reading}", str(error)))
    return Audit(subject, seen, masks, found, ways, left_out)


# Dependence -------------------------------------------------------------------------------------


def _seen(
    subject: Subject,
    probe: Probe,
    batch: declared.Batch,
    covered: Bool[np.ndarray, "B T"] | bool = True,
    *,
    bits_only: bool,
) -> Seen:
    """What the outputs depend on; gradients see what bits are too coarse for, and the reverse."""
    seen, may = probe.by_bits(batch), declared.reaches(subject.model, batch)

    def add(more: Seen) -> bool:
        """Whether some of what may be seen is not seen yet."""
        for key, x in more.items():
            seen[key] = seen[key] | x
        both = may.keys() & seen.keys()
        missing = ((may[key] & ~seen[key]).any(2) & covered for key in both)
        return any(x.any() for x in missing)

    if not add({}) and bits_only:
        return seen
    if add(probe.by_gradient(batch)) and subject.is_trained:
        # What trained parameters overlook entirely they could still see.
        params = random_params(subject.model)
        add(Probe(subject.model, params, probe.program, batch).by_gradient(batch))
    return seen


def _seen_wrong(
    subject: Subject,
    seen: Seen,
    batch: declared.Batch,
    how: str,
    covered: np.ndarray | None = None,
    *,
    can_be_blind: bool = True,
) -> Iterator[Finding]:
    """Where `seen` is not what the config declares, at the positions that are `covered`."""
    may = declared.reaches(subject.model, batch)
    for output, stream in (key for key in may if key in seen):
        where, found = subject.where(output, stream), seen[output, stream]
        counted = np.ones(found.shape[:2], bool) if covered is None else covered
        keys = batch[f"{stream.removesuffix('inputs')}segment_ids"]
        queries = keys if output == "encoder" else batch["segment_ids"]
        does, can = (x & counted[..., None] for x in (found, may[output, stream]))
        yield from compared(where, how, does, can, queries, keys, can_be_blind=can_be_blind)


def _dropping(subject: Subject) -> Probe:
    """The model as it trains, with more weights dropped where few are."""
    attention = subject.model.attention
    more = dataclasses.replace(attention, dropout=max(attention.dropout, DROPPED))

    def probe(config: AttentionConfig) -> Probe:
        model = dataclasses.replace(subject.model, attention=config)
        return Probe(model, subject.params, forward(model, deterministic=False), subject.batch)

    try:
        return probe(more)
    except ModelError:  # a core that drops no weights; the model may ask for none
        return probe(attention)


def _dropped(subject: Subject, probe: Probe, *, bits_only: bool) -> Iterator[Finding]:
    """The leaks of training; blindness means nothing there: what is dropped is not seen."""
    seen = probe.by_bits(subject.batch)
    if not bits_only:
        seen = {key: seen[key] | x for key, x in probe.by_gradient(subject.batch).items()}
    return _seen_wrong(subject, seen, subject.batch, "dropout on", can_be_blind=False)


# Values -----------------------------------------------------------------------------------------


def _mixed(subject: Subject, probe: Probe) -> Iterator[Finding]:
    """Rows of a batch that see one another."""
    wrong = probe.mixed(subject.batch)
    reason = "another row of the batch is seen"
    yield from differing(subject.where("logits", "inputs"), "rows", wrong, reason, "leak")


def _packed(subject: Subject, probe: Probe) -> Iterator[Finding]:
    """Documents whose logits are others in a packed row than in a row of their own."""
    batch, attention = subject.batch, subject.model.attention
    # Global tokens are the first of a row, whatever document they belong to.
    if batch["segment_ids"].max() < 2 or attention.global_tokens:
        return
    packed = probe.outputs(batch)["logits"]
    wrong = np.zeros(packed.shape[:2], bool)
    for alone, places in _documents_alone(batch):
        logits = probe.outputs(alone)["logits"]
        for row, (b, at) in enumerate(places):
            wrong[b, at] = unlike(logits[row, : len(at)], packed[b, at], subject.model.dtype)
    reason = "a document gives other logits than in a row of its own"
    yield from differing(subject.where("logits", "inputs"), "packed", wrong, reason)


def _documents_alone(batch: declared.Batch) -> Iterator[tuple[dict, list[tuple]]]:
    """Batches of the same shape, in which each document begins a row, and where it has stood.

    Positions are those that are declared: they begin again with each document.
    """
    segments = batch["segment_ids"]
    found = [
        (b, np.flatnonzero(segments[b] == i))
        for b in range(len(segments))
        for i in range(1, segments[b].max() + 1)
    ]
    for start in range(0, len(found), len(segments)):
        places = found[start : start + len(segments)]
        alone = {name: np.zeros_like(array) for name, array in batch.items()}
        for row, (b, at) in enumerate(places):
            for name, array in batch.items():
                alone[name][row, : len(at)] = array[b, at]
            alone["segment_ids"][row, : len(at)] = 1
            alone["positions"][row, : len(at)] = np.arange(len(at))
        yield alone, places


# Decoding ---------------------------------------------------------------------------------------


def _readings(subject: Subject) -> list[Reading]:
    """Ways through a cache, of models that write."""
    model, (rows, length) = subject.model, subject.batch["inputs"].shape
    if model.architecture == "encoder_only" or model.head.kind == "classifier" or length < 8:
        return []
    return [Reading((1,) * rows, 1, 1), Reading((5, 3, 4)[:rows], 5, 3)]


def _cached(subject: Subject, probe: Probe, reading: Reading) -> Iterator[Finding]:
    """What is seen through the cache, and logits that are others than without one."""
    model, length = subject.model, subject.batch["inputs"].shape[1]
    batch = _whole_rows(subject, reading)
    reader = Probe(model, subject.params, through_cache(model, reading), batch)
    covered, how = reading.covered(length), f"cached, {reading}"
    seen = _seen(subject, reader, batch, covered, bits_only=True)  # nothing is trained through it
    yield from _seen_wrong(subject, seen, batch, how, covered)
    cached, whole = reader.outputs(batch)["logits"], probe.outputs(batch)["logits"]
    wrong = unlike(cached, whole, model.dtype) & covered
    reason = "a token gives other logits than without a cache"
    yield from differing(subject.where("logits", "inputs"), how, wrong, reason)


def _whole_rows(subject: Subject, reading: Reading) -> declared.Batch:
    """Rows as they are written: one text each, of tokens that differ, with a source beside it."""
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
        batch["prefix_len"][:] = reading.lengths
    return batch


# Masks and cores --------------------------------------------------------------------------------


def _masks(subject: Subject) -> dict[str, declared.Pairs]:
    """The masks that the model's cores are given."""
    lengths = {
        kind: tuple(ids.shape[1] for ids in _ids(subject.batch, kind)) for kind in subject.pairs
    }

    def whole(batch: dict) -> dict:
        found = attention_masks(subject.model, batch)
        return {kind: mask.to_bool(*lengths[kind]) for kind, mask in found.items()}

    masks = jax.jit(whole, compiler_options=FAST)(model_inputs(subject.model, subject.batch))
    rows = len(subject.batch["inputs"])
    return {k: np.broadcast_to(masks[k], (rows, *masks[k].shape[1:])) for k in subject.names}


def _ids(batch: declared.Batch, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids of the queries and keys of an attention."""
    own, source = batch["segment_ids"], batch.get("encoder_segment_ids", batch["segment_ids"])
    return {"self": (own, own), "encoder": (source, source), "cross": (own, source)}[kind]


def _tempted(subject: Subject) -> Iterator[Finding]:
    """Queries that what they may not see can reach, if only it is tempting enough."""
    model, batch = subject.model, model_inputs(subject.model, subject.batch)
    stack = "encoder" if model.architecture == "encoder_only" else "decoder"
    sites: dict[str, tuple[str, str, AttentionSite]] = {
        "encoder": ("encoder", "self_attention", "self"),
        "self": (stack, "self_attention", "decoder" if "encoder" in subject.names else "self"),
        "cross": ("decoder", "cross_attention", "cross"),
    }
    masks = attention_masks(model, {name: jax.numpy.asarray(x) for name, x in batch.items()})
    for kind, mask in masks.items():
        stack, attention, site = sites[kind]
        params = jax.tree.map(lambda x: x[0], subject.params[stack]["blocks"][attention])
        shared = spec_of(model.attention.core_of(site)).shared_params(model)
        core_params = {name: subject.params[stack][name] for name in shared}
        may = np.asarray(subject.pairs[kind].any(1))
        wrong = tempted(model, params, site, mask, may, core_params)
        reason = "what must not be seen changes the result where scores are extreme"
        yield from differing(subject.names[kind], "temptation", wrong, reason, "leak")
