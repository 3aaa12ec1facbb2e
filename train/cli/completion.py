"""`heedful completion SHELL`: a script with which a shell completes commands, flags and choices."""

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from heedful.names import did_you_mean
from heedful.train.cli import arguments as flags
from heedful.train.errors import TrainError

SHELLS = ("bash", "zsh", "tcsh", "fish")
OF_CONFIGS: dict[str, type] = {
    "train": flags.TrainArguments,
    "inspect": flags.InspectArguments,
    "masks": flags.ConfigMasksArguments,
    "plan": flags.PlanArguments,
}
OF_RUNS: dict[str, type | None] = {
    "evaluate": flags.EvaluateArguments,
    "translate": flags.DecodeArguments,
    "generate": flags.DecodeArguments,
    "classify": flags.ClassifyArguments,
    "attention": flags.AttentionArguments,
    "plot": flags.PlotArguments,
    "compare": flags.PlotArguments,
    "reproduce": flags.ReproduceArguments,
    "verify": flags.VerifyArguments,
    "import": flags.ImportArguments,
    "export": flags.LoadArguments,
    "runs": None,
    "configs": None,
    "cores": None,
}


def script(shell: str, configs: Sequence[str]) -> str:
    """Return the script of tyro for this shell; raise TrainError for a shell that tyro lacks."""
    import tyro

    if shell not in SHELLS:
        raise TrainError(
            f"heedful completion {shell}: {did_you_mean(shell, SHELLS)}give one of "
            f"{', '.join(SHELLS)}"
        )
    names: Any = Literal[tuple(configs)]  # type: ignore[valid-type]
    commands = {name: _command(kind, names) for name, kind in OF_CONFIGS.items()}
    commands |= {name: _command(kind, Path) for name, kind in OF_RUNS.items()}
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="heedful", args=["--tyro-print-completion", shell]
        )
    # Where there is nothing to complete, such as after a run, bash completes names of files.
    return printed.getvalue().replace("complete -F ", "complete -o default -F ")


def _command(kind: type | None, names: Any) -> type:
    """Return a dataclass with the positional arguments of a command, and its flags."""
    import tyro

    fields: list[Any] = [("name", tyro.conf.Positional[names])]
    if kind is not None:
        fields.append(("flags", Annotated[kind, tyro.conf.arg(name="")]))
    return dataclasses.make_dataclass("Command", fields)
