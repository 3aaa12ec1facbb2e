"""Train an experiment: the trainer of Python and of `heedful train`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from heedful.data.config import DataConfig, TokenizerConfig
from heedful.data.pipeline import Dataset
from heedful.data.tokenizer import Tokenizer
from heedful.train import loop
from heedful.train.audit.report import audit_before_training
from heedful.train.config_json import differences, to_json
from heedful.train.conversion.init_from import merge_set_fields
from heedful.train.conversion.source import open_source
from heedful.train.errors import TrainError, require
from heedful.train.experiment import Experiment
from heedful.train.hosts import primary_first
from heedful.train.inspection.curves import try_plot
from heedful.train.load import Trained, load
from heedful.train.messages import quiet
from heedful.train.observers import Observer
from heedful.train.run import Run
from heedful.train.start import start_run
from heedful.train.trackers import tracked
from heedful.train.trained_run import TrainedRun


def fit(
    experiment: Experiment,
    run_dir: str | Path,
    *,
    train: Dataset | None = None,
    valid: Dataset | None = None,
    test: Dataset | None = None,
    tokenizer: Tokenizer | None = None,
    callbacks: Sequence[Observer] = (),
    console: Console | None = None,
    fallback: bool = False,
    audit: bool = True,
) -> TrainedRun:
    """Train an experiment in the directory `run_dir`, and return the trained run.

    The same call again resumes a run that was interrupted, or returns a finished one. The directory
    is that of `heedful train`: all commands can use it, and plot.png in it shows the curves.

    experiment: settings of model, data and training. With train.init_from, the model below the head
    is that of the source; a field of experiment.model with another value than there is an error.
    train, valid, test: data from texts of the program (`Dataset.from_texts`, ...), in place of
    experiment.data; train and valid belong together. None: experiment.data names the data.
    tokenizer: tokenizer in place of experiment.data.tokenizer; None: that of `train`, or one that
    is learned from the training texts.
    callbacks: objects that receive the events of training; an exception of a callback ends it.
    console: for messages and a progress bar; None: nothing is printed, and texts of
    experiment.data that are left out are told in a UserWarning.
    fallback: resume from an earlier checkpoint if the newest is corrupt.
    audit: audit the masks of a small random model of the same config before the first step.

    The parameters of the returned run are, as in `load`, the mean of the newest
    train.average_last checkpoints (5 by default), or those of the best checkpoint if it is 1.

    Raises TrainError, DataError and ModelError for settings that do not fit together; NonFiniteLoss
    (a TrainError) if the loss is not finite; and Interrupted after SIGINT (Ctrl-C) or SIGTERM, when
    the state is saved.

    Example:
        >>> import tempfile, heedful as hf
        >>> texts = ["red cat sleeps", "blue bird sings"] * 32
        >>> tokenizer = hf.Tokenizer.train(texts, hf.TokenizerConfig(kind="words"))
        >>> train, valid = (hf.Dataset.from_texts(part, tokenizer, max_length=8, batch_tokens=64)
        ...     for part in (texts[:48], texts[48:]))
        >>> class Steps(hf.Observer):
        ...     def on_evaluation(self, step, measured):
        ...         print(f"step {step}:", *measured)
        >>> experiment = hf.Experiment(
        ...     model=hf.ModelConfig(architecture="decoder_only", width=16, layers=1,
        ...         attention=hf.AttentionConfig(heads=2)),
        ...     train=hf.TrainConfig(steps=2))
        >>> run = hf.fit(experiment, tempfile.mkdtemp(), train=train, valid=valid,
        ...     callbacks=[Steps()], audit=False)
        step 2: loss
        >>> run.steps
        [2]
    """
    console, directory = console or quiet(), Path(run_dir)
    given = {"train": train, "valid": valid, "test": test}
    data = {split: dataset for split, dataset in given.items() if dataset is not None} or None
    config = experiment.data
    if data is not None:
        config, tokenizer = _of_datasets(experiment, data, tokenizer)
        data = {split: replace(dataset, split=split) for split, dataset in data.items()}
    elif tokenizer is not None:
        require(
            config.tokenizer == TokenizerConfig(),
            "a tokenizer is given, and experiment.data.tokenizer is set: leave one of them out",
        )
    model, init_from = experiment.model, experiment.train.init_from
    if init_from is not None:
        model = merge_set_fields(model, open_source(init_from, console).model)
    parts = directory, model, config, experiment.train
    run = primary_first(lambda: start_run(*parts, console, tokenizer))
    trained = train_run(
        run, console, audit=audit, fallback=fallback, observers=callbacks, data=data
    )
    return TrainedRun(trained, data)


def train_run(
    run: Run,
    console: Console,
    *,
    audit: bool = True,
    fallback: bool = False,
    observers: Sequence[Observer] = (),
    data: Mapping[str, Dataset] | None = None,
    evaluate: Callable[[Trained], dict[str, Any]] | None = None,
) -> Trained:
    """Audit, train or resume a run, draw its curves, and load its parameters.

    The tracker of the run, if it has one, receives what happens, and in the end the scores that
    `evaluate` returns, and the pictures.
    """
    if audit:
        audit_before_training(run.model, run.data, console)
    with tracked(run, console) as tracker:
        loop.fit(run, console, fallback=fallback, observers=[*observers, tracker], data=data)
        try_plot(run, console)
        trained = load(run.directory, console, fallback=fallback)
        tracker.on_result(evaluate(trained) if evaluate else {}, run.directory)
    return trained


def _of_datasets(
    experiment: Experiment, data: dict[str, Dataset], tokenizer: Tokenizer | None
) -> tuple[DataConfig, Tokenizer]:
    """Return the data config and the tokenizer of datasets; raise TrainError if they differ."""
    for split in ("train", "valid"):
        require(
            split in data, f"{split} is missing: give both train and valid, or none of the datasets"
        )
    first = data["train"]
    require(
        experiment.data in (DataConfig(), first.config),
        "datasets are given, and experiment.data is set to something else: leave experiment.data "
        "out, as the datasets have their own settings",
    )
    for split, dataset in data.items():
        if other := list(differences(to_json(dataset.config), to_json(first.config), "data")):
            raise TrainError(
                f"the dataset {split} has other settings than train ({'; '.join(other[:3])}): make "
                "both with the same"
            )
        require(
            dataset.split == split or not dataset.config.holdout,
            f"the dataset {split} was made with split={dataset.split!r}: make it with "
            f"split={split!r}",
        )
        require(
            dataset.seed == experiment.train.seed,
            f"the dataset {split} has the seed {dataset.seed}, but train.seed is "
            f"{experiment.train.seed}: give both the same",
        )
        own = tokenizer or first.tokenizer
        require(
            dataset.tokenizer.fingerprint == own.fingerprint,
            f"the dataset {split} has another tokenizer: make all datasets with the same tokenizer",
        )
    return first.config, tokenizer or first.tokenizer
