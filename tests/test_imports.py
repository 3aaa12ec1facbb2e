"""Who may import whom: the data flows one way."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("model", "data", "train", "configs", "tests", "benchmarks")
ALLOWED = {
    "model": {"model"},
    "data": {"data"},
    "train": {"model", "data", "train"},
    "configs": {"configs", "model.config", "data.config", "train.config"},
    "benchmarks": {"benchmarks", "configs", "data", "model", "train"},
}
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from model import masks` imports model.masks
            submodules = {
                f"{node.module}.{alias.name}"
                for alias in node.names
                if (ROOT / str(node.module).replace(".", "/") / f"{alias.name}.py").exists()
            }
            found |= submodules or {str(node.module)}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_flow_one_way(path: Path):
    package = path.relative_to(ROOT).parts[0]
    allowed = ALLOWED[package]
    if path == ROOT / "train" / "cli.py":
        allowed = allowed | {"configs"}
    for name in imported(path):
        if name.split(".")[0] in OURS:
            prefixes = {name, name.split(".")[0]}
            assert prefixes & allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent.name == "data"], ids=lambda path: path.name
)
def test_data_never_names_jax(path: Path):
    """Its worker processes must not touch a device."""
    assert not {name for name in imported(path) if name.split(".")[0] in ("jax", "jaxlib", "flax")}


@pytest.mark.parametrize("module", ["data.pipeline", "configs.base", "train.cli", "model.config"])
def test_importing_it_does_not_import_jax(module: str):
    code = f"import {module}, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_what_is_imported_is_declared():
    """Another package may need it today, and no longer tomorrow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {re.split(r"[<>=\[]", line)[0] for line in project["dependencies"]}
    installed = [path for path in FILES if ROOT / "benchmarks" not in path.parents]
    names = {name.split(".")[0] for path in installed for name in imported(path)}
    others = names - sys.stdlib_module_names - set(OURS)
    distributions = packages_distributions()
    assert {name for name in others if not declared & set(distributions[name])} == set()
