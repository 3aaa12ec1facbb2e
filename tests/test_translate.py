"""Translations against a plain loop that runs the whole model for each token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import POSITIONS, random_params, tiny

from data.config import TokenizerConfig
from data.tokenizer import Tokenizer
from model.transformer import build
from train.config import DecodeConfig, MeshConfig, TrainError
from train.sharding import make_mesh
from train.translate import Translator

MESH = make_mesh(MeshConfig(), jax.devices()[:1])
CONFIG = TokenizerConfig(kind="chars", vocab_size=99)
CHARS = Tokenizer.train(["abcdefghijklm"], CONFIG, "translation")
# Of T5 and Marian: other numbers, and decoders that begin with the padding token.
OTHERS = Tokenizer(CHARS._json)
OTHERS.pad, OTHERS.bos, OTHERS.eos = 2, 2, 0
TEXTS = ["abc", "  ", "lkjihgfedcba", "m"]


def make(tokenizer: Tokenizer = CHARS, positions: str = "relative", **options: Any) -> Translator:
    changes: dict[str, Any] = {"norm_position": "pre", "positions_max_length": 64}
    model = tiny(vocab_size=tokenizer.vocab_size, **POSITIONS[positions] | changes)
    tokens = jnp.zeros((1, 3), jnp.int32)
    params = random_params(build(model), tokens, tokens, scale=0.7)
    values: dict[str, Any] = {"beam": 1, "extra_length": 7} | options
    return Translator(model, DecodeConfig(**values), tokenizer, params, MESH)


def plain(translator: Translator, texts: list[str]) -> list[str]:
    model = build(translator.model)

    @jax.jit
    def forward(tokens, source):
        segments = (jnp.cumsum(source[:, ::-1] == translator.eos, axis=1)[:, ::-1] > 0) * 1
        variables = {"params": translator.params}
        return model.apply(variables, tokens, source, encoder_segment_ids=segments)[0]

    return [
        plain_one(translator, forward, text, line) if text.strip() else ""
        for line, text in enumerate(texts)
    ]


def plain_one(translator: Translator, forward: Any, text: str, line: int) -> str:
    decode = translator.decode
    ids = [*translator.tokenizer.encode_batch([text])[0], translator.eos]
    source, longest = np.full((1, 13), 5, np.int32), len(ids) + decode.extra_length
    source[0, : len(ids)] = ids
    key = jax.random.fold_in(jax.random.key(translator.seed), line)
    written = [translator.bos]
    while len(written) <= longest and translator.eos not in written:
        tokens = np.zeros((1, 20), np.int32)
        tokens[0, : len(written)] = written
        row = np.array(forward(tokens, source)[len(written) - 1])
        for token in set(written):
            row[token] *= decode.repetition_penalty ** -np.sign(row[token])
        if decode.temperature:
            fold = jax.random.fold_in(key, len(written) - 1)
            row = row / decode.temperature + jax.random.gumbel(fold, row.shape)
        written.append(int(np.argmax(row)))
    return translator.tokenizer.decode(written)


@pytest.mark.parametrize(
    ("tokenizer", "positions", "options"),
    [
        (CHARS, "rotary", {"temperature": 2.0, "repetition_penalty": 1.5}),
        (OTHERS, "relative", {"temperature": 2.0}),
    ],
    ids=["rotary", "relative"],
)
def test_a_translation_is_what_each_text_alone_gives(tokenizer, positions: str, options: dict):
    translator = make(tokenizer, positions, **options)
    found = translator(TEXTS)
    assert found == plain(translator, TEXTS)
    assert len(set(found)) > 2


def test_learned_positions_leave_room_for_the_translation():
    translator = make(positions="learned", extra_length=50)
    assert len(translator(["a" * 13])) == 1  # 14 tokens and 50 more: 64
    with pytest.raises(TrainError, match=r"2 sentences have more than 14 tokens.*line 2"):
        translator(["a", "a" * 14, "b", "b" * 20])


def test_what_is_not_for_translations_says_so():
    with pytest.raises(TrainError, match=r"decode\.stop.*after a prompt"):
        make(stop=(".",))
    endless = Tokenizer(CHARS._json)
    endless.eos = None
    with pytest.raises(TrainError, match="lacks the begin and end"):
        make(endless)
