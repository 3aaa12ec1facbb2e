"""Test that the encoder-decoder equals transformers' T5 with the same random weights.

Version 1.0 has relu and a head that is tied and scaled; version 1.1 has gated gelu and an untied
head.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from peer import (
    REAL,
    SOURCE,
    SOURCE_REAL,
    TOKENS,
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

from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
)
from heedful.model.pretrained import write
from heedful.model.transformer import build

MOST = 1e-4  # Attention scores are not scaled and therefore large.
PADDED = tensors(
    input_ids=SOURCE,
    attention_mask=SOURCE_REAL,
    decoder_input_ids=TOKENS,
    decoder_attention_mask=REAL,
)


@pytest.fixture(scope="module", params=["1.0", "1.1"])
def models(request, tmp_path_factory):
    """Return a model of transformers, and our model from its file."""
    is_new = request.param == "1.1"
    config = transformers.T5Config(
        vocab_size=V,
        d_model=20,
        d_kv=7,
        d_ff=31,
        num_heads=3,
        num_layers=3,
        num_decoder_layers=2,
        relative_attention_num_buckets=8,  # Few buckets: distance 2 is in a logarithmic bucket.
        relative_attention_max_distance=6,
        feed_forward_proj="gated-gelu" if is_new else "relu",
        tie_word_embeddings=not is_new,
        decoder_start_token_id=0,
        attn_implementation="eager",
    )
    theirs = transformers.T5ForConditionalGeneration(config)
    if is_new:  # transformers ties head and embedding until it reads a file that has both.
        theirs.lm_head.weight = torch.nn.Parameter(torch.empty(V, 20))
    found = ours(randomised(theirs), tmp_path_factory.mktemp("t5"))
    assert found.config.tie_embeddings == found.config.head.scale == (not is_new)
    return theirs, found


def test_padded(models):
    theirs, found = models
    logits, states = run(found, TOKENS, SOURCE, segment_ids=REAL, encoder_segment_ids=SOURCE_REAL)
    for stack, real in (("encoder", SOURCE_REAL), ("decoder", REAL)):
        expected, blocks = hidden(getattr(theirs, stack).block, lambda: theirs(**PADDED))
        assert_close(f"hidden states of the {stack}", states[stack], blocks, real, MOST)
    assert_close("logits", logits, expected, REAL, MOST)


def test_packed(models):
    theirs, found = models
    assert_close("logits", run_packed(found), one_by_one(theirs), most=MOST)


def test_with_cache(models):
    theirs, found = models
    source = tensors(input_ids=SOURCE, attention_mask=SOURCE_REAL)
    expected = with_cache(theirs, TOKENS, "decoder_input_ids", **source)
    encoded = encode(found, SOURCE, SOURCE_REAL)
    logits = run_with_cache(found, TOKENS, encoded, jnp.asarray(SOURCE_REAL))
    assert_close("logits", logits, expected, most=MOST)


def test_the_way_back(models, tmp_path):
    theirs, found = models
    again = back(type(theirs), export(found, tmp_path / "export"))
    with torch.no_grad():
        np.testing.assert_array_equal(array(again(**PADDED).logits), array(theirs(**PADDED).logits))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_our_model_exported(tied: bool, scale: bool, tmp_path):
    config = ModelConfig(
        vocab_size=V,
        width=21,
        layers=2,
        attention=AttentionConfig(heads=7, bias=False, scaled=False),
        feed_forward=FeedForwardConfig(width=13, activation="silu", gated=tied, bias=False),
        norm=NormConfig(kind="rmsnorm", position="pre", epsilon=1e-3),
        positions=PositionConfig(kind="relative", buckets=4, max_distance=5),
        head=HeadConfig(scale=scale),
        tie_embeddings=tied,
        scale_embeddings=False,
    )
    params = random_params(build(config), TOKENS, SOURCE, scale=0.2)
    write(tmp_path / "export", config, params, special={"pad_token_id": 0})
    theirs = back(transformers.T5ForConditionalGeneration, tmp_path / "export")
    logits, _ = run(compact(config, params), TOKENS, SOURCE)
    with torch.no_grad():
        inputs = tensors(input_ids=SOURCE, decoder_input_ids=TOKENS)
        assert_close("logits", logits, array(theirs(**inputs).logits), most=MOST)
