"""The command line: run a command, and end the process with its exit code."""

import inspect
import io
import logging
import os
import sys
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from heedful import __version__
from heedful.configs import base
from heedful.data.errors import DataError
from heedful.model.config import ModelError
from heedful.names import did_you_mean
from heedful.train import signals
from heedful.train.cli import commands, completion, experiments, runs
from heedful.train.cli.flags import take
from heedful.train.cli.prepare import helps
from heedful.train.cli.usage import USAGE
from heedful.train.cpu_allocator import keep_memory
from heedful.train.errors import Interrupted, TrainError


def main() -> None:
    """Run the command in sys.argv, and end the process with the exit code of the command."""
    signals.watch(*sys.argv[1:2])
    keep_memory()
    _quiet()
    _speak_utf8()
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `heedful ... | head` is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if code in (1, 2) and _of_several():
        # Exit at once: a normal exit waits for the other processes, which may wait for this one.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code.

    0: success. 1: an audit has findings, bits differ, a plan does not fit, or another process of
    the run has died. 2: an error of the user. 75 (EX_TEMPFAIL): the run was saved on all processes
    after SIGTERM, and the same command resumes it. 130: the same after SIGINT. If there is nothing
    to save, `signals` ends the process with the same codes, but with 143 for SIGTERM in commands
    other than train.
    """
    try:
        return _dispatch(arguments)
    except (DataError, ModelError, TrainError) as error:
        print(f"heedful: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(f"heedful: {interruption}; the same command resumes it", file=sys.stderr)
        return interruption.code
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):
            return _failed(error)
        name = "a file" if error.filename is None else error.filename
        print(
            f"heedful: error: {name}: {error.strerror}; give another path, or make this one "
            "readable and writable",
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        is_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        if not is_memory or _of_several():
            return _failed(error)
        reason = next(iter(str(error).splitlines()), "")[:200]
        print(
            f"heedful: error: out of memory ({reason}): choose a smaller model, batch or length",
            file=sys.stderr,
        )
        return 2


def _of_several() -> bool:
    """Tell if this command runs in several processes; do not import jax to find out."""
    return (
        "heedful.train.hosts" in sys.modules
        and sys.modules["heedful.train.hosts"].is_multiprocess()
    )


def _failed(error: Exception) -> int:
    """Print the error of one of several processes; return the exit code.

    In a single process, raise the error.
    """
    if not _of_several():
        raise error
    if sys.modules["heedful.train.hosts"].is_peer_failure(error):
        reason = str(error).splitlines()[0][:200]
        print(
            f"heedful: error: another process has died or cannot be reached ({reason}): "
            "start all processes again; the same command resumes a run",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)
    return 1


COMMANDS = {
    "evaluate": commands.evaluate,
    "translate": commands.translate,
    "generate": commands.generate,
    "classify": commands.classify,
    "attention": commands.attention,
    "plot": runs.plot,
    "compare": runs.compare,
    "reproduce": commands.reproduce,
    "verify": commands.verify,
    "import": commands.import_,
    "export": commands.export,
}


OF_CONFIG = ("configs", "train", "inspect", "masks", "plan")
"""Commands that take a config: a name, a Python file, or --config FILE."""

OF_SEVERAL = (
    "train", "evaluate", "translate", "generate", "classify", "export", "reproduce", "verify"
)  # fmt: skip


def _join(arguments: list[str]) -> list[str]:
    """Connect this process with others if flags or environment say so; return the other flags."""
    from heedful.train import hosts

    given, rest = take(arguments, hosts.FLAGS)
    hosts.join(given)
    return rest


def _config_file(command: str, arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Return (FILE of --config FILE or None, the other arguments)."""
    given, others = take(arguments, ["--config"])
    if not given:
        return None, others
    if others and not others[0].startswith("-"):
        raise TrainError(
            f"heedful {command} {others[0]} --config {given['--config']}: give either a config or "
            "--config"
        )
    return Path(given["--config"]).expanduser(), others


def _dispatch(arguments: list[str]) -> int:
    for argument in arguments:
        if not _is_unicode(argument):
            raise TrainError(f"the argument {argument!a} is not UTF-8: convert or rename it")
    command, rest = (arguments or ["--help"])[0], arguments[1:]
    file = None
    if command in OF_CONFIG:
        file, rest = _config_file(command, rest)
    if command in OF_SEVERAL and not helps(rest):
        rest = _join(rest)
    known = ["configs", "cores", "runs", "completion", *OF_CONFIG[1:], *COMMANDS]
    if command in ("--help", "-h"):
        print(USAGE)
    elif command == "--version":
        print(f"heedful {__version__} (jax {version('jax')}, flax {version('flax')})")
    elif command == "configs" and not rest:
        for name in base.names():
            print(f"{name:24}{base.load(name)[1].strip().splitlines()[0]}")
    elif command == "cores":
        from heedful.train.inspection.cores import table

        print(table())
    elif command not in known:
        meant = did_you_mean(command, known)
        raise TrainError(f"unknown command '{command}': {meant}choose one of {', '.join(known)}")
    elif rest and rest[0] in ("--help", "-h"):
        print(USAGE)
    elif command == "runs":
        runs.runs(rest)
    elif command == "completion":
        print(completion.script((rest or ["bash"])[0], base.names()))
    elif file is None and (not rest or rest[0].startswith("-")):
        either = "a config or a run directory"
        wanted = dict.fromkeys(OF_CONFIG, either) | {"configs": "a config"}
        wanted["import"] = "hf:DIR, a directory with a Hugging Face model,"
        raise TrainError(
            f"heedful {command} needs {wanted.get(command, 'a run directory')} first: "
            "see heedful --help"
        )
    elif command in OF_CONFIG:
        target = f"--config {file}" if file else rest.pop(0)
        named = None
        if file is not None:
            named = experiments.read(file)
        elif command == "configs" or experiments.is_experiment(target) or not Path(target).exists():
            named = experiments.load(target)
        if command in ("inspect", "masks", "plan"):
            return getattr(commands, command)(target, named, rest) or 0
        if named is None:
            commands.resume(target, rest)
        else:
            getattr(commands, command)(named, rest)
    else:
        return COMMANDS[command](rest[0], rest[1:]) or 0
    return 0


def _is_unicode(text: str) -> bool:
    """Tell if an argument is valid Unicode; Python encodes other bytes as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _speak_utf8() -> None:
    """Write UTF-8 to files and pipes; in a terminal, replace characters that it lacks."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors=errors)


def _quiet() -> None:
    """Silence messages of orbax and asyncio about errors that are also raised as exceptions."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")

    def tell(problem: Any) -> None:
        # All coroutines here are of orbax; their exceptions are raised where they are awaited.
        is_told = inspect.iscoroutine(problem.object) or "loop is closed" in str(problem.exc_value)
        if not is_told:
            sys.__unraisablehook__(problem)

    sys.unraisablehook = tell
