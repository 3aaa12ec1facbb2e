"""Test that the reference core, the plain Transformer and all exact cores compute the same."""

import dataclasses
import importlib
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_transformer

from heedful.model import masks
from heedful.model.attention import CORES, AttentionCall
from heedful.model.attention.cudnn import attend
from heedful.model.attention.reference import reference
from heedful.model.positions import PositionBias
from heedful.train.config import MeshConfig
from heedful.train.sharding import flax_rules, make_mesh

B, T, N, K, H = 2, 16, 4, 2, 8
PADDING = masks.padding(jnp.array([11, 0]), T)
DOCUMENTS = masks.packed(jnp.array([[1] * 5 + [2] * 8 + [0] * 3, [0] * 2 + [3] * 14]))
CASES: dict[str, dict[str, Any]] = {
    "causal, window, padding": {
        "mask": masks.causal() & masks.sliding(3, 3) & PADDING,
        "scale": 0.3,
    },
    "causal documents": {"mask": masks.causal() & DOCUMENTS},
    "bias, dropout": {
        "mask": masks.full(),
        "bias": PositionBias(jnp.linspace(-1, 1, 8 * N).reshape(8, N), True, 9),
        "dropout_rate": 0.3,
        "dropout_key": jax.random.key(1),
    },
}


def call_of(case: str, dtype: Any) -> AttentionCall:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in (N, K, K)]
    return AttentionCall(*arrays, **CASES[case])


def can_run(core: str, case: str) -> bool:
    spec = CORES[core]
    is_known = case != "causal documents" or "self" not in spec.one_document_at
    return spec.is_exact and is_known and spec.refusal(call_of(case, jnp.float32)) is None


def value_and_gradients(core: Any, call: AttentionCall, mesh: MeshConfig) -> list[np.ndarray]:
    """Return the output, and gradients for queries, keys, values and the bias."""
    g = jnp.asarray(np.random.default_rng(1).normal(size=call.q.shape), call.q.dtype)

    @jax.jit
    def run(q, k, v, bias):
        def attend(q, k, v, bias):
            return core(call.replace(q=q, k=k, v=v, bias=bias))

        with nn.logical_axis_rules(flax_rules()):
            out, pull = jax.vjp(attend, q, k, v, bias)
            return out, *pull(g)

    devices = jax.devices()[: np.prod([size for size in vars(mesh).values() if size > 0])]
    with jax.set_mesh(make_mesh(mesh, devices)):
        return jax.tree.leaves(jax.device_get(run(call.q, call.k, call.v, call.bias)))


@pytest.mark.parametrize(
    ("core", "case", "dtype"),
    [
        (core, case, dtype)
        for core in CORES
        for case in CASES
        for dtype in (jnp.float32, jnp.bfloat16)
        if can_run(core, case) and (dtype == jnp.float32 or case == "causal, window, padding")
    ],
)
def test_exact_cores_compute_it(core: str, case: str, dtype: Any):
    one, call = MeshConfig(data=1), call_of(case, dtype)
    q, k, v = (jnp.float32(x) for x in (call.q, call.k, call.v))
    exact = value_and_gradients(reference, call.replace(q=q, k=k, v=v), one)
    mesh = dataclasses.replace(one, seq=4) if CORES[core].length == "split" else one
    function = getattr(importlib.import_module(f"heedful.model.attention.{core}"), core)
    if "cpu" not in CORES[core].platforms:  # XLA computes with the same arguments.
        function = partial(attend, implementation="xla")
    found = value_and_gradients(function, call, mesh)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.02
    for x, y in zip(found, exact, strict=True):
        size = max(1.0, np.abs(y).max())
        np.testing.assert_allclose(np.float32(x), y, rtol=0, atol=tolerance * size)
    assert found[0].dtype == dtype


@pytest.mark.parametrize("name", ["t5", "llama", "bloom", "small keys"])
def test_it_is_the_attention_of_the_plain_transformer(name: str, monkeypatch):
    spec = dataclasses.replace(CORES["dense"], make=lambda config, shared: reference)
    monkeypatch.setitem(CORES, "dense", spec)
    test_transformer.test_logits_are_those_of_a_plain_implementation(name)
