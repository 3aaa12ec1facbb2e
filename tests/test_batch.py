"""Test batches: padding rows to one length, and the check of the arrays of a batch."""

import numpy as np
import pytest

from heedful.data.batch import FIELDS, PER_ROW, check, pad_and_stack
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.data.errors import DataError
from heedful.data.objectives import OBJECTIVES
from heedful.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["a b"], TokenizerConfig(kind="chars", vocab_size=11))


def make(name, **example):
    config = DataConfig(source="tfds:x", objective=name)
    return OBJECTIVES[name].row(example, np.random.default_rng(0), config, TOKENIZER)


def ids(n):
    return np.full(n, 5, np.int32)


def row(source, target):
    return make("translation", source=ids(source), target=ids(target))


@pytest.fixture
def batch():
    return pad_and_stack([row(2, 5), row(4, 1), row(0, 0)], 5, 7)


@pytest.fixture
def labelled():
    rows = [
        make("regression", text=ids(n), pair=ids(1), label=np.float32(n - 2.5)) for n in (1, 3, 2)
    ]
    return pad_and_stack(rows, 5, 7)


def test_pad_and_stack(batch):
    check(batch)
    assert batch.keys() <= FIELDS.keys()
    for name, array in batch.items():
        assert array.shape == (5, 7)
        assert array.dtype == FIELDS[name].dtype
        assert not array[3:].any()
    assert batch["weights"].sum(1).tolist() == [6, 2, 1, 0, 0]
    assert batch["segment_ids"].tolist()[1] == [1, 1, 0, 0, 0, 0, 0]
    assert batch["positions"].tolist()[0] == [0, 1, 2, 3, 4, 5, 0]
    assert batch["encoder_segment_ids"].sum(1).tolist() == [3, 5, 1, 0, 0]
    assert batch["encoder_positions"].tolist()[1] == [0, 1, 2, 3, 4, 0, 0]
    assert batch["inputs"][0].tolist() == [1, 5, 5, 5, 5, 5, 0]


def test_one_value_for_a_row(labelled):
    check(labelled)
    assert labelled["targets"].tolist() == [-1.5, 0.5, -0.5, 0, 0]
    assert labelled["targets"].dtype == np.float32
    assert labelled["weights"].tolist() == [1, 1, 1, 0, 0]
    assert labelled["type_ids"].tolist()[1] == [0, 0, 0, 0, 0, 1, 1]
    classes = [make("classification", text=ids(n), label=np.int32(n)) for n in (1, 3)]
    batch = pad_and_stack(classes, 3, 5)
    check(batch)
    assert batch["targets"].dtype == np.int32
    assert batch["targets"].tolist() == [1, 3, 0]
    prefixes = pad_and_stack([make("prefix_lm", text=ids(n)) for n in (2, 5)], 3, 5)
    check(prefixes)
    assert prefixes["prefix_len"].shape == (3,)
    assert prefixes["prefix_len"][2] == 0
    assert set(PER_ROW) <= FIELDS.keys()


def test_too_long_a_row_is_never_cut():
    with pytest.raises(ValueError, match="shape"):
        pad_and_stack([row(2, 7)], 3, 7)


def test_each_side_has_a_length_of_its_own():
    batch = pad_and_stack([row(12, 4), row(3, 1)], 3, 7, 13)
    check(batch)
    for name, array in batch.items():
        assert array.shape == (3, 13 if name.startswith("encoder_") else 7)
    assert batch["encoder_inputs"][0].tolist() == [5] * 12 + [2]
    batch = {name: a[:2] if name.startswith("encoder_") else a for name, a in batch.items()}
    with pytest.raises(DataError, match=r"encoder_inputs has shape \(2, 13\)"):
        check(batch)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("positions", lambda a: a[:3], r"positions has shape \(3, 7\), but inputs has \(5, 7\)"),
        ("prefix_len", lambda a: a, r"prefix_len has shape \(5, 7\)"),
        ("prefix_len", lambda a: a[:, 0] + 1, "prefix_len is not 0 at a padding"),
        ("targets", lambda a: a.astype(np.int64), "targets has dtype int64: use int32"),
        ("targets", lambda a: a.astype(np.float32), "targets has dtype float32: use int32"),
        ("weights", lambda a: a + 1, "weights is not 0 at a padding"),
        ("encoder_inputs", lambda a: a + 1, "encoder_inputs is not 0"),
        ("positions", lambda a: -a, "positions has a negative"),
        ("surprise", lambda a: a, "unknown array 'surprise'"),
        ("everything", lambda a: a[:, ::-1], "padding before a token"),
    ],
)
def test_check_finds_what_breaks_the_contract(batch, name, change, message):
    if name == "everything":
        batch = {key: change(array) for key, array in batch.items()}
    else:
        batch[name] = change(batch.get(name, batch["inputs"]))
    with pytest.raises(DataError, match=message):
        check(batch)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weights", lambda a: np.ones((5, 7), np.float32), r"weights has shape \(5, 7\)"),
        ("weights", lambda a: a + 1, "weights is not 0 at a padding"),
        ("targets", lambda a: a.astype(np.float64), "targets has dtype float64"),
        ("targets", lambda a: a.astype(np.int32) - 7, "targets has a negative"),
    ],
)
def test_check_of_one_value_for_a_row(labelled, name, change, message):
    labelled[name] = change(labelled[name])
    with pytest.raises(DataError, match=message):
        check(labelled)
