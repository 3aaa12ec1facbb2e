"""Test axis names: unknown names and wrong counts are errors; parameters have the right names."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from tiny import HEAD_DIM, HEADS, INNER, KV_HEADS, POSITIONS, TOKENS, WIDTH, V, tiny

from heedful.model.axes import AXES, constrain, partitioned
from heedful.model.transformer import build


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"\['embd'\]"):
        partitioned(nn.initializers.ones, "embd", "mlp")
    with pytest.raises(ValueError, match=r"\['act_lenght'\]"):
        constrain(jnp.zeros((3, 5)), "act_batch", "act_lenght")


def test_one_name_per_dimension():
    x = jnp.zeros((3, 5, 7))
    with pytest.raises(ValueError, match=r"axis names .* \(3, 5, 7\): give 3 names"):
        constrain(x, "act_batch", "act_length")
    assert constrain(x, "act_batch", "act_length", "act_embed").shape == x.shape


MODELS: list[dict[str, Any]] = [
    {"tie_embeddings": False, "feed_forward_gated": True, "head_bias": True},
    {
        "architecture": "decoder_only",
        **POSITIONS["relative"],
        "lora_rank": 5,
        "lora_targets": ("query", "key", "value", "out", "up", "down"),
    },
    {
        "architecture": "encoder_only",
        "positions_kind": "learned",
        "positions_max_length": 17,
        "type_vocab_size": 17,  # as many as positions: the rows of both tables are named "position"
        "norm_embeddings": True,
        "head_transform": True,
    },
    {"architecture": "encoder_only", "head_kind": "classifier", "head_outputs": 19},
]


def test_each_parameter_axis_has_the_size_that_its_name_says():
    sizes = {
        "embed": WIDTH,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "mlp": INNER,
        "vocab": V,
        "position": 17,
        "buckets": 8,
        "features": WIDTH,
        "classes": 19,
        "rank": 5,
        "norm": WIDTH,
        "layers": 7,
    }
    assert sizes.keys() == {name for name in AXES if not name.startswith("act_")}
    seen = set()
    for changes in MODELS:
        config = tiny(**changes, layers=7)
        arrays = [TOKENS] * (2 if config.architecture == "encoder_decoder" else 1)
        params = jax.eval_shape(build(config).init, jax.random.key(0), *arrays)["params"]
        boxes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.Partitioned))
        for box in boxes:
            assert isinstance(box, nn.Partitioned)
            assert box.value.shape == tuple(sizes[str(name)] for name in box.names)
            seen.update(box.names)
    assert seen == sizes.keys()
