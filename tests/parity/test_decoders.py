"""Test decoders of many families against transformers, with random weights and unusual sizes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import CASES, LAYERS
from peer import (
    DOCUMENTS,
    REAL,
    TOKENS,
    array,
    assert_close,
    back,
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

from heedful.model.pretrained import Pretrained
from heedful.model.transformer import build, empty_cache

NEW = 50
torch.set_num_threads(1)


@pytest.fixture(
    scope="module", params=[(c, i) for c in CASES for i in range(len(CASES[c]))], ids=str
)
def models(request, tmp_path_factory):
    """Return a model of transformers, and our model from its file."""
    name, index = request.param
    cls = getattr(transformers, name)
    config = cls.config_class(**CASES[name][index], attn_implementation="eager")
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    theirs = randomised(cls(config))
    return theirs, ours(theirs, tmp_path_factory.mktemp(name))


def check(what: str, found: np.ndarray, expected: np.ndarray, real: Any = None) -> None:
    """Compare to 1e-5 of the largest number, or of 1 if that is larger."""
    assert_close(what, found, expected, real, 1e-5 * max(1.0, np.abs(expected).max()))


def alone(theirs: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return array(theirs(**tensors(input_ids=tokens)).logits)


def test_padded(models):
    theirs, found = models
    logits, states = run(found, TOKENS, segment_ids=REAL)
    inputs = tensors(input_ids=TOKENS, attention_mask=REAL)
    layers = theirs.get_submodule(LAYERS.get(type(theirs).__name__, "model.layers"))
    expected, blocks = hidden(layers, lambda: theirs(**inputs))
    check("logits", logits, expected, REAL)
    check("hidden states", states["decoder"], blocks, REAL)


def test_packed(models):
    theirs, found = models
    logits = run_row(found, np.concatenate(DOCUMENTS)[None])
    expected = [alone(theirs, document[None]) for document in DOCUMENTS]
    check("logits", logits, np.concatenate(expected, axis=1))


def continued(found: Pretrained, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Continue prompts greedily through the cache; return tokens, and the logits of all steps."""
    config, length = found.config, prompts.shape[1] + NEW
    apply = jax.jit(partial(build(config).apply, method="decode"))
    cache, tokens, scores = empty_cache(config, len(prompts), length), prompts, []
    for t in range(length - 1):
        step = jnp.asarray(tokens[:, t : t + 1])
        logits, cache = apply({"params": found.params}, step, cache=cache, offset=jnp.int32(t))
        scores.append(np.asarray(logits))
        if t + 1 == tokens.shape[1]:
            tokens = np.concatenate([tokens, scores[-1].argmax(-1)], axis=1)
    return tokens, np.concatenate(scores, axis=1)


def test_greedy_text_through_the_cache(models):
    theirs, found = models
    tokens, logits = continued(found, TOKENS)
    with torch.no_grad():
        text = theirs.generate(torch.tensor(TOKENS), max_new_tokens=NEW, do_sample=False)
    np.testing.assert_array_equal(tokens, array(text))
    check("logits", logits, alone(theirs, tokens[:, :-1]))


def test_the_way_back(models, tmp_path):
    theirs, found = models
    export(found, tmp_path / "export")
    again = back(transformers.AutoModelForCausalLM, tmp_path / "export")
    np.testing.assert_array_equal(alone(again, TOKENS), alone(theirs, TOKENS))
