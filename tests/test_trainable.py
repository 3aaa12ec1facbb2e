"""Test trainable parameters: frozen ones keep their bits without moments, others have factors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import toy
from jax.sharding import Mesh
from test_sharding import CLASSIFIER, EVERY_AXIS, MODEL, PACKED, Trained, eight, losses, train

from heedful.model.config import LoraConfig, ModelConfig
from heedful.train.config import MeshConfig, OptimizerConfig, TrainConfig
from heedful.train.errors import TrainError
from heedful.train.optimizer import make_optimizer
from heedful.train.sharding import make_mesh
from heedful.train.state import abstract_params, set_up
from heedful.train.trainable import join, layer_names, named, rate_factors, split

ONE = make_mesh(MeshConfig(), jax.devices()[:1])
FREEZE = (r"^embedding\.", r"decoder\.blocks\.1\.")
OPTIMIZER = OptimizerConfig(peak_lr=0.01, warmup_steps=0, weight_decay=0.1)
LORA = dataclasses.replace(CLASSIFIER, lora=LoraConfig(rank=2, targets=("query", "value", "up")))


def config(**values) -> TrainConfig:
    return TrainConfig(optimizer=dataclasses.replace(OPTIMIZER, **values))


def abstract(model: ModelConfig) -> Any:
    return abstract_params(model, ONE)


def factors(model: ModelConfig, **values) -> dict[str, list[float]]:
    """Return the factors of a parameter's layers, or the factor of the parameter, by name."""
    params = abstract(model)
    found = rate_factors(params, model, OptimizerConfig(**values))
    return {
        name: np.broadcast_to(np.ravel(factor), leaf.shape[:1]).tolist()
        if ".blocks." in name
        else [float(factor)]
        for (name, leaf), factor in zip(named(params), jax.tree.leaves(found), strict=True)
    }


def changes(trained: Trained) -> dict[str, bool]:
    """Return True if any bit has changed in training, by name and layer."""
    found = {}
    for (name, before), (_, after) in zip(
        named(trained.initial), named(jax.device_get(trained.state.params)), strict=True
    ):
        names = layer_names(name, before.shape)
        parts = zip([before], [after]) if len(names) == 1 else zip(before, after)  # noqa: B905
        found |= {
            part: a.tobytes() != b.tobytes() for part, (a, b) in zip(names, parts, strict=True)
        }
    return found


def size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def run(model: ModelConfig, mesh: Mesh | None = None, **values) -> Trained:
    mesh = mesh or ONE
    return train(model, config(**values), mesh, params=toy.random_params(model, mesh, seed=0))


@pytest.fixture(scope="module")
def free() -> Trained:
    return run(PACKED)


@pytest.fixture(scope="module")
def frozen() -> Trained:
    return run(PACKED, freeze=FREEZE)


def test_what_is_frozen_keeps_its_bits_and_nothing_else(free, frozen):
    assert all(changes(free).values())  # Everything changes, by weight decay too.
    fixed = {name for name, changed in changes(frozen).items() if not changed}
    asked = ("embedding.", "decoder.blocks.1.")
    assert fixed == {name for name in changes(frozen) if name.startswith(asked)}


def test_what_is_frozen_has_no_optimizer_state(free, frozen):
    table = frozen.initial["embedding"]["table"].size
    whole, less = size(free.state.opt_state), size(frozen.state.opt_state)
    # Both moments of the table are missing; a frozen layer within a stack keeps its moments.
    assert whole - less == 2 * table
    assert whole == pytest.approx(2 * size(free.initial), abs=3)  # The rest are counters.
    assert len(jax.tree.leaves(free.state.opt_state)) == 2 + len(
        jax.tree.leaves(frozen.state.opt_state)
    )


def test_what_is_frozen_is_outside_of_the_norm(free, frozen):
    ours, whole = frozen.metrics[0]["grad_norms"], free.metrics[0]["grad_norms"]
    assert ours["embedding"]["table"] is None
    squares = []
    for (name, norm), (_, wanted) in zip(
        named(ours), [x for x in named(whole) if x[0] != "embedding.table"], strict=True
    ):
        wanted = np.array(wanted)
        if ".blocks." in name:
            assert norm[1] == 0 < wanted[1]
            wanted[1] = 0
        np.testing.assert_allclose(norm, wanted, rtol=1e-6)
        squares.append((wanted**2).sum())
    np.testing.assert_allclose(frozen.metrics[0]["grad_norm"], np.sqrt(sum(squares)), rtol=1e-5)


def test_eight_devices_freeze_the_same(frozen):
    ours = run(PACKED, eight(EVERY_AXIS), freeze=FREEZE)
    assert changes(ours) == changes(frozen)
    np.testing.assert_allclose(losses(ours), losses(frozen), rtol=1e-5)


def test_with_low_rank_updates_only_they_and_the_head_train():
    ours = run(LORA, eight(EVERY_AXIS))
    changed = changes(ours)
    for name, is_other in changed.items():
        assert is_other == ("lora_" in name or name.startswith("head.")), name
    assert sum("lora_" in name for name in changed) == LORA.layers * 3 * 2  # 3 targets, A and B
    trainable, _ = split(ours.initial, ours.setup.factors)
    assert size(ours.state.opt_state) == pytest.approx(2 * size(trainable), abs=3)
    assert size(trainable) < size(ours.initial) / 5


