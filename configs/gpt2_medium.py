"""GPT-2 of 350 million parameters (Radford et al. 2019, table 2).

heedful train gpt2_medium --train.mesh.fsdp 8

The recipe is that of gpt2_small, with a peak learning rate between those of arXiv:2005.14165 table
2.1. The experiment has not been run here yet.
"""

from heedful.configs import gpt2_small
from heedful.configs.base import Experiment


def get_config() -> Experiment:
    return gpt2_small.get_config(layers=24, width=1024, heads=16, peak_lr=3e-4)
