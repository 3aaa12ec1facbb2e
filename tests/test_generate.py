"""Test generation against a plain loop that runs the whole model for each token."""

import dataclasses
import importlib
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from tiny import INNER, KV_HEADS, LAYERS, POSITIONS, WIDTH, random_params, tiny

from heedful.configs import base
from heedful.data.config import TokenizerConfig
from heedful.data.tokenizer import BOS, EOS, PAD, Tokenizer
from heedful.model import stack_cache
from heedful.model.cache import KVCache
from heedful.model.config import ModelConfig
from heedful.model.decoding.beam_search import length_penalty
from heedful.model.transformer import build
from heedful.train.config import DecodeConfig, MeshConfig
from heedful.train.errors import TrainError
from heedful.train.inference import generate
from heedful.train.inference.batching import batches, shapes
from heedful.train.inference.generate import Generator
from heedful.train.inference.text import Text
from heedful.train.sharding import make_mesh

MESH = make_mesh(MeshConfig(), jax.devices()[:1])
LETTERS = "abcdefghijklm"
CHARS = Tokenizer.train([LETTERS], TokenizerConfig(kind="chars", vocab_size=99), "causal_lm")
BYTES = Tokenizer.train(["x"], TokenizerConfig(kind="bytes", vocab_size=260), "causal_lm")
PROMPTS = ["", "ab", "lmabcabgkdbaj", "c", "kkkkkkk"]
CHUNK = 6  # This does not divide 16, the number of positions of these prompts.
OWN = ("seed", "prefix", "tell", "longest")  # arguments of a Generator itself
LONGEST = 25  # positions of a prompt and its continuation


def small(tokenizer: Tokenizer = CHARS, **changes: Any) -> ModelConfig:
    options = {"norm_position": "pre", "tie_embeddings": False, "vocab_size": tokenizer.vocab_size}
    return tiny("decoder_only", **options | POSITIONS[changes.pop("positions", "rotary")] | changes)


def make(config: ModelConfig, tokenizer: Tokenizer = CHARS, mesh: Any = MESH, **options: Any):
    own = {name: options.pop(name) for name in OWN if name in options}
    params = random_params(build(config), jnp.zeros((1, 3), jnp.int32), scale=1.0)
    values: dict[str, Any] = {"beam": 1, "max_tokens": 11} | options
    decode = DecodeConfig(**values)
    return Generator(config, decode, tokenizer, params, mesh, **own)


class Plain:
    """A generator without batches and cache: each token takes a forward pass over all before it."""

    def __init__(self, generator: Generator, longest: int = LONGEST):
        self.generator, self.model, self.longest = generator, build(generator.model), longest
        self.forward = jax.jit(self._forward)

    def _forward(self, tokens: jax.Array, prefix: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"prefix_len": prefix} if self.generator.prefix else {}
        return self.generator.params.apply(tokens, **options)[0]

    def prompt(self, text: str) -> list[int]:
        tokenizer = self.generator.tokenizer
        return [tokenizer.bos, *tokenizer.encode_batch([text])[0].tolist()]

    def logits(self, prompt: list[int], written: list[int]) -> np.ndarray:
        context = (prompt + written)[self.first(len(prompt), len(written)) :]
        tokens = np.zeros((1, self.longest), np.int32)
        tokens[0, : len(context)] = context
        prefix = max(len(prompt) - self.first(len(prompt), len(written)), 0)
        row = np.array(self.forward(tokens, jnp.array([prefix]))[len(context) - 1])
        if self.generator.decode.beam > 1:
            row -= np.log(np.sum(np.exp(row)))
        penalty = self.generator.decode.repetition_penalty
        for token in {*prompt[1:], *written}:  # The begin token is not part of the text.
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        return row

    def first(self, prompt: int, written: int) -> int:
        """Return the index of the first token that the model sees when it writes the next one."""
        positions, stride = self.generator.model.positions, self.longest // 4
        if positions.kind != "learned" or prompt + self.generator.decode.max_tokens <= self.longest:
            return 0
        read = prompt + written - written % stride
        return max(read - (self.longest - stride + 1), 0)

    def decode(self, text: str, line: int) -> tuple[list[int], float]:
        """Return tokens and the sum of their log-probabilities."""
        generator, written, score = self.generator, [], 0.0
        key = jax.random.fold_in(jax.random.key(generator.seed), line)
        while len(written) < generator.decode.max_tokens:
            row = self.logits(self.prompt(text), written)
            score -= np.log(np.sum(np.exp(row)))
            noisy = row
            if temperature := generator.decode.temperature:
                noise = jax.random.gumbel(jax.random.fold_in(key, len(written)), row.shape)
                noisy = row / temperature + noise
            written.append(int(np.argmax(noisy)))
            score += row[written[-1]]
            if written[-1] == generator.tokenizer.eos:
                break
        return written, score

    def __call__(self, prompts: list[str]) -> list[str]:
        rows = [self.decode(prompt, line)[0] for line, prompt in enumerate(prompts)]
        return [self.generator.tokenizer.decode(row) for row in rows]


