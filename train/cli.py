"""The command line: heedful configs | train | evaluate | translate."""

import contextlib
import io
import logging
import os
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from configs import base
from data.config import DataConfig, DataError
from model.config import ModelConfig, ModelError
from train.config import DecodeConfig, Interrupted, TrainConfig, TrainError

USAGE = """usage: heedful COMMAND ...

  heedful configs                       the experiments, one a line
  heedful train CONFIG [--flags]        train, or resume, and evaluate
  heedful evaluate RUN [--flags]        validation loss, test BLEU, samples
  heedful translate RUN [--flags]       one line of output per line of standard input

heedful train CONFIG --help lists every field with its meaning."""

# glibc gives freed memory back to the system between steps and asks for it again: twice the time.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train an experiment; the same command again resumes it."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    run_dir: Path
    """Directory of the run."""
    fallback: bool = False
    """Resume from the checkpoint before when the newest is corrupt."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Measure a run, or translate with it."""

    checkpoint: str = "average"
    """Which parameters: average (of the newest train.average), last, best, or a step."""
    seed: int = 0
    """Of the sampling, with decode.temperature."""
    fallback: bool = False
    """Leave corrupt checkpoints out, and say so, instead of stopping."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)


def main() -> None:
    _keep_memory()
    _quiet()
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `heedful ... | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Runs a command and returns its exit code: 0, 2 for a user's error, 130 when interrupted."""
    try:
        return _dispatch(arguments)
    except (DataError, ModelError, TrainError) as error:
        print(f"heedful: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(f"heedful: {interruption}; the same command resumes it", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    command, rest = (arguments or ["--help"])[0], arguments[1:]
    if command in ("--help", "-h"):
        print(USAGE)
        return 0
    if command == "configs":
        for name in base.names():
            print(f"{name:24}{base.load(name)[1].strip().splitlines()[0]}")
        return 0
    commands = {"train": _train, "evaluate": _evaluate, "translate": _translate}
    if command not in commands:
        raise TrainError(f"unknown command '{command}': choose configs, {', '.join(commands)}")
    wanted = "a config" if command == "train" else "a run directory"
    if not rest or (rest[0].startswith("-") and rest[0] not in ("--help", "-h")):
        raise TrainError(f"heedful {command} needs {wanted} first: see heedful --help")
    if rest[0] in ("--help", "-h"):
        print(USAGE)
        return 0
    return commands[command](rest[0], rest[1:])


def _train(name: str, arguments: list[str]) -> int:
    experiment, description = base.load(name)
    default = TrainArguments(
        model=experiment.model,
        data=experiment.data,
        train=experiment.train,
        run_dir=Path("runs") / name,
    )
    chosen = _parse(default, arguments, f"heedful train {name}", description)

    _keep_compiled()
    from train.loop import fit, start_run

    console = _console()
    run = start_run(chosen.run_dir, chosen.model, chosen.data, chosen.train, console)
    fit(run, console, fallback=chosen.fallback)
    _report(run.directory, EvaluateArguments(decode=run.train.decode), console)
    return 0


def _evaluate(directory: str, arguments: list[str]) -> int:
    chosen = _parse_evaluate(directory, arguments, "evaluate")
    _report(Path(directory), chosen, _console())
    return 0


def _translate(directory: str, arguments: list[str]) -> int:
    chosen = _parse_evaluate(directory, arguments, "translate")
    from train.evaluate import Evaluator

    lines = _read_lines(sys.stdin.buffer)
    translator = Evaluator(Path(directory), _console(stderr=True), **vars(chosen)).translator
    for line in translator(lines):
        print(line)
    return 0


def _report(directory: Path, chosen: EvaluateArguments, console: Any) -> None:
    from train.evaluate import Evaluator

    Evaluator(directory, console, **vars(chosen)).report()


def _parse_evaluate(directory: str, arguments: list[str], command: str) -> EvaluateArguments:
    _keep_compiled()
    from train.run import Run

    default = EvaluateArguments(decode=Run.open(directory).train.decode)
    return _parse(default, arguments, f"heedful {command} {directory}", "")


def _read_lines(stream: Any) -> list[str]:
    lines = stream.read().split(b"\n")
    lines = lines[:-1] if lines and not lines[-1] else lines
    decoded = []
    for number, line in enumerate(lines, 1):
        try:
            decoded.append(line.decode("utf-8").rstrip("\r"))
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8 in line {number}: convert it") from error
    return decoded


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


T = TypeVar("T")


def _parse(default: T, arguments: list[str], program: str, description: str) -> T:
    """The command line over the defaults; a mistake is a TrainError of one line."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                type(default),
                default=default,
                args=arguments,
                prog=program,
                description=description or None,
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        raise TrainError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """What tyro says in a box of several lines: what is wrong, and what was perhaps meant."""
    lines = [re.sub(r"[─│╭╮╰╯]", " ", line).strip() for line in box.splitlines()]
    text = " ".join(" ".join(line for line in lines[1:] if line).split())
    text = re.sub(r"^Error parsing [\w.-]+: (?=[a-z_]+\.)", "", text)
    text = text.replace("Argument helptext:", "; it is")
    return re.sub(r"For full helptext, (see|run) (.*--help)$", r"(\2 lists all flags)", text)


def _keep_compiled() -> None:
    """What XLA compiles is kept for the next process."""
    import jax

    from data.packages import cache

    jax.config.update("jax_compilation_cache_dir", str(cache() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _quiet() -> None:
    """Leaves out what orbax and asyncio tell about a failure that is raised as well."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")

    def tell(problem: Any) -> None:
        if "Event loop is closed" not in str(problem.exc_value):
            sys.__unraisablehook__(problem)

    sys.unraisablehook = tell


def _keep_memory() -> None:
    """Starts this process again, once, with an allocator that keeps its memory."""
    if sys.platform != "linux" or all(name in os.environ for name in ALLOCATOR):
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in ALLOCATOR.items()})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    main()
