"""Test that the decoder equals transformers' LLaMA with the same random weights."""

import numpy as np
import pytest
from peer import (
    DOCUMENTS,
    REAL,
    TOKENS,
    B,
    T,
    V,
    array,
    assert_close,
    back,
    compact,
    export,
    hidden,
    ours,
    randomised,
    run,
    run_row,
    run_with_cache,
    tensors,
    torch,
    transformers,
    with_cache,
)
from tiny import random_params

from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
    RotaryConfig,
)
from heedful.model.pretrained import write
from heedful.model.transformer import build

ROPE = {
    "none": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5},
    "llama3": {  # Of wavelengths 6 to 906 one is kept, one is between, three are scaled.
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 3.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 40,
    },
}


@pytest.fixture(scope="module", params=list(ROPE))
def models(request, tmp_path_factory):
    """Return a model of transformers, and our model from its file.

    Models with scaled positions have tied embeddings and biases.
    """
    is_scaled = request.param != "none"
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        intermediate_size=31,
        rope_parameters=ROPE[request.param],
        tie_word_embeddings=is_scaled,
        attention_bias=is_scaled,
        mlp_bias=is_scaled,
        attn_implementation="eager",
    )
    theirs = randomised(transformers.LlamaForCausalLM(config))
    found = ours(theirs, tmp_path_factory.mktemp("llama"))
    assert found.config.positions.rotary.scaling == request.param
    return theirs, found


def test_padded(models):
    theirs, found = models
    logits, states = run(found, TOKENS, segment_ids=REAL)
    inputs = tensors(input_ids=TOKENS, attention_mask=REAL)
    expected, blocks = hidden(theirs.model.layers, lambda: theirs(**inputs))
    assert_close("logits", logits, expected, REAL)
    assert_close("hidden states", states["decoder"], blocks, REAL)


def test_far_positions(tmp_path):
    """At this distance frequencies with an error in the last bit change the logits."""
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=31,
        attn_implementation="eager",
    )
    theirs = randomised(transformers.LlamaForCausalLM(config))
    tokens = np.random.default_rng(0).integers(1, V, (1, 3000))
    with torch.no_grad():
        expected = array(theirs(**tensors(input_ids=tokens)).logits)
    logits, _ = run(ours(theirs, tmp_path), tokens)
    assert_close("logits", logits, expected)


def test_packed(models):
    theirs, found = models
    logits = run_row(found, np.concatenate(DOCUMENTS)[None])
    with torch.no_grad():
        alone = [array(theirs(torch.tensor(document[None])).logits) for document in DOCUMENTS]
    assert_close("logits", logits, np.concatenate(alone, axis=1))


def test_with_cache(models):
    theirs, found = models
    assert_close("logits", run_with_cache(found, TOKENS), with_cache(theirs, TOKENS))


def test_the_way_back(models, tmp_path):
    theirs, found = models
    again = back(transformers.LlamaForCausalLM, export(found, tmp_path / "export"))
    inputs = tensors(input_ids=TOKENS)
    with torch.no_grad():
        np.testing.assert_array_equal(array(again(**inputs).logits), array(theirs(**inputs).logits))


def test_our_model_exported(tmp_path):
    config = ModelConfig(
        architecture="decoder_only",
        vocab_size=V,
        width=28,
        layers=2,
        attention=AttentionConfig(heads=7, bias=False),
        feed_forward=FeedForwardConfig(width=13, activation="gelu", gated=True, bias=False),
        norm=NormConfig(kind="rmsnorm", position="pre", epsilon=1e-3),
        positions=PositionConfig(kind="rotary", rotary=RotaryConfig(base=123.0)),
        scale_embeddings=False,
    )
    params = random_params(build(config), np.zeros((B, T), int), scale=0.3)
    write(tmp_path / "export", config, params, special={"eos_token_id": 2})
    theirs = back(transformers.LlamaForCausalLM, tmp_path / "export")
    logits, _ = run(compact(config, params), TOKENS)
    with torch.no_grad():
        assert_close("logits", logits, array(theirs(torch.tensor(TOKENS)).logits))
