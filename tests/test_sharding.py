"""Test sharding: mesh axes of axis names, and training on one device against eight devices."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jax.sharding import Mesh, PartitionSpec

from heedful.data.packing import Shape
from heedful.model.attention_masks import encoder_mask
from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    LayerConfig,
    LinformerConfig,
    ModelConfig,
    ModelError,
    NormConfig,
    PositionConfig,
    RotaryConfig,
)
from heedful.model.multi_head_attention import MultiHeadAttention
from heedful.model.ops.products import matmul
from heedful.train.config import MeshConfig, OptimizerConfig, TrainConfig
from heedful.train.errors import TrainError
from heedful.train.model_loss import (
    Loss,
    classification_loss,
    language_model_loss,
    regression_loss,
)
from heedful.train.sharding import (
    batch_sharding,
    flax_rules,
    local_batch_shards,
    make_mesh,
    parameter_shardings,
    replicated,
    require_divisible,
    resolve,
    to_devices,
)
from heedful.train.state import Setup, TrainState, first_state, init_params, set_up
from heedful.train.step import make_eval_step, make_train_step

V, CLASSES = 24, 3
MODEL = ModelConfig(
    vocab_size=V,
    width=16,
    layers=2,
    attention=AttentionConfig(heads=4, kv_heads=2),
    feed_forward=FeedForwardConfig(width=12),
    dropout=0.1,
)
PACKED = dataclasses.replace(
    MODEL,
    architecture="decoder_only",
    norm=NormConfig(kind="rmsnorm", position="pre"),
    positions=PositionConfig(kind="rotary"),
)
CLASSIFIER = dataclasses.replace(
    MODEL,
    architecture="encoder_only",
    positions=PositionConfig(kind="learned", max_length=7),
    head=HeadConfig(kind="classifier", outputs=CLASSES, pooling="mean"),
    type_vocab_size=2,
)
MASKED = dataclasses.replace(
    MODEL, architecture="encoder_only", head=HeadConfig(transform=True, bias=True)
)
PATTERN = dataclasses.replace(
    PACKED,
    layers=5,
    pattern=(LayerConfig(window=2, rotary=RotaryConfig(base=7)), LayerConfig(positions=False)),
)
MODELS = {"translation": MODEL, "packed": PACKED, "classifier": CLASSIFIER, "pattern": PATTERN}
TRAIN = TrainConfig(optimizer=OptimizerConfig(peak_lr=0.01, warmup_steps=3))
EVERY_AXIS = MeshConfig(data=1, fsdp=2, seq=2, tensor=2)
MESHES = [
    ("translation", MeshConfig(data=8)),
    ("translation", MeshConfig(data=1, fsdp=8)),
    ("translation", MeshConfig(data=4, tensor=2)),
    ("translation", MeshConfig(data=4, seq=2)),
    ("translation", EVERY_AXIS),
    ("packed", EVERY_AXIS),
    ("classifier", EVERY_AXIS),
    ("pattern", EVERY_AXIS),
]


def batch(
    rng: np.random.Generator, model: ModelConfig = MODEL, rows: int = 16, length: int = 6
) -> dict[str, np.ndarray]:
    """Return a batch of the model's objective; some rows are empty."""
    ids = lambda: rng.integers(4, V, (rows, length)).astype(np.int32)  # noqa: E731
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    real = places < rng.integers(0, length + 1, (rows, 1))  # 0: an empty row
    segments = real.astype(np.int32)
    one = {"inputs": ids(), "segment_ids": segments, "positions": places * segments}
    if model.head.kind == "classifier":
        outputs, counts = model.head.outputs or 0, segments[:, 0].astype(np.float32)
        targets = rng.integers(0, outputs, rows).astype(np.int32)
        if outputs == 1:
            targets = rng.normal(size=rows).astype(np.float32)
        second = places >= rng.integers(1, length, (rows, 1))
        types = (second * segments).astype(np.int32)
        return {**one, "type_ids": types, "targets": targets, "weights": counts}
    one |= {"targets": ids(), "weights": segments.astype(np.float32)}
    if model.architecture == "encoder_only":  # A share of the tokens are targets.
        return {**one, "weights": one["weights"] * (rng.random((rows, length)) < 0.3)}
    if model.architecture == "decoder_only":  # two documents in each row
        second = places >= rng.integers(1, length, (rows, 1))
        starts = second.argmax(1)[:, None]
        segments = segments * (1 + second)
        places = (places - starts * second) * real
        return {**one, "segment_ids": segments, "positions": places.astype(np.int32)}
    encoder = {f"encoder_{name}": x for name, x in one.items() if name.endswith(("ids", "ions"))}
    return {**one, **encoder, "encoder_inputs": ids()}


