"""How good a model is: loss and perplexity, BLEU and chrF, accuracy and correlations."""

import hashlib
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from heedful.data import sources
from heedful.data.pipeline import Dataset
from heedful.data.store import fingerprint
from heedful.data.text_files import one_line
from heedful.data.writing import write_whole
from heedful.train.config import DecodeConfig, TrainError
from heedful.train.evaluation import scores
from heedful.train.evaluation.perplexity import NOTHING_TO_PREDICT, strided_loss
from heedful.train.hosts import is_first, primary_first
from heedful.train.inference.translate import Translator
from heedful.train.load import Trained
from heedful.train.reproducibility.record import data_record
from heedful.train.run import Run, to_json, write_json
from heedful.train.sharding import require_divisible, rows_here, to_devices
from heedful.train.step import make_eval_step

SPLITS = {"valid": "validation", "test": "test"}
NO_BETTER = 0.98
NOTHING_LEARNED = (
    "that is no better: nothing but frequencies was learned. Look at the learning rate and its "
    "warmup, the positions, the residuals and norms, and at whether inputs and targets belong "
    "together"
)


def measure(eval_step: Callable, params: Any, dataset: Dataset, mesh: Mesh) -> dict[str, float]:
    """Mean losses over the whole dataset, each example once, and the scores of a classifier.

    A loss is in nats per predicted token or class, or the squared error of a regression.
    """
    totals: defaultdict[str, float] = defaultdict(float)
    total_weight = 0.0
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    pending = []
    for batch in dataset.eval_batches(*rows_here(mesh)):
        pending.append(eval_step(params, to_devices(batch, mesh)))
    for losses, weight, predicted in jax.device_get(pending):
        for name, loss in losses.items():
            totals[name] += float(loss)
        total_weight += float(weight)
        if predicted is not None:
            outputs, targets, counts = predicted
            kept.append((outputs[counts > 0], targets[counts > 0]))
    if not total_weight:
        raise TrainError(NOTHING_TO_PREDICT.format(split=dataset.split))
    measured = {name: total / total_weight for name, total in totals.items()}
    if kept:
        outputs, targets = map(np.concatenate, zip(*kept, strict=True))
        score = scores.regression if targets.dtype == np.float32 else scores.classification
        measured |= score(outputs, targets)
    return measured


def frequency_loss(dataset: Dataset) -> float:
    """What `measure` would give for a guess that knows how frequent each target is, nothing else.

    That is the entropy of the targets in nats; for a regression their variance.
    """
    targets = (batch["targets"][batch["weights"] > 0] for batch in dataset.eval_batches())
    if dataset.config.objective == "regression":
        return float(np.concatenate(list(targets)).var())
    counts: Counter[int] = Counter()
    for some in targets:
        counts.update(dict(zip(*np.unique(some, return_counts=True), strict=True)))
    shares = np.array(list(counts.values())) / counts.total()
    return float(-np.sum(shares * np.log(shares)))


def report(
    trained: Trained,
    decode: DecodeConfig,
    console: Console,
    *,
    seed: int = 0,
    stride: int | None = None,
    other_data: bool = False,
    directory: Path | None = None,
) -> dict[str, Any]:
    """Writes what the model scores on validation and test data to result.json, and prints it.

    Where nothing can be written, as in the run of somebody else, it is printed all the same. With
    the scores stands what they are of: the steps of the checkpoints, how it was decoded. For a
    translation samples are shown, and all translations written beside it. They lie in `directory`;
    None: that of the run. With a `stride` long documents are read in windows that overlap
    (`strided_loss`). Raises TrainError where the devices do not divide the batches, where a loss is
    no number, and, unless `other_data` allows it, where the data are not those of the training.
    """
    run, tokenizer = trained.run, trained.tokenizer
    directory = directory or run.directory
    eval_step = make_eval_step(
        run.model, trained.mesh, run.train.loss_chunk, run.train.deterministic
    )
    result: dict[str, Any] = {"checkpoints": trained.steps}
    if stride is not None:
        result["stride"] = stride
    lines: list[str] = []
    for split in SPLITS:
        prepare = partial(Dataset.prepare, run.data, tokenizer, split, seed=run.train.seed)
        dataset = primary_first(prepare)
        _require_same(run, dataset, console, other_data)
        for line in dataset.report:
            console.print(line)
        for shape in dataset.eval_plan.shapes:
            require_divisible(shape, 1, trained.mesh)
        with jax.set_mesh(trained.mesh):
            if stride is None:
                measured = measure(eval_step, trained.params, dataset, trained.mesh)
            else:
                loss = strided_loss(eval_step, trained.params, dataset, trained.mesh, stride)
                measured = {"loss": loss}
        name = SPLITS[split]
        if not math.isfinite(measured["loss"]):
            raise TrainError(
                f"the {name} loss is {measured['loss']}, with the parameters of step "
                f"{', '.join(map(str, trained.steps))}: nothing is written; choose another "
                "--checkpoint, or train with a lower train.optimizer.peak_lr"
            )
        lines += [f"{name} {line}" for line in describe(measured, dataset)]
        if is_first():
            measured["frequency_loss"] = known = frequency_loss(dataset)
            lines.append(f"{name} loss of a guess by frequency alone: {known:.4f}")
            if measured["loss"] > NO_BETTER * known:
                lines.append(NOTHING_LEARNED)
        result |= {f"{split}_{key}": value for key, value in measured.items()}
    is_written = _write(directory, result, console)
    for line in lines:
        console.print(line, markup=False)
    if run.data.objective == "translation":
        scored, lines, text = _translate(trained, decode, console, seed)
        result |= scored
        is_written = _write(directory, result, console, text)
        for line in lines:
            console.print(line, markup=False)
    where = "the run lies in" if directory == run.directory else "result.json lies in"
    if is_written:
        console.print(f"\n{where} {directory}", markup=False)
    return result


