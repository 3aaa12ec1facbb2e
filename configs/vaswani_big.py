"""The big model of "Attention Is All You Need" (arXiv:1706.03762, table 3) on WMT14.

heedful train vaswani_big

The paper trains 300,000 steps, 3.5 days on 8 P100, averages the last 20 checkpoints, and gives BLEU
28.4 on newstest2014 English to German (table 2). The experiment has not been run here yet.
"""

import dataclasses

from heedful.configs import vaswani_base
from heedful.configs.base import Experiment
from heedful.model.config import AttentionConfig, FeedForwardConfig

WIDTH = 1024


def get_config() -> Experiment:
    base = vaswani_base.get_config()
    optimizer = dataclasses.replace(
        base.train.optimizer, peak_lr=(WIDTH * vaswani_base.WARMUP) ** -0.5
    )
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model,
            width=WIDTH,
            attention=AttentionConfig(heads=16),
            feed_forward=FeedForwardConfig(width=4096, activation="relu"),
            dropout=0.3,
        ),
        train=dataclasses.replace(
            base.train, steps=300_000, max_checkpoints=20, average_last=20, optimizer=optimizer
        ),
    )
