"""Test low-rank adaptation against a model whose matrices include the updates."""

import copy
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tiny import HEAD_DIM, HEADS, INNER, KV_HEADS, LAYERS, TOKENS, WIDTH, init, tiny

from heedful.model.transformer import build

RANK, ALPHA = 5, 3.0
TARGETS = ("query", "key", "value", "out", "up", "gate", "down")
GATED: dict[str, Any] = {"feed_forward_gated": True, "norm_position": "pre"}


def adapted(**changes: Any):
    return tiny("decoder_only", lora_rank=RANK, lora_alpha=ALPHA, **GATED, **changes)


def linears(params: dict) -> dict[str, dict]:
    """Return the linear maps of all layers by name; they are parts of `params`, not copies."""
    blocks = params["decoder"]["blocks"]
    return blocks["self_attention"] | blocks["feed_forward"]


def test_an_update_equals_a_changed_matrix():
    model, params = init(adapted(lora_targets=TARGETS))
    merged = copy.deepcopy(params)
    for name, linear in linears(merged).items():
        a, b = (np.asarray(linear.pop(part), np.float64) for part in ("lora_a", "lora_b"))
        update = np.stack([np.tensordot(a[i], b[i], 1) for i in range(LAYERS)])
        assert update.shape == linear["kernel"].shape, name
        linear["kernel"] += jnp.float32(ALPHA / RANK * update)
    adapt = jax.jit(model.apply)
    run = jax.jit(build(tiny("decoder_only", **GATED)).apply)
    logits, expected = adapt({"params": params}, TOKENS), run({"params": merged}, TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)

    # An update starts with lora_b = 0 and changes nothing.
    for linear in linears(params).values():
        linear["lora_b"] *= 0
    before = copy.deepcopy(params)
    for linear in linears(before).values():
        del linear["lora_a"], linear["lora_b"]
    logits, expected = adapt({"params": params}, TOKENS), run({"params": before}, TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)


def boxes(config) -> dict[str, dict]:
    params = jax.eval_shape(build(config).init, jax.random.key(0), TOKENS)["params"]
    return linears(params)


def test_shapes_and_axes_of_the_updates():
    dims = {
        "embed": WIDTH,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "mlp": INNER,
        "rank": RANK,
        "layers": LAYERS,
    }
    queries, keys = ("heads", "head_dim"), ("kv_heads", "head_dim")
    ends = {
        "query": (("embed",), queries),
        "key": (("embed",), keys),
        "value": (("embed",), keys),
        "out": (queries, ("embed",)),
        "up": (("embed",), ("mlp",)),
        "gate": (("embed",), ("mlp",)),
        "down": (("mlp",), ("embed",)),
    }
    for name, linear in boxes(adapted(lora_targets=TARGETS)).items():
        inputs, outputs = ends[name]
        for part, names in (("lora_a", (*inputs, "rank")), ("lora_b", ("rank", *outputs))):
            box = linear[part]
            assert isinstance(box, nn.Partitioned)
            assert box.names == ("layers", *names), (name, part)
            assert box.value.shape == tuple(dims[str(axis)] for axis in box.names)


def test_only_the_targets_are_adapted():
    for changes, targets in (({}, ("query", "value")), ({"lora_targets": ("down",)}, ("down",))):
        for name, linear in boxes(adapted(**changes)).items():
            assert ("lora_a" in linear) == ("lora_b" in linear) == (name in targets), name
    never = boxes(tiny("decoder_only", **GATED))
    assert not any(part.startswith("lora") for linear in never.values() for part in linear)
