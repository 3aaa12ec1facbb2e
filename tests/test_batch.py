import numpy as np
import pytest

from data.batch import FIELDS, check, pad_and_stack
from data.config import DataConfig, DataError
from data.objectives import translation


def row(source, target):
    tokens = {"source": np.full(source, 7, np.int32), "target": np.full(target, 11, np.int32)}
    return translation(tokens, np.random.default_rng(0), DataConfig())


@pytest.fixture
def batch():
    return pad_and_stack([row(2, 5), row(4, 1), row(0, 0)], 5, 7)


def test_pad_and_stack(batch):
    check(batch)
    assert batch.keys() == FIELDS.keys()
    for name, array in batch.items():
        assert array.shape == (5, 7)
        assert array.dtype == FIELDS[name].dtype
        assert not array[3:].any()
    assert batch["weights"].sum(1).tolist() == [6, 2, 1, 0, 0]
    assert batch["encoder_segment_ids"].sum(1).tolist() == [3, 5, 1, 0, 0]
    assert batch["inputs"][0].tolist() == [1, 11, 11, 11, 11, 11, 0]


def test_too_long_a_row_is_never_cut():
    with pytest.raises(ValueError, match="shape"):
        pad_and_stack([row(2, 7)], 3, 7)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("inputs", lambda a: a[:3], "shapes"),
        ("targets", lambda a: a.astype(np.int64), "targets has dtype int64: use int32"),
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
