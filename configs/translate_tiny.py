"""English to German software strings with a tiny Transformer: the default experiment.

heedful train translate_tiny
"""

from heedful.configs.base import Experiment
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.model.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig
from heedful.train.config import DecodeConfig, OptimizerConfig, TrainConfig


def get_config() -> Experiment:
    return Experiment(
        model=ModelConfig(
            architecture="encoder_decoder",
            width=128,
            layers=2,
            attention=AttentionConfig(heads=4),
            feed_forward=FeedForwardConfig(width=256),
            # The paper's post-norm needs thousands of steps at the start; there are fewer here.
            norm=NormConfig(position="pre"),
            dropout=0.1,
        ),
        data=DataConfig(
            source="homeassistant",
            tokenizer=TokenizerConfig(vocab_size=4000),
            batch_tokens=2048,
            buckets=5,
            max_length=64,
        ),
        train=TrainConfig(
            steps=1500,
            checkpoint_every=100,
            average_last=3,
            optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=150, schedule="linear"),
            decode=DecodeConfig(extra_length=16),
        ),
    )
