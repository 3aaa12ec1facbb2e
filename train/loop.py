"""fit(): from a config to a trained model, resuming where a former call stopped."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from heedful.data.pipeline import Dataset, TrainIterator
from heedful.model.attention import choose
from heedful.model.config import ModelConfig
from heedful.train.async_saver import Saving
from heedful.train.checkpoint import Checkpoints, CorruptCheckpoint
from heedful.train.config import TrainConfig, TrainError
from heedful.train.conversion.init_from import init_from_pretrained, open_source
from heedful.train.evaluation.measure import measure
from heedful.train.hosts import is_first, is_multiprocess, primary_first, require_same
from heedful.train.inference.translate import require_positions
from heedful.train.metrics import MetricsWriter, lasting, require_finite, score, scores
from heedful.train.optimizer import learning_rate
from heedful.train.plan.oom_advice import explained
from heedful.train.reproducibility.fingerprint import make_fingerprint
from heedful.train.reproducibility.record import (
    FingerprintWriter,
    RunObserver,
    add_environment,
    environment,
)
from heedful.train.run import Run
from heedful.train.sharding import require_divisible, rows_here, to_devices
from heedful.train.state import Setup, TrainState, first_state, init_params, parameter_count, set_up
from heedful.train.step import make_eval_step, make_train_step
from heedful.train.stop import Stop
from heedful.train.tasks import task_of
from heedful.train.trainable import named, split

DETERMINISM = {
    True: "deterministic: no atomic additions, no kernels chosen by timing them; that costs speed "
    "(--train.no-deterministic)",
    False: "not deterministic: another run gives other bits (--train.deterministic)",
}
AHEAD = 2  # steps that are dispatched before the loss of an earlier one is read


def fit(
    run: Run,
    console: Console,
    *,
    fallback: bool = False,
    start: tuple[TrainState, dict] | None = None,
    witness: RunObserver | None = None,
) -> None:
    """Trains until `train.steps`, from the newest checkpoint if there is one, or from `start`.

    `fallback` allows to start from an earlier checkpoint when the newest is corrupt. The `witness`
    sees the environment and each fingerprint, and what it raises ends the training. Raises
    NonFiniteLoss, CorruptCheckpoint, SaveFailed for the last checkpoint, and Interrupted on SIGINT
    or SIGTERM to any process, after saving.
    """
    config, tokenizer, task = run.train, run.tokenizer(), task_of(run.data)
    prepare = partial(Dataset.prepare, run.data, tokenizer, seed=config.seed)
    with console.status("reading the data"):
        train_data = primary_first(lambda: prepare("train"))
        valid_data = primary_first(lambda: prepare("valid"))
        # Read at the end: what is wrong with it is to be known now.
        test_data = primary_first(lambda: prepare("test"))
        primary_first(lambda: _require_room(run, test_data))
    require_same("config", repr((run.model, run.data, config)))
    require_same("tokenizer", tokenizer.fingerprint)
    require_same("data", train_data.data_fingerprint + valid_data.data_fingerprint)
    for line in train_data.report + valid_data.report + test_data.report:
        console.print(line)

    setup = set_up(run.model, config)
    mesh = setup.mesh
    for shape in train_data.train_plan.shapes:
        require_divisible(shape, config.accumulate, mesh)
    for shape in valid_data.eval_plan.shapes + test_data.eval_plan.shapes:
        require_divisible(shape, 1, mesh)
    describe(run.model, run.data.max_length, setup, console)
    if config.optimizer.warmup_steps > config.steps:
        console.print(_unfinished(config), style="yellow")
    if mesh.devices.flat[0].platform == "gpu":
        console.print(DETERMINISM[config.deterministic])
    splits = {"train": train_data, "valid": valid_data, "test": test_data}
    data = {name: dataset.data_fingerprint for name, dataset in splits.items()}
    del test_data, splits  # It is prepared again at the end.
    now = environment(run, mesh, data)
    if witness is not None:
        witness.environment(now)

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
        validate = lambda state: measure(eval_step, state.params, valid_data, mesh)  # noqa: E731
        patience = _Patience(config, checkpoints.scores)
        began = time.perf_counter()
        with jax.set_mesh(mesh), explained(run, list(mesh.devices.flat), console):
            _loop(run, state, step, batches, validate, saving, patience, mesh, console, witness)
        share = saving.seconds / (time.perf_counter() - began)
        console.print(f"saving held training up for {saving.seconds:.2f} s ({share:.1%})")


def _unfinished(config: TrainConfig) -> str:
    """A warning about a warmup that is longer than the training."""
    optimizer = config.optimizer
    last = np.asarray(learning_rate(optimizer, config.steps)(config.steps - 1)).item()
    return (
        f"train.optimizer.warmup_steps = {optimizer.warmup_steps:,} is more than train.steps = "
        f"{config.steps:,}: the learning rate ends at {last:.3g} and never comes to "
        f"train.optimizer.peak_lr = {optimizer.peak_lr:.3g}; shorten the warmup, or train longer"
    )


def _require_room(run: Run, test_data: Dataset) -> None:
    """Raises TrainError where a test sentence could not be translated at the end."""
    if task_of(run.data).use == "translate":
        sizes = (test_data.store.counts()["source"] + 1).tolist()  # and the end
        require_positions(run.model, run.train.decode, sizes, "test sentences")


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Keeps others from training in the same directory; raises TrainError where one does."""
    release = primary_first(lambda: run.lock() if is_first() else lambda: None)
    try:
        yield
    finally:
        release()


