"""T5 small: an encoder-decoder that restores corrupted spans (arXiv:1910.10683).

heedful train t5_small

The paper pretrains for 524,288 steps of 128 rows of 512 tokens on C4 (§3.1.2; 60 million parameters
§3.2.2). AdamW with an inverse square root schedule replaces its AdaFactor. The experiment has not
been run here yet.
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
from heedful.train.config import DecodeConfig, OptimizerConfig, TrainConfig


def get_config() -> Experiment:
    return Experiment(
        model=ModelConfig(
            architecture="encoder_decoder",
            width=512,
            layers=6,
            attention=AttentionConfig(heads=8, head_dim=64, bias=False, scaled=False),
            feed_forward=FeedForwardConfig(width=2048, activation="relu", bias=False),
            norm=NormConfig(kind="rmsnorm", position="pre", epsilon=1e-6),
            positions=PositionConfig(kind="relative"),
            head=HeadConfig(scale=True),
            dropout=0.1,
            scale_embeddings=False,
            dtype="bfloat16",
        ),
        data=DataConfig(
            source="tfds:c4/en",
            holdout=2e-5,
            objective="span_corruption",
            tokenizer=TokenizerConfig(kind="bpe", vocab_size=32_128),
            max_length=512,
            buckets=1,
            batch_tokens=128 * 512,
        ),
        train=TrainConfig(
            steps=524_288,
            label_smoothing=0.0,
            checkpoint_every=5000,
            average_last=1,
            optimizer=OptimizerConfig(
                peak_lr=1e-3, warmup_steps=10_000, schedule="inverse_sqrt", b2=0.99, epsilon=1e-8
            ),
            decode=DecodeConfig(beam=1),
        ),
    )
