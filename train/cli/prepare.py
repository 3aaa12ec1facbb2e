"""Prepare a command: parse its flags, load its run, and set up the cache of the compiler."""

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

from heedful.data.config import DataConfig
from heedful.model.config import ModelConfig
from heedful.train.cli import flags
from heedful.train.cli.arguments import LoadArguments
from heedful.train.cli.terminal import console
from heedful.train.config import TrainConfig

T = TypeVar("T")


def helps(arguments: list[str]) -> bool:
    """Tell if the flags ask for help."""
    return "--help" in arguments or "-h" in arguments


def split_text(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return (text before the flags, flags); the text is None if the flags come first."""
    if arguments and arguments[0] != "-h" and not arguments[0].startswith("--"):
        return arguments[0], arguments[1:]
    return None, arguments


def parse(default: T, arguments: list[str], program: str, description: str = "") -> T:
    """Return `default` with the values that the flags in `arguments` set.

    ~ at the front of a path becomes the home directory.
    """
    chosen, home = flags.parse(default, arguments, program, description), os.path.expanduser
    from heedful.train.paths import data_paths, train_paths

    changed: dict[str, Any] = {}
    for name, value in vars(chosen).items():
        if isinstance(value, Path):
            changed[name] = value.expanduser()
        elif isinstance(value, DataConfig):
            changed[name] = data_paths(value, home)
        elif isinstance(value, TrainConfig):
            changed[name] = train_paths(value, home)
    return dataclasses.replace(chosen, **changed)  # type: ignore[type-var]


def parse_for_run(kind: type[T], directory: str, arguments: list[str], command: str) -> T:
    """Return the arguments of a command on a run; defaults of decode flags are those of the run."""
    keep_compiled()
    from heedful.train.run import Run

    has_decode = any(entry.name == "decode" for entry in dataclasses.fields(kind))  # type: ignore[arg-type]
    run = Run.open(directory)
    of_run: dict[str, Any] = {"decode": run.train.decode} if has_decode else {}
    return parse(kind(**of_run), arguments, f"heedful {command} {directory}")


def load_run(directory: str, chosen: LoadArguments, stderr: bool = False) -> Any:
    """Return the run with the chosen parameters, as `load.Trained`."""
    from heedful.train.load import load

    return load(
        Path(directory), console(stderr), checkpoint=chosen.checkpoint, fallback=chosen.fallback
    )


def with_pretrained_body(
    model: ModelConfig, train: TrainConfig, arguments: list[str]
) -> ModelConfig:
    """Return the model of an experiment; below the head, it is the model to fine-tune, if any."""
    init_from = flags.early(arguments, "--train.init-from") or train.init_from
    if init_from in (None, "None") or helps(arguments):
        return model
    from heedful.train.conversion.init_from import merge_pretrained_config
    from heedful.train.conversion.source import open_source

    return merge_pretrained_config(model, open_source(init_from, console()).model)


def keep_compiled() -> None:
    """Cache compiled programs on disk for later processes, and free the memory of compilations."""
    import jax

    from heedful.data.packages import cache
    from heedful.train.cpu_allocator import keep_in_place

    keep_in_place()
    jax.config.update("jax_compilation_cache_dir", str(cache() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
