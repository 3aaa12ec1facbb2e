"""BERT base: a bidirectional encoder that restores masked words (arXiv:1810.04805 §3.1).

heedful train bert_base

The paper trains 1,000,000 steps of 256 rows of 512 tokens of books and Wikipedia, 4 days on 16 TPU
chips, and gives 84.6 on MNLI after fine-tuning (table 1). This experiment is the masked language
model alone, without next-sentence prediction, on Wikipedia. It has not been run here yet.
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
            architecture="encoder_only",
            width=768,
            layers=12,
            attention=AttentionConfig(heads=12, dropout=0.1),
            feed_forward=FeedForwardConfig(width=3072, activation="gelu"),
            norm=NormConfig(position="post", epsilon=1e-12, embeddings=True),
            positions=PositionConfig(kind="learned", max_length=512),
            head=HeadConfig(transform=True, bias=True),
            type_vocab_size=2,
            dropout=0.1,
            scale_embeddings=False,
            init="normal",
            dtype="bfloat16",
        ),
        data=DataConfig(
            source="tfds:wikipedia/20230601.en",
            objective="masked_lm",
            tokenizer=TokenizerConfig(kind="wordpiece", vocab_size=30_522, lowercase=True),
            max_length=512,
            batch_tokens=256 * 512,
        ),
        train=TrainConfig(
            steps=1_000_000,
            label_smoothing=0.0,
            loss_chunk=80,  # 15 % of 512 tokens are 77 targets
            checkpoint_every=5000,
            average_last=1,
            optimizer=OptimizerConfig(
                peak_lr=1e-4,
                warmup_steps=10_000,
                schedule="linear",
                b2=0.999,
                epsilon=1e-6,
                weight_decay=0.01,
            ),
            decode=DecodeConfig(beam=1),
        ),
    )
