"""The variations of "Attention Is All You Need" (arXiv:1706.03762, table 3), one at a time.

heedful train vaswani_table3:heads_1     # heads_1 or another name in ROWS
heedful train vaswani_table3             # the base model

The paper measures perplexity and BLEU on newstest2013, English to German. The variations have not
been run here at this size; multi30k_table3 has the same variations of a small model.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from heedful.configs import vaswani_base
from heedful.configs.base import Experiment

BASE = 4.92, 25.8
"""Perplexity and BLEU of the base model in the paper."""


class Row(NamedTuple):
    """One variation, with the perplexity and BLEU of the paper."""

    group: str
    change: Callable[[Experiment], Experiment]
    perplexity: float
    bleu: float


def _model(experiment: Experiment, **changes: Any) -> Experiment:
    return replace(experiment, model=replace(experiment.model, **changes))


def heads(factor: float) -> Callable[[Experiment], Experiment]:
    """Return a change that multiplies the number of heads; the head size becomes width / heads."""

    def change(e: Experiment) -> Experiment:
        count = round(factor * e.model.attention.heads)
        return _model(e, attention=replace(e.model.attention, heads=count))

    return change


def keys(factor: float) -> Callable[[Experiment], Experiment]:
    """Return a change that multiplies the size of queries and keys; values keep their size."""

    def change(e: Experiment) -> Experiment:
        size = round(factor * e.model.head_dim)
        return _model(e, attention=replace(e.model.attention, key_dim=size))

    return change


def layers(factor: float) -> Callable[[Experiment], Experiment]:
    return lambda e: _model(e, layers=round(factor * e.model.layers))


def width(factor: float) -> Callable[[Experiment], Experiment]:
    """Return a change that multiplies the width, and with it the size of the heads.

    The learning rate is proportional to width^-0.5, as in the paper (§5.3).
    """

    def change(e: Experiment) -> Experiment:
        optimizer = e.train.optimizer
        optimizer = replace(optimizer, peak_lr=optimizer.peak_lr * factor**-0.5)
        wide = _model(e, width=round(factor * e.model.width))
        return replace(wide, train=replace(e.train, optimizer=optimizer))

    return change


def inner(factor: float) -> Callable[[Experiment], Experiment]:
    def change(e: Experiment) -> Experiment:
        feed_forward = e.model.feed_forward
        feed_forward = replace(feed_forward, width=round(factor * feed_forward.width))
        return _model(e, feed_forward=feed_forward)

    return change


def dropout(rate: float) -> Callable[[Experiment], Experiment]:
    return lambda e: _model(e, dropout=rate)


def smoothing(share: float) -> Callable[[Experiment], Experiment]:
    return lambda e: replace(e, train=replace(e.train, label_smoothing=share))


def learned(e: Experiment) -> Experiment:
    return _model(e, positions=replace(e.model.positions, kind="learned"))


ROWS = {
    "heads_1": Row("A", heads(1 / 8), 5.29, 24.9),
    "heads_4": Row("A", heads(1 / 2), 5.00, 25.5),
    "heads_16": Row("A", heads(2), 4.91, 25.8),
    "heads_32": Row("A", heads(4), 5.01, 25.4),
    "keys_16": Row("B", keys(1 / 4), 5.16, 25.1),
    "keys_32": Row("B", keys(1 / 2), 5.01, 25.4),
    "layers_2": Row("C", layers(1 / 3), 6.11, 23.7),
    "layers_4": Row("C", layers(2 / 3), 5.19, 25.3),
    "layers_8": Row("C", layers(4 / 3), 4.88, 25.5),
    "width_256": Row("C", width(1 / 2), 5.75, 24.5),
    "width_1024": Row("C", width(2), 4.66, 26.0),
    "inner_1024": Row("C", inner(1 / 2), 5.12, 25.4),
    "inner_4096": Row("C", inner(2), 4.75, 26.2),
    "dropout_0": Row("D", dropout(0.0), 5.77, 24.6),
    "dropout_2": Row("D", dropout(0.2), 4.95, 25.5),
    "smoothing_0": Row("D", smoothing(0.0), 4.67, 25.3),
    "smoothing_2": Row("D", smoothing(0.2), 5.47, 25.7),
    "positions_learned": Row("E", learned, 4.92, 25.7),
}
"""Rows of the table. A name has the size in the paper; a change is relative to the base model."""


def get_config(row: str | None = None) -> Experiment:
    base = vaswani_base.get_config()
    return ROWS[row].change(base) if row else base
