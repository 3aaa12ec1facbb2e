"""Test the style of the code: docstrings, names and the length of files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("model", "data", "train", "configs", "benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
FILES += sorted((ROOT / "heedful").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_LINES = 400

# A docstring begins with an imperative or with the name of a thing, and with none of these words.
NO_OPENINGS = {"Of", "What", "That", "Those", "Whether", "Which", "Who", "How", "Where", "If", "In"}

# Former names in this code for things that have an established name in the field.
OLD_NAMES = {
    "Apart", "Cut", "FEW", "FEWEST", "FITTING", "Inputs", "Place", "Shared", "Sums", "WIDEST",
    "Witness", "Writing", "adopt", "head_lr", "how", "is_real", "labelled", "log_total",
    "one_first", "put_together", "scored", "several", "take_apart", "take_over",
}  # fmt: skip


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parametrize(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", files, ids=relative)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring of the module, its classes, functions and fields."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                match statement:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        yield statement.lineno, text.strip()


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name of each variable, attribute, argument, function and class."""
    for node in ast.walk(tree(path)):
        for field in ("id", "attr", "arg", "name"):
            if isinstance(name := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), name


@parametrize(FILES + TESTS)
def test_docstrings_begin_with_an_imperative_or_name_a_thing(path: Path):
    openings = [(line, text, re.match(r"\w*", text)) for line, text in docstrings(path)]
    assert [
        (line, text) for line, text, first in openings if first and first[0] in NO_OPENINGS
    ] == []


@parametrize(FILES)
def test_names_are_those_of_the_field(path: Path):
    assert [(line, name) for line, name in names(path) if name in OLD_NAMES] == []


@parametrize(FILES)
def test_a_file_is_read_in_one_sitting(path: Path):
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


@parametrize([path for path in FILES if relative(path).startswith(("model/", "data/"))])
def test_public_functions_and_classes_have_a_docstring(path: Path):
    public = (
        node
        for node in tree(path).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    )
    assert [node.name for node in public if not ast.get_docstring(node)] == []
