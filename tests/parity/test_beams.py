"""Test beam search against transformers: all rows, for random decoders and encoder-decoders."""

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from peer import V, ours, torch, transformers

from heedful.data.config import TokenizerConfig
from heedful.data.tokenizer import Tokenizer
from heedful.train.config import DecodeConfig, MeshConfig
from heedful.train.inference.batching import batches
from heedful.train.inference.generate import Generator
from heedful.train.inference.translate import Translator
from heedful.train.sharding import make_mesh

MESH = make_mesh(MeshConfig(), jax.devices()[:1])
ROWS, LENGTH, PAD, START, EOS = 50, 5, 0, 1, 2
PROMPTS = np.random.default_rng(0).integers(3, V, (ROWS, LENGTH)).astype(np.int32)
IDS = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": EOS}


def sharp(model: Any, seed: int) -> Any:
    """Set random weights whose logits differ so much that hypotheses end early, late or never."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name and "ln_" not in name and "embed_positions" not in name:
                weight.normal_(0.0, 0.5, generator=generator)
    return model.eval()


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=V,
        n_positions=64,
        n_embd=12,
        n_layer=2,
        n_head=3,
        tie_word_embeddings=False,
        **IDS,
    )
    return sharp(transformers.GPT2LMHeadModel(config), 1)


def marian() -> Any:
    config = transformers.MarianConfig(
        vocab_size=V, d_model=12, encoder_layers=1, decoder_layers=2, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=16, decoder_ffn_dim=16,
        max_position_embeddings=64, decoder_start_token_id=START, forced_eos_token_id=None, **IDS,
    )  # fmt: skip
    model = sharp(transformers.MarianMTModel(config), 2)
    model.final_logits_bias[0, EOS] = 3.0
    model.final_logits_bias[0, START] = -99.0  # Only transformers penalises START.
    return model


@pytest.fixture(scope="module", params=[gpt2, marian])
def both(request, tmp_path_factory) -> tuple[Any, Any]:
    model = request.param()
    return model, ours(model, Path(tmp_path_factory.mktemp("beams")))


def tokenizer() -> Tokenizer:
    found = Tokenizer.train(["abc"], TokenizerConfig(kind="chars", vocab_size=99), "translation")
    found.pad, found.bos, found.eos = PAD, START, EOS
    return found


def theirs(
    model: Any, limit: int, last: tuple[int, ...] = (EOS,), **options: Any
) -> tuple[list[list[int]], np.ndarray]:
    found = model.generate(
        torch.tensor(PROMPTS, dtype=torch.long),
        attention_mask=torch.ones(PROMPTS.shape, dtype=torch.long),
        max_new_tokens=limit, return_dict_in_generate=True, output_scores=True,
        do_sample=False, eos_token_id=list(last), **options,
    )  # fmt: skip
    first = 1 if model.config.is_encoder_decoder else LENGTH
    return [
        cut(row, last) for row in found.sequences[:, first:].tolist()
    ], found.sequences_scores.numpy()


def cut(row: list[int], last: tuple[int, ...] = (EOS,)) -> list[int]:
    """Return a row up to its end token, which excludes the padding after a shorter hypothesis."""
    ends = [i for i, token in enumerate(row) if token in last]
    return row[: ends[0] + 1] if ends else row


def searched(
    found: Any, limit: int, last: tuple[int, ...] = (), **options: Any
) -> tuple[list[list[int]], np.ndarray]:
    decode = DecodeConfig(extra_length=max(limit - LENGTH, 1), max_tokens=limit, **options)
    make = Translator if found.config.architecture == "encoder_decoder" else Generator
    known = tokenizer()
    known._ends = last
    if make is Generator:
        known.bos = None  # The prompts have no begin token; all tokens are text.
    writer: Any = make(found.config, decode, known, found.params, MESH)
    run = writer._run if make is Translator else writer._search
    rows, scores = [[0]] * ROWS, np.zeros(ROWS)
    for numbers, some in batches(dict(enumerate(PROMPTS)), decode, MESH):
        with jax.set_mesh(MESH):
            decoded = jax.device_get(run(writer.params, some))
        for i, row, length, score in zip(numbers, *decoded, strict=False):
            rows[i], scores[i] = row[:length].tolist(), score
    return rows, scores


@pytest.mark.parametrize("early_stopping", ["never", False, True])
@pytest.mark.parametrize(
    ("exponent", "sizes", "penalty"),
    [
        (0.0, [(2, 6)], 1.0),
        (1.0, [(4, 6), (3, 20)], 1.0),
        (2.0, [(4, 9)], 1.0),
        (1.0, [(4, 8)], 1.3),
    ],
)
def test_every_row_is_that_of_transformers(
    both, early_stopping: bool | str, exponent: float, sizes: list[tuple[int, int]], penalty: float
):
    model, found = both
    ends = []
    common = {"length_penalty": exponent, "early_stopping": early_stopping}
    common |= {"repetition_penalty": penalty}
    for width, limit in sizes:
        rows, scores = theirs(model, limit, num_beams=width, **common)
        own, own_scores = searched(found, limit, beam=width, length_penalty_offset=0, **common)
        assert own == rows
        np.testing.assert_allclose(own_scores, scores, rtol=1e-4)
        ends += [EOS in row for row in rows]
    assert {*ends} == {True, False}  # Unfinished hypotheses compete with finished ones.


def test_several_ends_and_words_that_are_never_written(both):
    model, found = both
    options: dict[str, Any] = {"num_beams": 3, "length_penalty": 1.0}
    free, _ = theirs(model, 9, **options)
    counts = Counter(token for row in free for token in row if token != EOS)
    frequent = [token for token, _ in counts.most_common(3)]
    last, never = (EOS, frequent[0]), (PAD, *frequent[1:])
    rows, scores = theirs(model, 9, last, bad_words_ids=[[i] for i in never], **options)
    own, own_scores = searched(
        found, 9, last, beam=3, length_penalty=1.0, length_penalty_offset=0, early_stopping=False,
        never=never,
    )  # fmt: skip
    assert own == rows != free
    np.testing.assert_allclose(own_scores, scores, rtol=1e-4)
    assert frequent[0] in {row[-1] for row in rows}
