"""Shakespeare character by character with a small GPT, in a few minutes on a CPU.

heedful train shakespeare_char --data.source files --data.train input.txt

The setting is nanoGPT's small CPU setting: 4 layers and 2,000 steps of 12 rows of 64 characters,
but with three times its learning rate. The last 5 % of the file are held out for validation, and
the 5 % before them for the test. On tinyshakespeare split as nanoGPT does, with the last tenth for
both (docs/results.md has the command), it gives 1.77 nats per character in about a minute on 2
cores; nanoGPT's README gives 1.88. Without the flags the text is that of the package `shakespeare`.
"""

from heedful.configs.base import Experiment
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
)
from heedful.train.config import DecodeConfig, OptimizerConfig, TrainConfig


def get_config() -> Experiment:
    return Experiment(
        model=ModelConfig(
            architecture="decoder_only",
            width=128,
            layers=4,
            attention=AttentionConfig(heads=4, bias=False),
            feed_forward=FeedForwardConfig(width=512, activation="gelu", bias=False),
            norm=NormConfig(position="pre", epsilon=1e-5, bias=False),
            positions=PositionConfig(kind="learned", max_length=64),
            dropout=0.0,
            scale_embeddings=False,
            init="scaled_normal",
        ),
        data=DataConfig(
            source="shakespeare",
            objective="causal_lm",
            holdout=0.05,
            tokenizer=TokenizerConfig(kind="chars", vocab_size=1000),
            max_length=64,
            batch_tokens=12 * 64,
            batch_multiple=4,
        ),
        train=TrainConfig(
            steps=2000,
            label_smoothing=0.0,
            checkpoint_every=250,
            average_last=1,
            optimizer=OptimizerConfig(
                peak_lr=3e-3,
                final_lr=3e-4,
                warmup_steps=100,
                schedule="cosine",
                b2=0.99,
                epsilon=1e-8,
                weight_decay=0.1,
            ),
            decode=DecodeConfig(beam=1, temperature=0.8, max_tokens=500),
        ),
    )
