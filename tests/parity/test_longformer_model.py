"""Test that an encoder with windows and global tokens equals transformers' Longformer."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peer import (
    V,
    array,
    assert_close,
    back,
    compact,
    export,
    ours,
    randomised,
    run,
    tensors,
    torch,
    transformers,
)
from tiny import random_params
from tiny_pretrained import LONGFORMER

from heedful.model.pretrained import write
from heedful.model.transformer import build

CLASSES, WINDOW, PADDING = 7, 3, 1
LENGTHS = [23, 11, 2]
B, T = len(LENGTHS), max(LENGTHS)
REAL = (np.arange(T) < np.array(LENGTHS)[:, None]).astype(int)
RNG = np.random.default_rng(0)
TOKENS = np.where(REAL, RNG.integers(2, V, (B, T)), PADDING)
TYPES = RNG.integers(0, 2, (B, T))
HEADS = ("LongformerForMaskedLM", "LongformerForSequenceClassification", "LongformerModel")


def longformer(name: str) -> Any:
    config = transformers.LongformerConfig(
        vocab_size=V,
        hidden_size=20,
        num_hidden_layers=3,
        num_attention_heads=5,
        intermediate_size=31,
        max_position_embeddings=33,
        type_vocab_size=2,
        attention_window=2 * WINDOW,
        num_labels=CLASSES,
    )
    return randomised(getattr(transformers, name)(config))


@pytest.fixture(scope="module", params=HEADS)
def models(request, tmp_path_factory):
    """Return a model of transformers, and our model from its file."""
    theirs = longformer(request.param)
    found = ours(theirs, tmp_path_factory.mktemp("longformer"))
    assert found.architecture == request.param
    attention = found.config.attention
    assert (attention.core, attention.window, attention.global_projections) == (
        "longformer",
        WINDOW,
        True,
    )
    assert found.config.positions.max_length == 31
    return theirs, found


def outputs(theirs: Any, tokens: int, **inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Run a model of transformers whose first `tokens` tokens are global.

    Returns its outputs and its hidden states [L, B, T, D].
    """
    first = np.broadcast_to(np.arange(T) < tokens, (B, T)).astype(int)
    arrays = tensors(input_ids=TOKENS, global_attention_mask=first, **inputs)
    with torch.no_grad():
        out = theirs(**arrays, output_hidden_states=True)
    result = out.logits if "logits" in out else out.last_hidden_state
    return array(result), np.stack([array(x) for x in out.hidden_states[1:]])


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("core", ["longformer", "dense"])
def test_padded(models, tokens: int, core: str):
    theirs, found = models
    attention = replace(found.config.attention, core=core, global_tokens=tokens)
    found = replace(found, config=replace(found.config, attention=attention))
    expected, blocks = outputs(theirs, tokens, attention_mask=REAL, token_type_ids=TYPES)
    inputs = {"segment_ids": REAL, "type_ids": TYPES}
    if found.architecture == "LongformerModel":
        encode = partial(build(found.config).apply, method="encode")
        arrays = jax.tree.map(jnp.asarray, {"inputs": TOKENS, **inputs})
        assert_close(
            "last", np.asarray(jax.jit(encode)({"params": found.params}, **arrays)), expected, REAL
        )
        return
    scores, states = run(found, TOKENS, **inputs)
    assert_close("hidden states", states["encoder"], blocks, REAL)
    assert_close("scores", scores, expected, REAL if scores.ndim == 3 else None)


def test_the_way_back(models, tmp_path):
    theirs, found = models
    again = back(type(theirs), export(found, tmp_path / "export"))
    mine, expected = (outputs(model, 1, attention_mask=REAL) for model in (again, theirs))
    real = REAL.astype(bool)  # Positions of padding may change.
    np.testing.assert_array_equal(mine[1][:, real], expected[1][:, real])
    if found.architecture == "LongformerForSequenceClassification":
        np.testing.assert_array_equal(mine[0], expected[0])
    else:
        np.testing.assert_array_equal(mine[0][real], expected[0][real])


def test_our_model_exported(tmp_path):
    params = random_params(build(LONGFORMER), jnp.zeros((1, 3), jnp.int32), scale=0.2)
    found = compact(LONGFORMER, params)
    write(tmp_path / "export", LONGFORMER, params, special={"pad_token_id": PADDING})
    theirs = back(transformers.LongformerForMaskedLM, tmp_path / "export")
    tokens = np.minimum(TOKENS, (LONGFORMER.vocab_size or 0) - 1)[:, :15]
    first = np.zeros_like(tokens)
    first[:, : LONGFORMER.attention.global_tokens] = 1
    scores, _ = run(found, tokens, segment_ids=REAL[:, :15])
    inputs = tensors(input_ids=tokens, attention_mask=REAL[:, :15], global_attention_mask=first)
    with torch.no_grad():
        assert_close("scores", scores, array(theirs(**inputs).logits), REAL[:, :15])