@pytest.mark.parametrize("kind", quick.only(["rotary", "relative"], POSITIONS))
def test_a_batch_is_what_each_prompt_alone_gives_without_a_cache(kind: str, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", CHUNK)
    config = small(positions=kind, positions_max_length=LONGEST)
    generator = make(config, temperature=3.0, repetition_penalty=1.3, seed=3)
    ((numbers, rows),) = generator._batches(generator._encode(PROMPTS))
    *_, found = generator._decode(rows, 11)
    plain = Plain(generator)
    lengths = set()
    for row, line in enumerate(numbers):
        tokens, score = plain.decode(PROMPTS[line], line)
        assert found.tokens[row].tolist() == tokens + [0] * (11 - len(tokens))
        assert found.lengths[row] == len(tokens)
        assert found.scores[row] == pytest.approx(score, abs=1e-3)
        lengths.add(len(tokens))
    assert len(lengths) > 1  # Some texts end before others.
    assert not found.lengths[len(numbers) :].any()


def test_a_begin_that_is_the_end_is_not_penalised():
    """Begin and end of GPT-2's texts are the same token; the begin is not part of a text."""
    one = Tokenizer(CHARS._json)
    one.bos = one.eos = 11  # a token that this model writes often
    generator = make(small(), one, temperature=3.0, repetition_penalty=50.0)
    ((numbers, rows),) = generator._batches(generator._encode(PROMPTS))
    *_, found = generator._decode(rows, 11)
    plain = Plain(generator)
    for row, line in enumerate(numbers):
        tokens, score = plain.decode(PROMPTS[line], line)
        assert found.tokens[row, : found.lengths[row]].tolist() == tokens
        assert found.scores[row] == pytest.approx(score, abs=1e-3)
    assert found.lengths[: len(numbers)].min() < 11


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 3.0, "prefix": True}])
def test_so_are_the_likeliest_tokens_and_those_after_a_prefix(options: dict, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", CHUNK)
    generator = make(small(), **options)
    written = generator(PROMPTS)
    assert written == Plain(generator)(PROMPTS)
    assert len(set(written)) > 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "beam", "core"),
    quick.only(
        [("rotary", 3, "auto")],
        [("learned", 1, "auto"), ("alibi", 1, "longformer"), ("rotary", 3, "auto")],
    ),
)
def test_a_window_rolls_in_constant_memory(kind: str, beam: int, core: str, monkeypatch):
    config = small(
        positions=kind, positions_max_length=LONGEST, attention_window=2, attention_core=core
    )
    monkeypatch.setattr(generate, "CHUNK", CHUNK)
    options = {"beam": beam, "temperature": 3.0 if beam == 1 else 0.0, "seed": 3}
    rolling = make(config, **options)(PROMPTS)
    if beam == 1:
        assert rolling == Plain(make(config, **options))(PROMPTS)
    # A cache of all positions gives the same texts.
    monkeypatch.setattr(stack_cache, "new_cache", KVCache.zeros)
    assert rolling == make(config, **options)(PROMPTS)
    assert len(set(rolling)) > 2


def test_prompts_of_all_lengths_keep_their_order():
    generator = make(small(), batch_tokens=64, max_tokens=3)
    rng = np.random.default_rng(0)
    prompts = ["".join(rng.choice(list(LETTERS), n)) for n in (20, 1, 17, 2, 5, 16, 15, 3, 0, 7)]
    assert generator(prompts) == Plain(generator)(prompts)
    assert generator([]) == []


@pytest.mark.slow
def test_many_devices_write_the_same():
    config = small(positions="relative")
    written = make(config)(PROMPTS)
    many = make(config, mesh=make_mesh(MeshConfig(data=4, fsdp=2)))
    assert many(PROMPTS) == written
    assert "".join(many.stream(PROMPTS[1])) == written[1] != ""


