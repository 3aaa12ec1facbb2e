"""Masked characters of Shakespeare, BERT's smallest size (arXiv:1908.08962): minutes on a CPU.

heedful train bert_tiny
"""

import dataclasses

from heedful.configs import bert_base
from heedful.configs.base import Experiment
from heedful.data.config import TokenizerConfig
from heedful.model.config import AttentionConfig, FeedForwardConfig, NormConfig, PositionConfig
from heedful.train.config import OptimizerConfig


def get_config() -> Experiment:
    base = bert_base.get_config()
    return Experiment(
        model=dataclasses.replace(
            base.model,
            width=128,
            layers=2,
            attention=AttentionConfig(heads=2),
            feed_forward=FeedForwardConfig(width=512, activation="gelu"),
            # Post-norm would need a warmup of more steps than this experiment has.
            norm=NormConfig(position="pre", epsilon=1e-12, embeddings=True),
            positions=PositionConfig(kind="learned", max_length=128),
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
