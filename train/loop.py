"""fit(): train a run from its configs, or resume the run where an earlier call stopped."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from heedful.data.examples import SPLITS
from heedful.data.iterator import TrainIterator
from heedful.data.pipeline import Dataset
from heedful.data.tokenizer import Tokenizer
from heedful.train.async_saver import Saving
from heedful.train.checkpoint import Checkpoints, CorruptCheckpoint
from heedful.train.conversion.init_from import init_from_pretrained
from heedful.train.conversion.source import open_source
from heedful.train.describe import describe
from heedful.train.errors import TrainError
from heedful.train.evaluation.measure import measure
from heedful.train.hosts import is_first, primary_first, require_same
from heedful.train.inference.translate import require_positions
from heedful.train.messages import lasting
from heedful.train.meter import AHEAD, Meter
from heedful.train.metrics import MetricsWriter, scores
from heedful.train.observers import Observer, ProgressBar
from heedful.train.patience import Patience
from heedful.train.plan.oom_advice import explained
from heedful.train.reproducibility.fingerprint import make_fingerprint
from heedful.train.reproducibility.record import (
    FingerprintWriter,
    add_environment,
    environment,
)
from heedful.train.run import Run
from heedful.train.sharding import require_divisible, rows_here, to_devices
from heedful.train.state import Setup, TrainState, first_state, init_params, set_up
from heedful.train.step import make_eval_step, make_train_step
from heedful.train.stop import Stop
from heedful.train.tasks import task_of
from heedful.train.trainable import named


def fit(
    run: Run,
    console: Console,
    *,
    fallback: bool = False,
    start: tuple[TrainState, dict] | None = None,
    observers: Sequence[Observer] = (),
    data: Mapping[str, Dataset] | None = None,
) -> None:
    """Train up to step `train.steps`, from `start`, or else from the newest checkpoint, if any.

    With `fallback`, an earlier checkpoint is used if the newest is corrupt. `observers` receive the
    events of the training run; an exception of an observer ends the run. `data` has the datasets of
    a run on texts of a program, by split; None: they are read as the run says. Raises
    NonFiniteLoss, CorruptCheckpoint, SaveFailed for the last checkpoint, and, after saving,
    Interrupted on SIGINT or SIGTERM to any process.
    """
    config, tokenizer, task = run.train, run.tokenizer(), task_of(run.data)
    with console.status("reading the data"):
        # Test data are used at the end; read them now, to report errors early.
        splits = {split: _prepare(run, tokenizer, split, data) for split in data or SPLITS}
        if "test" in splits:
            primary_first(lambda: _require_room(run, splits["test"]))
    train_data, valid_data = splits["train"], splits["valid"]
    require_same("config", repr((run.model, run.data, config)))
    require_same("tokenizer", tokenizer.fingerprint)
    require_same("data", train_data.data_fingerprint + valid_data.data_fingerprint)
    for dataset in splits.values():
        for line in dataset.report:
            console.print(line)
        if console.quiet and data is None:  # The datasets of a program have warned before.
            dataset.warned()

    setup = set_up(run.model, config)
    mesh = setup.mesh
    for split, dataset in splits.items():
        is_train = split == "train"
        for shape in (dataset.train_plan if is_train else dataset.eval_plan).shapes:
            require_divisible(shape, config.accumulate if is_train else 1, mesh)
    describe(run, setup, console)
    fingerprints = {name: dataset.data_fingerprint for name, dataset in splits.items()}
    del splits, dataset  # The test data are prepared again at the end.
    now = environment(run, mesh, fingerprints)
    for observer in observers:
        observer.on_start(now)

    measured = partial(scores, run.metrics, config.metric)
    with (
        lasting(console),
        _alone(run),
        Checkpoints(
            run.checkpoints, tokenizer.fingerprint, config.max_checkpoints, measured
        ) as checkpoints,
        closing(
            train_data.train_iterator(*rows_here(mesh), partial(to_devices, mesh=mesh))
        ) as batches,
        closing(Saving(run, checkpoints, batches, train_data.data_fingerprint, console)) as saving,
    ):
        restored = start or _restore(checkpoints, setup.abstract, saving, fallback, console)
        if restored is None:
            state = first_state(setup, _first_params(run, setup, console))
        else:
            state, position = restored
            saving.go_on(position)
        step = make_train_step(run.model, config, setup, task.loss)
        smoothing = config.label_smoothing if config.metric == "smoothed_loss" else None
        eval_step = make_eval_step(
            run.model, mesh, task.loss, config.loss_chunk, config.deterministic, smoothing
        )
        if (first := int(state.step)) < config.steps:
            add_environment(run, now, first, console)
            primary_first(lambda: run.keep_result(first) if is_first() else None)
        training = _Training(
            run=run,
            mesh=mesh,
            console=console,
            train_step=step,
            batches=batches,
            validate=lambda state: measure(eval_step, state.params, valid_data, mesh),
            saving=saving,
            patience=Patience(config, checkpoints.scores),
            observers=observers,
        )
        began = time.perf_counter()
        with jax.set_mesh(mesh), explained(run, list(mesh.devices.flat), console):
            training.go_on(state)
        share = saving.seconds / (time.perf_counter() - began)
        console.print(f"saving held training up for {saving.seconds:.2f} s ({share:.1%})")


def _prepare(
    run: Run, tokenizer: Tokenizer, split: str, data: Mapping[str, Dataset] | None
) -> Dataset:
    """Return the data of a split: those that the caller gave, or else those that the run names."""
    if data is not None:
        return data[split]
    prepare = partial(Dataset.prepare, run.data, tokenizer, split, seed=run.train.seed)
    return primary_first(prepare)


def _require_room(run: Run, test_data: Dataset) -> None:
    """Raise TrainError if a test sentence is too long to be translated at the end."""
    if task_of(run.data).use == "translate":
        sizes = (test_data.store.counts()["source"] + 1).tolist()  # With the end token.
        require_positions(run.model, run.train.decode, sizes, "test sentences")


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Keep other processes from training in this directory; raise TrainError if one does."""
    release = primary_first(lambda: run.lock() if is_first() else lambda: None)
    try:
        yield
    finally:
        release()


