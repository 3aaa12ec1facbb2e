"""Test the initial values of whole models, and the parameter counts of published models."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
)
from heedful.model.transformer import build

TOKENS = jnp.zeros((1, 3), jnp.int32)

# Standard deviations by parameter. Parameters that are not named here start as 0 (biases, lora_b)
# or as 1 (scales). D = 60, F = 128, N = 6, K = 3, H = 10, 3 layers.
EMBEDDINGS = ("embedding.table", "positions.table")
KINDS: dict[str, tuple[dict[str, Any], dict[Any, float]]] = {
    "glorot": (
        {
            "architecture": "decoder_only",
            "positions_kind": "relative",
            "attention_scaled": False,
            "head_scale": True,
            "lora_rank": 7,
        },
        {
            "query": math.sqrt(2 / 120) / math.sqrt(10),  # the factor 1 / sqrt(H) of scaled scores
            "key": math.sqrt(2 / 90),  # Glorot and Bengio 2010, eq. 12
            "value": math.sqrt(2 / 90),
            "out": math.sqrt(2 / 120),
            "up": math.sqrt(2 / 188),
            "down": math.sqrt(2 / 188),
            "embedding.table": 1.0,
            "relative_bias.table": 60**-0.5,
            "lora_a": 60**-0.5,
        },
    ),
    "normal": (
        {
            "architecture": "encoder_only",
            "positions_kind": "learned",
            "type_vocab_size": 29,
            "head_transform": True,
            "head_bias": True,
        },
        dict.fromkeys(("query", "key", "value", "out", "up", "down", *EMBEDDINGS), 0.02)
        | {"transform": 0.02, "inputs.types": 0.02},
    ),
    "scaled_normal": (
        {"architecture": "decoder_only", "positions_kind": "learned", "tie_embeddings": False},
        dict.fromkeys(("query", "key", "value", "up", "head", *EMBEDDINGS), 0.02)
        | dict.fromkeys(("out", "down"), 0.02 / math.sqrt(2 * 3)),  # GPT-2 §2.3
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values(kind: str):
    changes, deviations = KINDS[kind]
    sizes = {"width": 60, "feed_forward_width": 128, "layers": 3, "vocab_size": 101}
    model = build(tiny(init=kind, **sizes, **changes))
    key = jax.random.key(0, impl="rbg")  # The default implementation compiles for seconds.
    params = nn.unbox(jax.jit(model.init)(key, TOKENS))["params"]
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *_, parent, name = (str(key.key) for key in path)
        if name in ("bias", "lora_b", "scale"):
            assert (np.asarray(leaf) == (name == "scale")).all(), path
            continue
        part = {"kernel": parent, "lora_a": name}.get(name, f"{parent}.{name}")
        seen.add(part)
        noise = 5 / math.sqrt(2 * leaf.size)
        assert np.std(leaf) == pytest.approx(deviations[part], rel=noise), path
        if "blocks" in str(path):
            assert (leaf[0] != leaf[1]).mean() > 0.99, path  # Each layer draws its own values.
    assert seen == deviations.keys()


@pytest.mark.slow
def test_each_stack_is_scaled_by_its_own_depth():
    sizes = {"width": 60, "feed_forward_width": 128, "layers": 2, "encoder_layers": 8}
    model = build(tiny(init="scaled_normal", **sizes))
    key = jax.random.key(0, impl="rbg")
    params = nn.unbox(jax.jit(model.init)(key, TOKENS, TOKENS))["params"]
    for stack, layers in (("encoder", 8), ("decoder", 2)):
        kernel = params[stack]["blocks"]["feed_forward"]["down"]["kernel"]
        assert len(kernel) == layers
        assert np.std(kernel) == pytest.approx(0.02 / math.sqrt(2 * layers), rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["tables", "scaled tables", "scaled head"])
def test_tokens_begin_no_smaller_than_what_is_added_to_them(kind: str, tied: bool):
    """A table that also gives logits starts smaller, unless one of its two uses is scaled."""
    how = {"scale_embeddings": kind == "scaled tables", "head_scale": kind == "scaled head"}
    model = build(tiny("decoder_only", width=60, vocab_size=101, tie_embeddings=tied, **how))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0, impl="rbg"), TOKENS))["params"]
    deviation = np.std(params["embedding"]["table"])
    begin = deviation * (math.sqrt(60) if how["scale_embeddings"] else 1)
    small = tied and kind == "tables"
    assert begin == pytest.approx(60**-0.5 if small else 1.0, rel=0.05)


PUBLISHED = {
    "vaswani base, arXiv:1706.03762 table 3": (
        65e6,
        {"vocab_size": 37_000},
    ),
    "bert-base-uncased, masked LM": (
        109_514_298,
        {
            "architecture": "encoder_only",
            "vocab_size": 30_522,
            "width": 768,
            "layers": 12,
            "attention": AttentionConfig(heads=12),
            "feed_forward": FeedForwardConfig(width=3072, activation="gelu"),
            "norm": NormConfig(embeddings=True),
            "positions": PositionConfig(kind="learned"),
            "head": HeadConfig(transform=True, bias=True),
            "type_vocab_size": 2,
        },
    ),
    "gpt2": (
        124_439_808,
        {
            "architecture": "decoder_only",
            "vocab_size": 50_257,
            "width": 768,
            "layers": 12,
            "attention": AttentionConfig(heads=12),
            "feed_forward": FeedForwardConfig(width=3072, activation="gelu_tanh"),
            "norm": NormConfig(position="pre"),
            "positions": PositionConfig(kind="learned", max_length=1024),
        },
    ),
    "t5-small": (
        60_506_624,
        {
            "vocab_size": 32_128,
            "attention": AttentionConfig(heads=8, bias=False, scaled=False),
            "feed_forward": FeedForwardConfig(bias=False),
            "norm": NormConfig(kind="rmsnorm", position="pre"),
            "positions": PositionConfig(kind="relative"),
        },
    ),
    "Llama-3-8B": (
        8_030_261_248,
        {
            "architecture": "decoder_only",
            "vocab_size": 128_256,
            "width": 4096,
            "layers": 32,
            "attention": AttentionConfig(heads=32, kv_heads=8, bias=False),
            "feed_forward": FeedForwardConfig(
                width=14_336, activation="silu", gated=True, bias=False
            ),
            "norm": NormConfig(kind="rmsnorm", position="pre"),
            "positions": PositionConfig(kind="rotary"),
            "tie_embeddings": False,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters_of_published_models(name: str):
    expected, values = PUBLISHED[name]
    config = ModelConfig(**values)
    arrays = [TOKENS] * (2 if config.architecture == "encoder_decoder" else 1)
    params = jax.eval_shape(build(config).init, jax.random.key(0), *arrays)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    # The paper rounds 63 million to 65 million.
    assert count == (pytest.approx(expected, rel=0.04) if expected == 65e6 else expected)
