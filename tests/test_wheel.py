"""Test the installed package in a folder whose files have the names of heedful's own folders."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import toy

from heedful import __version__

ROOT = Path(__file__).parent.parent
USERS = ("model.py", "train.py", "data/__init__.py", "configs/__init__.py")


def run(command: list[str | Path], folder: Path) -> str:
    """Run a command in a folder, apart from this clone, and return its standard output."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, project: Path, folder: Path) -> Path:
    """Build a `wheel` or an `sdist` of a project by its build backend; return the file."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    run([sys.executable, "-c", code], project)
    (path,) = (path for path in folder.iterdir() if path.is_file())
    return path


@pytest.fixture(scope="module", params=["wheel", pytest.param("sdist", marks=pytest.mark.slow)])
def scripts(request, tmp_path_factory) -> Path:
    """Return the folder of commands of a fresh environment with heedful from a wheel.

    The wheel is built from a copy of the clone, or from an sdist of it. Other packages come from
    the environment of these tests.
    """
    folder = tmp_path_factory.mktemp(request.param)
    project, built = folder / "clone", folder / "built"
    built.mkdir()
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "runs")
    shutil.copytree(ROOT, project, symlinks=True, ignore=unwanted)
    if request.param == "sdist":
        shutil.unpack_archive(build("sdist", project, built), folder, filter="data")
        project, built = folder / f"heedful-{__version__}", folder / "from_sdist"
        built.mkdir()
    wheel = build("wheel", project, built)
    environment = folder / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel], folder)
    (own,) = environment.glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (own / "others.pth").write_text("".join(f"{path}\n" for path in others))
    return environment / "bin"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a folder with a user's own modules, which fail when they are imported."""
    folder = tmp_path / "mine"
    for name in USERS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise ImportError('a file of the user')\n")
    return folder


def test_every_module_is_installed(scripts: Path):
    (installed,) = scripts.parent.glob("lib/python*/site-packages/heedful")
    tracked = (
        path for top in (ROOT / "heedful").iterdir() if top.is_dir() for path in top.rglob("*")
    )
    wanted = {path.relative_to(ROOT / "heedful") for path in tracked if path.suffix == ".py"}
    assert wanted == {path.relative_to(installed) for path in installed.glob("*/**/*.py")}


def test_names_of_a_users_own_modules_do_not_matter(scripts: Path, folder: Path):
    code = """if True:
        import json, heedful, heedful.model.transformer, heedful.data.pipeline, heedful.train.loop
        import heedful.configs.base
        print(json.dumps([heedful.__file__, heedful.__version__]))
    """
    file, version = json.loads(run([scripts / "python", "-c", code], folder))
    assert Path(file).is_relative_to(scripts.parent)
    assert version == __version__


@pytest.mark.slow
def test_the_command_lists_configs_and_trains(scripts: Path, folder: Path):
    assert run([scripts / "heedful", "--version"], folder).startswith(f"heedful {__version__} (jax")
    assert "translate_tiny" in run([scripts / "heedful", "configs"], folder)
    corpus = toy.write_corpus(folder / "corpus")
    flags = toy.flags(corpus, folder / "run", steps=3, every=3)
    run([scripts / "python", "-m", "heedful", "train", *flags], folder)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in lines) == 3
