"""`heedful evaluate`: measure a run on validation and test data; print and write its scores."""

import hashlib
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from heedful.data import sources
from heedful.data.pipeline import Dataset
from heedful.data.store import fingerprint
from heedful.data.writing import write_whole
from heedful.train.config import DecodeConfig
from heedful.train.config_json import to_json, write_json
from heedful.train.errors import TrainError
from heedful.train.evaluation.measure import describe, frequency_loss, measure
from heedful.train.evaluation.perplexity import strided_loss
from heedful.train.evaluation.translations import translate_test
from heedful.train.hosts import is_first, primary_first
from heedful.train.load import Trained
from heedful.train.reproducibility.record import data_record
from heedful.train.run import Run
from heedful.train.sharding import require_divisible
from heedful.train.step import make_eval_step
from heedful.train.tasks import task_of

SPLITS = {"valid": "validation", "test": "test"}
NO_BETTER = 0.98
NOTHING_LEARNED = (
    "the model is no better: it has learned only frequencies. Check the learning rate and its "
    "warmup, the positions, the residuals and norms, and that inputs and targets belong together"
)


def report(
    trained: Trained,
    decode: DecodeConfig,
    console: Console,
    *,
    seed: int = 0,
    stride: int | None = None,
    other_data: bool = False,
    directory: Path | None = None,
    data: Mapping[str, Dataset] | None = None,
) -> dict[str, Any]:
    """Write the scores of a model on validation and test data to result.json, and print them.

    result.json also has the steps of the checkpoints and the settings of decoding. For translation,
    samples are printed, and all translations are written to a file in the same directory:
    `directory`, or None for the directory of the run. If the directory is not writable, the scores
    are only printed. With `stride`, long documents are read in overlapping windows (see
    `strided_loss`). `data` has the datasets of a run on texts of a program, by split; splits that
    it lacks are left out; None: the data are read as the run says. Raises TrainError if the devices
    do not divide the batches, if a loss is not finite, and, without `other_data`, if the data
    differ from those of the training run.
    """
    run, tokenizer = trained.run, trained.tokenizer
    directory, task = directory or run.directory, task_of(run.data)
    eval_step = make_eval_step(
        run.model, trained.mesh, task.loss, run.train.loss_chunk, run.train.deterministic
    )
    result: dict[str, Any] = {"checkpoints": trained.steps}
    if stride is not None:
        result["stride"] = stride
    lines: list[str] = []
    for split in SPLITS if data is None else [name for name in SPLITS if name in data]:
        prepare = partial(Dataset.prepare, run.data, tokenizer, split, seed=run.train.seed)
        dataset = primary_first(prepare) if data is None else data[split]
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
        if is_first() and (known := frequency_loss(dataset)) is not None:
            measured["frequency_loss"] = known
            lines.append(f"{name} loss of a guess by frequency alone: {known:.4f}")
            if measured["loss"] > NO_BETTER * known:
                lines.append(NOTHING_LEARNED)
        result |= {f"{split}_{key}": value for key, value in measured.items()}
    is_written = _write(directory, result, console)
    for line in lines:
        console.print(line)
    if task.use == "translate" and (data is None or "test" in data):
        examples = None if data is None else data["test"].texts()
        translations = translate_test(trained, decode, console, seed, examples)
        result |= translations.result
        is_written = _write(directory, result, console, translations.text)
        for line in translations.lines:
            console.print(line)
    where = "the run lies in" if directory == run.directory else "result.json lies in"
    if is_written:
        console.print(f"\n{where} {directory}")
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
    """Return the directory for scores with these settings: the run's, if they are its defaults.

    Raises TrainError if the directory is a link, which could lead to other files of the user.
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
            raise TrainError(
                f"{folder} is a link, and results are not written through links: delete the link"
            )
    return place


def _require_same(run: Run, dataset: Dataset, console: Console, other_data: bool) -> None:
    """Raise TrainError if the data of a split differ from the record; `other_data`: only print."""
    known, split, now = data_record(run), dataset.split, dataset.data_fingerprint
    if not known:
        console.print(f"{run.directory} has no record of its training data: the data may differ")
        return
    if split == "test" and split not in known and not run.data.test and "train" in known:
        # An older record lacks the test data; here they are a part of the recorded training data.
        split, now = "train", primary_first(lambda: fingerprint(sources.load(run.data, "train")))
    if known.get(split, now) == now:
        return
    files = ", ".join(getattr(run.data, dataset.split) or run.data.train) or run.data.source
    problem = (
        f"the {SPLITS[dataset.split]} data of {run.directory}, from {files}, differ from the data "
        "of its training run: their scores cannot be compared with other scores of the run"
    )
    if not other_data:
        raise TrainError(f"{problem}; restore the data, or give --other-data to evaluate on these")
    console.print(problem, style="yellow")


def _write(
    directory: Path, result: dict[str, Any], console: Console, translations: str | None = None
) -> bool:
    """Write the results; return True unless a file cannot be written.

    Call this before results are printed, as a reader of the output may close it.
    """
    if not is_first():
        return True
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "result.json", result)
        if translations is not None:
            write_whole(directory / "translations.test.txt", translations)
    except OSError as error:
        problem = f"{error.filename} cannot be written ({error.strerror}): the results are only "
        console.print(f"{problem}printed; copy the run to keep them", style="yellow")
        return False
    return True
