"""Shakespeare character by character with a GPT of 10 million parameters, for one GPU.

heedful train shakespeare_char_gpu --data.source files --data.train input.txt

The setting is nanoGPT's `train_shakespeare_char`: 6 layers, 5,000 steps of 64 rows of 256
characters, and its learning rates. Its README gives a validation loss of 1.4697 on the last tenth
of tinyshakespeare, after 3 minutes on an A100. The experiment has not been run here yet.
"""

import dataclasses

from heedful.configs import shakespeare_char
from heedful.configs.base import Experiment
from heedful.model.config import AttentionConfig, FeedForwardConfig, PositionConfig


def get_config() -> Experiment:
    small = shakespeare_char.get_config()
    return Experiment(
        model=dataclasses.replace(
            small.model,
            width=384,
            layers=6,
            attention=AttentionConfig(heads=6, bias=False, dropout=0.2),
            feed_forward=FeedForwardConfig(width=1536, activation="gelu", bias=False),
            positions=PositionConfig(kind="learned", max_length=256),
            dropout=0.2,
        ),
        data=dataclasses.replace(
            small.data, max_length=256, batch_tokens=64 * 256, batch_multiple=8
        ),
        train=dataclasses.replace(
            small.train,
            steps=5000,
            optimizer=dataclasses.replace(small.train.optimizer, peak_lr=1e-3, final_lr=1e-4),
        ),
    )