def _first_params(run: Run, setup: Setup, console: Console) -> Any:
    """Return random parameters, or pretrained parameters for fine-tuning; print which."""
    params = init_params(run.model, setup.mesh, run.train.seed)
    if run.train.init_from is None:
        console.print("the parameters begin at random")
        return params
    source = open_source(run.train.init_from, console)
    return init_from_pretrained(params, source, run.model, run.train.reinit, console)


@dataclass(frozen=True, kw_only=True)
class _Training:
    """A training run that is set up, with everything that its loop needs."""

    run: Run
    mesh: Mesh
    console: Console
    train_step: Callable
    batches: TrainIterator
    validate: Callable[[TrainState], dict[str, float]]
    saving: Saving
    patience: Patience
    observers: Sequence[Observer]

    def go_on(self, state: TrainState) -> None:
        """Train from `state` to the end, with all observers."""
        run, first = self.run, int(state.step)
        fingerprint = make_fingerprint(self.mesh)
        names = [name for name, _ in named(state.params)]
        lacks_score = first > 0 and self._is_due(first) and self.saving.lacks_score(first)
        with (
            ExitStack() as stack,
            closing(MetricsWriter(run.directory, first, measures_again=lacks_score)) as writer,
            closing(FingerprintWriter(run, first or -1, names, self.observers)) as fingerprints,
            Stop(self.mesh, AHEAD) as stop,
            closing(ProgressBar(self.console, first, run.train.steps)) as bar,
        ):
            for observer in self.observers:
                stack.callback(observer.close)
            own = (self.saving, self.patience, fingerprints, writer, bar)
            training = replace(self, observers=(*own, *self.observers))
            meter = Meter(run.train.log_every, training.observers)
            if first == 0:
                fingerprints.write(0, fingerprint(state.params))
            elif lacks_score:
                training._evaluate(state, lambda: "which its checkpoint lacked")
            training._loop(state, fingerprint, meter, stop)

    def _loop(self, state: TrainState, fingerprint: Callable, meter: Meter, stop: Stop) -> None:
        """Train up to the last step; after a signal, save and raise Interrupted."""
        config, compiled = self.run.train, set[tuple]()
        for step in range(int(state.step) + 1, config.steps + 1):
            if self.patience.is_over(step - 1):
                best = self.patience.best_step
                self.console.print(f"no better checkpoint since step {best:,}: stopped")
                break
            with meter.fetching():
                batch = next(self.batches)
            shape = tuple(array.shape for array in jax.tree.leaves(batch))
            if shape not in compiled:
                compiled.add(shape)
                with self._phase("compiling"):
                    state, metrics = self.train_step(state, batch)
            else:
                state, metrics = self.train_step(state, batch)
            del batch  # If it were freed with the next batch, the reading thread would run first.
            is_stopped = stop.agreed() and step < config.steps
            is_saved = self._is_due(step) or is_stopped
            if is_saved or step % config.fingerprint_every == 0:
                metrics["fingerprint"] = fingerprint(state.params)
            meter.add(step, metrics)
            if is_saved:
                with meter.pause():
                    meter.drain()
                    self._save(state, step, is_stopped)
                    if is_stopped:
                        raise stop.interrupted(step)
                    # Evaluate after saving: if a signal comes meanwhile, the checkpoint exists.
                    self._evaluate(state, self.saving.said)
        self.saving.settle()
        if stop.is_asked():
            raise stop.interrupted(int(state.step))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Context of work that is no training step; observers learn when it begins and ends."""
        for observer in self.observers:
            observer.on_phase(name)
        yield
        for observer in self.observers:
            observer.on_phase("training")

    def _is_due(self, step: int) -> bool:
        """Return True if this step has a regular checkpoint.

        Regular checkpoints come every `checkpoint_every` steps, and after the last step.
        """
        config = self.run.train
        return step % config.checkpoint_every == 0 or step == config.steps

    def _save(self, state: TrainState, step: int, is_stopped: bool) -> None:
        is_last = is_stopped or step == self.run.train.steps
        self.saving.save(state, is_due=self._is_due(step), last=is_last)
        for observer in self.observers:
            observer.on_checkpoint(step)

    def _evaluate(self, state: TrainState, said: Callable[[], str]) -> None:
        """Evaluate the state on the validation data; its checkpoint exists already."""
        with self._phase("validating"):
            step, measured = int(state.step), self.validate(state)
        for observer in self.observers:
            observer.on_evaluation(step, measured)
        listed = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
        self.console.print(f"step {step:,}: validation {listed}, {said()}")


def _restore(
    checkpoints: Checkpoints,
    abstract: TrainState,
    saving: Saving,
    fallback: bool,
    console: Console,
) -> tuple[TrainState, dict] | None:
    """Return the newest state that can be read; None: there is no checkpoint.

    Without `fallback`, an error in the newest checkpoint is raised.
    """
    corrupt: list[int] = []
    for step in reversed(checkpoints.steps):
        try:
            saving.require_ours(checkpoints.position(step))
            state, position = checkpoints.restore(step, abstract)
        except CorruptCheckpoint as error:
            if not fallback:
                raise
            console.print(str(error), style="yellow")
            corrupt.append(step)
            continue
        for each in corrupt:
            console.print(f"set aside as {checkpoints.set_aside(each)}", style="yellow")
        console.print(f"resuming from the checkpoint of step {step:,}")
        return state, position
    if corrupt:
        raise TrainError(
            f"no checkpoint in {checkpoints.directory} can be read: restore one, or train again "
            "with another --run-dir (all checkpoints are left unchanged)"
        )
    return None
