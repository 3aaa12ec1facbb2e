"""Write parts of the pages from the code: a hook of mkdocs replaces `<!-- generate: NAME -->`."""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import heedful
from heedful.configs import base
from heedful.data.config import DataConfig
from heedful.model.config import ModelConfig
from heedful.model.pretrained.config import FAMILIES
from heedful.train import cli
from heedful.train.cli import arguments
from heedful.train.config import TrainConfig

CONFIGS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
NAMES = {
    "Load": "export",
    "Decode": "translate, generate",
    "ConfigMasks": "masks CONFIG",
    "Masks": "masks RUN",
    "Plot": "plot, compare",
}
"""Commands of the classes of arguments; other classes have the name of their command."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with its generated parts; mkdocs calls this function."""
    return re.sub(r"<!-- generate: (\w+) -->", lambda found: PARTS[found[1]](), markdown)


def commands() -> str:
    """Describe each command: the usage text, then the flags of each command."""
    lines = ["```", cli.USAGE, "```", ""]
    for name, kind in vars(arguments).items():
        if name.endswith("Arguments") and dataclasses.is_dataclass(kind):
            name = name.removesuffix("Arguments")
            lines += [f"## {NAMES.get(name, name.lower())}", "", _text(kind.__doc__ or ""), ""]
            lines += _fields(kind, "")
    return "\n".join(lines)


def fields() -> str:
    """Describe every field of the configs, with the flag that sets the field."""
    lines = []
    for section, kind in CONFIGS.items():
        for name, config in _sections(section, kind):
            lines += [f"## {name}", "", _text(config.__doc__ or ""), "", *_fields(config, name)]
    return "\n".join(lines)


def experiments() -> str:
    """Describe the experiments that ship: the docstring of each config."""
    lines = []
    for name in base.names():
        title, _, rest = base.load(name)[1].strip().partition("\n")
        lines += [f"## {name}", "", _text(title), ""]
        for block in rest.strip().split("\n\n"):
            is_code = "heedful " in block or block.startswith("python -m")
            is_code = is_code and not re.search(r"[.:)]$", block.splitlines()[-1])
            lines += ["```", block, "```", ""] if is_code else [_text(block), ""]
    return "\n".join(lines)


def checkpoints() -> str:
    """List the families of checkpoints, with the classes that can be read and written."""
    lines = ["| `model_type` | heedful's architecture | classes |", "|---|---|---|"]
    for family in FAMILIES.values():
        classes = ", ".join(f"`{name}`" for name in family.classes)
        lines.append(f"| `{family.model_type}` | `{family.architecture}` | {classes} |")
    return "\n".join(lines)


def api() -> str:
    """Ask mkdocstrings for every public name: functions, then classes, configs and errors."""
    groups: dict[str, list[str]] = {
        group: [] for group in ("Functions", "Masks", "Classes", "Configs", "Errors")
    }
    for name in getattr(heedful, "__all__", ()):
        value = getattr(heedful, name)
        is_class = inspect.isclass(value)
        if isinstance(value, ModuleType):
            functions = inspect.getmembers(value, inspect.isfunction)
            own = [each for each, f in functions if f.__module__ == value.__name__]
            shown = ", ".join(each for each in own if not each.startswith("_"))
            options = (
                f"{{show_root_heading: false, show_root_toc_entry: false, members: [{shown}]}}"
            )
            group, name = "Masks", f"{name}\n    options: {options}"
        elif is_class and issubclass(value, BaseException):
            group = "Errors"
        elif name.endswith("Config"):
            group = "Configs"
        else:
            group = "Classes" if is_class else "Functions"
        groups[group].append(name)
    lines = []
    for group, names in groups.items():
        lines += [f"## {group}", ""]
        if group == "Configs":
            lines += ["[Config fields](fields.md) describes each field.", ""]
        lines += [f"::: heedful.{name}\n" for name in names]
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {
    "api": api,
    "checkpoints": checkpoints,
    "commands": commands,
    "experiments": experiments,
    "fields": fields,
}


def _sections(name: str, config: type) -> Iterator[tuple[str, type]]:
    """Yield (full name, class) of a config and of the configs in it."""
    yield name, config
    for field, kind in get_type_hints(config).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _sections(f"{name}.{field}", kind)


def _fields(config: type, section: str) -> list[str]:
    """Return a definition list: the flag, the type and the default of each field, and its text."""
    hints, texts, lines = get_type_hints(config), _docstrings(config), []
    for field in dataclasses.fields(config):
        kind, name = hints[field.name], field.name.replace("_", "-")
        if dataclasses.is_dataclass(kind):
            path = f"{section}.{field.name}" if section else field.name
            place = "train.decode" if path == "decode" else path
            anchor, flag = place.replace(".", ""), f"--{path}.…".replace("_", "-")
            lines += [f"`{flag}`", f":   The fields of [{place}](fields.md#{anchor}).", ""]
            continue
        flag = f"--{section}.{name}".replace("_", "-") if section else f"--{name}"
        parts = [f"`{flag}`", _kind(kind)]
        if field.default is not dataclasses.MISSING:
            parts.append(f"default `{_value(field.default)}`")
        lines += [" · ".join(parts), f":   {_text(texts.get(field.name, ''))}", ""]
    return lines


def _docstrings(config: type) -> dict[str, str]:
    """Return the strings below the fields of a class and of its bases."""
    found: dict[str, str] = {}
    for each in reversed(config.__mro__[:-1]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        body = node.body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            match field, text:
                case ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str(words))):
                    found[ast.unparse(field.target)] = words
    return found


def _kind(kind: Any) -> str:
    """Return a type in words: the choices of a Literal, or the name of the type."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_kind(each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(f"`{each}`" for each in get_args(kind))
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        return f"any number of: {_kind(inner[0])}" if Ellipsis in inner else f"{len(inner)} words"
    names = {str: "text", int: "whole number", float: "number", bool: "`True` or `False`"}
    return names.get(kind) or (
        "`None`" if kind is type(None) else kind.__name__.removesuffix("Config").lower()
    )


def _value(value: Any) -> str:
    return "()" if value == () else str(value)


def _text(text: str) -> str:
    """Return a docstring without its example as Markdown in one line, with links to papers."""
    text = text.partition("Example:")[0]
    text = re.sub(r"([*\[\]<>])", r"\\\1", " ".join(text.split()))
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
