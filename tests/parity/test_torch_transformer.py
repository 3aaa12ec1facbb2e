"""Test that the encoder-decoder equals `torch.nn.Transformer` with post-norm and with pre-norm.

Both have padding masks.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from heedful.model.config import (  # noqa: E402
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
)
from heedful.model.transformer import build  # noqa: E402

B, S, T, V = 3, 7, 5, 23
WIDTH, HEADS, INNER, LAYERS = 20, 5, 31, 2
SOURCE_LENGTHS, LENGTHS = np.array([7, 4, 1]), np.array([3, 5, 2])


def array(tensor) -> np.ndarray:
    return tensor.detach().numpy()


def norm(layer) -> dict:
    return {"scale": array(layer.weight), "bias": array(layer.bias)}


def dense(linear) -> dict:
    return {"kernel": array(linear.weight).T, "bias": array(linear.bias)}


def attention(layer) -> dict:
    """Convert attention from torch, which has query, key and value in one matrix [3 D, D]."""
    heads = (HEADS, WIDTH // HEADS)
    kernels = np.split(array(layer.in_proj_weight), 3)
    biases = np.split(array(layer.in_proj_bias), 3)
    result = {
        name: {"kernel": kernel.T.reshape(WIDTH, *heads), "bias": bias.reshape(heads)}
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
    }
    out = dense(layer.out_proj)
    return result | {"out": {"kernel": out["kernel"].reshape(*heads, WIDTH), "bias": out["bias"]}}


def block(layer) -> dict:
    names = ["self_attention_norm", "feed_forward_norm"]
    result = {
        "self_attention": attention(layer.self_attn),
        "feed_forward": {"up": dense(layer.linear1), "down": dense(layer.linear2)},
    }
    if hasattr(layer, "multihead_attn"):
        result["cross_attention"] = attention(layer.multihead_attn)
        names.insert(1, "cross_attention_norm")
    for i, name in enumerate(names, start=1):
        result[name] = norm(getattr(layer, f"norm{i}"))
    return result


def stack(coder, has_last_norm: bool) -> dict:
    blocks = [block(layer) for layer in coder.layers]
    result = {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}
    return result | ({"norm": norm(coder.norm)} if has_last_norm else {})


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("position", ["post", "pre"])
def test_hidden_states_through_the_same_head(position: str):
    theirs = torch.nn.Transformer(
        d_model=WIDTH,
        nhead=HEADS,
        num_encoder_layers=LAYERS,
        num_decoder_layers=LAYERS,
        dim_feedforward=INNER,
        dropout=0.0,
        activation="relu",
        batch_first=True,
        norm_first=position == "pre",
    ).train()  # In eval mode torch's encoder removes columns of padding from its output.
    if position == "post":  # torch adds a second norm at the end of a stack; the paper does not.
        theirs.encoder.norm = theirs.decoder.norm = None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(0.0, 0.3, generator=generator)

    rng = np.random.default_rng(0)
    table = rng.normal(size=(V, WIDTH)).astype(np.float32) * WIDTH**-0.5
    source, tokens = rng.integers(0, V, (B, S)), rng.integers(0, V, (B, T))
    source_real = np.arange(S) < SOURCE_LENGTHS[:, None]
    real = np.arange(T) < LENGTHS[:, None]

    embed = lambda tokens: torch.tensor(table[tokens] * math.sqrt(WIDTH))  # noqa: E731
    hidden = theirs(
        embed(source),
        embed(tokens),
        tgt_mask=torch.ones(T, T, dtype=torch.bool).triu(1),  # True where attention is forbidden
        src_key_padding_mask=torch.tensor(~source_real),
        tgt_key_padding_mask=torch.tensor(~real),
        memory_key_padding_mask=torch.tensor(~source_real),
    )
    expected = array(hidden) @ table.T

    model = build(
        ModelConfig(
            vocab_size=V,
            width=WIDTH,
            layers=LAYERS,
            attention=AttentionConfig(heads=HEADS),
            feed_forward=FeedForwardConfig(width=INNER),
            norm=NormConfig(position=position, epsilon=1e-5),  # type: ignore[arg-type]
            positions=PositionConfig(kind="none"),  # torch.nn.Transformer has none
        )
    )
    params = {
        "embedding": {"table": table},
        "encoder": stack(theirs.encoder, position == "pre"),
        "decoder": stack(theirs.decoder, position == "pre"),
    }
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.array(tokens), jnp.array(source))
    assert sum(x.size for x in jax.tree.leaves(tree)) == sum(
        x.size for x in jax.tree.leaves(params)
    )
    logits = jax.jit(model.apply)(
        {"params": jax.tree.map(jnp.asarray, params)},
        jnp.array(tokens),
        jnp.array(source),
        segment_ids=jnp.array(real.astype(int)),
        encoder_segment_ids=jnp.array(source_real.astype(int)),
    )
    difference = np.abs(np.asarray(logits) - expected)[real].max()
    print(f"{position}: largest difference of logits: {difference:.2g}")
    assert difference < 1e-5
