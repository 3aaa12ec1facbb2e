"""Describe a training run, in lines for people, before it starts."""

import jax
import numpy as np
from rich.console import Console

from heedful.model.attention import choose
from heedful.train.config import TrainConfig
from heedful.train.hosts import is_multiprocess
from heedful.train.optimizer import learning_rate
from heedful.train.run import Run
from heedful.train.state import Setup, parameter_count
from heedful.train.trainable import split

DETERMINISM = {
    True: "deterministic: no atomic additions, no kernels chosen by timing; this is slower "
    "(--train.no-deterministic)",
    False: "not deterministic: every run gives other bits (--train.deterministic)",
}


def describe(run: Run, setup: Setup, console: Console) -> None:
    """Print the attention cores, the parameters, the devices, and warnings about the settings."""
    devices, params = setup.mesh.devices.ravel(), setup.abstract.params
    model, length, config = run.model, run.data.max_length, run.train
    sizes = ", ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())
    names = dict.fromkeys(model.attention.core_of(site) for site in model.sites)
    platform, shards = devices[0].platform, setup.mesh.shape["seq"]
    for core, reason in (choose(name, platform, length, shards=shards) for name in names):
        console.print(f"attention core: {core} ({reason})")
    count = f"{parameter_count(params):,}"
    training = parameter_count(split(params, setup.factors)[0])
    if training < parameter_count(params):
        count += f", of which {training:,} train"
    console.print(f"parameters: {count} ({model.architecture})")
    hosts = f" on {jax.process_count()} processes" if is_multiprocess() else ""
    console.print(f"devices: {devices.size} x {devices[0].device_kind}{hosts} (mesh: {sizes})")
    if config.optimizer.warmup_steps > config.steps:
        console.print(_unfinished(config), style="yellow")
    if platform == "gpu":
        console.print(DETERMINISM[config.deterministic])


def _unfinished(config: TrainConfig) -> str:
    """Return a warning about a warmup that is longer than the training run."""
    optimizer = config.optimizer
    last = np.asarray(learning_rate(optimizer, config.steps)(config.steps - 1)).item()
    return (
        f"train.optimizer.warmup_steps = {optimizer.warmup_steps:,} is more than train.steps = "
        f"{config.steps:,}: the learning rate ends at {last:.3g} and never reaches "
        f"train.optimizer.peak_lr = {optimizer.peak_lr:.3g}; shorten the warmup, or train longer"
    )
