r"""ListOps with expressions of 100 to 200 tokens, in a small model: minutes on a CPU.

heedful train listops_tiny
heedful train listops_tiny --run-dir runs/listops_longformer --model.attention.core longformer \
    --model.attention.window 16 --model.attention.global-tokens 1
heedful train listops_tiny --run-dir runs/listops_performer --model.attention.core performer \
    --model.attention.performer.features 64
heedful train listops_tiny --run-dir runs/listops_linformer --model.attention.core linformer \
    --model.attention.linformer.rank 32 --model.attention.linformer.max-length 208

The accuracies are not comparable to those of `listops` or to published ones, because the
expressions are shorter. The guide to long documents has the accuracies of each core.
"""

import dataclasses

from heedful.configs import listops
from heedful.configs.base import Experiment
from heedful.data.config import ListOpsConfig
from heedful.model.config import AttentionConfig, FeedForwardConfig
from heedful.train.config import OptimizerConfig


def get_config() -> Experiment:
    base = listops.get_config()
    return Experiment(
        model=dataclasses.replace(
            base.model,
            width=128,
            layers=2,
            attention=AttentionConfig(heads=4, bias=False),
            feed_forward=FeedForwardConfig(width=256, activation="gelu_tanh"),
            dropout=0.0,
        ),
        data=dataclasses.replace(
            base.data,
            listops=ListOpsConfig(examples=16_000, min_length=100, max_length=200),
            max_length=208,
            batch_tokens=32 * 208,
        ),
        train=dataclasses.replace(
            base.train,
            steps=500,
            checkpoint_every=250,
            optimizer=OptimizerConfig(
                peak_lr=1e-3, warmup_steps=50, schedule="linear", weight_decay=0.1
            ),
        ),
    )
