"""The variations of `vaswani_table3` in a small size, on the captions of Multi30k.

heedful train multi30k_table3:heads_1       # in the folder with the files of `multi30k`
python -m benchmarks.table3 --data FOLDER   # all variations, and their table (see docs/results.md)

The model has a quarter of the width and half of the layers of `vaswani_base`. It trains for 400
steps of 2,048 tokens (less than two epochs); a variation can have another effect in a long training
run. Pre-norm and a learning rate that falls to 0 keep the differences between random seeds smaller
than those between most variations.
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