def test_what_streams_is_what_a_batch_gives():
    generator = make(small(BYTES), BYTES, temperature=1.0, max_tokens=60)
    for prompt in ("", "Grüße"):
        generator.decode = dataclasses.replace(generator.decode, stop=())
        text = generator([prompt])[0]
        assert "".join(generator.stream(prompt)) == text
        assert len(text) > 10
        for stop in (text[7:9], text[4:5], "nowhere"):
            generator.decode = dataclasses.replace(generator.decode, stop=("#!", stop))
            expected = text.split(stop)[0].split("#!")[0]
            assert generator([prompt]) == [expected]
            assert "".join(generator.stream(prompt)) == expected


def test_a_text_comes_token_by_token_until_its_end(monkeypatch):
    generator = make(small(), temperature=9.0, max_tokens=97)
    until = []
    decode_until = generator._advance
    monkeypatch.setattr(generator, "_advance", lambda *x: until.append(x[-1]) or decode_until(*x))
    pieces = generator.stream("abc")
    assert len(next(pieces)) == 1
    assert until == [1, 2]  # The devices are one token ahead.
    written = list(pieces)
    assert len(written) > 1
    assert {len(piece) for piece in written} == {1}
    assert len(until) < 97


def test_without_an_end_token_it_ends_at_max_tokens():
    endless = Tokenizer(CHARS._json)
    endless.eos = None
    generator = make(small(), endless, temperature=9.0, max_tokens=97)
    ((_, rows),) = generator._batches(generator._encode([""]))
    *_, found = generator._decode(rows, 97)
    assert found.lengths.tolist() == [97]
    assert EOS in found.tokens[0]


@pytest.mark.slow
def test_a_wide_beam_finds_the_best_of_all_texts():
    tokenizer = Tokenizer.train(["ab"], TokenizerConfig(kind="chars", vocab_size=9), "causal_lm")
    V, steps = tokenizer.vocab_size, 3
    options = {"beam": V * (V - 1) ** 2, "max_tokens": steps, "repetition_penalty": 1.7}
    options |= {"length_penalty": 1.3, "length_penalty_offset": 0}
    generator = make(small(tokenizer), tokenizer, **options)
    plain, prompts = Plain(generator), ["", "abba", "b"]
    others = [token for token in range(V) if token != EOS]
    best = []
    for prompt in prompts:
        known = plain.prompt(prompt)
        log_probs = {
            before: plain.logits(known, list(before))
            for n in range(steps)
            for before in itertools.product(others, repeat=n)
        }
        ended: list[tuple[int, ...]] = [
            (*before, EOS) for n in range(steps) for before in itertools.product(others, repeat=n)
        ]
        ended += itertools.product(others, repeat=steps)  # texts that the limit cuts
        scores = {
            text: sum(log_probs[text[:i]][token] for i, token in enumerate(text))
            / length_penalty(len(text), exponent=1.3, offset=0)
            for text in ended
        }
        best.append(max(scores.items(), key=lambda item: item[1]))
    (numbers, rows), *_ = generator._batches(generator._encode(prompts))
    found = generator._search(generator.params, rows)
    for row, number in enumerate(numbers):
        assert tuple(found.tokens[row, : found.lengths[row]].tolist()) == best[number][0]
        assert found.scores[row] == pytest.approx(best[number][1], rel=1e-4)
    assert generator(prompts) == [tokenizer.decode(text) for text, _ in best]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "unroll", "copied"),
    [(LAYERS, None, False), (LAYERS, 1, False), (13, 1, True), (13, 13, False)],
)
def test_layers_are_not_copied_for_each_token(layers: int, unroll: int | None, copied: bool):
    """A CPU program unrolls up to 12 layers, or `unroll` layers; more layers run in a loop."""
    program = writing_program(small(layers=layers, unroll=unroll), ["ab"])
    kernels = f"f32[{layers},{WIDTH},{INNER}]", f"f32[{layers},{INNER},{WIDTH}]"
    cache = f"f32[{layers},1,{KV_HEADS},{16 + 11},6]"
    assert any(kernel in program for kernel in kernels) == (cache in program) == copied


@pytest.mark.slow
def test_products_with_few_rows_lead_with_the_matrix():
    """The transposed product, which compilers prefer, is slower on a CPU."""
    program = writing_program(small(tie_embeddings=True), ["a", "b", "c", "d"])
    for size in (INNER, CHARS.vocab_size):
        product = re.compile(rf" = f32\[{size},4\]\S* (dot\(|fusion\(.*kind=kCustom)")
        assert product.search(program), size


