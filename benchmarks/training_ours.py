"""The worker for this library's step: `python -m benchmarks.training_ours SETTING LIBRARY`."""

import dataclasses
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.beside import Setting
from benchmarks.worker import Ready, answer_with, ceiling, highest_resident, samples
from heedful.configs import base
from heedful.train.cpu_allocator import keep_in_place
from heedful.train.inspection.costs import parts
from heedful.train.model_loss import language_model_loss
from heedful.train.state import first_state, init_params, parameter_count, set_up
from heedful.train.step import make_train_step

BEGAN = time.perf_counter()


def prepare(setting: Setting) -> Ready:
    keep_in_place()
    experiment = base.load(setting.config)[0]
    optimizer = dataclasses.replace(experiment.train.optimizer, clip_norm=1.0)
    targets = setting.targets or setting.length
    chunk = setting.targets or experiment.train.loss_chunk
    config = dataclasses.replace(experiment.train, optimizer=optimizer, loss_chunk=chunk)
    part, rate = experiment.model, setting.dropout
    model = dataclasses.replace(
        part,
        vocab_size=setting.vocab_size,
        dtype=setting.dtype,
        dropout=rate,
        attention=dataclasses.replace(part.attention, dropout=rate, core=setting.core),
        feed_forward=dataclasses.replace(part.feed_forward, dropout=rate),
    )
    setup = set_up(model, config)
    step = make_train_step(model, config, setup, language_model_loss)
    random = np.random.default_rng(0)
    shape = setting.rows, setting.length

    def tokens() -> np.ndarray:
        return random.integers(4, setting.vocab_size, shape, np.int32)

    is_target = random.permuted(np.broadcast_to(np.arange(setting.length), shape), axis=1) < targets
    batch = {"inputs": tokens(), "targets": tokens(), "weights": is_target.astype(np.float32)}
    if model.architecture == "encoder_decoder":
        batch["encoder_inputs"] = tokens()
    held = [first_state(setup, init_params(model, setup.mesh, 0))]
    keys = setting.length // (2 if model.architecture == "decoder_only" else 1)
    share = targets / setting.length
    flops = sum(
        part.flops * (share if part.name == "head" else 1)
        for part in parts(model, held[0].params, keys)
    )

    def run(steps: int = setting.steps) -> None:
        with jax.set_mesh(setup.mesh):
            metrics: dict[str, Any] = {"loss": 0.0}
            for _ in range(steps):
                held[0], metrics = step(held[0], batch)
            float(metrics["loss"])

    run(3)
    start = time.perf_counter() - BEGAN
    if setting.profile:
        with jax.profiler.trace(setting.profile):
            run()
    return samples(run, peak), {
        "start": start,
        "flops": 3 * flops * setting.rows * setting.length,
        "parameters": parameter_count(held[0].params),
        **about_jax(setting.dtype, setting.product),
    }


def about_jax(dtype: str, size: int) -> dict[str, Any]:
    """Return the ceiling, the version and the device of this library."""
    large, product = jnp.ones((size, size), dtype), jax.jit(jnp.matmul)
    best = ceiling(lambda: product(large, large).block_until_ready(), size)
    device = jax.devices()[0].device_kind
    return {"ceiling": best, "versions": f"jax {jax.__version__} on {device}"}


def peak() -> int:
    """Return the peak memory in bytes, of the device if it has its own memory."""
    counted = jax.devices()[0].memory_stats() or {}
    return counted.get("peak_bytes_in_use") or highest_resident()


if __name__ == "__main__":
    answer_with(lambda: prepare(Setting(**json.loads(sys.argv[1]))))
