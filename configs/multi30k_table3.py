"""The variations of `vaswani_table3` in a small size, on the captions of Multi30k.

heedful train multi30k_table3:heads_1       # in the folder of the files of `multi30k`
python -m benchmarks.table3 --data FOLDER   # all runs, and the table: RESULTS.md has the results

The models have a quarter of the width and half of the layers, and train for 400 steps of 2,048
tokens, which is less than two epochs. A variation may have another effect in a longer run. Norms
are before the sublayers and the learning rate falls to 0; otherwise seeds would differ by more than
most variations after so few steps.
"""

from dataclasses import replace

from heedful.configs import multi30k, vaswani_table3
from heedful.configs.base import Experiment
from heedful.model.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig
from heedful.train.config import DecodeConfig, OptimizerConfig

ROWS = vaswani_table3.ROWS
STEPS = 400


def get_config(row: str | None = None) -> Experiment:
    whole = multi30k.get_config()
    base = Experiment(
        model=ModelConfig(
            architecture="encoder_decoder",
            width=128,
            layers=3,
            attention=AttentionConfig(heads=8),
            feed_forward=FeedForwardConfig(width=512, activation="relu"),
            norm=NormConfig(position="pre"),
            dropout=0.1,
        ),
        data=replace(
            whole.data,
            test=("valid.en", "valid.de"),
            batch_tokens=2048,
            buckets=3,
            length_multiple=8,
            max_length=48,
        ),
        train=replace(
            whole.train,
            steps=STEPS,
            checkpoint_every=STEPS,
            max_checkpoints=1,
            average_last=1,
            patience=None,
            optimizer=OptimizerConfig(
                kind="adam",
                peak_lr=3e-3,
                warmup_steps=100,
                schedule="linear",
                clip_norm=None,
            ),
            decode=DecodeConfig(beam=1),
        ),
    )
    return ROWS[row].change(base) if row else base
