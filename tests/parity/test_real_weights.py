"""Test published weights from package indexes: MiniLM (BERT) and the stories model (LLaMA)."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peer import array, assert_close, back, export, tensors, torch, transformers

from heedful.data import packages
from heedful.data.tokenizer import Tokenizer
from heedful.model.heads import pool
from heedful.model.pretrained import Pretrained, read, read_llama2c
from heedful.model.transformer import build, empty_cache

SENTENCES = [
    "The cat sat on the mat.",
    "A cat was sitting on a mat, quietly.",
    "Interest rates rose by half a percentage point in March 2023.",
    "naïve café — déjà vu!",
    "No",
]


def test_minilm_embeds_sentences_as_transformers_does(tmp_path: Path):
    folder = packages.minilm()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = their_tokenizer(SENTENCES, padding=True, return_tensors="pt")
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = array(theirs(**inputs).last_hidden_state)
    real = array(inputs["attention_mask"])
    mean = (hidden * real[..., None]).sum(1) / real.sum(1, keepdims=True)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)

    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    begin, end = tokenizer.frame
    rows = [np.array([begin, *ids, end]) for ids in tokenizer.encode_batch(SENTENCES)]
    tokens, segments = np.zeros((2, len(rows), max(map(len, rows))), int)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    np.testing.assert_array_equal(tokens, array(inputs["input_ids"]))
    np.testing.assert_array_equal(segments, real)

    found = read(folder)
    assert found.unused == []
    assert found.config.vocab_size == tokenizer.vocab_size
    encode = partial(build(found.config).apply, method="encode")
    states = jax.jit(encode)({"params": found.params}, jnp.asarray(tokens), jnp.asarray(segments))
    pooled = np.asarray(pool(states, jnp.asarray(segments), "mean"))
    embedded = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    assert_close("hidden states", np.asarray(states), hidden, real)
    assert_close("sentence embeddings", embedded, expected)
    similar = embedded @ embedded.T
    assert similar[0, 1] > 0.8 > 0.2 > similar[0, 2]

    again = back(transformers.BertModel, export(found, tmp_path / "export"))
    with torch.no_grad():
        np.testing.assert_array_equal(array(again(**inputs).last_hidden_state), hidden)


@pytest.fixture(scope="module")
def stories() -> tuple[Pretrained, list[bytes]]:
    """Return the model, and the text of each token."""
    path = packages.stories15m()
    found = read_llama2c(path, following=packages.STORIES_TOKENIZER_BYTES)
    rest, pieces = path.read_bytes()[-packages.STORIES_TOKENIZER_BYTES + 4 :], []
    while rest:  # A token is a float32 score, an int32 length, and as many bytes.
        length = int.from_bytes(rest[4:8], "little")
        pieces.append(rest[8 : 8 + length])
        rest = rest[8 + length :]
    assert len(pieces) == found.config.vocab_size
    return found, pieces


@pytest.mark.parametrize("prompt", [[], [b" One", b" day", b",", b" a", b" dog"]])
def test_the_stories_model_tells_the_same_story(prompt: list[bytes], stories, tmp_path: Path):
    found, pieces = stories
    begin = [1, *map(pieces.index, prompt)]
    theirs = back(transformers.LlamaForCausalLM, export(found, tmp_path / "export"))
    expected, cache, step = [*begin], None, begin
    with torch.no_grad():
        for _ in range(200):
            out = theirs(torch.tensor([step]), past_key_values=cache, use_cache=True)
            cache, step = out.past_key_values, [int(out.logits[0, -1].argmax())]
            expected += step

    decode = jax.jit(partial(build(found.config).apply, method="decode"))
    params = jax.tree.map(jnp.asarray, found.params)
    tokens, our_cache, step = [*begin], empty_cache(found.config, 1, 256), begin
    for _ in range(200):
        offset = jnp.int32(len(tokens) - len(step))
        logits, our_cache = decode(
            {"params": params}, jnp.array([step]), cache=our_cache, offset=offset
        )
        step = [int(logits[0, -1].argmax())]
        tokens += step
    text = b"".join(pieces[token] for token in tokens[1:]).decode()
    print(text)
    assert tokens == expected
    assert text.startswith(" Once upon a time, there was" if not prompt else " One day, a dog")

    logits = build(found.config).apply({"params": params}, jnp.array([tokens]))
    with torch.no_grad():
        wanted = array(theirs(**tensors(input_ids=np.array([tokens]))).logits)
    assert_close("logits", np.asarray(logits), wanted, most=1e-4)  # The largest logit is 26.
