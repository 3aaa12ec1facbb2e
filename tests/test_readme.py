"""Test the commands in README, the pages and the configs: they can run one after the other."""

import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest

from heedful.configs import base

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = {"README.md": README} | {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md"))
}
GOES_ON = ("--train.mesh.", "--coordinator ", "--process")  # flags that do not change a run


def trainings() -> list[list[str]]:
    """Return the words after `heedful train` of each command in a code block or in a config."""
    texts = [block for page in PAGES.values() for block in page.split("```")[1::2]]
    texts += [base.load(name)[1] for name in base.names()]
    lines = "\n".join(texts).replace("\\\n", " ")
    found = re.findall(r"^(?:\S+ )*heedful train (\w[^&#\n]*)", lines, re.MULTILINE)
    return [shlex.split(line.replace('"', "")) for line in found]


def test_no_training_finds_another_one_in_its_directory():
    runs = defaultdict(set)
    for config, *words in trainings():
        if config.startswith("runs/"):  # It resumes this run.
            continue
        flags = re.findall(r"--\S+(?: (?!--)\S+)*", " ".join(words))
        directory = f"--run-dir runs/{Path(config).stem.replace(':', '/')}"
        directory = next((flag for flag in flags if flag.startswith("--run-dir")), directory)
        others = [flag for flag in flags if not flag.startswith((*GOES_ON, "--run-dir", "--help"))]
        runs[directory].add((config, *sorted(others)))
    assert len(runs["--run-dir runs/translate_tiny"]) == 1
    assert not {directory: found for directory, found in runs.items() if len(found) > 1}


def test_the_checkpoint_that_is_verified_is_one_of_those_kept():
    train = base.load("translate_tiny")[0].train
    found = re.search(r"heedful verify runs/translate_tiny --checkpoint (\d+)", README)
    saved = range(0, train.steps + 1, train.checkpoint_every)
    assert found and int(found[1]) in saved[-train.max_checkpoints : -1]


def test_shakespeare_for_a_gpu_has_the_learning_rates_of_nanogpt():
    """The values are those of config/train_shakespeare_char.py in github.com/karpathy/nanoGPT."""
    optimizer = base.load("shakespeare_char_gpu")[0].train.optimizer
    rates = optimizer.peak_lr, optimizer.final_lr, optimizer.warmup_steps, optimizer.b2
    assert rates == (1e-3, 1e-4, 100, 0.99)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str):
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", prose)
    folder = (ROOT / page).parent
    assert [link for link in links if not (folder / link).exists()] == []
