"""What a model learns from an example: tokens in, the arrays of one row out (numpy, on the host).

An objective turns the tokens of one example into unpadded arrays [T]; `batch.FIELDS` says what each
one means. Targets are shifted here and nowhere else. A new objective is a function and a line in
`OBJECTIVES`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from data.config import DataConfig
from data.tokenizer import BOS, EOS

_BOS, _EOS = np.array([[BOS], [EOS]], np.int32)

Arrays = dict[str, np.ndarray]


class Objective(NamedTuple):
    """How examples become rows.

    row(tokens, rng, config) maps the tokens of one example, `{"source": [S], "target": [T]}`, to
    the arrays of its row; all randomness comes from `rng`.
    lengths(tokens) maps the token counts of all examples, `{"source": [E], "target": [E]}`, to the
    lengths [sides, E] that `row` will give; an encoder-decoder row has two sides.
    """

    row: Callable[[Mapping[str, np.ndarray], np.random.Generator, DataConfig], Arrays]
    lengths: Callable[[Mapping[str, np.ndarray]], np.ndarray]


def translation(
    example: Mapping[str, np.ndarray], rng: np.random.Generator, config: DataConfig
) -> Arrays:
    """Predict the target from the source and the target so far (arXiv:1706.03762 §3.1)."""
    source = np.concatenate((example["source"], _EOS))
    targets = np.concatenate((example["target"], _EOS))
    return {
        "inputs": np.concatenate((_BOS, example["target"])),
        "targets": targets,
        "weights": np.ones(len(targets), np.float32),
        "segment_ids": np.ones(len(targets), np.int32),
        "positions": np.arange(len(targets), dtype=np.int32),
        "encoder_inputs": source,
        "encoder_segment_ids": np.ones(len(source), np.int32),
        "encoder_positions": np.arange(len(source), dtype=np.int32),
    }


def _translation_lengths(tokens: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.stack([tokens["source"], tokens["target"]]) + 1


OBJECTIVES = {
    "translation": Objective(translation, _translation_lengths),
}
