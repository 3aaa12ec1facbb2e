"""The flags of a command, from the fields of a dataclass."""

import ast
import contextlib
import io
import re
import textwrap
from collections.abc import Collection
from typing import Any, TypeVar

from heedful.model.config import LayerConfig
from heedful.names import did_you_mean
from heedful.train.config_json import from_json
from heedful.train.errors import TrainError
from heedful.train.renamed import require_new_flags

T = TypeVar("T")

# Messages of tyro that are written anew.
UNKNOWN = (
    r"Unrecognized options: (?P<given>.*?)"
    r"( (Perhaps you meant|Arguments similar to [^:]*):(?P<near>.*?))? \((?=[^()]*--help lists)"
)
INVALID = (
    r"invalid choice '(?P<given>.*)' for argument '(?P<flag>.*)'. "
    r"Expected one of \((?P<known>.*?)\)\."
)


def parse(default: T, arguments: list[str], program: str, description: str = "") -> T:
    """Return `default` with the values of the flags; for a wrong flag raise TrainError (one line).

    `program` and `description` are for the help.
    """
    import tyro

    require_new_flags(arguments)
    _join_lines_of_help()
    description = "\n".join(textwrap.fill(line, 79) for line in description.splitlines())
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                type(default),
                default=default,
                args=arguments,
                prog=program,
                description=description or None,
                registry=_registry(),
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        raise TrainError(_one_line(said.getvalue())) from None


def _join_lines_of_help() -> None:
    """Let tyro fill the lines of a help text; it keeps breaks before indented lines of docstrings.

    This is a function inside tyro: without it, the help only has ragged lines.
    """
    from tyro import _strings

    if hasattr(_strings, "remove_single_line_breaks"):
        _strings.remove_single_line_breaks = lambda text: "\n\n".join(
            " ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)
        )


def _registry() -> Any:
    """Return tyro's rules for types with their own text form: a LayerConfig is one word."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def pattern(info: Any) -> PrimitiveConstructorSpec | None:
        if info.type != tuple[LayerConfig, ...]:
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="[LAYER ...]",
            instance_from_str=lambda words: tuple(map(layer_from_text, words)),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: list(map(str, value)),
        )

    return registry


def layer_from_text(text: str) -> LayerConfig:
    """Return the LayerConfig whose `str` is this text; raise ValueError for another text."""
    values: dict[str, Any] = {}
    for setting in text.split(",") if text != "model" else ():
        name, found, value = setting.partition("=")
        if not found:
            raise ValueError(f"{setting}: give field=value, such as window=16, or model")
        *sections, field = name.split(".")
        inside = values
        for section in sections:
            inside = inside.setdefault(section, {})
        try:
            inside[field] = ast.literal_eval(value)
        except (SyntaxError, ValueError):  # Not a Python literal: a word.
            inside[field] = value
    try:
        return from_json(LayerConfig, values, "pattern")
    except (AttributeError, TypeError) as error:
        raise ValueError(str(error)) from None


def early(arguments: list[str], flag: str) -> str | None:
    """Return the value of a flag on which defaults of other flags depend; None: not given."""
    value = None
    for argument, following in zip(arguments, [*arguments, None][1:], strict=True):
        name, found, inline = argument.partition("=")
        if name.replace("_", "-") == flag:
            value = inline if found else following
    return value


def take(arguments: list[str], flags: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Return (values of the arguments in `flags`, the other arguments)."""
    values, others = {}, []
    following = iter(arguments)
    for argument in following:
        name, found, value = argument.partition("=")
        if name not in flags:
            others.append(argument)
            continue
        values[name] = value if found else next(following, "")
        if not values[name]:
            raise TrainError(f"{name} needs a value: give {name} VALUE")
    return values, others


def _unknown(found: re.Match) -> str:
    """Name the flags that do not exist, and the flag that is most like the first of them."""
    near = re.search(r"(--[\w.-]+)", found["near"] or "")
    meant = f": did you mean {near[1]}?" if near else ""
    return f"unknown {found['given'].replace(',', '')}{meant} ("


def _invalid(found: re.Match) -> str:
    """Name the choices of a flag, the choice first that was meant."""
    known = re.findall("'([^']*)'", found["known"])
    meant = did_you_mean(found["given"], known)
    return f"{found['flag']} {found['given']}: {meant}give one of {', '.join(known)}"


def _one_line(box: str) -> str:
    """Return the text of tyro's box in one line: the error, and similar flags."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", box)  # Without the colours of a terminal.
    frame = r"[─│╭╮╰╯]|^[+|]|[+|]$|-{3,}"  # The second half is that of an ASCII terminal.
    lines = [re.sub(frame, " ", line).strip() for line in plain.splitlines()]
    text = " ".join(" ".join(line for line in lines[1:] if line).split())
    text = re.sub(r"^Error parsing [\w.-]+: (?=[a-z_]+\.)", "", text)
    text = text.replace("Argument helptext:", "; it is")
    text = re.sub(r"For full helptext, (see|run) (.*--help)$", r"(\2 lists all flags)", text)
    return re.sub(INVALID, _invalid, re.sub(UNKNOWN, _unknown, text))