class Trained(NamedTuple):
    """The result of some training steps."""

    initial: Any
    metrics: list[dict]
    """Metrics of each step."""
    state: TrainState
    setup: Setup


def loss_of(model: ModelConfig) -> Loss:
    """Return the loss for a language model, for classes, or for a regression with one output."""
    if model.head.kind == "language_model":
        return language_model_loss
    return regression_loss if model.head.outputs == 1 else classification_loss


@functools.cache
def prepare(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> tuple[Setup, Callable]:
    """Return the setup and the training step, which compiles once."""
    setup = set_up(model, config, mesh)
    return setup, make_train_step(model, config, setup, loss_of(model))


def train(
    model: ModelConfig,
    config: TrainConfig = TRAIN,
    mesh: Mesh | None = None,
    steps: int = 3,
    params: Any = None,
    length: int = 6,
) -> Trained:
    """Train from `params` or those of seed 7, on one device unless `mesh` is given."""
    setup, step = prepare(model, config, mesh or make_mesh(MeshConfig(), jax.devices()[:1]))
    mesh = setup.mesh
    if params is None:
        params = init_params(model, mesh, seed=7)
    else:
        params = jax.tree.map(
            lambda x, a: jax.device_put(x, a.sharding), params, setup.abstract.params
        )
    initial = jax.device_get(params)
    state = first_state(setup, params)
    metrics, rng = [], np.random.default_rng(0)
    with jax.set_mesh(mesh):
        for _ in range(steps):
            state, values = step(state, to_devices(batch(rng, model, length=length), mesh))
            metrics.append(jax.device_get(values))
    return Trained(initial, metrics, state, setup)


@pytest.mark.parametrize("width", [4, 12])
def test_the_gradient_of_a_kernel_gathers_no_activations(width: int):
    """Rows and sequences are sharded: each device sums its products, then an all-reduce follows."""
    mesh = make_mesh(MeshConfig(data=2, seq=4), jax.devices()[:8])
    x = jax.ShapeDtypeStruct((4, 8, 8), np.float32, sharding=batch_sharding(mesh, 2))
    kernel = jax.ShapeDtypeStruct((8, width), np.float32, sharding=replicated(mesh))

    def loss(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(matmul(x, kernel)))  # type: ignore[arg-type]

    step = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(replicated(mesh), x.sharding))
    with jax.set_mesh(mesh), nn.logical_axis_rules(flax_rules()):
        text = step.lower(kernel, x).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text


def losses(trained: Trained) -> list[float]:
    return [float(m["loss"]) / float(m["weight"]) for m in trained.metrics]


def evaluate(model: ModelConfig, trained: Trained) -> tuple[float, Any]:
    """Return the mean loss of another batch, and a classifier's predictions for it."""
    mesh, other = trained.setup.mesh, batch(np.random.default_rng(1), model)
    with jax.set_mesh(mesh):
        step = make_eval_step(model, mesh, loss_of(model))
        losses, weight, predicted = step(trained.state.params, to_devices(other, mesh))
    return float(losses["loss"]) / float(weight), predicted


def eight(config: MeshConfig) -> Mesh:
    return make_mesh(config, jax.devices()[:8])


@functools.cache
def one_device(kind: str) -> tuple[Trained, float, Any]:
    trained = train(MODELS[kind], steps=50)
    return trained, *evaluate(MODELS[kind], trained)


@pytest.mark.parametrize(("kind", "mesh"), quick.only([("packed", EVERY_AXIS)], MESHES), ids=str)
def test_eight_devices_equal_one(kind: str, mesh: MeshConfig):
    one, one_loss, one_predicted = one_device(kind)
    # Compiling the initialisation takes half of the time, so that it is tested once per model.
    params = None if mesh == EVERY_AXIS else one.initial
    ours = train(MODELS[kind], mesh=eight(mesh), steps=50, params=params)
    jax.tree.map(np.testing.assert_array_equal, ours.initial, one.initial)
    # Sums have another order; dropout masks are the same.
    np.testing.assert_allclose(losses(ours), losses(one), rtol=1e-5)
    jax.tree.map(  # The step keeps the sharding of each array.
        lambda x, wanted: x.sharding.is_equivalent_to(wanted.sharding, x.ndim) or pytest.fail(),
        ours.state,
        ours.setup.abstract,
    )
    loss, predicted = evaluate(MODELS[kind], ours)
    assert loss == pytest.approx(one_loss, rel=1e-5)
    assert (predicted is None) == (kind != "classifier")
    if predicted is not None:  # Predictions are replicated, in the order of the rows.
        assert all(x.sharding.is_fully_replicated for x in predicted.values())
        outputs, one_outputs = predicted.pop("outputs"), one_predicted["outputs"]
        np.testing.assert_allclose(outputs, one_outputs, atol=1e-4)
        assert predicted.keys() == {"targets", "weights"}
        for x, wanted in ((x, one_predicted[name]) for name, x in predicted.items()):
            np.testing.assert_array_equal(x, wanted)


