"""Test stacks whose layers differ in window, rotary frequencies, or use of positions."""

import dataclasses
import io
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from plain import Plain
from rich.console import Console
from tiny import (
    HEADS,
    KV_HEADS,
    PLACES,
    POSITIONS,
    SEGMENTS,
    SOURCE,
    SOURCE_PLACES,
    SOURCE_SEGMENTS,
    TOKENS,
    B,
    T,
    init,
    tiny,
)

from heedful.configs import base
from heedful.data.config import DataConfig
from heedful.model import masks
from heedful.model.cache import BeamCache, KVCache, WindowCache
from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    ModelError,
    NormConfig,
    PositionConfig,
    RotaryConfig,
)
from heedful.model.decoding.parameters import prepare
from heedful.model.pretrained.config import config_to_hf
from heedful.model.stack import Stack
from heedful.model.stack_cache import PatternCache
from heedful.model.transformer import empty_cache
from heedful.train.audit import declared
from heedful.train.audit.audit import audit
from heedful.train.audit.subject import Subject
from heedful.train.config import TrainConfig
from heedful.train.conversion.init_from import merge_pretrained_config
from heedful.train.inspection.costs import memory, parts
from heedful.train.inspection.inspect import inspect
from heedful.train.reproducibility.record import changes, environments
from heedful.train.run import Run, from_json, to_json, with_defaults
from heedful.train.state import set_up

close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
LOCAL = LayerConfig(window=1)
MODELS: dict[str, dict[str, Any]] = {
    "gemma 2": {  # local and global layers in turn; the last period is incomplete
        "architecture": "decoder_only",
        **POSITIONS["rotary"],
        "pattern": (LOCAL, LayerConfig()),
        "layers": 5,
        "norm_position": "pre",
    },
    "gemma 3": {  # five local layers with another base, one global layer, then two more layers
        "architecture": "decoder_only",
        **POSITIONS["rotary"],
        "pattern": (LayerConfig(window=2, rotary=RotaryConfig(base=3)),) * 5 + (LayerConfig(),),
        "layers": 8,
        "norm_position": "pre",
    },
    "smollm3": {  # no rotation in every second layer
        "architecture": "decoder_only",
        **POSITIONS["rotary"],
        "pattern": (LayerConfig(), LayerConfig(positions=False)),
        "layers": 4,
    },
    "modernbert": {  # an encoder with a window that one layer overrides
        "architecture": "encoder_only",
        "positions_kind": "alibi",
        "attention_window": 1,
        "pattern": (LayerConfig(window="all"), LayerConfig(), LayerConfig(positions=False)),
        "layers": 4,
    },
    "pair": {  # stacks of different depths; one of them ends within the first period
        **POSITIONS["relative"],
        "pattern": (LOCAL, LayerConfig(positions=False), LayerConfig(window=0)),
        "layers": 4,
        "encoder_layers": 2,
    },
}


def groups(config, length: int) -> tuple:
    cache = empty_cache(config, B, length)
    assert isinstance(cache, PatternCache)
    return cache.groups


def arrays(config) -> tuple[tuple, dict[str, Any], dict[str, Any]]:
    """Return the arguments of the model, and those of the plain model."""
    given = {"segment_ids": jnp.array(SEGMENTS), "positions": jnp.array(PLACES)}
    if config.architecture != "encoder_decoder":
        return (TOKENS,), given, {}
    given["encoder_segment_ids"] = jnp.array(SOURCE_SEGMENTS)
    given["encoder_positions"] = jnp.array(SOURCE_PLACES)
    return (TOKENS, SOURCE), given, {"source": (np.asarray(SOURCE), SOURCE_SEGMENTS, SOURCE_PLACES)}


