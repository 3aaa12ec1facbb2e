"""Multi30k captions, English to German, with Transformer-Tiny as published (arXiv:2105.14462).

heedful train multi30k     # in the folder of the files, or with --data.train A B and so on

The files are not part of the project: 29,000 pairs in the lower-cased form that papers use, split
into pieces by 10,000 merges; `@@ ` marks the end of a piece within a word. The paper gives 41.02
BLEU on test.2016 for text alone (lower-cased and tokenised, pieces joined again). An epoch has 63
batches; the checkpoints of the last ten epochs are averaged. As in fairseq, which the paper uses,
the smoothed loss decides whether training still helps, and the score of a translation is divided by
its length. Seed 0 gave 41.07 after 7,245 steps, each of about 0.6 seconds on two cores of an EPYC
(Zen 5; docs/results.md).
"""

from heedful.configs.base import Experiment
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.model.config import AttentionConfig, FeedForwardConfig, ModelConfig
from heedful.train.config import DecodeConfig, OptimizerConfig, TrainConfig

EPOCH = 63


def get_config() -> Experiment:
    return Experiment(
        model=ModelConfig(
            architecture="encoder_decoder",
            width=128,
            layers=4,
            attention=AttentionConfig(heads=4),
            feed_forward=FeedForwardConfig(width=256, activation="relu"),
            dropout=0.3,
        ),
        data=DataConfig(
            source="files",
            languages=("en", "de"),
            train=("train.en", "train.de"),
            valid=("valid.en", "valid.de"),
            test=("test.2016.en", "test.2016.de"),
            tokenizer=TokenizerConfig(kind="words", vocab_size=10_000),
            batch_tokens=8192,
            buckets=8,
            length_multiple=1,
            max_length=64,
        ),
        train=TrainConfig(
            steps=8000,
            label_smoothing=0.1,
            checkpoint_every=EPOCH,
            max_checkpoints=10,
            average_last=10,
            metric="smoothed_loss",
            patience=10,
            optimizer=OptimizerConfig(
                kind="adam",
                peak_lr=5e-3,
                initial_lr=1e-7,
                warmup_steps=2000,
                schedule="inverse_sqrt",
                b1=0.9,
                b2=0.98,
                epsilon=1e-8,
                clip_norm=25.0,
            ),
            decode=DecodeConfig(beam=5, length_penalty=1.0, length_penalty_offset=0),
        ),
    )