def _first_params(run: Run, setup: Setup, console: Console) -> Any:
    """Random parameters, or where the run fine-tunes those that it begins from; says which."""
    params = init_params(run.model, setup.mesh, run.train.seed)
    if run.train.init_from is None:
        console.print("pretraining: the parameters begin at random")
        return params
    source = open_source(run.train.init_from, console)
    return init_from_pretrained(params, source, run.model, run.train.reinit, console)


def _loop(
    run: Run,
    state: TrainState,
    train_step: Callable,
    batches: TrainIterator,
    validate: Callable[[TrainState], dict[str, float]],
    saving: Saving,
    patience: "_Patience",
    mesh: jax.sharding.Mesh,
    console: Console,
    witness: RunObserver | None,
) -> None:
    """Steps from `state` to the end; raises Interrupted when a signal has come, after saving."""
    config, first = run.train, int(state.step)
    is_due = lambda step: step % config.checkpoint_every == 0 or step == config.steps  # noqa: E731
    fingerprint = make_fingerprint(mesh)
    names = [name for name, _ in named(state.params)]
    columns = [
        TextColumn("step"), MofNCompleteColumn(), BarColumn(),
        TextColumn("{task.description}"), TimeRemainingColumn(),
    ]  # fmt: skip
    lacks_score = first > 0 and is_due(first) and saving.lacks_score(first)
    with (
        closing(MetricsWriter(run.directory, first, measures_again=lacks_score)) as writer,
        closing(FingerprintWriter(run, first or -1, names, witness)) as fingerprints,
        Stop(mesh, AHEAD) as stop,
        Progress(*columns, console=console) as bar,
    ):
        task = bar.add_task("compiling", total=config.steps, completed=first)
        meter = _Meter(
            writer,
            fingerprints,
            config.log_every,
            lambda step, text: bar.update(task, completed=step, description=text),
        )

        def judge(step: int, said: Callable[[], str]) -> None:
            """Measures the state, and gives its checkpoint the score."""
            measured = validate(state)
            of_step = score(measured, config.metric)
            saving.score(step, of_step)
            patience.add(step, of_step)
            writer.write(step, {f"valid_{name}": value for name, value in measured.items()})
            listed = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
            console.print(f"step {step:,}: validation {listed}, {said()}")

        if first == 0:
            fingerprints.write(0, fingerprint(state.params))
        elif lacks_score:
            judge(first, lambda: "which its checkpoint lacked")
        for step in range(first + 1, config.steps + 1):
            if patience.is_over(step - 1):
                console.print(f"no better checkpoint since step {patience.best_step:,}: stopped")
                break
            began = time.perf_counter()
            batch = next(batches)
            meter.fetched(time.perf_counter() - began)
            state, metrics = train_step(state, batch)
            del batch  # Freed when the next one is there, it would let the reading thread go first.
            is_last = step == config.steps
            is_stopped = stop.agreed() and not is_last
            is_saved = is_due(step) or is_stopped
            if is_saved or step % config.fingerprint_every == 0:
                metrics["fingerprint"] = fingerprint(state.params)
            meter.add(step, metrics)
            if is_saved:
                began = time.perf_counter()
                meter.drain()
                # Before it is measured: where a stop comes in the meantime, it is there.
                saving.save(state, is_due=is_due(step), last=is_last or is_stopped)
                if is_stopped:
                    raise stop.interrupted(step)
                judge(step, saving.said)
                meter.leave_out(time.perf_counter() - began)
        saving.settle()
        if stop.is_asked():
            raise stop.interrupted(int(state.step))