@pytest.mark.parametrize("unroll", [None, 1], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_a_plain_implementation(name: str, unroll: int | None):
    model, params = init(tiny(**MODELS[name], unroll=unroll))
    given, named, plain = arrays(model.config)
    logits = jax.jit(model.apply)({"params": params}, *given, **named)
    expected = Plain(model.config, params)(np.asarray(TOKENS), SEGMENTS, PLACES, **plain)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", quick.only(["gemma 3"], MODELS))
def test_parameters_are_those_of_equal_layers(name: str):
    def values(**changes: Any) -> dict:
        config = tiny(**MODELS[name] | changes)
        model, _ = init(config)
        given, _, _ = arrays(config)
        return jax.jit(lambda: model.init(jax.random.key(0), *given))()

    jax.tree.map(np.testing.assert_array_equal, values(), values(pattern=()))


@pytest.mark.parametrize("pattern", [(LayerConfig(),), (LayerConfig(),) * 3])
def test_a_period_of_one_is_the_program_of_equal_layers(pattern):
    def program(**changes: Any) -> str:
        config = tiny("decoder_only", layers=3, **POSITIONS["rotary"], **changes)
        model, params = init(config)

        @jax.jit
        @jax.grad
        def gradient(params):
            logits: Any = model.apply({"params": params}, TOKENS)
            return jnp.sum(logits)

        return gradient.lower(params).as_text()

    assert program(pattern=pattern) == program()
    assert program(pattern=(LOCAL, LOCAL)) == program(attention_window=1) != program()


# Intermediate values and training ---------------------------------------------------------------


@pytest.mark.parametrize("unroll", [None, 1])
def test_intermediates_are_in_the_order_of_the_layers(unroll: int | None):
    changes = MODELS["gemma 3"] | {"norm_position": "post", "unroll": unroll}
    model, params = init(tiny(**changes))
    _, sown = jax.jit(partial(model.apply, mutable="intermediates"))({"params": params}, TOKENS)
    sown = sown["intermediates"]["decoder"]["blocks"]
    (hidden,), (weights,) = sown["hidden"], sown["self_attention"]["weights"]
    back = np.arange(T)[:, None] - np.arange(T)
    for layer in range(8):
        window = T if layer == 5 else 2
        seen = np.broadcast_to((back >= 0) & (back <= window), weights[layer].shape)
        np.testing.assert_array_equal(weights[layer] > 0, seen)
    plain = Plain(model.config, params)
    for count in (1, 6, 7, 8):  # Hidden states equal those of a model with so many layers.
        blocks = jax.tree.map(lambda x: x[:count], plain.params["decoder"]["blocks"])  # noqa: B023
        x = plain.embed("inputs", np.asarray(TOKENS), np.arange(T)[None])
        past = (back >= 0)[None]
        expected = plain.stack({"blocks": blocks}, x, past, np.arange(T)[None], False)
        close(hidden[count - 1], expected)


@pytest.mark.slow
def test_remat_and_unroll_change_no_value_and_no_gradient():
    rates = {"dropout": 0.2, "attention_dropout": 0.3, "feed_forward_dropout": 0.4}

    def value_and_gradient(**changes):
        model, params = init(tiny(**MODELS["gemma 2"], **rates, **changes))

        @jax.jit
        @jax.value_and_grad
        def loss(params):
            rngs = {"dropout": jax.random.key(3)}
            logits: Any = model.apply({"params": params}, TOKENS, deterministic=False, rngs=rngs)
            return jnp.sum(jnp.sin(logits))

        return loss(params)

    value, gradient = value_and_gradient()
    for remat, unroll in (("full", 2), ("attention", 1)):
        other_value, other_gradient = value_and_gradient(remat=remat, unroll=unroll)
        np.testing.assert_allclose(other_value, value, rtol=1e-5)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), other_gradient, gradient
        )


def test_each_rematerialisation_keeps_less_than_the_one_before():
    kept = []
    for remat in ("none", "dots", "attention", "full"):
        model, params = init(tiny(**MODELS["gemma 2"], remat=remat))
        loss = lambda params, model=model: model.apply({"params": params}, TOKENS)  # noqa: E731
        _, pull = jax.eval_shape(partial(jax.vjp, loss), params)
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(pull)))
    assert kept == sorted(set(kept), reverse=True)


def test_layers_drop_different_elements():
    # Each block adds 1 to all elements; with dropout it adds 1 / (1 - rate) or 0.
    config = tiny(**MODELS["gemma 2"] | {"layers": 3, "dropout": 0.5})
    model, params = init(config)
    params = jax.tree.map(jnp.zeros_like, params)
    params["decoder"]["blocks"]["feed_forward"]["down"]["bias"] += 1.0
    train = partial(model.apply, deterministic=False, mutable="intermediates")
    _, sown = jax.jit(train)({"params": params}, TOKENS, rngs={"dropout": jax.random.key(0)})
    (hidden,) = sown["intermediates"]["decoder"]["blocks"]["hidden"]
    added = np.diff(np.concatenate([np.zeros_like(hidden[:1]), hidden]), axis=0)
    assert set(np.unique(added)) == {0.0, 2.0}
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert 0.2 < (added[first] == added[second]).mean() < 0.8


