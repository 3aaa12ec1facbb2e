"""How good a model is: validation loss, perplexity, BLEU."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from sacrebleu.metrics.bleu import BLEU

from data import sources
from data.pipeline import Dataset
from data.tokenizer import Tokenizer
from train.checkpoint import Checkpoints, CorruptCheckpoint
from train.config import DecodeConfig, TrainError
from train.optimizer import make_optimizer
from train.run import Run, write_json
from train.sharding import make_mesh, to_devices
from train.state import abstract_state
from train.step import make_eval_step
from train.translate import Translator


def mean_loss(eval_step: Callable, params: Any, dataset: Dataset, mesh: Mesh) -> float:
    """Cross-entropy in nats per target token over the whole dataset, each example once."""
    parts = []
    for batch in dataset.eval_batches(jax.process_index(), jax.process_count()):
        parts.append(eval_step(params, to_devices(batch, mesh)))
    losses, weights = np.array(jax.device_get(parts), np.float64).T
    return float(losses.sum() / weights.sum())


def bleu(
    translations: Sequence[str], references: Sequence[str], tokenizer: Tokenizer
) -> tuple[float, str]:
    """Corpus BLEU and sacreBLEU's signature (arXiv:1804.08771).

    Text that is tokenised already is compared as it is, once its pieces are joined.
    """
    # `force` only silences the warning about text that is tokenised: here it is meant to be.
    tokenize = "none" if tokenizer.pretokenized else "13a"
    metric = BLEU(tokenize=tokenize, force=tokenizer.pretokenized)
    score = metric.corpus_score(
        list(translations), [[tokenizer.plain(line) for line in references]]
    )
    return score.score, str(metric.get_signature())


class Evaluator:
    """The parameters of a run, ready to be measured and used."""

    def __init__(
        self,
        directory: Path,
        console: Console,
        *,
        checkpoint: str = "average",
        decode: DecodeConfig,
        seed: int = 0,
        fallback: bool = False,
    ):
        self.run, self.console = Run.open(directory), console
        self.tokenizer = self.run.tokenizer()
        self.mesh = make_mesh(self.run.train.mesh)
        optimizer = make_optimizer(self.run.train.optimizer, self.run.train.steps)
        abstract = abstract_state(self.run.model, optimizer, self.mesh).params
        checkpoints = Checkpoints(self.run.checkpoints, self.tokenizer.fingerprint)
        candidates, count = _candidates(checkpoints, checkpoint, self.run.train.average)
        self.params, steps = _average(checkpoints, candidates, count, abstract, fallback, console)
        listed = ", ".join(f"{step:,}" for step in steps)
        console.print(f"parameters of step {listed}" + (" averaged" if len(steps) > 1 else ""))
        self.translator = Translator(
            self.run.model, decode, self.tokenizer, self.params, self.mesh, seed
        )

    def report(self) -> None:
        """Prints validation loss, test BLEU and samples, and writes result.json beside the run."""
        run, console = self.run, self.console
        valid = Dataset.prepare(run.data, self.tokenizer, "valid", seed=run.train.seed)
        with jax.set_mesh(self.mesh):
            loss = mean_loss(make_eval_step(run.model), self.params, valid, self.mesh)
        console.print(f"validation loss: {loss:.4f} nats per token (perplexity {np.exp(loss):.2f})")
        examples = list(sources.load(run.data, "test"))
        started = time.perf_counter()
        with console.status(f"translating {len(examples):,} test sentences"):
            translations = self.translator([example["source"] for example in examples])
        seconds = time.perf_counter() - started
        score, signature = bleu(translations, [e["target"] for e in examples], self.tokenizer)
        console.print(f"test BLEU: {score:.2f} ({signature})")
        console.print(f"translated {len(examples):,} sentences in {seconds:.1f} s")
        picked = np.random.default_rng(0).permutation(len(examples))[: run.train.samples]
        for i in picked:
            source, target = (self.tokenizer.plain(examples[i][s]) for s in ("source", "target"))
            console.print(f"\n  source     {source}", markup=False)
            console.print(f"  reference  {target}", markup=False)
            console.print(f"  heedful    {translations[i]}", markup=False)
        (run.directory / "translations.test.txt").write_text(
            "".join(line + "\n" for line in translations), "utf-8"
        )
        result = {"valid_loss": loss, "test_bleu": score, "signature": signature}
        write_json(run.directory / "result.json", result)
        console.print(f"\nthe run lies in {run.directory}")


def _candidates(checkpoints: Checkpoints, which: str, average: int) -> tuple[list[int], int]:
    """(steps in order of preference, how many of them to average)."""
    newest = checkpoints.steps[::-1]
    if not newest:
        raise TrainError(f"{checkpoints.directory} holds no checkpoint yet")
    if which in ("average", "last"):
        return newest, min(average, len(newest)) if which == "average" else 1
    if which == "best":
        best = checkpoints.best()
        return [best, *(step for step in newest if step != best)], 1
    if not which.isdigit() or int(which) not in newest:
        raise TrainError(
            f"no checkpoint '{which}': choose average, last, best, or a step of "
            f"{', '.join(map(str, newest[::-1]))}"
        )
    return [step for step in newest if step <= int(which)], 1


def _average(
    checkpoints: Checkpoints,
    candidates: Sequence[int],
    count: int,
    abstract: Any,
    fallback: bool,
    console: Console,
) -> tuple[Any, list[int]]:
    """Mean parameters (arXiv:1706.03762 §6.1) of the first `count` candidates, and their steps."""
    total, used = None, []
    for step in candidates:
        try:
            params = checkpoints.restore_params(step, abstract)
        except CorruptCheckpoint as error:
            if not fallback:
                raise
            console.print(f"{error}\nleft out", style="yellow")
            continue
        total = params if total is None else jax.tree.map(jnp.add, total, params)
        used.append(step)
        if len(used) == count:
            break
    if not used:
        raise TrainError(f"no checkpoint in {checkpoints.directory} can be read")
    return jax.tree.map(lambda x: x / len(used), total), sorted(used)