def describe(model: ModelConfig, length: int, setup: Setup, console: Console) -> None:
    """Says what runs on rows of `length` tokens, and where."""
    devices, params = setup.mesh.devices.ravel(), setup.abstract.params
    sizes = ", ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())
    names = dict.fromkeys(model.attention.core_of(site) for site in model.sites)
    platform, shards = devices[0].platform, setup.mesh.shape["seq"]
    for core, reason in (choose(name, platform, length, shards=shards) for name in names):
        console.print(f"attention core: {core} ({reason})")
    count = f"{parameter_count(params):,}"
    training = parameter_count(split(params, setup.factors)[0])
    if training < parameter_count(params):
        count += f", of which {training:,} train"
    console.print(f"parameters: {count} ({model.architecture})")
    hosts = f" on {jax.process_count()} processes" if is_multiprocess() else ""
    console.print(f"devices: {devices.size} x {devices[0].device_kind}{hosts} (mesh: {sizes})")


def _restore(
    checkpoints: Checkpoints,
    abstract: TrainState,
    saving: Saving,
    fallback: bool,
    console: Console,
) -> tuple[TrainState, dict] | None:
    """The newest state that can be read, older ones only if `fallback`; None: there is none."""
    corrupt: list[int] = []
    for step in reversed(checkpoints.steps):
        try:
            saving.require_ours(checkpoints.position(step))
            state, position = checkpoints.restore(step, abstract)
        except CorruptCheckpoint as error:
            if not fallback:
                raise
            console.print(str(error), style="yellow", markup=False)
            corrupt.append(step)
            continue
        for each in corrupt:
            console.print(f"set aside as {checkpoints.set_aside(each)}", style="yellow")
        console.print(f"resuming from the checkpoint of step {step:,}")
        return state, position
    if corrupt:
        raise TrainError(
            f"no checkpoint in {checkpoints.directory} can be read; all are left as they are: "
            "repair one, or give another --run-dir to begin anew"
        )
    return None


class _Patience:
    """When the best checkpoint has become too old."""

    def __init__(self, config: TrainConfig, scores: Mapping[int, float]):
        self._limit = config.patience and config.patience * config.checkpoint_every
        self.best_step, self._best = 0, -math.inf
        for step in sorted(scores):
            self.add(step, scores[step])

    def add(self, step: int, score: float) -> None:
        if score > self._best:
            self.best_step, self._best = step, score

    def is_over(self, step: int) -> bool:
        return self._limit is not None and step - self.best_step >= self._limit


class _Meter:
    """Reads metrics some steps late, so that the device never waits for the host, and logs them."""

    def __init__(
        self,
        writer: MetricsWriter,
        fingerprints: FingerprintWriter,
        log_every: int,
        show: Callable[[int, str], None],
    ):
        self.writer, self.fingerprints, self.log_every = writer, fingerprints, log_every
        self.show = show
        self._pending: deque = deque()
        self._restart()

    def leave_out(self, seconds: float) -> None:
        """Takes time off this interval that was not training."""
        self._since += seconds

    def _restart(self) -> None:
        self._since, self._loss, self._weight, self._waited = time.perf_counter(), 0.0, 0.0, 0.0

    def fetched(self, seconds: float) -> None:
        """Takes the time that the next batch took; it counts where no step was left to work on."""
        if not self._pending or self._pending[-1][1]["loss"].is_ready():
            self._waited += seconds

    def add(self, step: int, metrics: dict) -> None:
        """Takes the metrics of a step that the devices work on."""
        self._pending.append((step, metrics))
        while len(self._pending) > AHEAD:
            self._read()

    def drain(self) -> None:
        while self._pending:
            self._read()

    def _read(self) -> None:
        step, metrics = self._pending.popleft()
        require_finite(step, metrics)
        if "fingerprint" in metrics:
            self.fingerprints.write(step, metrics["fingerprint"], metrics)
        self._loss += float(metrics["loss"])
        self._weight += float(metrics["weight"])
        if step % self.log_every:
            return
        elapsed = time.perf_counter() - self._since
        values = {
            "loss": self._loss / max(self._weight, 1.0),
            "lr": float(metrics["lr"]),
            "grad_norm": float(metrics["grad_norm"]),
            "tokens_per_second": self._weight / elapsed,
            "input_wait_share": self._waited / elapsed,
        }
        self.writer.write(step, values)
        self.show(step, f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tokens/s")
        self._restart()