def writing_program(config: ModelConfig, prompts: list[str]) -> str:
    """Return the compiled program of the loop over tokens."""
    generator = make(config)
    (_, rows), *_ = generator._batches(generator._encode(prompts))
    with jax.set_mesh(MESH):
        state = generator._begin(generator.params, rows)
        return generator._advance.lower(generator.params, state, 11).compile().as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.2}, {"prefix": True, "attention_window": 4}]
)
def test_beyond_learned_positions_a_text_slides(options: dict, monkeypatch):
    """The window moves by a quarter of the table of positions; each text is the same as alone."""
    monkeypatch.setattr(generate, "CHUNK", CHUNK)
    window = {"attention_window": options.pop("attention_window", None)}
    config = small(positions="learned", positions_max_length=LONGEST, **window)
    told: list[str] = []
    endless = Tokenizer(CHARS._json)
    endless.eos = None
    options |= {"max_tokens": 20, "temperature": 3.0, "tell": told.append}
    generator = make(config, endless, **options)
    prompts = [*PROMPTS, "ab" * 9, "abc" * 13]
    written = generator(prompts)
    assert written == Plain(generator)(prompts)
    assert told == [
        "up to 60 tokens are more than model.positions.max_length = 25: beyond it, each token "
        "depends only on the last 20 to 25 tokens"
    ]
    assert "".join(generator.stream(prompts[-1])) == Plain(generator)(prompts[-1:])[0] != ""


@pytest.mark.parametrize("name", base.names())
def test_a_config_can_write_with_its_own_settings(name: str):
    module = importlib.import_module(f"heedful.configs.{name}")
    for row in (None, *getattr(module, "ROWS", ())):
        experiment, _ = base.load(f"{name}:{row}" if row else name)
        model, decode = experiment.model, experiment.train.decode
        if model.positions.kind != "learned":
            continue
        if model.architecture == "encoder_decoder":
            room = model.positions.max_length - decode.extra_length
            assert experiment.data.max_length <= room, row
        elif model.architecture == "decoder_only":
            assert decode.beam == 1, row  # Only beam 1 continues beyond the table.


def test_a_beam_ends_with_learned_positions():
    config = small(positions="learned", positions_max_length=LONGEST)
    generator = make(config, max_tokens=4, beam=2)
    fits = "abcdefghijabcdefghij"  # With the begin token it has 21 = 25 - 4 tokens.
    assert len(generator([fits])) == 1
    with pytest.raises(
        TrainError, match=r"prompt 2 has 22 tokens.*max_tokens = 4 .*= 25.*beam = 1"
    ):
        generator(["a", fits + "a"])


@pytest.mark.slow
def test_texts_longer_than_those_of_the_training_are_told():
    told: list[str] = []
    generator = make(small(), max_tokens=3, longest=8, tell=told.append)
    generator(["abcd"])
    assert told == []
    generator(["abcd", "abcde"])
    assert told[0].startswith("up to 9 tokens are more than data.max_length = 8 of the training")


def test_a_prompt_that_would_take_too_long_is_refused():
    generator = make(small(), max_tokens=3, batch_tokens=64)
    with pytest.raises(TrainError, match=r"prompt 2 has 65 tokens, more than .*batch_tokens = 64"):
        generator(["a", "a" * 64])


def test_who_cannot_write_says_so():
    for architecture, needed in (
        ("encoder_decoder", "heedful translate"),
        ("encoder_only", "encoder_only .* does not generate"),
    ):
        with pytest.raises(TrainError, match=needed):
            Generator(tiny(architecture), DecodeConfig(beam=1), CHARS, {}, MESH)
    config = small(head_kind="classifier", head_pooling="last", head_outputs=3)
    with pytest.raises(TrainError, match="classifier does not generate"):
        Generator(config, DecodeConfig(beam=1), CHARS, {}, MESH)
    with pytest.raises(TrainError, match=r"set decode\.beam = 1"):
        Generator(small(), DecodeConfig(beam=2), CHARS, {}, MESH).stream("ab")
    nowhere = Tokenizer(CHARS._json)
    nowhere.bos = None
    with pytest.raises(TrainError, match="prompt 2 is empty"):
        Generator(small(), DecodeConfig(beam=1), nowhere, {}, MESH)(["ab", ""])