@pytest.mark.slow
def test_the_ring_splits_the_sequence_and_changes_nothing():
    """The test covers an encoder, a decoder, cross-attention, dropout and rows of padding."""
    attention = dataclasses.replace(MODEL.attention, dropout=0.2)
    dense, ring = (
        dataclasses.replace(MODEL, attention=dataclasses.replace(attention, core=core))
        for core in ("dense", "ring")
    )
    one = train(dense, steps=2, length=8)
    mesh = eight(MeshConfig(data=2, seq=4))
    ours = train(ring, mesh=mesh, steps=2, params=one.initial, length=8)
    np.testing.assert_allclose(losses(ours), losses(one), rtol=1e-5)
    for x, wanted in zip(ours.metrics, one.metrics, strict=True):
        np.testing.assert_allclose(x["grad_norm"], wanted["grad_norm"], rtol=1e-4)


@functools.cache
def gradient_text(core: str, length: int, mesh: Mesh) -> str:
    """Return one device's program for the gradient of attention over a sharded sequence."""
    window = 3 if core == "longformer" else None
    projected = LinformerConfig(rank=4, max_length=length) if core == "linformer" else None
    parts: dict[str, Any] = {"linformer": projected} if projected else {}
    attention = AttentionConfig(heads=2, core=core, window=window, **parts)
    config = ModelConfig(architecture="encoder_only", width=8, attention=attention)
    module, mask = MultiHeadAttention(config), encoder_mask(config, None)
    x = jnp.zeros((2, length, 8))
    params = jax.eval_shape(lambda: nn.unbox(module.init(jax.random.key(0), x, None, mask)))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(module.apply(params, x, None, mask)[0]))  # type: ignore

    step = jax.jit(jax.grad(loss), in_shardings=(replicated(mesh), batch_sharding(mesh, 2)))
    with jax.set_mesh(mesh), nn.logical_axis_rules(flax_rules()):
        compiled: Any = step.lower(params, x).compile()
        return compiled.as_text()


@pytest.mark.parametrize("core", ["flash", "longformer", "performer"])
def test_cores_that_take_the_length_in_turn_refuse_to_have_it_split(core: str):
    words = rf"core {core} needs whole sequences.* set train\.mesh\.seq to 1, .* ring or dense"
    with pytest.raises(ModelError, match=words):
        gradient_text(core, 16, eight(MeshConfig(data=2, seq=4)))


@pytest.mark.slow
@pytest.mark.parametrize("core", ["auto", "linformer"])
def test_cores_that_keep_the_length_split_compute_a_part_on_each_device(core: str):
    """A core that loops over blocks, from length 512 on, would gather the sequence on a device."""
    text = gradient_text(core, 1024, eight(MeshConfig(data=1, seq=8)))
    keys = 1024 if core == "auto" else 4
    assert (2, 2, 128, keys) in shapes(text)
    assert not {(2, 2, 1024, keys), (2, 2, 512, keys)} & shapes(text)
    assert core == "auto" or "all-gather" not in text


def test_fsdp_splits_parameters_and_moments_and_tensor_splits_heads():
    state = set_up(MODEL, TRAIN, eight(MeshConfig(data=1, fsdp=4, tensor=2))).abstract
    query = state.params["decoder"]["blocks"]["self_attention"]["query"]["kernel"]
    assert query.sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)  # L, D, N, H
    moments = state.opt_state[0].mu["decoder"]["blocks"]["self_attention"]["query"]["kernel"]
    assert moments.sharding == query.sharding
    up = state.params["encoder"]["blocks"]["feed_forward"]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (2, 4, 6)


def test_unknown_axis_rank_reuse_and_division_are_refused_by_name():
    mesh = eight(EVERY_AXIS)
    cases = [
        (("emebd", "mlp"), (4, 4), "unknown axis name 'emebd'"),
        (("embed",), (4, 4), "1 axis names"),
        (("heads", "mlp"), (4, 4), "twice"),
        (("vocab", "embed"), (5, 4), "dimension 'vocab' of 5 does not divide into 2"),
    ]
    for axes, shape, words in cases:
        with pytest.raises(TrainError, match=words) as error:
            resolve("decoder.kernel", axes, shape, mesh)
        assert str(error.value).startswith("decoder.kernel: ")


