import numpy as np

from data.batch import FIELDS
from data.config import DataConfig
from data.objectives import OBJECTIVES, translation
from data.tokenizer import BOS, EOS


def tokens(source, target):
    return {"source": np.array(source, np.int32), "target": np.array(target, np.int32)}


def test_translation_shifts_targets_once():
    row = translation(tokens([5, 7], [11, 13, 17]), np.random.default_rng(0), DataConfig())
    expected = {
        "inputs": [BOS, 11, 13, 17],
        "targets": [11, 13, 17, EOS],
        "weights": [1, 1, 1, 1],
        "segment_ids": [1, 1, 1, 1],
        "positions": [0, 1, 2, 3],
        "encoder_inputs": [5, 7, EOS],
        "encoder_segment_ids": [1, 1, 1],
        "encoder_positions": [0, 1, 2],
    }
    assert {name: list(values) for name, values in row.items()} == expected
    for name, values in row.items():
        assert values.dtype == FIELDS[name].dtype, name


def test_every_objective_predicts_its_lengths():
    examples = [tokens([5] * s, [7] * t) for s, t in [(0, 3), (5, 2), (7, 0), (1, 11)]]
    raw = {side: np.array([len(e[side]) for e in examples]) for side in ("source", "target")}
    for objective in OBJECTIVES.values():
        lengths = objective.lengths(raw)
        for i, example in enumerate(examples):
            row = objective.row(example, np.random.default_rng(0), DataConfig())
            sides = [len(v) for name, v in row.items() if name.endswith("segment_ids")]
            assert sorted(lengths[:, i]) == sorted(sides)
