"""Test the audit of masks: it finds and names each planted bug, and finds nothing in our configs.

Tests plant bugs in the real code, and the audit must detect them by the behaviour of the model.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import toy
from PIL import Image
from rich.console import Console

from heedful.configs import base
from heedful.data import objectives, pipeline
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.model import heads, masks, transformer
from heedful.model.attention import CORES
from heedful.model.attention.core import CoreSpec
from heedful.model.attention.dense import dense
from heedful.model.cache import KVCache
from heedful.model.config import (
    AttentionConfig,
    HeadConfig,
    ModelConfig,
    ModelError,
    NormConfig,
    PositionConfig,
)
from heedful.train import cli
from heedful.train.audit import declared
from heedful.train.audit.audit import Audit, _cached, _extreme_scores, _schedules, audit
from heedful.train.audit.findings import Finding
from heedful.train.audit.measured import Probe, forward
from heedful.train.audit.report import audit_before_training
from heedful.train.audit.subject import Subject, with_core
from heedful.train.errors import TrainError

DENSE = importlib.import_module("heedful.model.attention.dense")
LM = DataConfig(source="shakespeare", objective="causal_lm")
PREFIX = dataclasses.replace(LM, objective="prefix_lm")
MASKED = dataclasses.replace(LM, objective="masked_lm")
TRANSLATION = DataConfig()
ARCHITECTURES = {
    "causal_lm": "decoder_only",
    "prefix_lm": "decoder_only",
    "masked_lm": "encoder_only",
    "translation": "encoder_decoder",
}


def model(data: DataConfig, **attention: Any) -> ModelConfig:
    return ModelConfig(
        architecture=ARCHITECTURES[data.objective],  # type: ignore[arg-type]
        layers=1,
        attention=AttentionConfig(heads=2, **attention),
        norm=NormConfig(position="pre"),
    )


def audited(data: DataConfig, *, small: bool = True, **attention: Any) -> Audit:
    return audit(Subject.of(model(data, **attention), data), small=small)


def found(
    result: Audit | list[Finding], kind: str, where: str, method: str = ""
) -> list[tuple[int, ...]]:
    """Return the positions of all findings of a kind; there must be at least one."""
    findings = result if isinstance(result, list) else result.findings
    chosen = [f for f in findings if (f.kind, f.where) == (kind, where) and method in f.method]
    assert chosen, [str(f) for f in findings]
    return [place for finding in chosen for place in finding.positions]


def decoded(data: DataConfig) -> list[Finding]:
    """Run the part of an audit that decodes with a cache."""
    subject = Subject.of(model(data), data)
    whole = forward(subject.model, deterministic=True)
    probe = Probe(subject.model, subject.params, whole, subject.batch)
    return [f for schedule in _schedules(subject) for f in _cached(subject, probe, schedule)]


# Planted bugs -----------------------------------------------------------------------------------


def plant_core(monkeypatch, name: str, core: Callable) -> None:
    spec = dataclasses.replace(CORES[name], make=lambda config, shared: core)
    monkeypatch.setitem(CORES, name, spec)


def test_causality_dropped_when_dropout_is_on(monkeypatch):
    def leaky(call):
        mask = call.mask
        mask = mask.replace(causal=mask.causal and not call.dropout_rate)
        return dense(call.replace(mask=mask))

    plant_core(monkeypatch, "dense", leaky)
    result = audited(LM)
    places = found(result, "leak", "self-attention", "dropout on")
    assert all(s > t for _, t, s in places)
    assert {finding.method for finding in result.findings} == {"dropout on"}


@pytest.mark.parametrize("data", [LM, MASKED], ids=lambda data: data.objective)
def test_off_by_one_window(monkeypatch, data):
    sliding = masks.sliding
    monkeypatch.setattr(masks, "sliding", lambda left, *rest: sliding(left + 1, *rest))
    places = found(audited(data, window=2), "leak", "self-attention")
    assert {t - s for _, t, s in places} == {3}


def test_window_too_narrow_is_blindness(monkeypatch):
    sliding = masks.sliding
    monkeypatch.setattr(masks, "sliding", lambda left, *rest: sliding(left - 1, *rest))
    places = found(audited(LM, window=2), "blindness", "self-attention")
    assert {t - s for _, t, s in places} == {2}


@pytest.mark.parametrize("data", [LM, MASKED], ids=lambda data: data.objective)
def test_leak_across_packed_documents(monkeypatch, data):
    packed = masks.packed
    monkeypatch.setattr(masks, "packed", lambda ids: packed((ids > 0).astype(int)))
    result = audited(data)
    ids = result.subject.batch["segment_ids"]
    places = found(result, "leak", "self-attention")
    assert all(0 < ids[b, s] != ids[b, t] > 0 for b, t, s in places)
    assert any("of another document" in str(finding) for finding in result.findings)


def test_padding_seen_by_queries(monkeypatch):
    packed = masks.packed
    monkeypatch.setattr(masks, "packed", lambda ids: packed(jnp.ones_like(ids)))
    result = audited(TRANSLATION)
    places = found(result, "leak", "encoder self-attention")
    ids = result.subject.batch["encoder_segment_ids"]
    assert any(ids[b, s] == 0 < ids[b, t] for b, t, s in places)
    assert any("which is padding" in str(finding) for finding in result.findings)


def test_prefix_off_by_one(monkeypatch):
    prefix = masks.prefix
    monkeypatch.setattr(masks, "prefix", lambda lengths: prefix(lengths + 1))
    result = audited(PREFIX)
    lengths = result.subject.batch["prefix_len"]
    places = found(result, "leak", "self-attention")
    assert all(s == lengths[b] > t for b, t, s in places)


def test_prefix_of_the_loss_off_by_one(monkeypatch):
    """The loss counts a target inside the prefix, which the position before it can see."""

    def eager(example, rng, config, tokenizer):
        row = objectives.prefix_lm(example, rng, config, tokenizer)
        row["weights"][max(int(row["prefix_len"]) - 2, 0) :] = 1
        return row

    plant_objective(monkeypatch, "prefix_lm", eager)
    result = audited(PREFIX)
    assert all(s == t + 1 for _, t, s in found(result, "leak", "targets"))


def test_padding_of_the_source_ignored_across(monkeypatch):
    monkeypatch.setattr(transformer, "cross_mask", lambda *_: masks.full())
    result = audited(TRANSLATION)
    ids = result.subject.batch["encoder_segment_ids"]
    places = found(result, "leak", "cross-attention")
    assert any(ids[b, s] == 0 for b, _, s in places)
    assert {finding.where for finding in result.findings} == {"cross-attention"}


@pytest.mark.parametrize(
    "data",
    quick.only([LM, TRANSLATION], [LM, PREFIX, TRANSLATION]),
    ids=lambda data: data.objective,
)
def test_cache_off_by_one(monkeypatch, data):
    write = KVCache.write
    monkeypatch.setattr(KVCache, "write", lambda self, k, v, at: write(self, k, v, at + 1))
    findings = decoded(data)
    kind = "decoder self-attention" if data == TRANSLATION else "self-attention"
    for method in ("token by token", "3 at a time"):
        found(findings, "difference", kind, method)


def test_cache_that_looks_one_ahead(monkeypatch):
    """A query sees the key of the next token."""

    def attend(self, core, call, cache_write_mask=None):
        mask, cache = call.mask, self.write(call.k, call.v, call.mask.q_offset)
        k, v = cache.rows()
        return core(call.replace(k=k, v=v, mask=mask.at(mask.q_offset + 1))), cache

    monkeypatch.setattr(KVCache, "attend", attend)
    places = found(decoded(LM), "leak", "self-attention", "3 at a time")
    assert {s - t for _, t, s in places} == {1}


def test_global_token_missing(monkeypatch):
    longformer = masks.longformer
    fewer = lambda window, index, *rest: longformer(window, index[:, 1:], *rest)  # noqa: E731
    monkeypatch.setattr(masks, "longformer", fewer)
    places = found(audited(MASKED, window=2, global_tokens=2), "blindness", "self-attention")
    assert all(0 in (t, s) or 1 in (t, s) for _, t, s in places)


def test_causal_linformer(monkeypatch):
    """Projections along the sequence mix later tokens into every key."""
    monkeypatch.setattr(CoreSpec, "require", lambda *_: None)
    data = dataclasses.replace(LM, packing=False)
    places = found(audited(data, core="linformer"), "leak", "self-attention")
    assert any(s > t for _, t, s in places)


def plant_objective(monkeypatch, name: str, row: Callable) -> None:
    known = objectives.OBJECTIVES[name]
    monkeypatch.setitem(objectives.OBJECTIVES, name, dataclasses.replace(known, row=row))


@pytest.mark.parametrize("data", [LM, PREFIX, TRANSLATION], ids=lambda data: data.objective)
def test_targets_that_are_not_shifted(monkeypatch, data):
    right = objectives.OBJECTIVES[data.objective].row

    def unshifted(*args):
        row = right(*args)
        return {**row, "targets": row["inputs"]}

    plant_objective(monkeypatch, data.objective, unshifted)
    result = audited(data)
    assert all(t == s for _, t, s in found(result, "leak", "targets"))
    found(result, "difference", "targets")


def test_tokens_that_are_not_masked(monkeypatch):
    def unmasked(*args):
        row = objectives.masked_lm(*args)
        return {**row, "inputs": row["targets"]}

    plant_objective(monkeypatch, "masked_lm", unmasked)
    found(audited(MASKED), "leak", "targets")


def test_positions_that_go_on(monkeypatch):
    def pack(rows):
        row = pack_right(rows)
        return {**row, "positions": np.arange(len(row["positions"]), dtype=np.int32)}

    pack_right = pipeline.pack
    monkeypatch.setattr(pipeline, "pack", pack)
    result = audited(LM)
    found(result, "difference", "positions")
    found(result, "difference", "self-attention", "packed")


def test_a_model_that_ignores_positions(monkeypatch):
    count = lambda _, inputs, offset=None: jnp.arange(inputs.shape[1])[None]  # noqa: E731
    monkeypatch.setattr(transformer, "_or_range", count)
    found(audited(LM), "difference", "self-attention", "packed")


def test_one_segment_for_all_documents(monkeypatch):
    def pack(rows):
        row = pack_right(rows)
        return {**row, "segment_ids": np.ones_like(row["segment_ids"])}

    pack_right = pipeline.pack
    monkeypatch.setattr(pipeline, "pack", pack)
    found(audited(LM), "difference", "segment_ids")


@pytest.mark.parametrize(
    ("data", "value"), [(LM, -1e4), (LM, float(jnp.finfo(jnp.float32).min)), (TRANSLATION, -1e9)]
)
def test_finite_mask_value(monkeypatch, data, value):
    """Padding sees everything, and a masked score beats allowed scores below the mask value."""

    def softmax(scores, allowed):
        return jax.nn.softmax(scores if allowed is None else jnp.where(allowed, scores, value))

    monkeypatch.setattr(DENSE, "masked_softmax", softmax)
    result = audited(data)
    leaks = list(_extreme_scores(result.subject))
    for where in result.subject.names.values():
        found(result, "leak", where, "dropout off")
        found(leaks, "leak", where, "extreme scores")


@pytest.mark.parametrize(("value", "is_added"), [(-1e4, False), (-1e9, True)])
def test_finite_mask_value_that_spares_empty_rows(monkeypatch, value, is_added):
    """The audit finds the bug with extreme scores only."""

    def softmax(scores, allowed):
        masked = jnp.where(allowed, scores, scores + value if is_added else value)
        return jax.nn.softmax(masked) * allowed.any(-1, keepdims=True)

    monkeypatch.setattr(DENSE, "masked_softmax", softmax)
    result = audited(LM)
    assert not result.findings
    found(list(_extreme_scores(result.subject)), "leak", "self-attention", "extreme scores")


def test_rows_that_see_one_another(monkeypatch):
    def mixed(call):
        return dense(call.replace(v=jnp.broadcast_to(call.v[:1], call.v.shape)))

    plant_core(monkeypatch, "dense", mixed)
    found(audited(LM), "leak", "self-attention", "rows")


# No findings ------------------------------------------------------------------------------------


@functools.cache
def clean(model: ModelConfig, data: DataConfig, small: bool) -> None:
    found = audit(Subject.of(model, data), small=small).findings
    assert [str(finding) for finding in found] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", base.names())
def test_our_configs_are_clean(name: str):
    """The audit of a small model is cached: configs that differ only in size share it."""
    experiment = base.load(name)[0]
    subject = Subject.of(experiment.model, experiment.data)
    config = dataclasses.replace(subject.model, dropout=0.1)
    objective, noise = experiment.data.objective, experiment.data.noise
    data = DataConfig(source="files", train=("-",), objective=objective, noise=noise)
    clean(config, data, small=name not in ("translate_tiny", "gpt2_small", "llama_7b", "bert_tiny"))


WINDOWS: dict[str, dict[str, Any]] = {
    "all": {},
    "window": {"window": 2},
    "dilation": {"window": 2, "dilation": (1, 2)},
    "global": {"window": 2, "global_tokens": 1},
}


@pytest.mark.parametrize(
    "data", quick.only([LM], [LM, MASKED, TRANSLATION]), ids=lambda data: data.objective
)
@pytest.mark.parametrize("window", quick.only(["window"], WINDOWS))
@pytest.mark.parametrize("core", [name for name in CORES if name not in ("dense", "splash")])
def test_cores_are_clean_where_they_run(core: str, window: str, data: DataConfig):
    """The test omits dense, which all other tests audit, and splash, which is slow on a CPU."""
    config = with_core(model(data, **WINDOWS[window]), core)
    if data == TRANSLATION and window != "all":
        pytest.skip("its two stacks are audited alone")
    if "global_tokens" in WINDOWS[window] or core == "linformer":
        data = dataclasses.replace(data, packing=False)
    try:
        result = audit(Subject.of(config, data), small=True)
    except ModelError as error:
        pytest.skip(str(error))
    found = [*result.findings, *_extreme_scores(result.subject)]
    assert [str(finding) for finding in found] == []


@pytest.mark.slow
def test_long_rows_are_clean():
    result = audit(Subject.of(model(LM, window=9), LM, 67))
    assert result.subject.model.attention.window == 9
    assert [str(finding) for finding in result.findings] == []


def test_pooled_classifiers_are_clean_and_padding_in_the_mean_is_not(monkeypatch):
    data = DataConfig(source="sentiment", objective="classification")
    config = ModelConfig(
        architecture="encoder_only",
        layers=1,
        attention=AttentionConfig(heads=2),
        positions=PositionConfig(kind="learned", max_length=3),
        head=HeadConfig(kind="classifier", pooling="mean", pooler=False),
    )
    assert not audit(Subject.of(config, data), small=True).findings
    pool = heads.pool
    monkeypatch.setattr(heads, "pool", lambda x, ids, how: pool(x, None, how))
    places = found(audit(Subject.of(config, data), small=True), "leak", "classifier")
    assert all(t == 0 for _, t, _ in places)


# The declaration --------------------------------------------------------------------------------


def test_the_closure_is_the_reach_of_so_many_steps():
    steps = np.eye(7, k=-2, dtype=bool)[None]
    for layers in (0, 1, 2, 3, 5):
        reach = declared.through([steps] * layers, np.eye(7, dtype=bool)[None])[0]
        expected = [[t - s in range(0, 2 * layers + 1, 2) for s in range(7)] for t in range(7)]
        np.testing.assert_array_equal(reach, expected)


def test_the_declaration_is_what_the_masks_say():
    """The loops of the audit's declaration and model/masks.py define the same pairs."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 4, (5, 11)), axis=1)[:, ::-1]
    prefix = rng.integers(0, 5, 5)
    for attention in WINDOWS.values():
        config = model(LM, **attention)
        mask = transformer.decoder_mask(config, jnp.array(segments), jnp.array(prefix))
        expected = np.asarray(mask.to_bool(11, 11))
        pairs = declared.attentions(config, {"segment_ids": segments, "prefix_len": prefix})
        np.testing.assert_array_equal(pairs["self"], np.broadcast_to(expected, pairs["self"].shape))


