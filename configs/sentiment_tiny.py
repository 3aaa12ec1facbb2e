"""Positive and negative sentences: a small encoder without pretraining.

heedful train sentiment_tiny
"""

from heedful.configs.base import Experiment
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
)
from heedful.train.config import OptimizerConfig, TrainConfig


def get_config() -> Experiment:
    return Experiment(
        model=ModelConfig(
            architecture="encoder_only",
            width=128,
            layers=2,
            attention=AttentionConfig(heads=4),
            feed_forward=FeedForwardConfig(width=256, activation="gelu"),
            norm=NormConfig(position="pre"),
            positions=PositionConfig(kind="learned", max_length=128),
            head=HeadConfig(kind="classifier", pooling="mean", pooler=False, dropout=0.3),
            dropout=0.3,
        ),
        data=DataConfig(
            source="sentiment",
            objective="classification",
            tokenizer=TokenizerConfig(kind="wordpiece", vocab_size=4000, lowercase=True),
            max_length=128,
            batch_tokens=2048,
        ),
        train=TrainConfig(
            steps=2000,
            label_smoothing=0.0,
            checkpoint_every=100,
            average_last=1,
            metric="accuracy",
            patience=5,
            optimizer=OptimizerConfig(
                peak_lr=1e-3, warmup_steps=100, schedule="linear", weight_decay=0.01
            ),
        ),
    )
