"""Translate the test data, and score the translations."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from heedful.data import sources
from heedful.data.examples import Example
from heedful.data.text_files import one_line
from heedful.train.config import DecodeConfig
from heedful.train.config_json import to_json
from heedful.train.evaluation import scores
from heedful.train.inference.translate import Translator
from heedful.train.load import Trained


class Translations(NamedTuple):
    """Translations of the test data, and their scores."""

    result: dict[str, Any]
    """Scores with their signatures, and the settings of decoding."""
    lines: list[str]
    """Scores and samples for people."""
    text: str
    """All translations, one per line."""


def translate_test(
    trained: Trained,
    decode: DecodeConfig,
    console: Console,
    seed: int,
    examples: Sequence[Example] | None = None,
) -> Translations:
    """Translate the test split, and score the translations; examples None: those of the run."""
    run, tokenizer = trained.run, trained.tokenizer
    translator = trained.writer(Translator, decode, seed)
    examples = list(sources.load(run.data, "test") if examples is None else examples)
    started = time.perf_counter()
    with console.status(f"translating {len(examples):,} test sentences"):
        translations = translator([example["source"] for example in examples])
    seconds = time.perf_counter() - started
    references = [tokenizer.plain(example["target"]) for example in examples]
    result: dict[str, Any] = {"decode": to_json(decode), "seed": seed}
    lines = []
    measured = scores.translation(translations, references, pretokenized=tokenizer.pretokenized)
    for name, (score, signature) in measured.items():
        lines.append(f"test {name}: {score:.2f} ({signature})")
        result |= {f"test_{name.lower()}": score, f"{name.lower()}_signature": signature}
    lines.append(f"translated {len(examples):,} sentences in {seconds:.1f} s")
    picked = np.random.default_rng(0).permutation(len(examples))[: run.train.samples]
    for i in picked:
        lines.append(f"\n  source     {one_line(tokenizer.plain(examples[i]['source']))}")
        lines.append(f"  reference  {one_line(references[i])}")
        lines.append(f"  heedful    {translations[i]}")
    return Translations(result, lines, "".join(line + "\n" for line in translations))
