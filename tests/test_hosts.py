"""Test several processes on one machine, which stand for several hosts: they compute the same bits.

The results stay the same when processes are killed; HEEDFUL_KILLS=10 kills more often.
"""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import toy
from launch import Process, checkpoint, finish, free_port, group, lines, same_bits, wait_for_step

from heedful.data.config import DataConfig, TokenizerConfig
from heedful.train import hosts
from heedful.train.config import DecodeConfig, MeshConfig, TrainConfig
from heedful.train.errors import TrainError
from heedful.train.inference.translate import Translator
from heedful.train.load import load

STEPS, EVERY = 32, 4
KILLS = int(os.environ.get("HEEDFUL_KILLS", 1))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, str]:
    """Share a cache of compiled programs and tokenised texts between the processes."""
    return {"HEEDFUL_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> list[str]:
    return toy.files(toy.write_text(tmp_path_factory.mktemp("text")))


def flags(text: list[str], run: Path) -> list[str]:
    sharded = ["--train.mesh.fsdp", "2", "--train.log-every", "1", "--train.max-checkpoints", "20"]
    return ["train", *toy.flags(text, run, STEPS, EVERY, config="shakespeare_char"), *sharded]


@pytest.fixture(scope="module")
def alone(text, cache, tmp_path_factory) -> Path:
    """Train a run in one process on four devices."""
    run = tmp_path_factory.mktemp("alone") / "run"
    finish(group(flags(text, run), 1, 4, **cache))
    return run


@pytest.mark.slow
def test_two_processes_equal_one_to_the_bit(text, alone, cache, tmp_path):
    run = tmp_path / "run"
    said = finish(group(flags(text, run), 2, 2, **cache))
    for step in range(EVERY, STEPS + 1, EVERY):
        (ours, position), (theirs, expected) = checkpoint(run, step), checkpoint(alone, step)
        same_bits(ours, theirs)
        assert position["iterator"] == expected["iterator"] == {"next_batch": step}
    keys = ("step", "loss", "grad_norm", "valid_loss")
    same = [[{k: line.get(k) for k in keys} for line in lines(r)] for r in (run, alone)]
    assert same[0] == same[1]
    assert (run / "result.json").read_text() == (alone / "result.json").read_text()
    assert "devices: 4 x cpu on 2 processes (mesh: data 2, fsdp 2, seq 1, tensor 1)" in said[0]
    assert "saving held training up for" in said[0]
    assert "validation" not in said[1]


@pytest.mark.slow
def test_what_they_write_is_what_one_writes(tmp_path, cache):
    """The parameters are sharded over two processes; the first reads lines and prints answers."""
    corpus = toy.write_corpus(tmp_path / "corpus")
    data = DataConfig(
        source="files", train=tuple(corpus[5:7]), tokenizer=TokenizerConfig(kind="words")
    )
    train = TrainConfig(mesh=MeshConfig(fsdp=4), decode=DecodeConfig(beam=2, extra_length=7))
    run = toy.random_run(tmp_path / "run", toy.model("encoder_decoder"), data, train)
    lines = ["red cat runs", "small bird sings", "", "blue dog"]
    trained = load(run.directory, toy.QUIET)
    parts = run.model, train.decode, trained.tokenizer, trained.params, trained.mesh
    text = "".join(line + "\n" for line in lines)
    said = finish(group(["translate", str(run.directory)], 2, 2, text, **cache))
    # gloo prints a line when it connects.
    written = [line for line in said[0].splitlines() if "connected" not in line]
    assert written[written.index("parameters of step 3") + 1 :] == Translator(*parts)(lines)
    assert "parameters" not in said[1]


def whole_and_the_same(run: Path, alone: Path) -> None:
    """Check that each step was logged once, with the loss of `alone`; no checkpoint is broken."""
    ours, theirs = ([line for line in lines(r) if "loss" in line] for r in (run, alone))
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    losses = [[line["loss"] for line in part] for part in (ours, theirs)]
    np.testing.assert_allclose(*losses, rtol=1e-4)  # Another mesh sums in another order.
    assert not drafts(run)
    for path in (run / "checkpoints").glob("[0-9]*"):
        assert checkpoint(run, int(path.name))[1]["iterator"] == {"next_batch": int(path.name)}


def drafts(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob("*tmp*"))


def kill_one(processes: list[Process], run: Path, step: int, rng: random.Random) -> None:
    """Kill a process after a step or in the next save; the others must end by themselves soon."""
    wait_for_step(run, step, processes[0])
    saving = rng.random() < 0.5
    deadline = time.time() + (20 if saving else rng.random() * 0.2)
    while time.time() < deadline and not (saving and drafts(run)):
        time.sleep(0.0005)
    victim = rng.randrange(len(processes))
    caught = bool(drafts(run))
    processes[victim].kill()
    began = time.time()
    for i, process in enumerate(processes):
        process.wait(hosts.HEARTBEAT + 30)
        assert process.returncode != 0, process.said()
        if i != victim:
            print(
                f"killed process {victim} after step {step}{' while saving' if caught else ''}: "
                f"process {i} ended with {process.returncode} after {time.time() - began:.1f} s"
            )


@pytest.mark.slow
def test_killed_and_asked_to_stop_and_moved(text, alone, cache, tmp_path):
    rng, run = random.Random(0), tmp_path / "run"
    command = flags(text, run)
    kill_one(group(command, 2, 2, **cache), run, EVERY + 1, rng)

    processes = group(command, 2, 2, **cache)
    wait_for_step(run, 2 * EVERY + 2, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    for said in finish(processes, code=75):
        assert "saved; the same command resumes it" in said
    assert "resuming from the checkpoint of step" in processes[0].said()

    finish(group(command, 1, 4, **cache))
    whole_and_the_same(run, alone)
    same_bits(checkpoint(run, STEPS)[0], checkpoint(alone, STEPS)[0])


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(1, KILLS + 1) if KILLS > 1 else [])
def test_killed_and_started_again_on_another_number(text, alone, cache, tmp_path, kill):
    rng, run = random.Random(kill), tmp_path / "run"
    command = flags(text, run)
    kill_one(group(command, 2, 2, **cache), run, rng.randrange(1, STEPS - EVERY), rng)
    processes, devices = [(2, 2), (1, 4), (4, 1), (1, 2), (4, 2)][kill % 5]
    finish(group(command, processes, devices, **cache))
    whole_and_the_same(run, alone)
    is_same_mesh = processes * devices == 4
    if is_same_mesh:
        same_bits(checkpoint(run, STEPS)[0], checkpoint(alone, STEPS)[0])
    print(f"started again on {processes} x {devices}: same bits: {is_same_mesh}")


def test_a_mistake_of_one_ends_all(text, cache, tmp_path):
    command, seeds = flags(text, tmp_path / "run"), ("0", "7")
    names = {"HEEDFUL_COORDINATOR": f"localhost:{free_port()}", "HEEDFUL_PROCESSES": "2"}
    processes = [
        Process([*command, "--train.seed", seed], 2, HEEDFUL_PROCESS=str(i), **names, **cache)
        for i, seed in enumerate(seeds)
    ]
    said = finish(processes, code=2)
    assert "another process has failed: see its error message" in said[0]
    assert "holds a run of another config (train.seed is 0 there and 7 here)" in said[1]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"--processes": "2"}, "--coordinator and --process missing"),
        ({"--coordinator": "a:1", "--processes": "2", "--process": "2"}, "from 0 to 1"),
        ({"--coordinator": "a:1", "--processes": "two", "--process": "0"}, "= two: give"),
    ],
)
def test_flags_that_are_not_enough(given, message):
    with pytest.raises(TrainError, match=message):
        hosts.join(given)


def test_alone_it_waits_for_nobody(monkeypatch):
    """A Slurm batch script and a Slurm step of one task do not wait for other processes."""
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}.items():
        monkeypatch.setenv(name, value)
    hosts.join({})
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    hosts.join({})
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    hosts.join({"--processes": "1"})
    assert not hosts.is_multiprocess()
