"""Test the completion scripts: bash completes with its own, fish and zsh get what they can take."""

import shutil
import subprocess

import pytest

from heedful.train.cli import run

MOST_BYTES = 128 * 1024
"""Longest argument of a process in Linux; fish passes its script as one."""


def script(shell: str, capsys) -> str:
    assert run(["completion", shell]) == 0
    return capsys.readouterr().out


def completed(text: str, capsys) -> list[str]:
    """Return the completions of bash for a line that ends in `text`."""
    words = text.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    lines = f"""
        COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}
        _heedful; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", script("bash", capsys) + lines], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_configs_and_flags(capsys):
    assert completed("heedful tra", capsys) == ["train", "translate"]
    assert completed("heedful train translate_t", capsys) == ["translate_tiny"]
    assert completed("heedful masks translate_t", capsys) == ["translate_tiny"]
    flags = ["--train.optimizer.warmup-steps", "--train.optimizer.weight-decay"]
    assert completed("heedful train translate_tiny --train.optimizer.w", capsys) == flags
    assert completed("heedful translate runs/a --decode.bea", capsys) == ["--decode.beam"]


def test_scripts_of_the_other_shells(capsys):
    fish, zsh = script("fish", capsys), script("zsh", capsys)
    assert len(fish.encode()) < MOST_BYTES
    assert "translate_tiny" in fish and "Number of steps in which the learning" in fish
    assert "translate_tiny" in zsh and "compdef _heedful heedful" in zsh
    assert "#compdef" not in zsh and '\n_tyro_heedful "$@"' not in zsh  # It is sourced, not found.
