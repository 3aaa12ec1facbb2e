"""Test that the encoder-decoder equals transformers' Marian with the same random weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peer import (
    REAL,
    SOURCE,
    SOURCE_REAL,
    TOKENS,
    B,
    T,
    V,
    array,
    assert_close,
    back,
    compact,
    encode,
    export,
    hidden,
    one_by_one,
    ours,
    randomised,
    run,
    run_packed,
    run_with_cache,
    tensors,
    torch,
    transformers,
    with_cache,
)
from tiny import random_params

from heedful.model.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig
from heedful.model.pretrained import write
from heedful.model.transformer import build
from heedful.train.loss import cross_entropy

PADDED = tensors(
    input_ids=SOURCE,
    attention_mask=SOURCE_REAL,
    decoder_input_ids=TOKENS,
    decoder_attention_mask=REAL,
)


def marian(**values: Any) -> Any:
    """Return a Marian of transformers with random weights."""
    config = transformers.MarianConfig(
        vocab_size=V,
        d_model=20,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=5,
        decoder_attention_heads=5,
        encoder_ffn_dim=31,
        decoder_ffn_dim=31,
        activation_function="swish",
        scale_embedding=True,
        pad_token_id=0,
        eos_token_id=1,
        forced_eos_token_id=None,
        decoder_start_token_id=2,
        dropout=0.0,
        attn_implementation="eager",
        **values,
    )
    return randomised(transformers.MarianMTModel(config))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a model of transformers, and our model from its file."""
    theirs = marian(max_position_embeddings=17)
    theirs.final_logits_bias.normal_(generator=torch.Generator().manual_seed(1))
    return theirs, ours(theirs, tmp_path_factory.mktemp("marian"))


def test_padded(models):
    theirs, found = models
    logits, states = run(found, TOKENS, SOURCE, segment_ids=REAL, encoder_segment_ids=SOURCE_REAL)
    for stack, real in (("encoder", SOURCE_REAL), ("decoder", REAL)):
        layers = getattr(theirs.model, stack).layers
        expected, blocks = hidden(layers, lambda: theirs(**PADDED))
        assert_close(f"hidden states of the {stack}", states[stack], blocks, real)
    assert_close("logits", logits, expected, REAL)


def test_far_positions(tmp_path):
    """Errors of float32 angles would exceed the tolerance for logits."""
    theirs = marian(max_position_embeddings=1500)
    source, tokens = (np.random.default_rng(k).integers(1, V, (1, 1500)) for k in (0, 1))
    with torch.no_grad():
        expected = array(theirs(**tensors(input_ids=source, decoder_input_ids=tokens)).logits)
    logits, _ = run(ours(theirs, tmp_path), tokens, source)
    assert_close("logits", logits, expected)


def test_packed(models):
    theirs, found = models
    assert_close("logits", run_packed(found), one_by_one(theirs))


def test_with_cache(models):
    theirs, found = models
    source = tensors(input_ids=SOURCE, attention_mask=SOURCE_REAL)
    expected = with_cache(theirs, TOKENS, "decoder_input_ids", **source)
    encoded = encode(found, SOURCE, SOURCE_REAL)
    logits = run_with_cache(found, TOKENS, encoded, jnp.asarray(SOURCE_REAL))
    assert_close("logits", logits, expected)


def test_loss_and_its_gradient(models):
    theirs, found = models
    targets = np.random.default_rng(1).integers(1, V, (B, T))
    real = torch.tensor(REAL, dtype=torch.bool)
    theirs.zero_grad()
    scores = theirs(**PADDED).logits
    loss = torch.nn.functional.cross_entropy(
        scores[real], torch.tensor(targets)[real], label_smoothing=0.1
    )
    loss.backward()

    @jax.jit
    @jax.value_and_grad
    def our_loss(params):
        logits: Any = build(found.config).apply(
            {"params": params},
            jnp.asarray(TOKENS),
            jnp.asarray(SOURCE),
            segment_ids=jnp.asarray(REAL),
            encoder_segment_ids=jnp.asarray(SOURCE_REAL),
        )
        weights = jnp.asarray(REAL, jnp.float32)
        total, weight = cross_entropy(logits, jnp.asarray(targets), weights, 0.1)
        return total / weight

    value, gradient = our_loss(found.params)
    assert float(value) == pytest.approx(loss.item(), abs=1e-5)
    # The gradient for the embedding passes through all layers; the row of padding is not trained.
    wanted = theirs.model.shared.weight.grad.numpy()
    assert_close("gradient", np.asarray(gradient["embedding"]["table"])[1:], wanted[1:])


def test_the_way_back(models, tmp_path):
    theirs, found = models
    again = back(type(theirs), export(found, tmp_path / "export"))
    with torch.no_grad():
        np.testing.assert_array_equal(array(again(**PADDED).logits), array(theirs(**PADDED).logits))


def test_our_model_exported(tmp_path):
    config = ModelConfig(
        vocab_size=V,
        width=14,
        layers=3,
        encoder_layers=2,
        attention=AttentionConfig(heads=7),
        feed_forward=FeedForwardConfig(width=13),
        norm=NormConfig(epsilon=1e-5),
    )
    params = random_params(build(config), TOKENS, SOURCE, scale=0.2)
    write(tmp_path / "export", config, params, special={"decoder_start_token_id": 2})
    theirs = back(transformers.MarianMTModel, tmp_path / "export")
    logits, _ = run(compact(config, params), TOKENS, SOURCE)
    with torch.no_grad():
        inputs = tensors(input_ids=SOURCE, decoder_input_ids=TOKENS)
        assert_close("logits", logits, array(theirs(**inputs).logits))
