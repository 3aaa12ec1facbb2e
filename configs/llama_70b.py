"""LLaMA 2 of 70 billion parameters (arXiv:2307.09288).

heedful train llama_70b --train.mesh.fsdp 512

The sizes are those of the published weights (https://huggingface.co/meta-llama/Llama-2-70b-hf,
config.json), and the recipe is that of §2.2: 2 trillion tokens in batches of 4 million. The
experiment has not been run here yet. This command shows what it needs:

heedful plan llama_70b --topology v5p:8x8x8 --train.mesh.fsdp 512
"""

from dataclasses import replace

from heedful.configs import llama_7b
from heedful.configs.base import Experiment
from heedful.model.config import AttentionConfig, FeedForwardConfig


def get_config() -> Experiment:
    small = llama_7b.get_config()
    model = replace(
        small.model,
        width=8192,
        layers=80,
        attention=AttentionConfig(heads=64, kv_heads=8, bias=False),
        feed_forward=FeedForwardConfig(width=28_672, activation="silu", gated=True, bias=False),
        norm=replace(small.model.norm, epsilon=1e-5),
    )
    data = replace(small.data, max_length=4096, batch_multiple=1024)
    optimizer = replace(small.train.optimizer, peak_lr=1.5e-4, final_lr=1.5e-5, epsilon=1e-5)
    return Experiment(
        model=model, data=data, train=replace(small.train, steps=500_000, optimizer=optimizer)
    )
