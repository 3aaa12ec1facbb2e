"""Positive and negative sentences: fine-tuning of MiniLM, which was trained on a billion pairs.

heedful train sentiment_minilm
"""

from heedful.configs.base import Experiment
from heedful.data.config import DataConfig
from heedful.model.config import HeadConfig, ModelConfig
from heedful.train.config import OptimizerConfig, TrainConfig


def get_config() -> Experiment:
    return Experiment(
        # The body and the vocabulary are those of the source.
        model=ModelConfig(
            architecture="encoder_only",
            head=HeadConfig(kind="classifier"),
        ),
        data=DataConfig(
            source="sentiment", objective="classification", max_length=128, batch_tokens=1024
        ),
        train=TrainConfig(
            init_from="package:minilm",
            steps=600,
            label_smoothing=0.0,
            checkpoint_every=100,
            average_last=1,
            metric="accuracy",
            patience=3,
            optimizer=OptimizerConfig(
                peak_lr=1e-4,
                warmup_steps=50,
                schedule="linear",
                weight_decay=0.01,
                layer_decay=0.9,
                head_lr_multiplier=10.0,
            ),
        ),
    )
