"""Axis names to mesh axes, and one device against eight."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from model.config import AttentionConfig, FeedForwardConfig, ModelConfig
from train.config import MeshConfig, OptimizerConfig, TrainConfig, TrainError
from train.optimizer import make_optimizer
from train.sharding import make_mesh, parameter_shardings, resolve, to_devices
from train.state import abstract_state, init_state
from train.step import make_eval_step, make_train_step

MODEL = ModelConfig(
    vocab_size=24,
    width=16,
    layers=2,
    attention=AttentionConfig(heads=4, kv_heads=2),
    feed_forward=FeedForwardConfig(width=12),
    dropout=0.1,
)
TRAIN = TrainConfig(optimizer=OptimizerConfig(peak_lr=0.01, warmup_steps=3))
MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=4, tensor=2),
    MeshConfig(data=4, seq=2),
    MeshConfig(data=1, fsdp=2, seq=2, tensor=2),
]


def batch(rng: np.random.Generator, rows: int = 16, length: int = 6) -> dict[str, np.ndarray]:
    ids = lambda: rng.integers(4, 24, (rows, length)).astype(np.int32)  # noqa: E731
    lengths = rng.integers(0, length + 1, (rows, 1))  # 0: an empty row
    segments = (np.arange(length) < lengths).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy()
    return {
        "inputs": ids(), "targets": ids(), "weights": segments.astype(np.float32),
        "segment_ids": segments, "positions": positions, "encoder_inputs": ids(),
        "encoder_segment_ids": segments, "encoder_positions": positions,
    }  # fmt: skip


def train(mesh_config: MeshConfig, devices: list, config: TrainConfig = TRAIN, steps: int = 5):
    """Initial parameters, losses, validation loss of some batches, and the last state."""
    mesh = make_mesh(mesh_config, devices)
    optimizer = make_optimizer(config.optimizer, config.steps)
    abstract = abstract_state(MODEL, optimizer, mesh)
    state = init_state(MODEL, optimizer, mesh, seed=7)
    initial = jax.device_get(state.params)
    step, losses = make_train_step(MODEL, config, optimizer, abstract), []
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        for _ in range(steps):
            state, metrics = step(state, to_devices(batch(rng), mesh))
            losses.append(float(metrics["loss"]) / float(metrics["weight"]))
        total, weight = make_eval_step(MODEL)(state.params, to_devices(batch(rng), mesh))
    return initial, np.array([*losses, float(total) / float(weight)]), state, abstract


@pytest.fixture(scope="module")
def one_device():
    return train(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize("mesh_config", MESHES, ids=str)
def test_eight_devices_equal_one(one_device, mesh_config: MeshConfig):
    initial, losses, _, _ = one_device
    ours, our_losses, state, abstract = train(mesh_config, jax.devices()[:8])
    jax.tree.map(np.testing.assert_array_equal, ours, initial)
    # Sums are taken in another order; dropout masks are the same.
    np.testing.assert_allclose(our_losses, losses, rtol=1e-5)
    jax.tree.map(  # the step keeps every array where init put it
        lambda x, wanted: x.sharding.is_equivalent_to(wanted.sharding, x.ndim) or pytest.fail(),
        state,
        abstract,
    )


def test_fsdp_splits_parameters_and_moments_and_tensor_splits_heads():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    state = abstract_state(MODEL, make_optimizer(TRAIN.optimizer, 9), mesh)
    query = state.params["decoder"]["blocks"]["self_attention"]["query"]["kernel"]
    assert query.sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)  # L, D, N, H
    moments = state.opt_state[0].mu["decoder"]["blocks"]["self_attention"]["query"]["kernel"]
    assert moments.sharding == query.sharding
    up = state.params["encoder"]["blocks"]["feed_forward"]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (2, 4, 6)


def test_unknown_axis_rank_reuse_and_division_are_refused_by_name():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, seq=2, tensor=2), jax.devices()[:8])
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
