"""LLaMA of 7 billion parameters (arXiv:2302.13971).

heedful train llama_7b --train.mesh.fsdp 64

The paper trains on 1 trillion tokens in batches of 4 million, 82,432 GPU-hours on A100 80 GB
(tables 2, 15). The experiment has not been run here yet.
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
            width=4096,
            layers=32,
            attention=AttentionConfig(heads=32, bias=False),
            feed_forward=FeedForwardConfig(width=11_008, activation="silu", gated=True, bias=False),
            norm=NormConfig(kind="rmsnorm", position="pre", epsilon=1e-6),
            positions=PositionConfig(kind="rotary"),
            dropout=0.0,
            tie_embeddings=False,
            scale_embeddings=False,
            init="normal",
            dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(
            source="tfds:c4/en",
            holdout=2e-5,
            objective="causal_lm",
            tokenizer=TokenizerConfig(kind="bpe", vocab_size=32_000),
            max_length=2048,
            batch_tokens=2048 * 2048,
            batch_multiple=2048,
        ),
        train=TrainConfig(
            steps=250_000,
            label_smoothing=0.0,
            checkpoint_every=1000,
            average_last=1,
            optimizer=OptimizerConfig(
                peak_lr=3e-4,
                final_lr=3e-5,
                warmup_steps=2000,
                schedule="cosine",
                b2=0.95,
                epsilon=1e-8,
                weight_decay=0.1,
            ),
            decode=DecodeConfig(beam=1, temperature=0.8, top_p=0.95),
        ),
    )
