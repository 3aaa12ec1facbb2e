"""Test that training a run again gives the same bits, and that a difference is named."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from heedful.model.ops.dropout import mix
from heedful.train import cli, loop
from heedful.train.cli.prepare import keep_compiled
from heedful.train.config import MeshConfig, OptimizerConfig
from heedful.train.reproducibility import record
from heedful.train.reproducibility.fingerprint import make_fingerprint, words
from heedful.train.run import Run
from heedful.train.sharding import make_mesh
from heedful.train.start import start_run
from heedful.train.step import compiler_options
from heedful.train.trainable import named

# Fingerprints ------------------------------------------------------------------------------------


def naive(x: np.ndarray) -> list[int]:
    """Compute a fingerprint by its definition, one element at a time."""
    hashed = lambda value: int(mix(jnp.uint32(value)))  # noqa: E731
    bits = x.ravel().view(f"uint{8 * x.dtype.itemsize}")
    first = [hashed(int(b) ^ hashed(place)) for place, b in enumerate(bits)]
    return [sum(first) % 2**32, sum(hashed(h ^ 0x9E3779B9) for h in first) % 2**32]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("shape", [(), (3, 5, 2)])
def test_words_are_sums_of_hashes_of_bits_and_places(dtype: str, shape: tuple[int, ...]):
    x = jnp.asarray(np.random.default_rng(0).normal(0, 9, shape)).astype(dtype)
    assert words(x).tolist() == naive(np.asarray(x))


def test_a_bit_and_a_swap_change_both_words():
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    flipped, swapped = x.copy(), x.copy()
    flipped.view(np.uint32)[3, 2] ^= 1
    swapped[[1, 2]] = swapped[[2, 1]]
    for other in (flipped, swapped, -x, x.reshape(7, 5).T):
        assert (words(jnp.asarray(other)) != words(jnp.asarray(x))).all()
    assert (words(jnp.asarray(-0.0)) != words(jnp.asarray(0.0))).all()


def test_fingerprints_do_not_depend_on_the_mesh():
    model = toy.model(vocab_size=24)
    alone = make_mesh(MeshConfig(), jax.devices()[:1])
    params = toy.random_params(model, alone, seed=3)
    wanted = np.asarray(make_fingerprint(alone)(params))
    assert wanted.shape == (len(named(params)), 2) and len(np.unique(wanted)) == wanted.size
    for config in (MeshConfig(fsdp=4), MeshConfig(fsdp=2, tensor=2)):
        mesh = make_mesh(config, jax.devices()[:8])
        split = toy.random_params(model, mesh, seed=3)
        assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(split))
        np.testing.assert_array_equal(make_fingerprint(mesh)(split), wanted)


# Runs --------------------------------------------------------------------------------------------


def train(directory: Path, text: Path, **values: Any) -> Path:
    """Train a run of 6 steps whose parameters are sharded over 8 devices."""
    config = dataclasses.replace(
        toy.TRAIN,
        steps=6,
        checkpoint_every=4,
        fingerprint_every=2,
        mesh=MeshConfig(fsdp=2, tensor=2),
        optimizer=OptimizerConfig(warmup_steps=2),
        **values,
    )
    keep_compiled()  # The commands then find the compiled programs in the cache.
    model, data = toy.model("decoder_only"), toy.data(text, "causal_lm", batch_multiple=8)
    loop.fit(start_run(directory, model, data, config, toy.QUIET), toy.QUIET)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return toy.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("reproduce") / "run", text)


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def heedful(capsys):
    """Return a function that runs a command and returns its exit code and its output."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        return code, "".join(capsys.readouterr())

    return run


def change(run: Path, step: int, name: str, value: str) -> None:
    """Replace a value in a line of the fingerprints."""
    path = run / "fingerprints.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["step"] == step:
            part = line if name in line else line["parameters"]
            part[name] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_environment(run: Path, part: str, name: str, value: object) -> None:
    """Replace a value in the newest environment."""
    path = run / "environment.json"
    environments = json.loads(path.read_text())
    environments[-1][part][name] = value
    path.write_text(json.dumps(environments))