def test_a_parameter_without_axis_names_is_refused():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    boxed = nn.Dense(3).init(jax.random.key(0), np.ones((1, 2)))["params"]
    with pytest.raises(TrainError, match="bias: a parameter without axis names"):
        parameter_shardings(boxed, mesh)


def test_a_mesh_that_does_not_fit_says_both_numbers():
    with pytest.raises(TrainError, match=r"tensor 3 devices, but there are 8"):
        make_mesh(MeshConfig(tensor=3), jax.devices()[:8])


def compiled_step(model: ModelConfig, mesh: Mesh, rows: int, length: int) -> str:
    """Return the program of one device, which has the shapes of the device's shards."""
    setup, step = prepare(model, TRAIN, mesh)
    with jax.set_mesh(mesh):
        arrays = batch(np.random.default_rng(3), model, rows=rows, length=length)
        lowered: Any = step.lower(setup.abstract, to_devices(arrays, mesh))  # type: ignore[attr-defined]
        return lowered.compile().as_text()


def shapes(text: str) -> set[tuple[int, ...]]:
    return {tuple(map(int, x.split(","))) for x in re.findall(r"= \(?\w+\[([\d,]+)\]", text)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2), EVERY_AXIS],
    ids=str,
)
def test_nothing_large_is_replicated(mesh: MeshConfig, capfd):
    """Activations of long rows and stacked parameters of wide models are sharded."""
    rows, length = 16, 32
    scanned = dataclasses.replace(PACKED, unroll=1)  # the default on other platforms than CPUs
    found = shapes(compiled_step(scanned, eight(mesh), rows, length))
    scores = rows * PACKED.attention.heads * length**2  # a layer's largest activation
    assert max(map(math.prod, found)) == PACKED.layers * scores / 8

    wide = dataclasses.replace(
        scanned,
        vocab_size=512,
        width=64,
        layers=3,
        attention=AttentionConfig(heads=8, kv_heads=4),
        feed_forward=FeedForwardConfig(width=96),
    )
    setup, _ = prepare(wide, TRAIN, eight(mesh))
    parts = mesh.fsdp * mesh.tensor
    for tree in (setup.abstract.params, setup.abstract.opt_state):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if x.ndim > 1 and "kernel" in jax.tree_util.keystr(path):
                assert math.prod(x.sharding.shard_shape(x.shape)) * parts == x.size
    found = shapes(compiled_step(wide, eight(mesh), 8, 2))
    # Before it uses a parameter, a device all-gathers its shards over fsdp, one layer at a time.
    kernels = jax.tree.leaves(setup.abstract.params["decoder"])
    of_layers = {x.shape for x in kernels if x.size > 4096}
    assert len(of_layers) == 5
    assert not of_layers & found
    assert max(map(math.prod, found)) <= 512 * 64 // mesh.tensor
    assert "full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "owners, process, expected",
    [
        ([[0], [0], [0], [0]], 0, ((0,), 1)),
        ([[0], [0], [1], [1]], 1, ((1,), 2)),
        ([[0, 0], [0, 0], [1, 1]], 1, ((2,), 3)),
        # Four hosts have 2 x 2 chips each; one axis contains all 4 x 4 chips.
        ([[h] for h in (0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3)], 1, ((1, 3), 8)),
        # With tensor parallelism over two hosts both have the same rows.
        ([[0, 1], [0, 1]], 1, ((0,), 1)),
        ([[0, 1], [0, 1], [2, 3], [2, 3]], 3, ((1,), 2)),
    ],
)
def test_rows_that_a_process_holds(owners, process, expected):
    assert local_batch_shards(np.array(owners), process) == expected


def test_what_does_not_divide_is_told_by_its_own_name():
    mesh = make_mesh(MeshConfig(seq=4), jax.devices()[:8])
    require_divisible(Shape(rows=4, lengths=(8,)), 2, mesh)
    with pytest.raises(TrainError, match=r"set data.batch_multiple to 4$"):
        require_divisible(Shape(rows=6, lengths=(8,)), 2, mesh)
    with pytest.raises(
        TrainError, match=r"train.mesh.seq = 4: set data.length_multiple and data.max"
    ):
        require_divisible(Shape(rows=4, lengths=(66,)), 2, mesh)