def test_a_rate_for_a_head_that_has_no_parameters_is_refused():
    with pytest.raises(TrainError, match=r"optimizer.head_lr_multiplier = 8.0: the head has no"):
        factors(MODEL, head_lr_multiplier=8.0)


def test_rates_fall_from_the_head_down_to_the_embeddings():
    found = factors(CLASSIFIER, layer_decay=0.5, head_lr_multiplier=8.0)
    for name, values in found.items():
        if name.startswith("head."):
            assert values == [8.0]
        elif ".blocks." in name:
            assert values == [0.25, 0.5]  # The top layer is one level below the head.
        else:
            assert name.split(".")[0] in ("embedding", "inputs") and values == [0.125]
    assert set(map(str, factors(CLASSIFIER).values())) == {"[1.0]", "[1.0, 1.0]"}
    assert factors(PACKED, layer_decay=0.5)["decoder.norm.scale"] == [1.0]


def test_embeddings_are_below_the_deeper_of_two_stacks():
    deep = dataclasses.replace(MODEL, encoder_layers=3, layers=1)
    found = factors(deep, layer_decay=0.5)
    assert found["encoder.blocks.feed_forward.up.kernel"] == [0.125, 0.25, 0.5]
    assert found["decoder.blocks.feed_forward.up.kernel"] == [0.5]
    assert found["embedding.table"] == [0.0625]


def test_freezing_goes_before_any_rate():
    found = factors(
        LORA, layer_decay=0.5, head_lr_multiplier=8.0, freeze=(r"blocks\.0\.", "pooler")
    )
    assert found["head.classes.kernel"] == [8.0]
    assert found["head.pooler.kernel"] == [0.0]
    assert found["embedding.table"] == [0.0]
    assert found["encoder.blocks.self_attention.query.lora_a"] == [0.0, 0.5]
    assert found["encoder.blocks.self_attention.query.kernel"] == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("lora", quick.only([LORA.lora], [LoraConfig(), LORA.lora]))
def test_queries_learn_as_if_their_scores_were_scaled(lora: LoraConfig):
    """With H = 4, unscaled scores of halved queries equal scaled scores, at all steps."""
    scaled = dataclasses.replace(MODEL, dropout=0.0, lora=lora)
    attention = dataclasses.replace(MODEL.attention, scaled=False)
    unscaled = dataclasses.replace(scaled, attention=attention)
    halved = ("query.kernel", "query.bias", "query.lora_b")

    def ends(model: ModelConfig, size: float) -> tuple[Trained, dict[str, np.ndarray]]:
        tree = toy.random_params(model, ONE, seed=0)
        params = [leaf * size if name.endswith(halved) else leaf for name, leaf in named(tree)]
        params = jax.tree.unflatten(jax.tree.structure(tree), params)
        how = {"weight_decay": 0.0, "clip_norm": None, "epsilon": 1e-20}
        trained = train(model, config(**how), ONE, params=params)
        return trained, dict(named(jax.device_get(trained.state.params)))

    ours, moved = ends(unscaled, 0.5)
    theirs, expected = ends(scaled, 1.0)
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-5)
    assert any(name.endswith(halved) for name in moved)
    for name, values in moved.items():
        if name.endswith("key.bias"):  # The softmax cancels it, so that its gradient is rounding.
            continue
        wanted = expected[name] * (0.5 if name.endswith(halved) else 1.0)
        np.testing.assert_allclose(values, wanted, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_an_update_is_proportional_to_its_factor():
    """Weight decay is included; the factors are powers of two, which are exact."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract(CLASSIFIER)
    )
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)

    def updates(**values) -> dict[str, Any]:
        optimizer_config = dataclasses.replace(OPTIMIZER, **values)
        found = rate_factors(params, CLASSIFIER, optimizer_config)
        optimizer = make_optimizer(optimizer_config, 9, found)
        trainable, rest = split(params, found)
        moved, _ = optimizer.update(split(grads, found)[0], optimizer.init(trainable), trainable)
        # Splitting and joining keeps all parameters.
        whole = join(optax.apply_updates(trainable, moved), rest)
        assert jax.tree.structure(whole) == jax.tree.structure(params)
        return dict(named(moved))

    plain = updates()
    ours = updates(
        layer_decay=0.5, head_lr_multiplier=4.0, freeze=("types", r"blocks\.0\.feed_forward")
    )
    assert plain.keys() - ours.keys() == {"inputs.types"}
    for name, update in ours.items():
        factor = np.array(0.125)
        if name.startswith("head."):
            factor = np.array(4.0)
        elif ".blocks." in name:
            bottom = 0.0 if "feed_forward" in name else 0.25
            factor = np.array([bottom, 0.5]).reshape(-1, *[1] * (update.ndim - 1))
        np.testing.assert_array_equal(update, plain[name] * factor, err_msg=name)


@pytest.mark.parametrize(
    ("freeze", "words"),
    [
        ((r"blocks\.2\.",), ["optimizer.freeze", "blocks", "matches no parameter"]),
        (("embedding", "enocder"), ["'enocder'", "matches no parameter", "embedding.table"]),
        ((".",), ["optimizer.freeze leaves nothing to train"]),
    ],
)
def test_patterns_that_cannot_be_meant(freeze, words):
    with pytest.raises(TrainError) as error:
        set_up(CLASSIFIER, config(freeze=freeze), ONE)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
