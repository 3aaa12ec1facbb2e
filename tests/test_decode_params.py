"""Test the parameters for decoding: their compiled programs, their arrays and their logits."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from tiny import TOKENS, B, init, tiny

from heedful.model.decoding.parameters import DecodeParams, prepare
from heedful.model.ops import platform
from heedful.model.ops.loops import UnstackedLayers
from heedful.model.transformer import build

CASES: dict[str, dict[str, Any]] = {
    "apart": {},
    "looped": {"layers": 13, "unroll": 1},
    "kernels only": {
        "norm_kind": "none", "attention_bias": False, "feed_forward_bias": False,
    },
}  # fmt: skip


def sizes(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def kernels(tree: Any, name: str) -> int:
    return sum(name in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))


@pytest.mark.parametrize("case", quick.only({*CASES} - {"looped"}, CASES))
def test_it_computes_what_the_parameters_do_and_holds_them_once(case: str):
    config = tiny("decoder_only", **CASES[case])
    model, params = init(config)
    made = jax.jit(lambda params: prepare(config, params))(params)
    assert sizes(made) == sizes(params)
    is_apart = case != "looped"
    assert bool(kernels(made, "transposed")) == is_apart
    blocks = made.collections["params"]["decoder"]["blocks"]
    assert isinstance(blocks, UnstackedLayers) == (case == "apart")

    expected = jax.jit(model.apply)({"params": params}, TOKENS)
    np.testing.assert_allclose(jax.jit(DecodeParams.apply)(made, TOKENS), expected, atol=1e-4)

    @jax.jit
    def by_token(made: DecodeParams):
        cache, found = made.empty_cache(B, TOKENS.shape[1]), []
        for t in range(TOKENS.shape[1]):
            logits, cache = made.step(TOKENS[:, t : t + 1], cache, jnp.int32(t))
            found.append(logits)
        return jnp.stack(found, axis=1)

    np.testing.assert_allclose(by_token(made), expected, atol=1e-4)


def test_parameters_have_one_schema_on_all_platforms(monkeypatch):
    config = tiny("decoder_only")
    shapes = {}
    for name in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(platform, "target_platform", lambda name=name: name)
        args = build(config).init, jax.random.key(0), TOKENS
        params = nn.unbox(jax.eval_shape(*args))["params"]
        made = jax.eval_shape(lambda params: prepare(config, params), params)
        assert bool(kernels(made, "transposed")) == (name == "cpu")
        if name != "cpu":
            assert made.collections == {"params": params}
        shapes[name] = jax.tree.map(lambda x: x.shape, params)
    assert shapes["cpu"] == shapes["gpu"] == shapes["tpu"]
