"""Small tasks that a model learns in seconds: a language pair, running text, and labelled tables.

Each word of the language has one translation, and the translation reverses the order of words.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from heedful.data.config import DataConfig
from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    ModelConfig,
    NormConfig,
)
from heedful.train.checkpoint import Checkpoints
from heedful.train.config import DecodeConfig, TrainConfig
from heedful.train.run import Run
from heedful.train.sharding import make_mesh
from heedful.train.start import start_run
from heedful.train.state import TrainState, abstract_params

SOURCE = ["red", "green", "blue", "small", "large", "cat", "dog", "bird", "runs", "sleeps", "sings"]
TARGET = ["rot", "gruen", "blau", "klein", "gross", "katze", "hund", "vogel", "rennt", "schlaeft",
          "singt"]  # fmt: skip


# Texts -------------------------------------------------------------------------------------------


def translate(line: str) -> str:
    table = dict(zip(SOURCE, TARGET, strict=True))
    return " ".join(table[word] for word in reversed(line.split()))


def label(sentence: str) -> str:
    """Return "good" for a sentence with red or green, else "bad"."""
    return "good" if {"red", "green"} & set(sentence.split()) else "bad"


def number(sentence: str) -> str:
    """Return the share of words that name animals."""
    words = sentence.split()
    return f"{sum(word in ('cat', 'dog', 'bird') for word in words) / len(words):.3f}"


def sentences(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(SOURCE, rng.integers(1, 8))) for _ in range(count)]


def write_corpus(folder: Path, sizes: dict[str, int] | None = None) -> list[str]:
    """Write the splits as pairs of files, and return the flags that name the files."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["--data.source", "files", "--data.tokenizer.kind", "words"]
    sizes = sizes or {"train": 211, "valid": 23, "test": 29}
    lines = sentences(sum(sizes.values()))
    for split, size in sizes.items():
        part, lines = lines[:size], lines[size:]
        source, target = folder / f"{split}.en", folder / f"{split}.de"
        source.write_text("".join(line + "\n" for line in part))
        target.write_text("".join(translate(line) + "\n" for line in part))
        flags += [f"--data.{split}", str(source), str(target)]
    return flags


def write_text(folder: Path) -> Path:
    """Write running text."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "text.txt"
    path.write_text("".join(line + ".\n" for line in sentences(307)))
    return path


def write_table(folder: Path, of: Callable[[str], str] = label, rows: int = 499) -> Path:
    """Write sentences with `of(sentence)` as their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "table.tsv"
    lines = [f"{line}\t{of(line)}\n" for line in sentences(rows)]
    path.write_text("text\tlabel\n" + "".join(lines))
    return path


# Runs --------------------------------------------------------------------------------------------


def files(path: Path) -> list[str]:
    """Return flags for data in one file; a tenth is for validation and a tenth for the test."""
    return ["--data.source", "files", "--data.train", str(path), "--data.holdout", "0.1"]


def flags(
    data: list[str], run_dir: Path, steps: int = 12, every: int = 4, config: str = "translate_tiny"
) -> list[str]:
    """Return the command line of a run that takes a few seconds."""
    return [
        config, "--run-dir", str(run_dir), *data,
        "--data.batch-tokens", "256", "--data.batch-multiple", "8",
        "--data.buckets", "1", "--data.max-length", "16",
        "--model.width", "16", "--model.layers", "1", "--model.attention.heads", "2",
        "--model.feed-forward.width", "32",
        *training(steps, every),
    ]  # fmt: skip


def training(steps: int = 12, every: int = 4) -> list[str]:
    """Return the part of the command line that does not concern the model and the data."""
    return [
        "--train.steps", str(steps), "--train.checkpoint-every", str(every),
        "--train.log-every", "2", "--train.max-checkpoints", "3", "--train.average-last", "2",
        "--train.samples", "2", "--train.decode.extra-length", "5",
        "--train.optimizer.warmup-steps", "5", "--train.optimizer.schedule", "inverse_sqrt",
        "--train.optimizer.final-lr", "0",
        "--no-audit",  # test_masks_audit.py runs the audit
    ]  # fmt: skip


QUIET = Console(quiet=True, markup=False)
CLASSIFIER = HeadConfig(kind="classifier", pooling="mean", pooler=False)


def model(architecture: str = "encoder_only", **values: Any) -> ModelConfig:
    """Return the smallest model of an architecture."""
    return ModelConfig(
        architecture=architecture,  # type: ignore[arg-type]
        width=16,
        layers=2,
        attention=AttentionConfig(heads=2),
        feed_forward=FeedForwardConfig(width=12),
        norm=NormConfig(position="pre"),
        **values,
    )


def data(path: Path, objective: str, **values: Any) -> DataConfig:
    """Return the config of data in one file."""
    return DataConfig(
        source="files",
        train=(str(path),),
        holdout=0.1,
        objective=objective,  # type: ignore[arg-type]
        **{"batch_tokens": 256, "max_length": 16, "buckets": 1, **values},
    )


TRAIN = TrainConfig(
    label_smoothing=0.0,
    max_checkpoints=3,
    average_last=2,
    decode=DecodeConfig(beam=1, max_tokens=7),
)


def random_run(
    directory: Path,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig = TRAIN,
    scores: Mapping[int, float] | None = None,
) -> Run:
    """Write a run with random parameters in checkpoints at the steps of `scores`."""
    run, scores = start_run(directory, model, data, train, QUIET), scores or {3: 0.0}
    mesh = make_mesh(run.train.mesh)
    checkpoints = Checkpoints(
        run.checkpoints, run.tokenizer().fingerprint, keep=train.max_checkpoints
    )
    for step, score in scores.items():
        params = random_params(run.model, mesh, seed=step)
        state = TrainState(jnp.int32(step), params, {"count": jnp.int32(step)})
        checkpoints.save(state, {"config": run.values()})
        checkpoints.wait()
        checkpoints.add_score(step, score)
    checkpoints.close()
    return run


def random_params(model: ModelConfig, mesh: Mesh, seed: int) -> Any:
    """Return random parameters, also for biases and scales, without compiling a program."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jax.device_put(rng.normal(0, 0.3, x.shape).astype(x.dtype), x.sharding),
        abstract_params(model, mesh),
    )