# With a cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("unroll", [None, 1])
@pytest.mark.parametrize("name", quick.only(["gemma 2"], ["gemma 2", "gemma 3", "smollm3"]))
def test_a_decoder_decodes_with_a_cache_as_it_was_taught(name: str, unroll: int | None):
    model, params = init(tiny(**MODELS[name], unroll=unroll))

    @jax.jit
    def run(params):
        decode = partial(model.apply, {"params": params}, method="decode")
        begin = {"cache": empty_cache(model.config, B, T), "offset": jnp.int32(0)}
        first, cache = decode(TOKENS[:, :2], **begin)

        def step(cache, t):
            token = jax.lax.dynamic_slice_in_dim(TOKENS, t, 1, axis=1)
            logits, cache = decode(token, cache=cache, offset=t)
            return cache, logits[:, 0]

        _, rest = jax.lax.scan(step, cache, jnp.arange(2, T))
        whole = model.apply({"params": params}, TOKENS)
        return whole, jnp.concatenate([first, jnp.swapaxes(rest, 0, 1)], 1)

    whole, decoded = run(params)
    close(decoded, whole)


@pytest.mark.slow
def test_hypotheses_of_a_pair_go_on_from_one_another():
    width, past = 4, 3
    model, params = init(tiny(**MODELS["pair"]))
    real = jnp.array(np.minimum(SOURCE_SEGMENTS, 1))
    reader = jax.jit(partial(prepare, model.config))(params)
    decode = jax.jit(lambda reader, *args, **options: reader.decode(*args, **options))
    encoded = jax.jit(partial(model.apply, method="encode"))({"params": params}, SOURCE, real)
    begin = {"cache": reader.empty_cache(B, T), "offset": jnp.int32(0)}
    _, cache = decode(reader, TOKENS[:, :past], encoded, real, **begin)
    cache = cache.repeat(width)
    kinds = [type(layer.self_attention) for group in cache.groups for layer in group.layers]
    assert kinds == [WindowCache, BeamCache, WindowCache, WindowCache]
    texts, rng = np.repeat(np.asarray(TOKENS[:, :past]), width, 0), np.random.default_rng(0)
    for t in range(past, T):
        tokens = rng.integers(0, 11, (B * width, 1))
        texts = np.concatenate([texts, tokens], 1)
        options = {"cache": cache, "offset": jnp.int32(t)}
        logits, cache = decode(reader, jnp.array(tokens), None, real, **options)
        parents = rng.integers(0, width, (B, width))
        cache = cache.reorder(jnp.array(parents))
        rows = (np.arange(B)[:, None] * width + parents).reshape(-1)
        whole: Any = model.apply(
            {"params": params},
            jnp.array(texts),
            jnp.repeat(SOURCE, width, 0),
            encoder_segment_ids=jnp.repeat(real, width, 0),
        )
        close(logits[:, 0], whole[:, -1])
        texts = texts[rows]


def test_a_layer_caches_no_more_than_its_window():
    config = tiny(**MODELS["gemma 3"])
    *local, last = groups(config, 17)[:6]
    assert {type(group.self_attention) for group in local} == {WindowCache}
    assert local[0].self_attention.k.shape[:3] == (1, B, 2 + 1)
    assert isinstance(last.self_attention, KVCache)
    assert last.self_attention.k.shape[:4] == (1, B, KV_HEADS, 17)
    assert len(groups(config, 17)) == 8


# Other parts of the project ---------------------------------------------------------------------


def test_runs_of_before_have_equal_layers(tmp_path):
    experiment = base.load("shakespeare_char")[0]
    run = Run(tmp_path, experiment.model, experiment.data, experiment.train)
    before = run.values()
    assert before["model"].pop("pattern") == []
    assert Run.of(tmp_path, before).model == run.model
    assert with_defaults(before) == run.values()
    (tmp_path / "environment.json").write_text(json.dumps({"config": before, "data": {}}))
    assert changes(environments(tmp_path)[0], {"config": run.values(), "data": {}}) == []
    pattern = (LayerConfig(window="all"), LayerConfig(window=3, rotary=RotaryConfig(base=3)))
    assert from_json(tuple[LayerConfig, ...], to_json(Pattern(pattern))["pattern"]) == pattern


@dataclasses.dataclass
class Pattern:
    pattern: tuple[LayerConfig, ...]


LLAMA: dict[str, Any] = {
    "width": 12,
    "layers": 3,
    "attention": AttentionConfig(heads=2, bias=False),
    "feed_forward": FeedForwardConfig(width=5, activation="silu", gated=True, bias=False),
    "norm": NormConfig(kind="rmsnorm", position="pre"),
    "positions": PositionConfig(kind="rotary"),
    "scale_embeddings": False,
}


