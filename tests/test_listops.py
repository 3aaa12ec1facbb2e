"""Test the expressions of ListOps: values, lengths and splits."""

import random
import re
import statistics
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from heedful.configs import base
from heedful.data import sources
from heedful.data.config import DataConfig, ListOpsConfig, TokenizerConfig
from heedful.data.errors import DataError
from heedful.data.examples import SPLITS
from heedful.data.pipeline import Dataset, tokenizer_texts
from heedful.data.sources import listops
from heedful.data.tokenizer import Tokenizer
from heedful.model.transformer import build
from heedful.train.cli.flags import parse

SHORT = ListOpsConfig(examples=211, held_out=53, min_length=11, max_length=37)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEEDFUL_CACHE", str(tmp_path / "cache"))


def config(short: ListOpsConfig = SHORT, **changes) -> DataConfig:
    return DataConfig(source="listops", objective="classification", listops=short, **changes)


def value(text: str, most: int = 10) -> int:
    """Evaluate an expression without the code under test; `most` is the limit of arguments."""
    stack: list = []
    for token in text.split():
        if token != "]":
            stack.append(token if token.startswith("[") else int(token))
            continue
        values = []
        while not isinstance(stack[-1], str):
            values.append(stack.pop())
        assert 2 <= len(values) <= most
        name = stack.pop()
        stack.append(
            {
                "[MIN": lambda v: sorted(v)[0],
                "[MAX": lambda v: sorted(v)[-1],
                "[MED": lambda v: int(statistics.median(v)),
                "[SM": lambda v: int(str(sum(v))[-1]),
            }[name](values)
        )
    (result,) = stack
    return result


def depth(text: str) -> int:
    """Return the depth of the deepest digits; the outermost operation is at depth 1."""
    deepest = level = 1
    for token in text.split():
        level += token.startswith("[") - (token == "]")
        deepest = max(deepest, level)
    return deepest


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),  # arXiv:1804.06028 §2
        ("[MED 1 8 ]", 4),  # 4.5, rounded down
        ("[MED 3 1 2 ]", 2),
        ("[SM 9 9 [MED 5 6 7 8 ] 5 ]", 9),
    ],
)
def test_the_evaluator_of_this_test(text, expected):
    assert value(text) == expected


def test_values_lengths_depths_and_arguments():
    given = replace(SHORT, max_depth=5, max_arguments=7)
    examples = [e for split in SPLITS for e in sources.load(config(given), split)]
    assert len(examples) == 211 + 2 * 53
    lengths = set()
    for example in examples:
        assert example["label"] == str(value(example["text"], most=7))
        tokens = example["text"].split(" ")
        assert tokens == example["text"].split()
        lengths.add(len(tokens))
    assert min(lengths) == 12 and max(lengths) == 36
    assert max(depth(example["text"]) for example in examples) == 5
    assert {token for e in examples for token in e["text"].split()} == {
        *"0123456789", "]", "[MIN", "[MAX", "[MED", "[SM"
    }  # fmt: skip


def test_arguments_and_operators_are_uniform():
    flat = ListOpsConfig(max_depth=2, max_arguments=7, min_length=1)
    rng = random.Random(1)
    texts = [listops.draw(rng, flat)[0].split() for _ in range(12_000)]
    counts = Counter(len(tokens) - 2 for tokens in texts)
    assert sorted(counts) == [2, 3, 4, 5, 6, 7]
    operators = Counter(tokens[0] for tokens in texts)
    digits = Counter(token for tokens in texts for token in tokens[1:-1])
    for counter, n in ((counts, 6), (operators, 4), (digits, 10)):
        share = counter.total() / n
        assert all(abs(count - share) < 5 * share**0.5 for count in counter.values()), counter


def test_a_quarter_of_the_arguments_are_operations():
    rng = random.Random(2)
    deep = ListOpsConfig(max_depth=3, max_length=10_000)
    texts = [listops.draw(rng, deep)[0].split() for _ in range(4000)]
    inside = sum(tokens.count("]") - 1 for tokens in texts)
    arguments = 4000 * 6  # An operation has (2 + 10) / 2 arguments on average.
    assert abs(inside / arguments - 0.25) < 0.02


def test_lengths_and_classes_of_long_range_arena():
    """Compare with the generator of Long Range Arena: mean length 1,040; 0 and 9 a sixth each."""
    rng, seen = random.Random(3), set()
    drawn = [listops._new(rng, ListOpsConfig(), seen) for _ in range(300)]
    lengths = [len(text.split()) for text, _ in drawn]
    assert min(lengths) > 500 and max(lengths) < 2000
    assert 950 < statistics.mean(lengths) < 1130
    classes = Counter(number for _, number in drawn)
    assert len(classes) == 10
    assert all(0.1 < classes[extreme] / 300 < 0.24 for extreme in (0, 9))
    assert max(classes[number] for number in range(1, 9)) / 300 < 0.17


