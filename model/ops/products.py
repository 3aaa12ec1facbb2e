"""Products of hidden states [B, T, i] and the matrices of linear maps."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from heedful.model.axes import mesh_axes
from heedful.model.ops.platform import op

MAX_ROWS_TRANSPOSED = 64  # rows of x up to which a CPU is faster with the matrix as first factor


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "B T i"], kernel: Float[Array, "..."], dtype: str | None = None
) -> Float[Array, "B T o"]:
    """Return x kernel in `dtype` (None: the type of x); the gradient for the kernel is x^T g.

    The kernel [*in, *out] becomes a matrix [i, o] of the type of x here, so that the backward pass
    finds the parameter itself and no copy of it. A derivative by JAX would give the gradient as
    (g^T x)^T, for which a CPU copies all of g.
    """
    return jnp.einsum("BTi,io->BTo", x, _matrix(kernel, x), preferred_element_type=dtype)


def _matrix(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return kernel.astype(x.dtype).reshape(x.shape[-1], -1)


def _matmul_forward(x: jax.Array, kernel: jax.Array, dtype: str | None):
    return matmul(x, kernel, dtype), (x, kernel)


def _matmul_backward(dtype: str | None, saved: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = saved
    g = g.astype(x.dtype)
    of_kernel = summed_outer_products(x, g)
    of_x = jnp.einsum("BTo,io->BTi", g, _matrix(kernel, x))
    return of_x, of_kernel.reshape(kernel.shape).astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


@op
def summed_outer_products(
    x: Float[Array, "B T i"], y: Float[Array, "B T o"]
) -> Float[Array, "i o"]:
    """Return x^T y, summed over all tokens of all rows.

    As a product of flat arrays, for which a TPU moves less. But where the mesh splits T, flat
    arrays would be gathered.
    """
    if any(mesh_axes("act_length")):
        return jax.lax.dot_general(x, y, (((0, 1), (0, 1)), ((), ())))
    return x.reshape(-1, x.shape[-1]).T @ y.reshape(-1, y.shape[-1])


@summed_outer_products.on("cpu")
def _wider_second(x: Float[Array, "B T i"], y: Float[Array, "B T o"]) -> Float[Array, "i o"]:
    """Return (y^T x)^T where x is the wider of the two: a CPU copies the first factor."""
    plain = summed_outer_products.plain
    if x.shape[-1] <= y.shape[-1]:
        return plain(x, y)
    return jax.lax.optimization_barrier(plain(y, x)).T


@op
def transposed_matmul(
    x: Float[Array, "B T i"], transposed: Float[Array, "o i"], dtype: str | None = None
) -> Float[Array, "B T o"]:
    """Return x transposed^T in `dtype` (None: their type)."""
    return jnp.einsum("BTi,oi->BTo", x, transposed, preferred_element_type=dtype)


@transposed_matmul.on("cpu")
def _matrix_first(
    x: Float[Array, "B T i"], transposed: Float[Array, "o i"], dtype: str | None = None
) -> Float[Array, "B T o"]:
    """Return (transposed x^T)^T where x has few rows, as in decoding.

    That takes down to 0.6 of the time of `matmul`; with many rows, as in a prompt, it would take a
    fifth more.
    """
    if _rows(x) > MAX_ROWS_TRANSPOSED:
        return transposed_matmul.plain(x, transposed, dtype)
    # Written as one einsum, x would become the first factor.
    y = jnp.einsum("oi,BTi->oBT", transposed, x, preferred_element_type=dtype)
    return jnp.moveaxis(y, 0, -1)


@op
def transpose_for_decoding(kernels: dict[Any, Any]) -> dict[Any, Any]:
    """Return those of the kernels [L, i, o] that decoding reads transposed, as [L, o, i]."""
    return {}


@transpose_for_decoding.on("cpu")
def _transpose_all(kernels: dict[Any, Any]) -> dict[Any, Any]:
    """Return all, for `transposed_matmul`."""
    return {name: jnp.swapaxes(kernel, 1, 2) for name, kernel in kernels.items()}


@op
def tied_logits(x: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """Return x table^T in float32, the products with all rows of an embedding."""
    return matmul(x, table.T, "float32")


@tied_logits.on("cpu")
def _tied_logits(x: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """Take `transposed_matmul` for few rows: the table is a transposed kernel as it stands."""
    if _rows(x) > MAX_ROWS_TRANSPOSED:
        return tied_logits.plain(x, table)
    return transposed_matmul(x, table, "float32")


def add_wide_bias(logits: Float[Array, "B T V"], bias: Float[Array, " V"]) -> Float[Array, "B T V"]:
    """Return logits + bias, where the bias is a product, so that its gradient is one, too.

    A CPU is slow to sum rows as wide as a vocabulary.
    """
    ones = jnp.ones(logits.shape[:2])
    return logits + jnp.einsum("BT,V->BTV", ones, bias, precision="highest")


def _rows(x: jax.Array) -> int:
    return math.prod(x.shape[:-1])
