"""Test that the encoder equals transformers' BERT with each head and the same random weights."""

from dataclasses import replace

import numpy as np
import pytest
from peer import (
    LENGTHS,
    REAL,
    TOKENS,
    TYPES,
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
    tensors,
    torch,
    transformers,
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

CLASSES = 7
HEADS = {
    "BertForMaskedLM": HeadConfig(transform=True, bias=True),
    "BertForSequenceClassification": HeadConfig(kind="classifier", outputs=CLASSES, dropout=0.3),
}


def bert(name: str):
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=31,
        max_position_embeddings=17,
        type_vocab_size=3,
        classifier_dropout=0.3,
        num_labels=CLASSES,
        attn_implementation="eager",
    )
    return randomised(getattr(transformers, name)(config))


@pytest.fixture(scope="module", params=list(HEADS))
def models(request, tmp_path_factory):
    """Return a model of transformers, and our model from its file."""
    theirs = bert(request.param)
    found = ours(theirs, tmp_path_factory.mktemp("bert"))
    assert found.architecture == request.param
    assert found.config.head == HEADS[request.param]
    return theirs, found


def test_padded(models):
    theirs, found = models
    logits, states = run(found, TOKENS, segment_ids=REAL, type_ids=TYPES)
    inputs = tensors(input_ids=TOKENS, attention_mask=REAL, token_type_ids=TYPES)
    expected, blocks = hidden(theirs.bert.encoder.layer, lambda: theirs(**inputs))
    assert_close("logits", logits, expected, REAL if logits.ndim == 3 else None)
    assert_close("hidden states", states["encoder"], blocks, REAL)


def test_packed(tmp_path):
    theirs = bert("BertForMaskedLM")
    documents = [(TOKENS[i, :n], TYPES[i, :n]) for i, n in enumerate(LENGTHS)]
    tokens, types = (np.concatenate(parts)[None] for parts in zip(*documents, strict=True))
    logits = run_row(ours(theirs, tmp_path), tokens, type_ids=types)
    with torch.no_grad():
        alone = [
            array(theirs(**tensors(input_ids=tokens[None], token_type_ids=types[None])).logits)
            for tokens, types in documents
        ]
    assert_close("logits", logits, np.concatenate(alone, axis=1))


def test_the_way_back(models, tmp_path):
    theirs, found = models
    again = back(type(theirs), export(found, tmp_path / "export"))
    inputs = tensors(input_ids=TOKENS, token_type_ids=TYPES)
    with torch.no_grad():
        np.testing.assert_array_equal(array(again(**inputs).logits), array(theirs(**inputs).logits))


def test_the_bare_body_and_its_pooler(tmp_path):
    theirs = bert("BertModel")
    found = ours(theirs, tmp_path / "theirs")
    again = back(transformers.BertModel, export(found, tmp_path / "export"))
    inputs = tensors(input_ids=TOKENS, attention_mask=REAL)
    with torch.no_grad():
        expected, back_again = theirs(**inputs), again(**inputs)
    np.testing.assert_array_equal(array(back_again.pooler_output), array(expected.pooler_output))
    # If the kernel of the classes is the identity, the outputs are the pooled features.
    classes = {"kernel": np.eye(20, dtype=np.float32), "bias": np.zeros(20, np.float32)}
    config = replace(found.config, head=replace(found.config.head, outputs=20))
    params = found.params | {"head": found.params["head"] | {"classes": classes}}
    pooled, states = run(compact(config, params), TOKENS, segment_ids=REAL)
    assert_close("pooled", pooled, array(expected.pooler_output))
    assert_close("last", states["encoder"][-1], array(expected.last_hidden_state), REAL)


@pytest.mark.parametrize("name", list(HEADS))
def test_our_model_exported(name: str, tmp_path):
    config = ModelConfig(
        architecture="encoder_only",
        vocab_size=V,
        width=21,
        layers=3,
        attention=AttentionConfig(heads=7),
        feed_forward=FeedForwardConfig(width=13, activation="gelu_tanh"),
        norm=NormConfig(epsilon=1e-3, embeddings=True),
        positions=PositionConfig(kind="learned", max_length=11),
        head=HEADS[name],
        type_vocab_size=3,
        scale_embeddings=False,
    )
    params = random_params(build(config), np.zeros((B, T), int), scale=0.2)
    write(tmp_path / "export", config, params, special={})
    theirs = back(getattr(transformers, name), tmp_path / "export")
    logits, _ = run(compact(config, params), TOKENS, type_ids=TYPES)
    inputs = tensors(input_ids=TOKENS, token_type_ids=TYPES)
    with torch.no_grad():
        assert_close("logits", logits, array(theirs(**inputs).logits))
