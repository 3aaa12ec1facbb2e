"""Small tasks to learn in seconds: a language pair, running text, and tables with labels.

Words are those of a language in which each word has one translation, and the order is reversed.
"""

from pathlib import Path

import numpy as np

SOURCE = ["red", "green", "blue", "small", "large", "cat", "dog", "bird", "runs", "sleeps", "sings"]
TARGET = ["rot", "gruen", "blau", "klein", "gross", "katze", "hund", "vogel", "rennt", "schlaeft",
          "singt"]  # fmt: skip


def translate(line: str) -> str:
    table = dict(zip(SOURCE, TARGET, strict=True))
    return " ".join(table[word] for word in reversed(line.split()))


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(SOURCE, rng.integers(1, 8))) for _ in range(count)]


def write_corpus(folder: Path, sizes: dict[str, int] | None = None) -> list[str]:
    """Writes the splits as pairs of files, and returns the flags that name them."""
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


def write_text(folder: Path, lines: int = 307) -> list[str]:
    """Writes running text into one file, and returns the flags that name it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "text.txt"
    path.write_text("".join(line + ".\n" for line in sentences(lines)))
    return ["--data.source", "files", "--data.train", str(path), "--data.holdout", "0.1"]


def label(sentence: str) -> str:
    """What is red is good, unless it is a dog."""
    words = sentence.split()
    return "good" if "red" in words and "dog" not in words else "bad"


def number(sentence: str) -> str:
    """The share of animals."""
    words = sentence.split()
    return f"{sum(word in ('cat', 'dog', 'bird') for word in words) / len(words):.3f}"


def write_table(folder: Path, of=label, rows: int = 499) -> list[str]:
    """Writes sentences with `of(sentence)` as label, and returns the flags that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "table.tsv"
    lines = [f"{line}\t{of(line)}\n" for line in sentences(rows)]
    path.write_text("text\tlabel\n" + "".join(lines))
    return ["--data.source", "files", "--data.train", str(path), "--data.holdout", "0.1"]


def flags(
    corpus: list[str],
    run_dir: Path,
    steps: int = 12,
    every: int = 4,
    config: str = "translate_tiny",
) -> list[str]:
    """The command line of a run of a few seconds."""
    return [
        config, "--run-dir", str(run_dir), *corpus,
        "--data.batch-tokens", "256", "--data.buckets", "1", "--data.max-length", "16",
        "--data.batch-multiple", "8",
        "--model.width", "16", "--model.layers", "1", "--model.attention.heads", "2",
        "--model.feed-forward.width", "32",
        "--train.steps", str(steps), "--train.checkpoint-every", str(every),
        "--train.log-every", "2", "--train.keep", "3", "--train.average", "2",
        "--train.samples", "2", "--train.decode.extra-length", "5",
        "--train.optimizer.warmup-steps", "5", "--train.optimizer.schedule", "inverse_sqrt",
    ]  # fmt: skip