# The commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Write a run of two layers with random parameters, and the text that it would train on."""
    folder = tmp_path_factory.mktemp("run")
    text = toy.write_text(folder)
    data = toy.data(text, "causal_lm", tokenizer=TokenizerConfig(kind="bytes"))
    return toy.random_run(folder / "run", toy.model("decoder_only"), data)


@pytest.mark.slow
def test_masks_of_a_run(run, capsys):
    assert cli.run(["masks", str(run.directory)]) == 0
    said = capsys.readouterr().out
    assert "the model of the run with its parameters" in said
    assert "documents of" in said and "0 leaks, 0 blind, 0 other differences" in said
    with Image.open(run.directory / "masks.png") as image:
        assert min(image.size) > 300


def test_a_leak_is_exit_code_1_and_red_in_the_picture(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    sliding = masks.sliding
    monkeypatch.setattr(masks, "sliding", lambda left, *rest: sliding(left + 1, *rest))
    assert cli.run(["masks", "shakespeare_char", "--model.attention.window", "3"]) == 1
    said = capsys.readouterr().out
    leak = "leak: self-attention (mask): position 4 of row 0 sees position 0"
    assert f"{leak}, which is outside the window" in said
    assert "!!" in said
    with Image.open("shakespeare_char.masks.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or ()}
    assert (0xD6, 0x27, 0x28) in colours


def test_training_does_not_begin_with_a_leak(monkeypatch, capsys, run):
    audit_before_training(run.model, run.data, Console(markup=False))
    assert "masks: audited, 0 leaks" in capsys.readouterr().out
    monkeypatch.setattr(masks, "causal", masks.full)
    with pytest.raises(TrainError, match=r"--no-audit(.|\n)*leak: self-attention"):
        audit_before_training(run.model, run.data, Console(markup=False))