def test_a_pattern_is_not_exported():
    config = tiny("decoder_only", layers=3, pattern=(LOCAL, LayerConfig()))
    with pytest.raises(ModelError, match=r"model.* cannot be exported"):
        config_to_hf(config)
    model = ModelConfig(
        architecture="decoder_only", vocab_size=7, **LLAMA, pattern=(LOCAL, LayerConfig())
    )
    with pytest.raises(ModelError, match=r"model\.pattern = .*window=1.* cannot be exported"):
        config_to_hf(model)
    config_to_hf(dataclasses.replace(model, pattern=()))


def test_a_fine_tuned_model_has_the_pattern_of_its_source():
    source = tiny(**MODELS["gemma 3"])
    new = merge_pretrained_config(tiny("decoder_only", **POSITIONS["rotary"]), source)
    assert new.pattern == source.pattern


def test_costs_count_the_keys_and_the_cache_of_each_layer(unchecked):
    length, layers = 13, 8
    config = tiny(**MODELS["gemma 3"])
    setup = set_up(config, TrainConfig())
    found = {part.name: part for part in parts(config, setup.abstract.params, length)}
    scores = found["self-attention scores"]
    keys = 7 * (2 + 1) + length  # keys in the window before a token, the token itself
    assert scores.flops == 4 * keys * HEADS * 6
    assert scores.masked == 4 * length / 2 * HEADS * 6
    data = DataConfig(source="shakespeare", objective="causal_lm", max_length=length)
    cache = memory(config, data, TrainConfig(), setup).cache
    assert cache == 2 * layers * KV_HEADS * 6 * 4
    console = Console(record=True, width=200, file=io.StringIO())
    inspect("x", config, data, TrainConfig(), console)
    said = console.export_text()
    assert "layers in the pattern window=2,rotary.base=3" in said
    assert "for the last 3 in 7 layers: " in said
    assert "self-attention of layers 1-5, 7-8 " in said and "self-attention of layer 6 " in said


# The audit --------------------------------------------------------------------------------------

LM = DataConfig(source="shakespeare", objective="causal_lm")
AUDITED = ModelConfig(
    architecture="decoder_only",
    layers=7,
    attention=AttentionConfig(heads=2),
    norm=NormConfig(position="pre"),
    pattern=(LayerConfig(window=2), LayerConfig()),
)


@pytest.mark.slow
def test_the_audit_finds_nothing_and_names_the_layers():
    subject = Subject.of(AUDITED, LM)
    assert subject.model.layers == 3
    names = ["self-attention of layers 1, 3", "self-attention of layer 2"]
    assert list(subject.attentions.values()) == names
    found = audit(subject)
    assert found.findings == []
    assert "weights of each layer" in found.methods


@pytest.mark.slow
@pytest.mark.parametrize("small", [True, False])
def test_a_stack_that_mixes_its_layers_up_is_found(monkeypatch, small: bool):
    """Only the weights show the bug: the logits depend on the same tokens in either order."""
    call = Stack.__call__
    monkeypatch.setattr(Stack, "__call__", lambda self, x, at, masks, **options: call(
        self, x, at, masks[::-1], **options))  # fmt: skip
    another = dataclasses.replace(AUDITED, dropout=0.2)  # No test has compiled this config yet.
    findings = audit(Subject.of(another, LM), small=small).findings
    kinds = {(finding.kind, finding.where, finding.method) for finding in findings}
    assert ("leak", "self-attention of layer 1", "weights") in kinds
    assert ("blindness", "self-attention of layer 2", "weights") in kinds


@pytest.mark.slow
def test_a_window_of_one_layer_that_is_off_by_one_is_found(monkeypatch):
    sliding = masks.sliding
    monkeypatch.setattr(masks, "sliding", lambda left, *rest: sliding(left + 1, *rest))
    findings = audit(Subject.of(AUDITED, LM)).findings
    places = [
        place
        for finding in findings
        if (finding.kind, finding.method) == ("leak", "mask")
        and finding.where == "self-attention of layers 1, 3"
        for place in finding.positions
    ]
    assert {t - s for *_, t, s in places} == {3}
    assert "self-attention of layer 2" not in {f.where for f in findings if f.method == "mask"}


def test_what_is_reached_follows_the_order_of_the_layers():
    config = dataclasses.replace(
        AUDITED, layers=3, pattern=(LayerConfig(window=0), LOCAL, LayerConfig(window=2))
    )
    reach = declared.reaches(config, {"segment_ids": np.ones((1, 7), int)})["logits", "inputs"][0]
    expected = [[0 <= t - s <= 1 + 2 for s in range(7)] for t in range(7)]
    np.testing.assert_array_equal(reach, expected)
