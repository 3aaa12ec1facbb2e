"""Test that a new core with parameters, a cache and random features needs one file and one line.

The line is the entry of the core in the table of cores.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from test_sharding import TRAIN, V, batch, prepare
from tiny import LAYERS, TOKENS, B, init, tiny

from heedful.data.config import DataConfig
from heedful.model.attention import CORES, FEATURES, AttentionCall, CoreSpec
from heedful.model.axes import partitioned
from heedful.model.config import AttentionConfig, ModelConfig
from heedful.model.masks import AttentionMask
from heedful.model.transformer import empty_cache
from heedful.train.audit.audit import audit
from heedful.train.audit.subject import Subject
from heedful.train.config import MeshConfig, TrainConfig
from heedful.train.inspection import costs
from heedful.train.inspection.cores import table
from heedful.train.sharding import make_mesh, to_devices
from heedful.train.state import first_state, set_up

FEATURE_COUNT = 5


# The file of the core ---------------------------------------------------------------------------


@struct.dataclass
class KernelState:
    """Sums of phi(k) v^T and of phi(k) over all keys so far."""

    values: jax.Array
    total: jax.Array

    def attend(self, core, call: AttentionCall, cache_write_mask=None):
        return core.extend(self, call, cache_write_mask)

    def keys(self, new: int) -> int:
        return new


class Kernel(nn.Module):
    """Linear attention with phi(x) = exp(strength tanh(W x)); W is random, strength is learned."""

    def setup(self):
        init = partitioned(nn.initializers.ones, "rank")
        self.strength = self.param("strength", init, (FEATURE_COUNT,))

    def __call__(self, call: AttentionCall) -> jax.Array:
        SPEC.require(call)
        (B, T, N, H), (S, K) = call.q.shape, call.k.shape[1:3]
        q, k = self.features(call)
        q = q.reshape(B, T, K, N // K, -1)
        pairs = jnp.einsum("BTKGR,BSKR->BKGTS", q, k)
        pairs = jnp.where(call.mask.to_bool(T, S)[:, :, None], pairs, 0)
        weights = pairs / jnp.maximum(pairs.sum(-1, keepdims=True), 1e-30)
        return jnp.einsum("BKGTS,BSKH->BTKGH", weights, call.v).reshape(B, T, N, H)

    def extend(self, state: KernelState, call: AttentionCall, cache_write_mask):
        SPEC.require(call)
        (B, T, N, H), K = call.q.shape, call.k.shape[2]
        q, k = self.features(call)
        if cache_write_mask is not None:
            k = jnp.where(cache_write_mask[:, :, None, None], k, 0)
        values = jnp.einsum("BTKR,BTKH->BTKRH", k, call.v).cumsum(1) + state.values[:, None]
        total = k.cumsum(1) + state.total[:, None]
        q = q.reshape(B, T, K, N // K, -1)
        mean = jnp.einsum("BTKGR,BTKRH->BTKGH", q, values)
        mean /= jnp.maximum(jnp.einsum("BTKGR,BTKR->BTKG", q, total), 1e-30)[..., None]
        return mean.reshape(B, T, N, H), KernelState(values[:, -1], total[:, -1])

    def features(self, call: AttentionCall) -> tuple[jax.Array, jax.Array]:
        key = self.make_rng(FEATURES) if self.has_rng(FEATURES) else jax.random.key(0)
        matrix = jax.random.normal(key, (call.q.shape[-1], FEATURE_COUNT))
        q, k = (jnp.exp(self.strength * jnp.tanh(x @ matrix)) for x in (call.q, call.k))
        return q, k


def refusal(call: AttentionCall) -> str | None:
    facts = call.mask.window, call.mask.prefix_len, call.bias, call.dropout_rate or None
    return None if all(fact is None for fact in facts) else "it knows documents and the past"


def new_cache(config: ModelConfig, batch: int) -> KernelState:
    total = jnp.zeros((batch, config.kv_heads, FEATURE_COUNT))
    return KernelState(jnp.zeros((*total.shape, config.head_dim)), total)


SPEC = CoreSpec(
    name="kernel",
    make=lambda config, shared: Kernel(name="kernel"),
    is_exact=False,
    has_weights=False,
    refusal=refusal,
    keys=lambda config: FEATURE_COUNT,
    redraw_steps=lambda config: 2,
    new_cache=new_cache,
    cached="sums of phi",
)


# The core in the rest of the project ------------------------------------------------------------


@pytest.fixture(autouse=True)
def core(monkeypatch):
    """Add the line to the table of cores."""
    monkeypatch.setitem(CORES, "kernel", SPEC)


MODEL = tiny("decoder_only", vocab_size=V, attention_core="kernel", positions_kind="none")


@pytest.mark.slow
def test_a_training_step_trains_it_and_draws_its_features_again():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    setup, step = prepare(MODEL, TRAIN, mesh)
    params = jax.device_get(init(MODEL)[1])
    assert params["decoder"]["blocks"]["self_attention"]["kernel"]["strength"].shape == (LAYERS, 5)
    losses = []
    with jax.set_mesh(mesh):
        placed = to_devices(batch(np.random.default_rng(3), MODEL), mesh)
        for number in range(5):
            state = first_state(setup, jax.device_put(params)).replace(step=jnp.int32(number))
            state, metrics = step(state, placed)
            losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1] != losses[2] == losses[3] != losses[4]
    norms: Any = metrics["grad_norms"]
    assert (norms["decoder"]["blocks"]["self_attention"]["kernel"]["strength"] > 0).all()


def test_decoding_with_its_cache_is_the_whole_at_once():
    model, params = init(MODEL)
    decode = jax.jit(partial(model.apply, {"params": params}, method="decode"))
    cache = empty_cache(MODEL, B, 9)
    assert isinstance(cache.self_attention, KernelState)
    first, cache = decode(TOKENS[:, :3], cache=cache, offset=0)
    rest = []
    for t in range(3, TOKENS.shape[1]):
        logits, cache = decode(TOKENS[:, t : t + 1], cache=cache, offset=t)
        rest.append(logits)
    whole = model.apply({"params": params}, TOKENS)
    np.testing.assert_allclose(jnp.concatenate([first, *rest], 1), whole, atol=1e-5, rtol=1e-5)
    # Each hypothesis of a search has its own sums.
    beams = cache.repeat(2).reorder(jnp.array([[1, 0]] * B))
    assert beams.self_attention.total.shape[:2] == (LAYERS, 2 * B)


@pytest.mark.slow
def test_the_table_of_cores_has_it():
    lines = table().splitlines()
    assert lines[0].endswith("| kernel |")
    (past,) = (line for line in lines if line.startswith("| decoder | the past |"))
    (cached,) = (line for line in lines if line.startswith("| decoder | the past, from a cache |"))
    assert past.endswith("| yes |") and cached.endswith("| yes |")
    assert any(line.endswith("kernel: it knows documents and the past") for line in lines)


def test_its_costs_are_known(unchecked):
    _, params = init(MODEL)
    parts = {part.name: part for part in costs.parts(MODEL, params, 128)}
    features = MODEL.attention.heads * MODEL.head_dim
    assert parts["self-attention scores"].flops == 4 * FEATURE_COUNT * LAYERS * features
    train, data = TrainConfig(label_smoothing=0.0), DataConfig(objective="causal_lm")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    memory = costs.memory(MODEL, data, train, set_up(MODEL, train, mesh))
    sums = FEATURE_COUNT * (MODEL.head_dim + 1)
    assert memory.cache == 4 * LAYERS * MODEL.kv_heads * sums


@pytest.mark.slow
def test_the_audit_finds_a_leak_in_it_and_nothing_else(monkeypatch):
    data = DataConfig(source="shakespeare", objective="causal_lm")
    attention = AttentionConfig(heads=2, core="kernel")
    config = ModelConfig(architecture="decoder_only", layers=1, attention=attention)
    result = audit(Subject.of(config, data))
    assert [str(finding) for finding in result.findings] == []
    assert result.unsupported == []

    class Leaky(Kernel):
        def __call__(self, call: AttentionCall) -> jax.Array:
            return super().__call__(call.replace(mask=AttentionMask()))

    make = lambda config, shared: Leaky(name="kernel")  # noqa: E731
    monkeypatch.setitem(CORES, "kernel", dataclasses.replace(SPEC, make=make))
    findings = audit(Subject.of(config, data), small=True).findings
    assert any(finding.kind == "leak" for finding in findings)
