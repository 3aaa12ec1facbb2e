"""The base model of "Attention Is All You Need" (arXiv:1706.03762 §5, table 3) on WMT14.

heedful train vaswani_base

The paper trains 100,000 steps of about 25,000 source and 25,000 target tokens, 12 hours on 8 P100,
and gives BLEU 27.3 on newstest2014 English to German (table 2). The experiment has not been run
here yet.
"""

from heedful.configs.base import Experiment
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.model.config import AttentionConfig, FeedForwardConfig, ModelConfig
from heedful.train.config import DecodeConfig, OptimizerConfig, TrainConfig

WIDTH, WARMUP = 512, 4000


def get_config() -> Experiment:
    return Experiment(
        model=ModelConfig(
            architecture="encoder_decoder",
            width=WIDTH,
            layers=6,
            attention=AttentionConfig(heads=8),
            feed_forward=FeedForwardConfig(width=2048, activation="relu"),
            dropout=0.1,
        ),
        data=DataConfig(
            source="tfds:wmt14_translate/de-en",
            languages=("en", "de"),
            tokenizer=TokenizerConfig(kind="bpe", vocab_size=37_000),
            batch_tokens=25_000,
            buckets=8,
            max_length=256,
        ),
        train=TrainConfig(
            steps=100_000,
            label_smoothing=0.1,
            checkpoint_every=1500,
            max_checkpoints=5,
            average_last=5,
            optimizer=OptimizerConfig(
                kind="adam",
                peak_lr=(WIDTH * WARMUP) ** -0.5,
                warmup_steps=WARMUP,
                schedule="inverse_sqrt",
                b1=0.9,
                b2=0.98,
                epsilon=1e-9,
                clip_norm=None,
            ),
            decode=DecodeConfig(beam=4, length_penalty=0.6, extra_length=50),
        ),
    )
