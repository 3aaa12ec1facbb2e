"""Test translations against a plain loop that runs the whole model for each token."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import POSITIONS, random_params, tiny

from heedful.data.config import TokenizerConfig
from heedful.data.tokenizer import Tokenizer
from heedful.model.transformer import build
from heedful.train.config import DecodeConfig, MeshConfig
from heedful.train.errors import TrainError
from heedful.train.inference.batching import batches
from heedful.train.inference.translate import Translator
from heedful.train.sharding import make_mesh

MESH = make_mesh(MeshConfig(), jax.devices()[:1])
CONFIG = TokenizerConfig(kind="chars", vocab_size=99)
CHARS = Tokenizer.train(["abcdefghijklm"], CONFIG, "translation")
# T5 and Marian have other ids, and their decoders begin with the padding token.
OTHERS = Tokenizer(CHARS._json)
OTHERS.pad, OTHERS.bos, OTHERS.eos = 2, 2, 0
# BART's texts begin with the end token.
SAME = Tokenizer(CHARS._json)
SAME.bos = SAME.eos
TEXTS = ["abc", "  ", "lkjihgfedcba", "m", *"fgacd"]


def make(tokenizer: Tokenizer = CHARS, positions: str = "relative", **options: Any) -> Translator:
    changes: dict[str, Any] = {"norm_position": "pre", "positions_max_length": 64}
    model = tiny(vocab_size=tokenizer.vocab_size, **POSITIONS[positions] | changes)
    tokens = jnp.zeros((1, 3), jnp.int32)
    params = random_params(build(model), tokens, tokens, scale=0.7)
    values: dict[str, Any] = {"beam": 1, "extra_length": 7} | options
    return Translator(model, DecodeConfig(**values), tokenizer, params, MESH)


def plain(translator: Translator, texts: list[str]) -> dict[int, tuple[list[int], float]]:
    """Return tokens and the sum of their log-probabilities for each text that is not blank."""

    @jax.jit
    def forward(tokens, source):
        segments = (jnp.cumsum(source[:, ::-1] == translator.eos, axis=1)[:, ::-1] > 0) * 1
        options = {"encoder_segment_ids": segments}
        return translator.params.apply(tokens, source, **options)[0]

    todo = {line: text for line, text in enumerate(texts) if text.strip()}
    return {line: plain_one(translator, forward, text, line) for line, text in todo.items()}


def plain_one(translator: Translator, forward: Any, text: str, line: int):
    decode, score = translator.decode, 0.0
    ids = [*translator.tokenizer.encode_batch([text])[0], translator.eos]
    source, longest = np.full((1, 13), 5, np.int32), len(ids) + decode.extra_length
    source[0, : len(ids)] = ids
    key = jax.random.fold_in(jax.random.key(translator.seed), line)
    written = [translator.bos]
    while len(written) <= longest and translator.eos not in written[1:]:
        tokens = np.zeros((1, 20), np.int32)
        tokens[0, : len(written)] = written
        row = np.array(forward(tokens, source)[len(written) - 1])
        for token in set(written[1:]):  # The begin token is not part of the text.
            row[token] *= decode.repetition_penalty ** -np.sign(row[token])
        noise = jax.random.gumbel(jax.random.fold_in(key, len(written) - 1), row.shape)
        written.append(int(np.argmax(row / decode.temperature + noise)))
        score += row[written[-1]] - np.log(np.sum(np.exp(row)))
    return written[1:], score


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("tokenizer", "positions", "options"),
    [
        slow(CHARS, "rotary", {"temperature": 2.0, "repetition_penalty": 1.5}, id="rotary"),
        pytest.param(OTHERS, "relative", {"temperature": 2.0}, id="relative"),
        slow(SAME, "relative", {"temperature": 2.0, "repetition_penalty": 50.0}, id="one-token"),
    ],
)
def test_a_translation_is_what_each_text_alone_gives(tokenizer, positions: str, options: dict):
    translator = make(tokenizer, positions, **options)
    expected = plain(translator, TEXTS)
    ids = tokenizer.encode_batch(TEXTS)
    sources = {i: np.append(ids[i], tokenizer.eos) for i in expected}
    ((lines, rows),) = batches(sources, translator.decode, MESH)
    found = translator._run(translator.params, rows)
    for row, line in enumerate(lines):
        tokens, score = expected[line]
        assert found.tokens[row, : found.lengths[row]].tolist() == tokens
        assert found.scores[row] == pytest.approx(score, abs=1e-3)
    texts = [tokenizer.decode(expected[i][0]) if i in expected else "" for i in range(len(TEXTS))]
    assert translator(TEXTS) == texts
    assert len(set(texts)) > 2


@pytest.mark.slow
def test_the_score_of_a_beam_is_divided_by_the_length():
    translator = make(beam=2, length_penalty=1.5, length_penalty_offset=0)
    text = "fgacd"
    source = np.array([*CHARS.encode_batch([text])[0], CHARS.eos])
    ((_, rows),) = batches({0: source}, translator.decode, MESH)
    found = translator._run(translator.params, rows)
    written = found.tokens[0, : found.lengths[0]]
    before = jnp.array([CHARS.bos, *written[:-1]])[None]
    logits = jax.jit(translator.params.apply)(before, jnp.array(source)[None])[0]
    score = float(jax.nn.log_softmax(logits)[np.arange(len(written)), written].sum())
    assert found.scores[0] == pytest.approx(score / len(written) ** 1.5, rel=1e-5)


def test_learned_positions_leave_room_for_the_translation():
    translator = make(positions="learned", extra_length=50)
    assert len(translator(["a" * 13])) == 1  # 14 tokens and 50 for the translation: 64
    with pytest.raises(TrainError, match=r"2 sentences have more than 14 tokens.*line 2"):
        translator(["a", "a" * 14, "b", "b" * 20])


@pytest.mark.slow
def test_long_texts_are_told_and_very_long_ones_refused():
    translator, told = make(batch_tokens=64), []
    translator.longest, translator.tell = 5, told.append
    translator(["abcd", "m", " " * 99])  # A blank line is not read.
    assert told == []
    translator(["abcd", "abcde", "a" * 40])
    assert told[0].startswith("2 of 3 lines have more than data.max_length = 5 tokens")
    assert "the first in line 2" in told[0]
    with pytest.raises(TrainError, match=r"line 2 .* has 65 tokens, more than .*batch_tokens = 64"):
        translator(["a", "a" * 64])


def test_what_is_not_for_translations_says_so():
    with pytest.raises(TrainError, match=r"decode\.stop.*continue a prompt"):
        make(stop=(".",))
    endless = Tokenizer(CHARS._json)
    endless.eos = None
    with pytest.raises(TrainError, match="lacks the begin or end"):
        make(endless)
