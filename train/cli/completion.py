"""`heedful completion SHELL`: a script with which a shell completes commands, flags and choices."""

import ast
import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from heedful.names import did_you_mean
from heedful.train.cli import arguments as flags
from heedful.train.errors import TrainError

LONGEST = 40
"""Characters of a description: fish passes all descriptions together as one argument."""
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
    """Return tyro's script for this shell, which completes flags, with the names of the configs.

    Raises TrainError for a shell that tyro lacks.
    """
    import tyro

    if shell not in NAMES:
        raise TrainError(
            f"heedful completion {shell}: {did_you_mean(shell, NAMES)}give one of "
            f"{', '.join(NAMES)}"
        )
    names: Any = Literal[tuple(configs)]  # type: ignore[valid-type]
    commands = {name: _command(kind, names) for name, kind in OF_CONFIGS.items()}
    commands |= {name: _command(kind, Path) for name, kind in OF_RUNS.items()}
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="heedful", args=["--tyro-print-completion", shell]
        )
    text = re.sub("^COMPLETION_SPEC = .*", _shortened(shell), printed.getvalue(), flags=re.M)
    text = re.sub(r'^(#compdef .*|_tyro_heedful "\$@")$', "", text, flags=re.M)  # Of zsh.
    commands = [*OF_CONFIGS, "configs"]
    return text + NAMES[shell].format(
        commands=" ".join(commands), pattern="|".join(commands), names=" ".join(configs)
    )


NAMES = {
    "bash": """
_heedful() {{
  if [[ $COMP_CWORD == 2 && ${{COMP_WORDS[1]}} == @({pattern}) ]]; then
    COMPREPLY=($(compgen -W "{names}" -- "${{COMP_WORDS[2]}}"))
  else
    _tyro_heedful "$@"
  fi
}}
complete -o default -F _heedful heedful
""",
    "zsh": """
_heedful() {{
  if (( CURRENT == 3 )) && [[ ${{words[2]}} == ({pattern}) && ${{words[3]}} != -* ]]; then
    compadd -- {names}
    _files
  elif (( CURRENT > 2 )) && [[ ${{words[CURRENT]}} != -* ]]; then
    _files
  else
    _tyro_heedful "$@"
  fi
}}
compdef _heedful heedful
""",
    "fish": """
function _heedful_configs
    set -l words (commandline -opc)
    test (count $words) -eq 2; and contains -- $words[2] {commands}
end
complete --command heedful --condition _heedful_configs --arguments "{names}"
complete --command heedful --force-files --condition "test (count (commandline -opc)) -ge 2"
""",
}
"""Completion of the names of configs and files, for each shell."""


def _shortened(shell: str) -> Callable[[re.Match], str]:
    """Return the function that shortens the descriptions in the line of tyro's script."""

    def shorten(value: Any) -> Any:
        if isinstance(value, list):
            return [shorten(item) for item in value]
        if not isinstance(value, dict):
            return value
        shorter = {name: shorten(item) for name, item in value.items()}
        if isinstance(text := value.get("description"), str):
            first = re.split(r"\n|; |\. ", text.rpartition(" • ")[2])[0]
            shorter["description"] = first[:LONGEST]
        return shorter

    def replaced(found: re.Match) -> str:
        name, _, text = found[0].partition(" = ")
        if shell != "fish":
            return f"{name} = {shorten(ast.literal_eval(text))!r}"
        spec = ast.literal_eval(re.sub(r'\\(["$\\])', r"\1", text))  # It is in double quotes.
        return f"{name} = " + re.sub(r'(["$\\])', r"\\\1", repr(shorten(spec)))

    return replaced


def _command(kind: type | None, names: Any) -> type:
    """Return a dataclass with the positional arguments of a command, and its flags."""
    import tyro

    fields: list[Any] = [("name", tyro.conf.Positional[names])]
    if kind is not None:
        fields.append(("flags", Annotated[kind, tyro.conf.arg(name="")]))
    return dataclasses.make_dataclass("Command", fields)