# Text -------------------------------------------------------------------------------------------


def read(text: str, stop: tuple[str, ...], tokenizer: Tokenizer = BYTES) -> list[str]:
    """Return the pieces of a text that arrives token by token; the last piece is the rest."""
    tokens = tokenizer.encode_batch([text])[0]
    growing = Text(tokenizer, np.array([BOS]), stop)
    pieces = [growing.read(tokens[: n + 1]) for n in range(len(tokens))]
    pieces.append(growing.rest())
    whole = Text(tokenizer, np.array([BOS]), stop)
    assert whole.read(tokens) + whole.rest() == "".join(pieces)
    assert whole.ended == growing.ended == any(s in text for s in stop)
    return pieces


def test_a_character_comes_when_its_last_byte_does():
    assert read("a€ß", ()) == ["a", "", "", "€", "", "ß", ""]
    growing = Text(BYTES, np.array([BOS]), ())
    euro = BYTES.encode_batch(["€"])[0]
    assert growing.read(euro[:2]) + growing.rest() == ""  # Part of a character gives no text.
    broken = Text(BYTES, np.array([BOS]), ())
    assert broken.read(np.array([*euro[:2], *BYTES.encode_batch(["a"])[0]])) == "\ufffda"


def test_what_may_begin_a_stop_string_waits():
    assert read("abcabd.", ("abd",)) == ["", "", "abc", "", "", "", "", ""]
    assert read("abcab", ("abd",)) == ["", "", "abc", "", "", "ab"]
    assert read("aaab", ("aab",)) == ["", "", "a", "", ""]
    assert "".join(read("x€y", ("€",))) == "x"
    assert "".join(read("one. two; three", (";", ". t"))) == "one"


def test_no_stop_string_is_ever_shown():
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(list("aé€"), 12))
        stop = tuple("".join(rng.choice(list("aé€"), rng.integers(1, 4))) for _ in range(2))
        shown = "".join(read(text, stop))
        assert text.startswith(shown)
        assert not any(s in shown for s in stop)
        assert len(shown) == min(text.find(s) if s in text else 12 for s in stop)


def test_a_word_after_a_prompt_keeps_its_space():
    config = TokenizerConfig(kind="words", vocab_size=99)
    words = Tokenizer.train(["one two th@@ ree"], config, "causal_lm")
    prompt, tokens = words.encode_batch(["one two", "two th@@ ree one"])
    growing = Text(words, np.append(BOS, prompt), ())
    assert [growing.read(tokens[: n + 1]) for n in range(4)] == [" two", " th", "ree", " one"]
    growing = Text(words, np.array([BOS]), ("e o",))
    special = np.array([tokens[0], BOS, PAD, *tokens[1:]])
    assert growing.read(special) == "two thre"
    assert growing.ended


def test_a_batch_has_no_more_positions_than_it_may():
    mesh = make_mesh(MeshConfig(data=2, fsdp=3, tensor=1), jax.devices()[:6])
    for positions in (1, 96, 5 * 6 * 16 + 15, 4096, 4608):
        for sequences, rows, length in shapes(dict.fromkeys(range(997), 9), positions, mesh):
            assert len(sequences) <= rows and rows % 6 == 0
            assert rows * length <= max(positions, 6 * 16)
    assert [rows for _, rows, _ in shapes({0: 9}, 4096, mesh)] == [6]


def test_batches_are_few_shapes_with_all_rows():
    rng = np.random.default_rng(0)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))
    sequences = {i: rng.integers(1, 9, n) for i, n in enumerate([3, 70, 16, 17, 1, 5, 40, 4, 33])}
    seen, shapes = {}, set()
    decode = DecodeConfig(beam=3, batch_tokens=3 * 64)  # On a CPU, batch_tokens has all hypotheses.
    for numbers, rows in batches(sequences, decode, mesh, longest=72):
        shapes.add(rows.inputs.shape)
        assert rows.lengths[len(numbers) :].sum() == 0
        for row, i in enumerate(numbers):
            assert rows.lines[row] == i
            seen[i] = rows.inputs[row, : rows.lengths[row]]
            assert not rows.inputs[row, rows.lengths[row] :].any()
    assert shapes == {(4, 16), (2, 32), (2, 64), (2, 72)}
    assert seen.keys() == sequences.keys()
    for i, sequence in sequences.items():
        np.testing.assert_array_equal(seen[i], sequence)