def test_a_run_records_what_its_bits_depend_on(trained):
    (environment,) = record.environments(trained)
    assert environment["from_step"] == 0
    assert environment["config"] == Run.open(trained).values()
    assert environment["data"].keys() == {"train", "valid", "test", "tokenizer"}
    assert environment["packages"].keys() >= {"jax", "jaxlib", "flax", "orbax-checkpoint"}
    assert "device_count=8" in environment["variables"]["XLA_FLAGS"]
    assert environment["devices"]["mesh"] == {"data": 2, "fsdp": 2, "seq": 1, "tensor": 2}
    assert environment["processor"]["name"] and environment["processor"]["cores"]
    assert len(environment["code"]["sources"]) == 64
    lines = record.fingerprints(Run.open(trained))
    assert list(lines) == [0, 2, 4, 6]
    assert "loss" not in lines[0] and np.frombuffer(bytes.fromhex(lines[2]["loss"]), ">f4")[0] > 0


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"3", b"\xff", b'[{"from_step": "0"}]'])
def test_a_damaged_record_is_kept_and_begun_anew(text, tmp_path, damage, capfd):
    model, data = toy.model("decoder_only"), toy.data(text, "causal_lm")
    run = start_run(tmp_path / "run", model, data, toy.TRAIN, toy.QUIET)
    path = run.directory / "environment.json"
    path.write_bytes(damage)
    assert record.environments(run.directory) == []
    record.add_environment(run, {"python": "3"}, 7, toy.QUIET)
    assert record.environments(run.directory) == [{"from_step": 7, "python": "3"}]
    assert (run.directory / "environment.json.damaged").read_bytes() == damage
    assert "environment.json is damaged" in capfd.readouterr().err


def test_without_a_record_no_environments_are_called_the_same(copy, heedful):
    (copy / "environment.json").write_text("{")
    with (copy / "fingerprints.jsonl").open("a") as file:
        file.write('[]\n{"step": 6}\n{"step": 2, "parameters": null}\n')
    code, said = heedful("verify", copy)
    assert code == 0 and "the environments cannot be compared" in said, said
    assert "identical to step 6" in said


def test_a_run_is_reproduced_to_the_bit(trained, heedful, tmp_path):
    code, out = heedful("reproduce", trained, "--run-dir", tmp_path / "again")
    assert code == 0, out
    assert "the environment is the same as in the record" in out
    assert "step 0: identical" in out and "identical to step 6" in out
    again = (tmp_path / "again" / "fingerprints.jsonl").read_text()
    assert again == (trained / "fingerprints.jsonl").read_text()
    code, out = heedful("reproduce", trained, "--run-dir", tmp_path / "again")
    assert code == 2 and "holds a run already" in out


def test_the_fingerprint_of_a_stop_is_none_that_training_again_gives(copy, heedful):
    lines = (copy / "fingerprints.jsonl").read_text().splitlines()
    stopped = lines[-1].replace('"step": 6', '"step": 5')
    (copy / "fingerprints.jsonl").write_text("\n".join([*lines[:-1], stopped]) + "\n")
    code, out = heedful("reproduce", copy)
    assert code == 0 and "identical to step 4\n" in out


def test_a_changed_seed_is_found_at_once_and_named(copy, heedful):
    values = json.loads((copy / "config.json").read_text())
    values["train"]["seed"] = 1
    (copy / "config.json").write_text(json.dumps(values))
    code, out = heedful("reproduce", copy)
    assert code == 1 and "step 0 differs: parameters " in out
    assert out.count("config.train.seed is 0 there and 1 here") == 2  # before and after training


