"""Test that SIGINT and SIGTERM end a command in each phase without a traceback.

A second signal ends the command at once. The commands run in processes of their own. A test sends
a signal only after the command has printed that it is ready.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import quick
import toy
from launch import ROOT

BEGIN = """
import atexit, gc, hashlib, signal, time
from heedful.train import cli, signals
def run(_):
    prepare()
    print("there", flush=True)
    work()
    return 0
cli.run = run
"""
PHASES = {
    "python": "while True: time.sleep(0.01)",
    "not python": "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
    "what catches everything": """while True:
        try: time.sleep(60)
        except BaseException: pass""",
    "a callback that nothing is raised from": """
    gc.callbacks.append(lambda *_: time.sleep(0.1))
    while True: gc.collect()""",
    "the end of the process": "atexit.register(time.sleep, 60)",
    "saving": "while True: time.sleep(0.01)",
}
BEFORE = {  # code that runs before a signal may come
    "saving": """signals.is_saving = True
    signal.signal(signal.SIGINT, lambda *_: print("saving", flush=True))""",
}


def start(phase: str, command: str) -> subprocess.Popen:
    prepare = f"def prepare():\n    {BEFORE.get(phase, 'pass')}"
    code = f"{BEGIN}\n{prepare}\ndef work():\n    {PHASES[phase]}\ncli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, command],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    return process


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "saving"])
def test_one_signal_ends_every_phase(phase):
    process = start(phase, "evaluate")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "heedful: ended by SIGINT\n")


def test_while_it_saves_the_second_one_ends_at_once():
    process = start("saving", "train")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    first, last = said.splitlines()
    assert first.startswith("heedful: SIGINT: saving and stopping after the current step")
    assert last == "heedful: ended by SIGINT; the same command resumes from the last checkpoint"


@pytest.mark.parametrize(("command", "code"), [("train", 75), ("translate", 143)])
def test_sigterm_says_whether_the_same_command_goes_on(command, code):
    process = start("python", command)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and said.startswith("heedful: ended by SIGTERM")
    assert ("the same command resumes" in said) == (command == "train")


@pytest.mark.slow
@pytest.mark.parametrize("delay", quick.only([5], [1.5, 3, 5, 7]))
def test_training_ends_wherever_it_is(delay: float, tmp_path: Path):
    """The signal comes while the command imports, reads, compiles or trains.

    All processes of its process group get the signal.
    """
    command = toy.flags(toy.write_corpus(tmp_path), tmp_path / "run", 10**6, 10**5)
    process = subprocess.Popen(
        [sys.executable, "-m", "heedful", "train", *command, "--audit"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    *_, last = said.decode().splitlines()
    assert last.startswith("heedful: ") and b"Traceback" not in said, said
