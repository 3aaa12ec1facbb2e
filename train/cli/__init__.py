"""The command line: which command runs, and in what process."""

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
from heedful.train import signals
from heedful.train.cli import commands
from heedful.train.cli.flags import take
from heedful.train.cli.prepare import helps
from heedful.train.config import Interrupted, TrainError
from heedful.train.cpu_allocator import keep_memory

USAGE = """usage: heedful COMMAND ...

  heedful configs                       the experiments, one a line
  heedful cores                         which attention core runs which mask
  heedful train CONFIG [--flags]        train, or resume, and evaluate
      --init-from RUN|hf:DIR            fine-tune what was trained before
  heedful evaluate RUN [--flags]        loss and scores on validation and test data
  heedful translate RUN [--flags]       a line of output per line of standard input
  heedful generate RUN ["text"]         go on with a text, or with each line of standard input
  heedful classify RUN ["text"]         the class of a text, or of each line of standard input
  heedful attention RUN "text"          a picture of who looks at whom
  heedful inspect CONFIG|RUN            parameters by part, memory, arithmetic, the mask
  heedful plan CONFIG|RUN [--flags]     memory, exchanges and time of a step, on chips to come
      --topology v5e:16x16 [--search]   compiled for TPUs that are not there
  heedful masks CONFIG|RUN [--length N] draws the masks and proves them: leaks and blindness
  heedful reproduce RUN [--steps N]     train again from the record, and compare every bit
  heedful verify RUN [--checkpoint N]   train on from a checkpoint, and compare every bit
  heedful import hf:DIR [--flags]       a run from a Hugging Face model
  heedful export RUN DIR                a Hugging Face model from a run

train, evaluate, translate, generate, classify, export, reproduce and verify run in several
processes, each started with the same command; in a Slurm step and on a TPU pod slice they find
each other, elsewhere by
      --coordinator HOST:PORT --processes N --process I
(or HEEDFUL_COORDINATOR, HEEDFUL_PROCESSES, HEEDFUL_PROCESS).

heedful COMMAND CONFIG|RUN --help lists every flag with its meaning; heedful --version."""


def main() -> None:
    """Run the command of this process, and end the process with its exit code."""
    signals.watch(*sys.argv[1:2])
    keep_memory()
    _quiet()
    _speak_utf8()
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `heedful ... | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if code in (1, 2) and _of_several():
        # At once: an ordinary exit waits for the other processes, which may wait for this one.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code.

    0; 1 where an audit finds something, bits differ, a plan does not fit, or another process of the
    run has died; 2 for a user's error; 75 (EX_TEMPFAIL: the same command resumes) when SIGTERM came
    and the run is saved on all processes; 130 when SIGINT did. Where there is nothing to save
    `signals` ends the process with the same codes; commands other than train have 143 for SIGTERM.
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
        print(f"heedful: error: out of memory ({reason}): ask for less of it", file=sys.stderr)
        return 2


def _of_several() -> bool:
    """Tell if there are other processes, without importing jax where nothing has."""
    return (
        "heedful.train.hosts" in sys.modules
        and sys.modules["heedful.train.hosts"].is_multiprocess()
    )


def _failed(error: Exception) -> int:
    """Print the error of one of several processes; return the exit code."""
    if not _of_several():
        raise error
    if sys.modules["heedful.train.hosts"].is_peer_failure(error):
        reason = str(error).splitlines()[0][:200]
        print(
            f"heedful: error: another process has died or cannot be reached ({reason}): "
            "start all of them again, the same command resumes a run",
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
    "reproduce": commands.reproduce,
    "verify": commands.verify,
    "import": commands.import_,
    "export": commands.export,
}


OF_SEVERAL = (
    "train", "evaluate", "translate", "generate", "classify", "export", "reproduce", "verify"
)  # fmt: skip


def _join(arguments: list[str]) -> list[str]:
    """Make this process one of several if flags or environment say so; return the other flags."""
    from heedful.train import hosts

    given, rest = take(arguments, hosts.FLAGS)
    hosts.join(given)
    return rest


def _dispatch(arguments: list[str]) -> int:
    for argument in arguments:
        if not _is_unicode(argument):
            raise TrainError(f"the argument {argument!a} is not UTF-8: convert or rename it")
    command, rest = (arguments or ["--help"])[0], arguments[1:]
    if command in OF_SEVERAL and not helps(rest):
        rest = _join(rest)
    known = ["configs", "cores", "train", "inspect", "masks", "plan", *COMMANDS]
    if command in ("--help", "-h"):
        print(USAGE)
    elif command == "--version":
        print(f"heedful {__version__} (jax {version('jax')}, flax {version('flax')})")
    elif command == "configs":
        for name in base.names():
            print(f"{name:24}{base.load(name)[1].strip().splitlines()[0]}")
    elif command == "cores":
        from heedful.train.inspection.cores import table

        print(table())
    elif command not in known:
        raise TrainError(f"unknown command '{command}': choose {', '.join(known)}")
    elif rest and rest[0] in ("--help", "-h"):
        print(USAGE)
    elif not rest or rest[0].startswith("-"):
        either = "a config or a run directory"
        wanted = {"train": "a config", "inspect": either, "masks": either, "plan": either}
        wanted["import"] = "hf:DIR, a directory with a Hugging Face model,"
        raise TrainError(
            f"heedful {command} needs {wanted.get(command, 'a run directory')} first: "
            "see heedful --help"
        )
    elif command == "train":
        commands.train(rest[0], *base.load(rest[0]), rest[1:])
    elif command in ("inspect", "masks", "plan"):
        is_run = not base.has(rest[0]) and Path(rest[0]).exists()
        experiment = None if is_run else base.load(rest[0])[0]
        return getattr(commands, command)(rest[0], experiment, rest[1:]) or 0
    else:
        return COMMANDS[command](rest[0], rest[1:]) or 0
    return 0


def _is_unicode(text: str) -> bool:
    """Tell if a text can be written; Python keeps bytes that are no text in halves of pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _speak_utf8() -> None:
    """Write UTF-8 to files and pipes, and to a terminal the characters that it has."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors=errors)


def _quiet() -> None:
    """Silence messages of orbax and asyncio about a failure that is raised as well."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")

    def tell(problem: Any) -> None:
        # Coroutines here are orbax's, and what they fail of is raised where they are awaited.
        is_told = inspect.iscoroutine(problem.object) or "loop is closed" in str(problem.exc_value)
        if not is_told:
            sys.__unraisablehook__(problem)

    sys.unraisablehook = tell
