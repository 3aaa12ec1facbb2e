"""The command line as a user meets it; each mistake is one line with exit code 2."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toy

from configs import base
from train import cli

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    return toy.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    assert cli.run(["train", *toy.flags(corpus, run)]) == 0
    return run


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def fails(capsys, arguments: list[str], *words: str) -> None:
    """The command exits with 2 and one line that holds all the words."""
    capsys.readouterr()
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("heedful: error: ") and "\n" not in error, error
    for word in words:
        assert word in error, error


def run_piped(arguments: list[str], stdin: bytes) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "train.cli", *arguments]
    return subprocess.run(command, input=stdin, cwd=ROOT, capture_output=True)


def test_train_prints_what_a_user_needs_and_writes_the_run(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.run(["train", *toy.flags(corpus, run, steps=4)]) == 0
    out = capsys.readouterr().out
    for word in (
        "attention core: dense (", "parameters: ", "padding", "validation loss: ", "test BLEU: ",
        "tok:none", "reference", f"the run lies in {run}",
    ):  # fmt: skip
        assert word in out, out
    names = {path.name.split(".")[0] for path in run.iterdir()}
    assert names >= {"config", "tokenizer", "environment", "metrics", "events", "checkpoints"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "input_wait_share"} <= lines[0].keys()
    assert len((run / "translations.test.txt").read_text().splitlines()) == 29


def test_the_same_command_again_only_evaluates(trained, corpus, capsys):
    before = (trained / "metrics.jsonl").read_text()
    assert cli.run(["train", *toy.flags(corpus, trained)]) == 0
    assert "resuming from the checkpoint of step 12" in capsys.readouterr().out
    assert (trained / "metrics.jsonl").read_text() == before


def test_it_learns_the_toy_language(tmp_path, capsys):
    corpus = toy.write_corpus(tmp_path / "corpus", {"train": 1997, "valid": 23, "test": 29})
    flags = toy.flags(corpus, tmp_path / "run", steps=300, every=100)
    flags += ["--model.width", "64", "--model.dropout", "0", "--data.batch-tokens", "1024"]
    flags += ["--train.optimizer.peak-lr", "5e-3", "--train.optimizer.warmup-steps", "50"]
    flags += ["--train.optimizer.schedule", "linear", "--train.average", "1"]
    assert cli.run(["train", *flags]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test_bleu"] > 90, result


def test_evaluate_every_choice_of_checkpoint(trained, capsys):
    shown = {}
    for which in ("average", "last", "best", "8"):
        assert cli.run(["evaluate", str(trained), "--checkpoint", which]) == 0
        shown[which] = re.search(r"parameters of step (.*)", capsys.readouterr().out).group(1)
    assert shown["average"] == "8, 12 averaged"
    assert shown["last"] == "12"
    assert shown["8"] == "8"
    losses = {
        line["step"]: line["valid_loss"]
        for line in map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
        if "valid_loss" in line
    }
    assert shown["best"] == str(min(losses, key=losses.get))


def test_translate_gives_a_line_per_line(trained):
    done = run_piped(["translate", str(trained)], b"red cat\n\nsmall dog runs\r\nno newline")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().split("\n")
    assert len(lines) == 5 and lines[1] == lines[4] == ""
    assert run_piped(["translate", str(trained)], b"").stdout == b""


def test_translate_samples_by_seed(trained):
    flags = ["--decode.beam", "1", "--decode.temperature", "2"]
    texts = [
        run_piped(["translate", str(trained), *flags, "--seed", seed], b"red cat runs\n").stdout
        for seed in ("0", "0", "1")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_configs_lists_them_and_help_explains_every_field(capsys):
    assert cli.run(["configs"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("translate_tiny", "vaswani_base", "vaswani_big"))
    with pytest.raises(SystemExit) as exit:
        cli.run(["train", "translate_tiny", "--help"])
    assert exit.value.code == 0
    text = " ".join(re.sub(r"[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    for flag in ("--model.width", "--data.batch-tokens", "--train.optimizer.peak-lr"):
        assert flag in text
    assert "Learning rate at the end of the warmup." in text
    assert cli.run(["--help"]) == cli.run(["train", "--help"]) == cli.run([]) == 0


@pytest.mark.parametrize("name", base.names())
def test_every_config_is_valid_and_says_its_command(name: str):
    experiment, description = base.load(name)
    assert f"heedful train {name}" in description
    assert isinstance(experiment, base.Experiment)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tarin"], ["unknown command 'tarin'", "train"]),
        (["train"], ["needs a config"]),
        (["train", "tranlate_tiny"], ["unknown config 'tranlate_tiny'", "translate_tiny"]),
        (["train", "translate_tiny", "--model.widht", "3"], ["--model.widht", "--model.width"]),
        (["train", "translate_tiny", "--model.width", "wide"], ["--model.width", "'wide'"]),
        (["train", "translate_tiny", "--model.norm.kind", "batch"], ["batch", "layernorm"]),
        (["train", "translate_tiny", "--model.width", "130"], ["heads = 4", "width = 130"]),
        (["train", "translate_tiny", "--data.source", "nowhere"], ["nowhere", "homeassistant"]),
        (["train", "translate_tiny", "--train.keep", "1"], ["train.average", "train.keep"]),
        (["evaluate", "no/such/run"], ["no/such/run is no run directory"]),
        (["translate"], ["needs a run directory"]),
    ],
)
def test_mistakes_on_the_command_line(capsys, arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fails(capsys, arguments, *words)
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_match(capsys, tmp_path):
    corpus = toy.write_corpus(tmp_path / "corpus")
    train = ["train", *toy.flags(corpus, tmp_path / "run")]
    source, target = tmp_path / "corpus" / "train.en", tmp_path / "corpus" / "train.de"
    whole = target.read_bytes()

    target.write_bytes(whole + b"noch eine\n")
    fails(capsys, train, "train.en", "211", "train.de", "212")
    target.write_bytes(whole[:40] + b"\xff" + whole[40:])
    fails(capsys, train, "train.de", "line", "UTF-8")
    source.write_bytes(b"")
    target.write_bytes(b"")
    fails(capsys, train, "train.en")
    target.unlink()
    fails(capsys, train, "train.de")
    assert not (tmp_path / "run").exists()


def test_too_long_sentences_are_counted(capsys, tmp_path):
    corpus = toy.write_corpus(tmp_path / "corpus")
    lines = (tmp_path / "corpus" / "train.en").read_text().splitlines()
    flags = [*toy.flags(corpus, tmp_path / "run", steps=2), "--data.max-length", "5"]
    assert cli.run(["train", *flags]) == 0
    out = capsys.readouterr().out
    too_long = sum(len(line.split()) + 1 > 5 for line in lines)
    assert f"{too_long} examples left out" in out and "--data.max-length" in out
    assert len((tmp_path / "run" / "translations.test.txt").read_text().splitlines()) == 29


def test_a_sentence_longer_than_learned_positions(capsys, corpus, tmp_path):
    flags = toy.flags(corpus, tmp_path / "run", steps=2)
    flags += ["--model.positions.kind", "learned", "--model.positions.max-length", "20"]
    assert cli.run(["train", *flags]) == 0
    done = run_piped(["translate", str(tmp_path / "run")], b"red\n" + b"cat " * 30 + b"\n")
    assert done.returncode == 2
    assert b"1 sentences have more than 14 tokens, the first in line 2" in done.stderr


def test_translate_input_that_is_not_utf8(trained):
    done = run_piped(["translate", str(trained)], b"red\ncat \xff\n")
    assert done.returncode == 2 and b"line 2" in done.stderr and done.stdout == b""


def test_a_run_directory_of_another_config(capsys, copy, corpus):
    arguments = ["train", *toy.flags(corpus, copy), "--train.optimizer.peak-lr", "0.5"]
    before = sorted(path for path in copy.rglob("*"))
    fails(capsys, arguments, "train.optimizer.peak_lr", "0.5", "--run-dir")
    assert sorted(path for path in copy.rglob("*")) == before


def test_data_that_has_changed(capsys, tmp_path):
    corpus = toy.write_corpus(tmp_path / "corpus")
    arguments = ["train", *toy.flags(corpus, tmp_path / "run", steps=4)]
    assert cli.run(arguments) == 0
    for side in ("en", "de"):
        path = tmp_path / "corpus" / f"train.{side}"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    fails(capsys, arguments, "the training data has changed", "--run-dir")


def test_another_tokenizer(capsys, copy):
    tokenizer = copy / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("katze", "kater"))
    fails(capsys, ["evaluate", str(copy)], "belongs to tokenizer", "tokenizer.json")


def corrupt(checkpoint: Path) -> None:
    """Cuts every data file of the parameters and the optimizer short."""
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_corrupt_checkpoint(copy, corpus):
    corrupt(copy / "checkpoints" / "12")
    train = ["train", *toy.flags(corpus, copy)]
    # Each in a process of its own: what orbax leaves behind after a failed read disturbs the
    # `ast.parse` of CPython 3.11, with which the next command line would be parsed.
    for command in (["evaluate", str(copy)], train):
        done = run_piped(command, b"")
        assert done.returncode == 2
        error = done.stderr.decode()
        assert re.fullmatch(r"heedful: error: .*checkpoints/12 is corrupt.*--fallback.*\n", error)
    done = run_piped(["evaluate", str(copy), "--fallback"], b"")
    assert done.returncode == 0 and "parameters of step 4, 8 averaged" in done.stdout.decode()
    done = run_piped([*train, "--fallback"], b"")
    assert done.returncode == 0
    assert "resuming from the checkpoint of step 8" in done.stdout.decode()
    assert (copy / "checkpoints.corrupt" / "12").is_dir()  # set aside, not deleted


def test_no_such_checkpoint(capsys, copy):
    fails(capsys, ["evaluate", str(copy), "--checkpoint", "5"], "'5'", "4, 8, 12")
    shutil.rmtree(copy / "checkpoints")
    fails(capsys, ["evaluate", str(copy)], "no checkpoint yet")


def test_a_config_that_cannot_be_read(capsys, copy):
    (copy / "config.json").write_text("{")
    fails(capsys, ["evaluate", str(copy)], "config.json cannot be read")


def test_a_full_disk_leaves_the_checkpoint_before_it_usable(copy, corpus):
    """A limit on the size of a file stands for the full disk: both make write() fail."""
    shutil.rmtree(copy / "checkpoints" / "12")
    code = (
        "import resource, sys; from train import cli;"
        "from train.checkpoint import Checkpoints; save = Checkpoints.save\n"
        "def limited(self, *arguments):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))\n"
        "    save(self, *arguments); self.wait()\n"
        "Checkpoints.save = limited\n"
        "cli.main()"
    )
    command = ["train", *toy.flags(corpus, copy)]
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True)
    error = done.stderr.decode()
    assert done.returncode == 2, error
    assert error.startswith("heedful: error: ") and "Traceback" not in error, error
    for word in ("could not be written", "File too large", "checkpoint 8 is intact"):
        assert word in error
    assert cli.run(command) == 0
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_loss_that_is_not_finite_stops_with_the_norms(corpus, tmp_path, capsys):
    flags = [*toy.flags(corpus, tmp_path / "run", steps=40), "--train.optimizer.peak-lr", "1e30"]
    flags += ["--model.norm.position", "pre", "--train.optimizer.warmup-steps", "0"]
    assert cli.run(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(r"at step \d+ the loss is (nan|inf)", error)
    assert "decoder.blocks.self_attention.query.kernel[0]: gradient" in error
    assert "peak_lr" in error
