"""A language pair to learn in seconds: each word has one translation, the order is reversed."""

from pathlib import Path

import numpy as np

SOURCE = ["red", "green", "blue", "small", "large", "cat", "dog", "bird", "runs", "sleeps", "sings"]
TARGET = ["rot", "gruen", "blau", "klein", "gross", "katze", "hund", "vogel", "rennt", "schlaeft",
          "singt"]  # fmt: skip


def translate(line: str) -> str:
    table = dict(zip(SOURCE, TARGET, strict=True))
    return " ".join(table[word] for word in reversed(line.split()))


def write_corpus(folder: Path, sizes: dict[str, int] | None = None) -> list[str]:
    """Writes the splits as pairs of files, and returns the flags that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    flags = ["--data.source", "files", "--data.tokenizer.kind", "words"]
    for split, size in (sizes or {"train": 211, "valid": 23, "test": 29}).items():
        lines = [" ".join(rng.choice(SOURCE, rng.integers(1, 8))) for _ in range(size)]
        source, target = folder / f"{split}.en", folder / f"{split}.de"
        source.write_text("".join(line + "\n" for line in lines))
        target.write_text("".join(translate(line) + "\n" for line in lines))
        flags += [f"--data.{split}", str(source), str(target)]
    return flags


def flags(corpus: list[str], run_dir: Path, steps: int = 12, every: int = 4) -> list[str]:
    """The command line of a run of a few seconds."""
    return [
        "translate_tiny", "--run-dir", str(run_dir), *corpus,
        "--data.batch-tokens", "256", "--data.buckets", "1", "--data.max-length", "16",
        "--model.width", "16", "--model.layers", "1", "--model.attention.heads", "2",
        "--model.feed-forward.width", "32",
        "--train.steps", str(steps), "--train.checkpoint-every", str(every),
        "--train.log-every", "2", "--train.keep", "3", "--train.average", "2",
        "--train.samples", "2", "--train.decode.extra-length", "5",
        "--train.optimizer.warmup-steps", "5", "--train.optimizer.schedule", "inverse_sqrt",
    ]  # fmt: skip