def evaluation_directory(
    run: Run,
    decode: DecodeConfig,
    *,
    checkpoint: str | None,
    fallback: bool,
    seed: int,
    stride: int | None,
    other_data: bool,
) -> Path:
    """Where the scores of these settings lie: in the run, where they are those of the training.

    Raises TrainError where a link stands there: it could lead to the files of a user.
    """
    ours, usual = to_json(decode), to_json(run.train.decode)
    usually = "average" if run.train.average_last > 1 else "best"
    others = {
        "checkpoint": None if checkpoint == usually else checkpoint,
        "fallback": fallback or None,
        **{name: value for name, value in ours.items() if value != usual[name]},
        "seed": seed or None,
        "stride": stride,
        "other_data": other_data or None,
    }
    settings = ",".join(f"{name}={value}" for name, value in others.items() if value is not None)
    if not settings:
        return run.directory
    name = re.sub(r"[^\w.,=-]", "_", settings, flags=re.ASCII)
    if name != settings or len(name) > 100:
        name = f"{name[:100]},{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    place = run.directory / "evaluations" / name
    for folder in (place.parent, place):
        if folder.is_symlink():
            raise TrainError(f"{folder} is a link, and nothing is written through one: remove it")
    return place


def _require_same(run: Run, dataset: Dataset, console: Console, other_data: bool) -> None:
    """Compares the data of a split with the record of the training."""
    known, split, now = data_record(run), dataset.split, dataset.data_fingerprint
    if not known:
        console.print(f"{run.directory} has no record of its training data: these may be others")
        return
    if split == "test" and split not in known and not run.data.test and "train" in known:
        # In a record of before there is no test; this is a part of what is recorded.
        split, now = "train", primary_first(lambda: fingerprint(sources.load(run.data, "train")))
    if known.get(split, now) == now:
        return
    files = ", ".join(getattr(run.data, dataset.split) or run.data.train) or run.data.source
    problem = (
        f"the {SPLITS[dataset.split]} data of {run.directory}, from {files}, are not those of its "
        "training: their scores cannot be compared with others of the run"
    )
    if not other_data:
        raise TrainError(f"{problem}; put them back, or measure these with --other-data")
    console.print(problem, style="yellow", markup=False)


def _write(
    directory: Path, result: dict[str, Any], console: Console, translations: str | None = None
) -> bool:
    """Writes what was computed, before any of it is shown: a reader of output may go away.

    Returns whether it could be written.
    """
    if not is_first():
        return True
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "result.json", result)
        if translations is not None:
            write_whole(directory / "translations.test.txt", translations)
    except OSError as error:
        problem = f"{error.filename} cannot be written ({error.strerror}): what follows is only "
        console.print(f"{problem}shown, copy the run to keep it", style="yellow")
        return False
    return True


def describe(measured: dict[str, float], dataset: Dataset) -> list[str]:
    """What was measured, in lines for people; the scores that decide come first."""
    config, loss = dataset.config, measured["loss"]
    if config.objective == "regression":
        lines = [f"mean squared error: {loss:.4f}"]
    elif config.objective == "classification":
        lines = [f"loss: {loss:.4f} nats per example"]
    else:
        perplexity = math.exp(loss) if loss < 700 else math.inf
        lines = [f"loss: {loss:.4f} nats per token (perplexity {perplexity:.2f})"]
    if config.objective == "causal_lm":
        bits = loss * dataset.target_count / dataset.characters / math.log(2)
        lines.append(f"bits per character: {bits:.4f}")
    others = {name: value for name, value in measured.items() if name != "loss"}
    deciding = scores.main_scores(config.source, others)
    ordered = [*deciding, *(name for name in others if name not in deciding)]
    named = {name: name for name in ordered}
    if "f1" in named:
        of = (
            f"class {dataset.classes[1]}"
            if len(dataset.classes) == 2
            else "all classes, their mean"
        )
        named["f1"] = f"f1 of {of}"
    return lines + [f"{named[name]}: {100 * others[name]:.2f} %" for name in ordered]


def _translate(
    trained: Trained, decode: DecodeConfig, console: Console, seed: int
) -> tuple[dict[str, Any], list[str], str]:
    """Translates the test split.

    Returns the scores with their signatures, the lines that show them and samples, and all
    translations.
    """
    run, tokenizer = trained.run, trained.tokenizer
    translator = Translator(run.model, decode, tokenizer, trained.params, trained.mesh, seed)
    examples = list(sources.load(run.data, "test"))
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
    return result, lines, "".join(line + "\n" for line in translations)
