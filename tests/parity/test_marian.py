"""The encoder-decoder equals `transformers`' Marian, given the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from model.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig  # noqa: E402
from model.transformer import build  # noqa: E402
from train.loss import cross_entropy  # noqa: E402

B, S, T, V = 3, 7, 5, 23
WIDTH, HEADS, INNER, ENCODER_LAYERS, LAYERS = 20, 5, 31, 3, 2
SOURCE_LENGTHS, LENGTHS = np.array([7, 4, 1]), np.array([3, 5, 2])

CONFIG = ModelConfig(
    vocab_size=V,
    width=WIDTH,
    layers=LAYERS,
    encoder_layers=ENCODER_LAYERS,
    attention=AttentionConfig(heads=HEADS),
    feed_forward=FeedForwardConfig(width=INNER),
    norm=NormConfig(position="post", epsilon=1e-5),  # torch's default, which Marian keeps
)


def marian():
    """A Marian model whose every weight is random: no bias is 0, no scale is 1."""
    config = transformers.MarianConfig(
        vocab_size=V,
        d_model=WIDTH,
        encoder_layers=ENCODER_LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=17,
        pad_token_id=0,
        eos_token_id=1,
        forced_eos_token_id=None,
        decoder_start_token_id=2,
        dropout=0.0,
        attn_implementation="eager",
    )
    model = transformers.MarianMTModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_positions" not in name:
                weight.normal_(0.0, 0.3, generator=generator)
                if "layer_norm.weight" in name:
                    weight += 1.0
    return model


def stacked(layers, convert) -> dict:
    """Layers in a list to arrays that lead with the layers."""
    return jax.tree.map(lambda *x: jnp.stack(x), *[convert(layer) for layer in layers])


def dense(linear, inputs=(), outputs=()) -> dict:
    """torch keeps [out, in], here it is [*in, *out]."""
    kernel = linear.weight.detach().numpy().T
    kernel = kernel.reshape(*(inputs or kernel.shape[:1]), *(outputs or kernel.shape[1:]))
    bias = linear.bias.detach().numpy()
    return {"kernel": kernel, "bias": bias.reshape(outputs or bias.shape)}


def norm(layer) -> dict:
    return {"scale": layer.weight.detach().numpy(), "bias": layer.bias.detach().numpy()}


def attention(layer) -> dict:
    heads = (HEADS, WIDTH // HEADS)
    return {
        "query": dense(layer.q_proj, outputs=heads),
        "key": dense(layer.k_proj, outputs=heads),
        "value": dense(layer.v_proj, outputs=heads),
        "out": dense(layer.out_proj, inputs=heads),
    }


def block(layer) -> dict:
    result = {
        "self_attention": attention(layer.self_attn),
        "self_attention_norm": norm(layer.self_attn_layer_norm),
        "feed_forward": {"up": dense(layer.fc1), "down": dense(layer.fc2)},
        "feed_forward_norm": norm(layer.final_layer_norm),
    }
    if hasattr(layer, "encoder_attn"):
        result["cross_attention"] = attention(layer.encoder_attn)
        result["cross_attention_norm"] = norm(layer.encoder_attn_layer_norm)
    return result


def test_logits_and_loss_gradient():
    theirs = marian()
    body = theirs.model
    params = {
        "embedding": {"table": body.shared.weight.detach().numpy()},
        "encoder": {"blocks": stacked(body.encoder.layers, block)},
        "decoder": {"blocks": stacked(body.decoder.layers, block)},
    }
    rng = np.random.default_rng(0)
    source, tokens, targets = (rng.integers(1, V, (B, n)) for n in (S, T, T))
    source_real = np.arange(S) < SOURCE_LENGTHS[:, None]
    real = np.arange(T) < LENGTHS[:, None]
    source, tokens = source * source_real, tokens * real  # padding has id 0

    expected = theirs(
        input_ids=torch.tensor(source),
        attention_mask=torch.tensor(source_real.astype(int)),
        decoder_input_ids=torch.tensor(tokens),
        decoder_attention_mask=torch.tensor(real.astype(int)),
    ).logits
    loss = torch.nn.functional.cross_entropy(
        expected[torch.tensor(real)], torch.tensor(targets[real]), label_smoothing=0.1
    )
    loss.backward()

    model = build(CONFIG)
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.array(tokens), jnp.array(source))
    assert sum(x.size for x in jax.tree.leaves(tree)) == sum(
        x.size for x in jax.tree.leaves(params)
    )

    @jax.jit
    def loss_and_logits(params):
        logits = model.apply(
            {"params": params},
            jnp.array(tokens),
            jnp.array(source),
            segment_ids=jnp.array(real.astype(int)),
            encoder_segment_ids=jnp.array(source_real.astype(int)),
        )
        weights = jnp.array(real, jnp.float32)
        total, weight = cross_entropy(logits, jnp.array(targets), weights, 0.1)
        return total / weight, logits

    grad = jax.value_and_grad(loss_and_logits, has_aux=True)
    (our_loss, logits), gradient = grad(jax.tree.map(jnp.asarray, params))
    difference = np.abs(np.asarray(logits) - expected.detach().numpy())[real].max()
    print(f"largest difference of logits: {difference:.2g}")
    assert difference < 1e-5
    assert float(our_loss) == pytest.approx(loss.item(), abs=1e-5)

    # The embedding's gradient has come through every layer, and the padding's row is not trained.
    wanted = body.shared.weight.grad.numpy()
    ours = np.asarray(gradient["embedding"]["table"])
    difference = np.abs(ours - wanted)[1:].max()
    print(f"largest difference of gradients: {difference:.2g}, of {np.abs(wanted).max():.2g}")
    assert difference < 1e-5
