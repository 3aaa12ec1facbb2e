"""Corrupted spans of Shakespeare with a tiny T5: minutes on a CPU.

heedful train t5_tiny
"""

import dataclasses

from configs import t5_small
from configs.base import Experiment
from data.config import TokenizerConfig
from model.config import AttentionConfig, FeedForwardConfig
from train.config import OptimizerConfig


def get_config() -> Experiment:
    base = t5_small.get_config()
    return Experiment(
        model=dataclasses.replace(
            base.model,
            width=128,
            layers=2,
            attention=AttentionConfig(heads=4, bias=False, scaled=False),
            feed_forward=FeedForwardConfig(width=512, activation="relu", bias=False),
            dropout=0.0,
            dtype="float32",
        ),
        data=dataclasses.replace(
            base.data,
            source="shakespeare",
            tokenizer=TokenizerConfig(kind="chars", vocab_size=1000),
            max_length=128,
            batch_tokens=16 * 128,
        ),
        train=dataclasses.replace(
            base.train,
            steps=1500,
            checkpoint_every=250,
            optimizer=OptimizerConfig(peak_lr=2e-3, warmup_steps=150, schedule="linear"),
        ),
    )
