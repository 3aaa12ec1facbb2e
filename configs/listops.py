r"""ListOps of Long Range Arena (arXiv:2011.04006 §2.2.1), 500 to 2,000 tokens, for one GPU.

heedful train listops

These commands train the same model with each other core:

heedful train listops --run-dir runs/lra_longformer --model.attention.core longformer \
    --model.attention.window 256 --model.attention.global-tokens 1
heedful train listops --run-dir runs/lra_performer --model.attention.core performer \
    --model.attention.dropout 0
heedful train listops --run-dir runs/lra_linformer --model.attention.core linformer

Long Range Arena gives accuracies (%) in Table 1: exact 36.37, Longformer 35.63, Performer 18.01,
Linformer 35.70.

Sizes, optimizer and 5,000 steps of 32 rows are those of the public configs of Long Range Arena. Its
paper gives 6 layers and a feed-forward width of 2,048 (appendix A): --model.layers 6
--model.feed-forward.width 2048. Here the dense layer before the classes is as wide as the model and
ends in tanh, and only matrices have weight decay. In the public configs the Longformer has no
global token, the Linformer has 16 rows (here 256; --model.attention.linformer.rank 16), and the
Performer has 2 features (here 256). Performer has no dropout because it has no attention weights.

The first run draws 96,000 + 2 x 2,000 expressions and tokenises them (--data.listops.examples). The
experiment has not been run here at this size, as it needs a GPU. `listops_tiny` runs on a CPU.
"""

from heedful.configs.base import Experiment
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    ModelConfig,
    NormConfig,
)
from heedful.train.config import OptimizerConfig, TrainConfig


def get_config() -> Experiment:
    return Experiment(
        model=ModelConfig(
            architecture="encoder_only",
            width=512,
            layers=4,
            attention=AttentionConfig(heads=8, bias=False, dropout=0.1),
            feed_forward=FeedForwardConfig(width=1024, activation="gelu_tanh", dropout=0.1),
            norm=NormConfig(position="pre"),
            head=HeadConfig(kind="classifier", pooling="first", dropout=0.0),
            dropout=0.1,
        ),
        data=DataConfig(
            source="listops",
            objective="classification",
            classes=tuple(map(str, range(10))),
            tokenizer=TokenizerConfig(kind="words"),
            max_length=2048,
            # 32 rows, each as long as the longest expression.
            batch_tokens=32 * 2048,
            buckets=1,
        ),
        train=TrainConfig(
            steps=5000,
            label_smoothing=0.0,
            checkpoint_every=500,
            average_last=1,
            metric="accuracy",
            optimizer=OptimizerConfig(
                peak_lr=0.05 * 1000**-0.5, warmup_steps=1000, weight_decay=0.1, clip_norm=None
            ),
        ),
    )