def test_a_changed_version_flag_and_source_are_named(copy, heedful):
    change_environment(copy, "packages", "jax", "0.9.0")
    change_environment(copy, "code", "sources", "other")
    change_environment(copy, "variables", "XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    change(copy, 2, "loss", "00000000")
    code, out = heedful("reproduce", copy, "--steps", 3)
    assert code == 1 and "step 2 differs: no parameter and the loss\n" in out
    after = out.partition("step 2 differs")[2]
    for word in (
        f"packages.jax is '0.9.0' there and '{jax.__version__}' here",
        "variables.XLA_FLAGS is '--xla_cpu_enable_fast_math=true' there",
        "code.sources is 'other' there",
    ):
        assert word in after, out


def test_other_versions_that_give_the_same_bits_reproduce(copy, heedful):
    change_environment(copy, "packages", "numpy", "1.0")
    code, out = heedful("reproduce", copy, "--steps", 3)
    assert code == 0 and "packages.numpy is '1.0' there" in out and "identical to step 2\n" in out


def test_a_parameter_that_differs_in_a_bit_is_named(trained, heedful, monkeypatch):
    make, name = loop.make_train_step, "decoder.norm.scale"

    def broken(*arguments):
        step = make(*arguments)

        def flip(state, batch):
            state, metrics = step(state, batch)
            if int(state.step) == 4:
                scale = state.params["decoder"]["norm"]["scale"]
                state.params["decoder"]["norm"]["scale"] = scale.at[5].set(
                    jnp.nextafter(scale[5], 9.0)
                )
            return state, metrics

        return flip

    monkeypatch.setattr(loop, "make_train_step", broken)
    code, out = heedful("reproduce", trained)
    assert code == 1 and f"step 4 differs: parameters {name} (1 of " in out
    assert "identical to step 2\n" in out
    assert "the recorded environments are the same" in out


def test_changed_data_is_said_before_training(text, trained, heedful):
    before = text.read_text()
    try:
        text.write_text(before.replace("red", "green", 1))
        code, out = heedful("reproduce", trained)
        assert code == 1 and "nothing was trained: data.train has changed" in out
        assert "data.train is " in out and "step 0" not in out
    finally:
        text.write_text(before)


@pytest.mark.slow
def test_a_fine_tuned_run_is_reproduced_from_where_it_began(trained, text, heedful, tmp_path):
    tuned = train(tmp_path / "tuned", text, init_from=str(trained))
    code, out = heedful("reproduce", tuned, "--steps", 2)
    assert code == 0 and "step 0: identical" in out and "identical to step 2\n" in out
    lines, others = record.fingerprints(Run.open(tuned)), record.fingerprints(Run.open(trained))
    assert lines[0] != others[0]


def test_what_cannot_be_compared_is_an_error(copy, heedful):
    code, out = heedful("reproduce", copy, "--steps", 1)
    assert code == 2 and "within 1 steps after step 0: it has fingerprints of steps 0, 2" in out
    (copy / "fingerprints.jsonl").unlink()
    code, out = heedful("reproduce", copy)
    assert code == 2 and "no fingerprints.jsonl" in out


# From a checkpoint -------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_is_verified_from_a_checkpoint_and_left_alone(trained, heedful):
    before = contents(trained)
    code, out = heedful("verify", trained)
    assert code == 0 and "from its checkpoint of step 4" in out and "step 4: identical" in out
    assert "identical to step 6" in out
    assert contents(trained) == before
    code, out = heedful("verify", trained, "--checkpoint", 6)
    assert code == 2 and "no fingerprint within 4 steps after step 6" in out


def test_a_checkpoint_that_is_not_what_was_written_is_named(copy, heedful):
    change(copy, 4, "decoder.norm.scale", "0" * 16)
    code, out = heedful("verify", copy)
    assert code == 1 and "step 4 differs: parameters decoder.norm.scale (1 of " in out
    assert "the checkpoint differs from the fingerprint of its step" in out


def test_another_environment_is_added_and_none_is_lost(copy, capsys):
    run, (first,) = Run.open(copy), record.environments(copy)
    now = {name: value for name, value in first.items() if name != "from_step"}
    record.add_environment(run, now, 4, toy.QUIET)
    assert record.environments(copy) == [first]
    other = now | {"packages": now["packages"] | {"jax": "0.9.0"}}
    record.add_environment(run, other, 4, toy.QUIET)
    record.add_environment(run, other, 5, toy.QUIET)
    assert record.environments(copy) == [first, {"from_step": 4, **other}]


def test_options_of_a_device_are_known_to_xla():
    """XLA refuses an unknown or misspelt option even if there is no GPU."""
    cpu = make_mesh(MeshConfig(), jax.devices()[:1])
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    options = compiler_options.__wrapped__(gpu, 128, True)
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    assert options["xla_gpu_deterministic_ops"] is True
    assert compiler_options.__wrapped__(gpu, 128, False) == {}
    assert "xla_gpu_deterministic_ops" not in compiler_options(cpu, 128, True)
    assert compiler_options(cpu, 767, True) and not compiler_options(cpu, 768, True)
    with pytest.raises(RuntimeError, match="xla_gpu_deterministic_opz"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_deterministic_opz": True})(1)
