"""Products of hidden states [B, T, i] with the matrices [i, o] of linear maps."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from heedful.model.axes import mesh_axes
from heedful.model.ops.platform import op

# Up to this number of rows of x, a CPU is faster with the matrix as the first factor.
MAX_ROWS_TRANSPOSED = 64


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "B T i"], kernel: Float[Array, "..."], dtype: str | None = None
) -> Float[Array, "B T o"]:
    """Return the product x @ kernel in `dtype` (None: the type of x).

    For an output gradient g, the gradient of the kernel is computed as x^T g; JAX's own derivative
    would be (g^T x)^T, for which a CPU copies g. The kernel [*in, *out] is reshaped to [i, o] and
    cast to the type of x in here, so that the backward pass stores the parameter and no copy.
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
    """Return x^T @ y, summed over all B * T tokens.

    Arrays are flattened to [B * T, ...], for which a TPU moves less data; but not if the mesh
    splits T, because then flat arrays would be gathered.
    """
    if any(mesh_axes("act_length")):
        return jax.lax.dot_general(x, y, (((0, 1), (0, 1)), ((), ())))
    return x.reshape(-1, x.shape[-1]).T @ y.reshape(-1, y.shape[-1])


@summed_outer_products.on("cpu")
def _wider_second(x: Float[Array, "B T i"], y: Float[Array, "B T o"]) -> Float[Array, "i o"]:
    """Return (y^T @ x)^T if x is wider than y: a CPU copies the first factor."""
    plain = summed_outer_products.plain
    if x.shape[-1] <= y.shape[-1]:
        return plain(x, y)
    return jax.lax.optimization_barrier(plain(y, x)).T


@op
def transposed_matmul(
    x: Float[Array, "B T i"], transposed: Float[Array, "o i"], dtype: str | None = None
) -> Float[Array, "B T o"]:
    """Return x @ transposed^T in `dtype` (None: the type of x and `transposed`)."""
    return jnp.einsum("BTi,oi->BTo", x, transposed, preferred_element_type=dtype)


@transposed_matmul.on("cpu")
def _matrix_first(
    x: Float[Array, "B T i"], transposed: Float[Array, "o i"], dtype: str | None = None
) -> Float[Array, "B T o"]:
    """Return (transposed @ x^T)^T if x has at most MAX_ROWS_TRANSPOSED rows, as in decoding.

    The product then takes as little as 0.6 of the time of `matmul`; with many rows, as in prefill,
    it would take a fifth more.
    """
    if _rows(x) > MAX_ROWS_TRANSPOSED:
        return transposed_matmul.plain(x, transposed, dtype)
    # In an einsum with the result BTo, x would become the first factor.
    y = jnp.einsum("oi,BTi->oBT", transposed, x, preferred_element_type=dtype)
    return jnp.moveaxis(y, 0, -1)


@op
def transpose_for_decoding(kernels: dict[Any, Any]) -> dict[Any, Any]:
    """Return the transposes [L, o, i] of the kernels that decoding reads transposed; here none."""
    return {}


@transpose_for_decoding.on("cpu")
def _transpose_all(kernels: dict[Any, Any]) -> dict[Any, Any]:
    """Return the transposes of all kernels [L, i, o], for `transposed_matmul`."""
    return {name: jnp.swapaxes(kernel, 1, 2) for name, kernel in kernels.items()}


@op
def tied_logits(x: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """Return the logits x @ table^T in float32; `table` is the embedding matrix."""
    return matmul(x, table.T, "float32")


@tied_logits.on("cpu")
def _tied_logits(x: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """Use `transposed_matmul` if x has at most MAX_ROWS_TRANSPOSED rows.

    The table [V, D] already has the layout [o, i].
    """
    if _rows(x) > MAX_ROWS_TRANSPOSED:
        return tied_logits.plain(x, table)
    return transposed_matmul(x, table, "float32")


def add_wide_bias(logits: Float[Array, "B T V"], bias: Float[Array, " V"]) -> Float[Array, "B T V"]:
    """Return logits + ones @ bias, so that the gradient of the bias is a product, too.

    It would be a sum over rows as wide as a vocabulary, which is slow on a CPU.
    """
    ones = jnp.ones(logits.shape[:2])
    return logits + jnp.einsum("BT,V->BTV", ones, bias, precision="highest")


def _rows(x: jax.Array) -> int:
    return math.prod(x.shape[:-1])