def test_no_expression_twice_and_the_seed_decides(monkeypatch, tmp_path):
    texts = {split: [e["text"] for e in sources.load(config(), split)] for split in SPLITS}
    every = [text for split in SPLITS for text in texts[split]]
    assert len(set(every)) == len(every) == 211 + 2 * 53

    monkeypatch.setenv("HEEDFUL_CACHE", str(tmp_path / "elsewhere"))
    again = {split: [e["text"] for e in sources.load(config(), split)] for split in SPLITS}
    assert again == texts
    fewer = config(replace(SHORT, examples=101))
    assert [e["text"] for e in sources.load(fewer, "train")] == texts["train"][:101]
    assert [e["text"] for e in sources.load(fewer, "test")] == texts["test"]
    other = config(replace(SHORT, seed=1))
    assert not set(texts["test"]) & {e["text"] for e in sources.load(other, "test")}


def test_the_draws_are_pinned():
    """The dataset must not change with the version of Python or with the code."""
    drawn = listops.draw(random.Random(22), SHORT)
    assert drawn == ("[SM [SM [MED 2 3 9 9 0 ] 5 1 ] 5 7 ]", 1)


def test_it_is_computed_once(monkeypatch):
    first = list(sources.load(config(), "valid"))
    monkeypatch.setattr(listops, "draw", None)
    assert list(sources.load(config(), "valid")) == first


def test_batches_have_a_begin_fifteen_words_and_an_end():
    given = config(tokenizer=TokenizerConfig(kind="words"), max_length=39, batch_tokens=390)
    tokenizer = Tokenizer.prepare(tokenizer_texts(given), given.tokenizer, given.objective)
    assert tokenizer.vocab_size == 4 + 15
    dataset = Dataset.prepare(given, tokenizer, "train")
    assert len(dataset.kept) == 211
    assert dataset.classes == tuple("0123456789")
    for batch in dataset.eval_batches():
        for tokens, target, ids in zip(
            batch["inputs"], batch["targets"], batch["segment_ids"], strict=True
        ):
            if ids.any():
                row = tokens[ids > 0]
                assert (row[0], row[-1]) == tokenizer.frame
                assert value(tokenizer.decode(row)) == target


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"min_length": 36}, "max_length is 37: .*min_length 36"),
        ({"max_depth": 1}, "max_depth is 1"),
        ({"max_arguments": 1}, "max_arguments is 1"),
        ({"examples": 0}, "examples is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_config_names_the_bad_field(changes, names):
    with pytest.raises(DataError, match=f"data.listops.{names}"):
        replace(SHORT, **changes)


def test_settings_of_another_source_are_not_ignored():
    with pytest.raises(DataError, match=r"data.listops is set, but data.source is 'sentiment'"):
        DataConfig(source="sentiment", listops=SHORT)


def test_what_cannot_be_found_ends(monkeypatch):
    monkeypatch.setattr(listops, "PATIENCE", 300)
    # There are only 400 expressions of one of four operators and two digits.
    few = ListOpsConfig(examples=401, min_length=3, max_length=5, max_depth=2, max_arguments=2)
    with pytest.raises(DataError, match=r"300 draws gave no new .*min_length 3 .*max_length 5"):
        sources.load(config(few), "train")


@pytest.mark.parametrize("name", ["listops", "listops_tiny"])
def test_each_core_trains_by_the_command_that_the_config_gives(name):
    """The test traces a forward pass with dropout; a core refuses unsupported settings then."""
    experiment, text = base.load(name)
    text = re.sub(r" --run-dir \S+", "", text.replace("\\\n", " "))
    commands = re.findall(rf"heedful train {name}((?:\s+--\S+ \S+)*)\n", text)
    cores = set()
    for command in commands:
        model = parse(experiment, command.split(), "heedful train").model
        cores.add(model.attention.core)
        head = replace(model.head, outputs=10)
        model = build(replace(model, vocab_size=19, head=head))
        tokens = jnp.ones((2, experiment.data.max_length), jnp.int32)
        keys = {stream: jax.random.key(0) for stream in ("params", "dropout", "features")}
        train = lambda tokens, model=model, keys=keys: model.init_with_output(  # noqa: E731
            keys, tokens, segment_ids=tokens, deterministic=False
        )[0]
        assert jax.eval_shape(train, tokens).shape == (2, 10)
    assert cores == {"auto", "longformer", "performer", "linformer"}


@pytest.mark.parametrize("name", ["examples", "held_out", "max_depth", "max_arguments"])
def test_numbers_that_would_never_end_are_refused(name):
    with pytest.raises(DataError, match=f"data.listops.{name} is 1000000000: give .* or less"):
        ListOpsConfig(**{name: 1_000_000_000})


def test_the_deepest_expressions_can_be_drawn():
    config = ListOpsConfig(max_depth=500, max_arguments=1000, min_length=1, max_length=10_000)
    for seed in range(20):
        with suppress(listops._TooLongError):
            listops.draw(random.Random(seed), config)
