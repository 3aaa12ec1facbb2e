"""The state that training changes: step, parameters, optimizer state; sharded from the start."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from heedful.model.config import ModelConfig
from heedful.model.init import boxed_params
from heedful.model.transformer import build
from heedful.train.config import TrainConfig
from heedful.train.optimizer import make_optimizer
from heedful.train.sharding import make_mesh, parameter_shardings, replicated
from heedful.train.trainable import rate_factors, split


@struct.dataclass
class TrainState:
    """The values that training changes; a checkpoint has them, and the position in the data.

    Example:
        >>> import jax, optax, heedful as hf
        >>> config = hf.ModelConfig(architecture="decoder_only", vocab_size=64, width=32, layers=1)
        >>> params = hf.init(hf.build(config), jax.random.key(0))
        >>> state = hf.TrainState.create(params, optax.adamw(1e-3))
        >>> int(state.step)
        0
    """

    step: jax.Array
    """Number of updates so far, int32 []."""
    params: Any
    """Parameters, a tree of arrays."""
    opt_state: Any
    """State of the optimizer; in a run, for the trainable parameters only."""

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation) -> "TrainState":
        """Return the state before the first step, for a loop of your own; all parameters train."""
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params))  # type: ignore[call-arg]


def abstract_params(config: ModelConfig, mesh: Mesh) -> Any:
    """Return shapes, types and shardings of the parameters; compute nothing."""
    boxed = jax.eval_shape(lambda: boxed_params(build(config), jax.random.key(0)))
    return _placed(nn.unbox(boxed), parameter_shardings(boxed, mesh))


class Setup(NamedTuple):
    """Mesh, optimizer and abstract state: everything that follows from the configs alone."""

    mesh: Mesh
    factors: Any
    """Factors of the learning rate, by parameter (see `trainable.rate_factors`)."""
    optimizer: optax.GradientTransformation
    abstract: TrainState
    """Shapes, types and shardings of the state."""


def set_up(model: ModelConfig, config: TrainConfig, mesh: Mesh | None = None) -> Setup:
    """Return the setup of a training run, on the devices of `mesh`, or on all devices."""
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    params = abstract_params(model, mesh)
    factors = rate_factors(params, model, config.optimizer)
    optimizer = make_optimizer(config.optimizer, config.steps, factors)
    trainable, _ = split(params, factors)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    specs = jax.tree.map(lambda x: x.sharding, trainable)
    opt_specs = optax.tree.map_params(
        optimizer,
        lambda _, spec: spec,
        opt_state,
        specs,
        transform_non_params=lambda _: replicated(mesh),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    state = TrainState(step, params, _placed(opt_state, opt_specs))  # type: ignore[arg-type]
    return Setup(mesh, factors, optimizer, state)


def init_params(config: ModelConfig, mesh: Mesh, seed: int) -> Any:
    """Create random parameters, sharded from the start; the values are the same on every mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(config, mesh))
    make = lambda: nn.unbox(boxed_params(build(config), jax.random.key(seed)))  # noqa: E731
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=shardings)()


def first_state(setup: Setup, params: Any) -> TrainState:
    """Return the state before the first step, from parameters that are random or pretrained."""
    shardings = jax.tree.map(lambda x: x.sharding, setup.abstract.opt_state)
    with jax.set_mesh(setup.mesh):
        init = jax.jit(setup.optimizer.init, out_shardings=shardings)
        opt_state = init(split(params, setup.factors)[0])
    step = jax.device_put(jnp.int32(0), setup.abstract.step.sharding)
    return TrainState(step, params, opt_state)  # type: ignore[arg-type]


def parameter_count(params: Any) -> int:
    """Return the number of all elements."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )
