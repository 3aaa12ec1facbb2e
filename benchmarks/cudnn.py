"""The core cudnn against dense on a GPU: errors at lengths of each residue modulo 128, and speed.

    python -m benchmarks.cudnn [--quick]

Lengths go from 64 to 8,191 in steps of 63, which is coprime to 128, so that each of the 128
residues occurs; --quick takes every eighth length. For each length and mask the benchmark computes
the largest error of the output and of each gradient, relative to the largest entry of dense in
float32, for cudnn and for dense in bfloat16. The exit code is 1 if cudnn gives NaN or more than
three times the error of dense. Then it prints the achieved TFLOP/s of the forward and the backward
pass; a causal mask counts half of the operations.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from heedful.model import masks
from heedful.model.attention import AttentionCall
from heedful.model.attention.cudnn import cudnn
from heedful.model.attention.dense import dense
from heedful.model.masks import AttentionMask

B, N, K, H = 2, 8, 4, 64
LENGTHS = range(64, 8192 + 1, 63)
MASKS: dict[str, Callable[[int], AttentionMask]] = {
    "full": lambda length: masks.full(),
    "causal": lambda length: masks.causal(),
    "causal window": lambda length: masks.causal() & masks.sliding(100, 0),
    "padding": lambda length: masks.padding(jnp.array([length // 3, length]), length),
    "causal padding": lambda length: (
        masks.causal() & masks.padding(jnp.array([length // 3, 0]), length)
    ),
}


def inputs(length: int, dtype=jnp.bfloat16, batch: int = B, seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, heads, H) for heads in (N, K, K, N)]
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(dtype) for shape in shapes]


@partial(jax.jit, static_argnums=0)
def run(core: Callable, arrays: list[jax.Array], mask: AttentionMask) -> tuple[jax.Array, ...]:
    """Return the output, and gradients for q, k and v."""
    *arrays, g = arrays
    out, pull = jax.vjp(lambda q, k, v: core(AttentionCall(q, k, v, mask)), *arrays)
    return (out, *pull(g))


def errors(found: tuple, exact: tuple) -> list[float]:
    """Return the relative errors of output, dq, dk and dv; an error is NaN if its array has NaN."""
    return [
        float(jnp.max(jnp.abs(x.astype(jnp.float32) - y)) / jnp.max(jnp.abs(y)))
        for x, y in zip(found, exact, strict=True)
    ]


def compare(lengths: list[int]) -> int:
    """Print the largest errors of each mask and all failures; return the number of failures."""
    failures = 0
    for name, make in MASKS.items():
        worst = np.zeros((2, 4))
        for length in lengths:
            mask = make(length)
            with jax.default_matmul_precision("highest"):
                exact = run(dense, inputs(length, jnp.float32), mask)
            both = np.array(
                [errors(run(core, inputs(length), mask), exact) for core in (cudnn, dense)]
            )
            if not (both[0] <= 3 * both[1]).all():  # NaN fails too.
                failures += 1
                print(f"FAILED {name}, length {length}: cudnn {both[0]}, dense {both[1]}")
            worst = np.fmax(worst, both)
        for core, values in zip(("cudnn", "dense"), worst, strict=True):
            listed = "  ".join(f"{x:.1e}" for x in values)
            print(f"{name:16}{core:8}worst error of out, dq, dk, dv: {listed}")
    return failures


def seconds(function: Callable, *arguments) -> float:
    """Return the seconds of a call: the best of five means of ten calls."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(10):
            out = function(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / 10)
    return min(times)


def speed(length: int) -> None:
    """Print TFLOP/s at a length: two products forward, five backward, of 2 B N T S H operations."""
    batch = max(1, 16384 // length)
    *arrays, g = inputs(length, batch=batch)
    for name, share in (("full", 1.0), ("causal", 0.5)):
        mask = MASKS[name](length)
        attend = jax.jit(lambda q, k, v, mask=mask: cudnn(AttentionCall(q, k, v, mask)))
        product = share * 2 * batch * N * length**2 * H
        forward = seconds(attend, *arrays)
        both = seconds(run, cudnn, [*arrays, g], mask)
        backward = max(both - forward, 1e-9)
        print(
            f"{name:8}{length:6} tokens: forward {2 * product / forward / 1e12:6.1f} TFLOP/s, "
            f"backward {5 * product / backward / 1e12:6.1f} TFLOP/s"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every eighth length")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        print(f"benchmarks.cudnn needs a GPU: jax runs on {jax.default_backend()} here")
        return 2
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, B {B}, N {N}, K {K}, H {H}")
    failures = compare(list(LENGTHS)[:: 8 if arguments.quick else 1])
    for length in (1024, 4096, 16384):
        speed(length)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
