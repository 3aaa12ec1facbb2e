"""Test that the decoder equals transformers' GPT-2 with the same random weights."""

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
)
from heedful.model.pretrained import write
from heedful.model.transformer import build


@pytest.fixture(scope="module", params=["tied", "untied"])
def models(request, tmp_path_factory):
    """Return a model of transformers, and our model from its file."""
    config = transformers.GPT2Config(
        vocab_size=V,
        n_embd=20,
        n_head=5,
        n_layer=3,
        n_inner=31,
        n_positions=17,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=request.param == "tied",
        attn_implementation="eager",
    )
    theirs = randomised(transformers.GPT2LMHeadModel(config))
    return theirs, ours(theirs, tmp_path_factory.mktemp("gpt2"))


def test_padded(models):
    theirs, found = models
    logits, states = run(found, TOKENS, segment_ids=REAL)
    inputs = tensors(input_ids=TOKENS, attention_mask=REAL)
    expected, blocks = hidden(theirs.transformer.h, lambda: theirs(**inputs))
    assert_close("logits", logits, expected, REAL)
    assert_close("hidden states", states["decoder"], blocks, REAL)


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
    again = back(transformers.GPT2LMHeadModel, export(found, tmp_path / "export"))
    inputs = tensors(input_ids=TOKENS)
    with torch.no_grad():
        np.testing.assert_array_equal(array(again(**inputs).logits), array(theirs(**inputs).logits))


def test_our_model_exported(tmp_path):
    config = ModelConfig(
        architecture="decoder_only",
        vocab_size=V,
        width=21,
        layers=2,
        attention=AttentionConfig(heads=7),
        feed_forward=FeedForwardConfig(width=13, activation="relu"),
        norm=NormConfig(position="pre", epsilon=1e-3),
        positions=PositionConfig(kind="learned", max_length=11),
        scale_embeddings=False,
    )
    params = random_params(build(config), np.zeros((B, T), int), scale=0.3)
    write(tmp_path / "export", config, params, special={"eos_token_id": 2})
    theirs = back(transformers.GPT2LMHeadModel, tmp_path / "export")
    logits, _ = run(compact(config, params), TOKENS)
    with torch.no_grad():
        assert_close("logits", logits, array(theirs(torch.tensor(TOKENS)).logits))
