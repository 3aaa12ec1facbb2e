"""Test imports: modules import each other in one direction only, and all packages are declared."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("model", "data", "train", "configs")
SHARED = ("heedful.errors", "heedful.names", "heedful.own_code", "heedful.readable")
MAY_IMPORT = {
    "heedful": SHARED,
    "model": ("heedful.model", *SHARED),
    "data": ("heedful.data", *SHARED),
    "train": ("heedful.model", "heedful.data", "heedful.train", *SHARED),
    "train/cli": ("heedful",),
    "configs": (
        "heedful.configs", "heedful.model.config", "heedful.data.config", "heedful.train.config",
        "heedful.train.errors", "heedful.train.experiment", "heedful.names",
    ),
    "benchmarks": (
        "benchmarks", "heedful.configs", "heedful.data", "heedful.model", "heedful.train"
    ),
}  # fmt: skip
FILES = sorted(
    path for folder in (*FOLDERS, "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
FILES += [ROOT / f"{name.replace('.', '/')}.py" for name in SHARED]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def imported(path: Path) -> set[str]:
    """Return the names of the modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            found.add(ast.unparse(node.args[0]).lstrip("f").strip("'"))  # also f"{a}.b"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from heedful.model import masks` imports heedful.model.masks.
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inside if file_of(name)} or {str(node.module)}
    return found


def file_of(module: str) -> Path | None:
    """Return the file of a module of this project; None for other modules."""
    path = ROOT / module.replace(".", "/")
    found = [path.with_suffix(".py"), path / "__init__.py"]
    return next((file for file in found if file.exists()), None)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_flow_one_way(path: Path):
    folders = [folder for folder in MAY_IMPORT if ROOT / folder in path.parents]
    allowed = MAY_IMPORT[max(folders, key=len)]
    for name in imported(path):
        is_ours = name.split(".")[0] in ("heedful", "tests", "benchmarks")
        is_allowed = any(name == each or name.startswith(f"{each}.") for each in allowed)
        assert is_allowed or not is_ours, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", FILES + TESTS, ids=NAMES + [path.name for path in TESTS])
def test_the_top_level_folders_are_no_import_names(path: Path):
    """A user's own model.py or data/ would hide our folders under these names."""
    if not path.name.endswith("_peers.py"):  # They import folders of other projects.
        assert not {name for name in imported(path) if name.split(".")[0] in FOLDERS}


def test_no_modules_import_each_other():
    """The test counts imports inside functions too."""
    files = {file.resolve(): file for file in FILES}

    def next_of(file: Path) -> set[Path]:
        found = (file_of(name) for name in imported(file) if name.startswith("heedful."))
        return {files[path.resolve()] for path in found if path} - {file}

    graph = {file: next_of(file) for file in FILES}
    while leaves := [file for file, others in graph.items() if not others & graph.keys()]:
        graph = {file: others for file, others in graph.items() if file not in leaves}
    cycle = {
        str(f.relative_to(ROOT)): sorted(g.name for g in graph[f] & graph.keys()) for f in graph
    }
    assert cycle == {}


@pytest.mark.parametrize(
    "path", [path for path in FILES if ROOT / "data" in path.parents], ids=lambda path: path.name
)
def test_data_never_names_jax(path: Path):
    """Worker processes of the data must not use a device."""
    assert not {name for name in imported(path) if name.split(".")[0] in ("jax", "jaxlib", "flax")}


@pytest.mark.parametrize(
    "module", ["heedful.data.pipeline", "heedful.configs.base", "heedful.train.cli",
               "heedful.model.config"]
)  # fmt: skip
def test_importing_it_does_not_import_jax(module: str):
    code = f"import {module}, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_what_is_imported_is_declared():
    """An undeclared package may be installed only because another package needs it today."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["wandb"], *extras["trackio"]]
    declared = {re.split(r"[<>=\[]", line)[0] for line in lines}
    # own_code.py imports what its caller names.
    skipped = {ROOT / "heedful" / "own_code.py", *(ROOT / "benchmarks").rglob("*.py")}
    installed = [path for path in FILES if path not in skipped]
    names = {name.split(".")[0] for path in installed for name in imported(path)}
    others = names - sys.stdlib_module_names - {"heedful"}
    distributions = packages_distributions()
    assert {name for name in others if not declared & {*distributions.get(name, [name])}} == set()
