"""GPT-2 of 124 million parameters (Radford et al. 2019, table 2).

heedful train gpt2_small

The recipe is that of nanoGPT: 600,000 steps of 491,520 tokens. The README of nanoGPT gives a
validation loss of about 2.85 on OpenWebText after 4 days on 8 A100; this experiment reads C4, so
its loss will differ. The experiment has not been run here yet.
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


def get_config(
    layers: int = 12, width: int = 768, heads: int = 12, peak_lr: float = 6e-4
) -> Experiment:
    return Experiment(
        model=ModelConfig(
            architecture="decoder_only",
            width=width,
            layers=layers,
            attention=AttentionConfig(heads=heads),
            feed_forward=FeedForwardConfig(width=4 * width, activation="gelu_tanh"),
            norm=NormConfig(position="pre", epsilon=1e-5),
            positions=PositionConfig(kind="learned", max_length=1024),
            dropout=0.0,
            unroll=1,
            scale_embeddings=False,
            init="scaled_normal",
            dtype="bfloat16",
        ),
        data=DataConfig(
            source="tfds:c4/en",
            holdout=2e-5,
            objective="causal_lm",
            tokenizer=TokenizerConfig(kind="bpe", vocab_size=50_257),
            max_length=1024,
            batch_tokens=480 * 1024,
            batch_multiple=32,
        ),
        train=TrainConfig(
            steps=600_000,
            label_smoothing=0.0,
            loss_chunk=256,
            checkpoint_every=1000,
            average_last=1,
            optimizer=OptimizerConfig(
                peak_lr=peak_lr,
                final_lr=peak_lr / 10,
                warmup_steps=2000,
                schedule="cosine",
                b2=0.95,
                epsilon=1e-8,
                weight_decay=0.1,
            ),
            decode=DecodeConfig(beam=1, temperature=0.8, top_k=200),
        ),
    )
