"""GPT-2 of 774 million parameters (Radford et al. 2019, table 2).

heedful train gpt2_large --train.mesh.fsdp 8

The recipe is that of gpt2_small, with the peak learning rate of the GPT-3 model of the nearest
size, 2.5e-4 (arXiv:2005.14165 table 2.1). The experiment has not been run here yet.
"""

from heedful.configs import gpt2_small
from heedful.configs.base import Experiment


def get_config() -> Experiment:
    return gpt2_small.get_config(layers=36, width=1280, heads=20, peak_lr=2.5e-4)
