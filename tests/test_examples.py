"""Test the examples: every script and notebook runs, and prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = {
    "own_loop.py": ([], r"step 200: loss [01]\.\d+"),
    "own_core.py": ([], r"from dense: \d\.\de[+-]0\d\nleaks and blind positions: none"),
    "fine_tune_minilm.py": (["{run}"], r"soon Prediction\(label='question'.*\n.*'statement'"),
    "translate.py": (["{run}"], r"three hundred twenty one -> dreihunderteinundzwanzig"),
    "pod.py": (["--run-dir", "{run}", "--processes", "1", "--steps", "20"], r"step 20"),
}
"""Arguments of each script, and what it must print."""
MOST_LINES = 60

pytestmark = pytest.mark.slow


def test_each_script_is_listed_and_short():
    paths = {path.name: path for path in EXAMPLES.glob("*.py")}
    assert paths.keys() == SCRIPTS.keys()
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in paths.items()}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(name: str, tmp_path: Path):
    arguments, expected = SCRIPTS[name]
    words = [argument.format(run=tmp_path / "run") for argument in arguments]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(expected, done.stdout), done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs"
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def environment() -> dict[str, str]:
    """Return the environment of a user: one CPU device, optimized programs, this clone."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
