"""Linear maps: their products, and what a CPU makes of them."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from heedful.model.axes import mesh_axes, partitioned, target_platform
from heedful.model.config import ModelConfig
from heedful.model.ops.platform import op

MAX_ROWS_TRANSPOSED = (
    64  # rows of x for which a CPU is faster with a transposed kernel as the first factor
)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "B T i"], kernel: Float[Array, "..."], dtype: str | None = None
) -> Float[Array, "B T o"]:
    """x kernel in `dtype` (None: that of x), whose gradient for the kernel is x^T g.

    The kernel [*in, *out] becomes a matrix [i, o] of the type of x here, so that the backward pass
    finds the parameter itself and no copy of it. Derived automatically the gradient comes out as
    (g^T x)^T, for which the CPU copies all of g. Where x is the wider of the two, that is what it
    gets after all: there it is the faster one.
    """
    return jnp.einsum("BTi,io->BTo", x, _matrix(kernel, x), preferred_element_type=dtype)


def _matrix(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return kernel.astype(x.dtype).reshape(x.shape[-1], -1)


def _matmul_forward(x: jax.Array, kernel: jax.Array, dtype: str | None):
    return matmul(x, kernel, dtype), (x, kernel)


def _matmul_backward(dtype: str | None, saved: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = saved
    g = g.astype(x.dtype)
    if target_platform() == "cpu" and x.shape[-1] > g.shape[-1]:
        of_kernel = jax.lax.optimization_barrier(_summed_products(g, x)).T
    else:
        of_kernel = _summed_products(x, g)
    of_x = jnp.einsum("BTo,io->BTi", g, _matrix(kernel, x))
    return of_x, of_kernel.reshape(kernel.shape).astype(kernel.dtype)


def _summed_products(x: Float[Array, "B T i"], y: Float[Array, "B T o"]) -> Float[Array, "i o"]:
    """x^T y. Flat, a TPU moves less for it; but where T is split, flat arrays would be gathered."""
    if any(mesh_axes("act_length")):
        return jax.lax.dot_general(x, y, (((0, 1), (0, 1)), ((), ())))
    return x.reshape(-1, x.shape[-1]).T @ y.reshape(-1, y.shape[-1])


matmul.defvjp(_matmul_forward, _matmul_backward)


def transposed_matmul(
    x: Float[Array, "B T i"], transposed: Float[Array, "o i"], dtype: str | None = None
) -> Float[Array, "B T o"]:
    """x transposed^T in `dtype` (None: theirs).

    Where x has few rows, as in decoding, it is (transposed x^T)^T, for which a CPU takes down to
    0.6 of the time of `matmul`; where it has many, as in a prompt, that would take a fifth more.
    """
    if math.prod(x.shape[:-1]) > MAX_ROWS_TRANSPOSED:
        return jnp.einsum("BTi,oi->BTo", x, transposed, preferred_element_type=dtype)
    # Written as one einsum, x would become the first factor.
    y = jnp.einsum("oi,BTi->oBT", transposed, x, preferred_element_type=dtype)
    return jnp.moveaxis(y, 0, -1)


class Linear(nn.Module):
    """A linear map from the axes `inputs` to the axes `outputs`, each a mapping name -> size.

    Initial values follow `config.init`, over the true fan-in and fan-out whatever the number of
    axes, times `gain`. Adapted by a low-rank update where `config.lora` names it. Takes parameters
    as `transposed_kernels` gives them, too.
    """

    config: ModelConfig
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    use_bias: bool
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "B T *in"]) -> Float[Array, "B T *out"]:
        dtype, lora, rank = self.config.dtype, self.config.lora, len(self.inputs)
        in_shape, out_shape = tuple(self.inputs.values()), tuple(self.outputs.values())
        fan_in = math.prod(in_shape)
        x = x.astype(dtype).reshape(*x.shape[:-rank], fan_in)

        def kernel(name: str, init: Callable, inputs: Mapping, outputs: Mapping) -> jax.Array:
            shape = (*inputs.values(), *outputs.values())
            return jnp.asarray(self.param(name, partitioned(init, *inputs, *outputs), shape))

        init = _initializer(self.config.init, self.gain, rank, len(self.outputs))
        if self.has_variable("params", "transposed"):
            y: Any = transposed_matmul(x, self.get_variable("params", "transposed").astype(dtype))
        else:
            y = matmul(x, kernel("kernel", init, self.inputs, self.outputs))
        if lora.rank and self.name in lora.targets:
            inner = {"rank": lora.rank}
            down = kernel("lora_a", nn.initializers.normal(fan_in**-0.5), self.inputs, inner)
            up = kernel("lora_b", nn.initializers.zeros, inner, self.outputs)
            y += lora.alpha / lora.rank * jnp.asarray(matmul(matmul(x, down), up))
        y = y.reshape(*y.shape[:-1], *out_shape)
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros, *self.outputs)
            # In float32, in which the gradient is then summed up over all rows.
            bias = jnp.asarray(self.param("bias", zeros, out_shape))
            y = (y.astype(jnp.float32) + bias).astype(dtype)
        return checkpoint_name(y, str(self.name))  # by which model.remat keeps it


@op
def kernels_for_decoding(params: Any) -> Any:
    """Return the parameters of a stack as decoding reads them."""
    return params


@kernels_for_decoding.on("cpu")
def transposed_kernels(params: Any) -> Any:
    """The parameters of a stack, each kernel [L, *in, *out] as `transposed` [L, out, in].

    Of the linear maps in a stack only the `out` of an attention has two axes of inputs.
    """

    def turned(path: tuple[str, ...], x: Any) -> tuple[tuple[str, ...], Any]:
        if path[-1] != "kernel":
            return path, x
        inputs = x.shape[1:3] if path[-2] == "out" else x.shape[1:2]
        x = x.reshape(len(x), math.prod(inputs), -1)
        return (*path[:-1], "transposed"), jnp.swapaxes(x, 1, 2)

    return unflatten_dict(dict(turned(*item) for item in flatten_dict(params).items()))


def _initializer(kind: str, gain: float, inputs: int, outputs: int) -> Callable:
    """Of a kernel whose first `inputs` axes come in and whose other `outputs` axes go out."""
    if kind != "glorot":
        return nn.initializers.normal(0.02 * gain)
    axes = range(inputs), range(inputs, inputs + outputs)
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform", *map(tuple, axes))
