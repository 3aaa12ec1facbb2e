"""Test the command line: output and files of commands; each mistake is one line and exit code 2."""

import contextlib
import gzip
import io
import json
import math
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import quick
import toy
from rich.table import Table

from heedful.configs import base
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.data.errors import DataError
from heedful.model.config import PositionConfig
from heedful.train import cli
from heedful.train.checkpoint import Checkpoints
from heedful.train.cli import terminal
from heedful.train.config import DecodeConfig, TrainConfig
from heedful.train.patience import Patience
from heedful.train.run import Run

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    return toy.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "out.txt").write_text(train(["train", *toy.flags(corpus, folder / "run")]))
    return folder / "run"


def sentiment(table: Path, run: Path, **values) -> list[str]:
    return ["train", *toy.flags(toy.files(table), run, config="sentiment_tiny", **values)]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return toy.write_table(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def classifier(table, tmp_path_factory) -> Path:
    """Train a classifier of sentences into good and bad; write its output to out.txt."""
    folder = tmp_path_factory.mktemp("classifier")
    flags = sentiment(table, folder / "run", steps=120, every=40)
    flags += ["--train.optimizer.peak-lr", "1e-2", "--train.average-last", "1"]
    flags += ["--model.dropout", "0", "--model.head.dropout", "0"]
    (folder / "out.txt").write_text(train(flags))
    return folder / "run"


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def fails(capsys, arguments: list[str], *words: str) -> None:
    """Check that a command exits with 2 and prints one line with an error that has all the words.

    The command may name the step of the parameters before it finds an error in a text or a model.
    """
    capsys.readouterr()
    assert cli.run(arguments) == 2
    *before, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("heedful: error: "), error
    assert all(line.startswith("parameters of step ") for line in before), before
    for word in words:
        assert word in error, error


def train(arguments: list[str]) -> str:
    """Train and return the printed output."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.run(arguments) == 0
    return out.getvalue()


@pytest.fixture
def pipe(monkeypatch, capsys):
    """Return a function that runs a command with a standard input and returns its output."""

    def run(arguments: list[str], stdin: bytes) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        assert cli.run(arguments) == 0
        return capsys.readouterr().out

    return run


def run_piped(arguments: list[str], stdin: bytes) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "heedful", *arguments]
    return subprocess.run(command, input=stdin, cwd=ROOT, capture_output=True)


def test_train_prints_what_a_user_needs_and_writes_the_run(trained):
    out = (trained.parent / "out.txt").read_text()
    for word in (
        "attention core: dense (", "parameters: ", "padding", "validation loss: ", "test BLEU: ",
        "test chrF: ", "tok:none", "reference", f"the run lies in {trained}",
    ):  # fmt: skip
        assert word in out, out
    names = {path.name.split(".")[0] for path in trained.iterdir()}
    assert names >= {"config", "tokenizer", "environment", "metrics", "events", "checkpoints"}
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "input_wait_share"} <= lines[0].keys()
    assert len((trained / "translations.test.txt").read_text().splitlines()) == 29
    result = json.loads((trained / "result.json").read_text())
    assert result["chrf_signature"].startswith("nrefs:1") and result["test_bleu"] >= 0
    assert result["checkpoints"] == [8, 12] and result["decode"]["extra_length"] == 5


@pytest.mark.slow
def test_the_same_command_again_only_evaluates(trained, corpus, capsys):
    before = (trained / "metrics.jsonl").read_text()
    assert cli.run(["train", *toy.flags(corpus, trained)]) == 0
    assert "resuming from the checkpoint of step 12" in capsys.readouterr().out
    assert (trained / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_it_learns_the_toy_language(tmp_path, capsys):
    corpus = toy.write_corpus(tmp_path / "corpus", {"train": 1997, "valid": 23, "test": 29})
    flags = toy.flags(corpus, tmp_path / "run", steps=300, every=100)
    flags += ["--model.width", "64", "--model.dropout", "0", "--data.batch-tokens", "1024"]
    flags += ["--train.optimizer.peak-lr", "5e-3", "--train.optimizer.warmup-steps", "50"]
    flags += ["--train.optimizer.schedule", "linear", "--train.average-last", "1"]
    assert cli.run(["train", *flags]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test_bleu"] > 90, result


@pytest.mark.parametrize(
    ("objective", "config"),
    quick.only(
        [("causal_lm", "shakespeare_char")],
        [
            ("causal_lm", "shakespeare_char"),
            ("prefix_lm", "shakespeare_char"),
            ("masked_lm", "bert_tiny"),
            ("span_corruption", "t5_tiny"),
        ],
    ),
)
def test_text_is_learned_by_every_objective(objective: str, config: str, tmp_path, capsys):
    text = toy.files(toy.write_text(tmp_path))
    flags = toy.flags(text, tmp_path / "run", steps=45, every=15, config=config)
    flags += ["--data.objective", objective, "--train.optimizer.peak-lr", "1e-2"]
    assert cli.run(["train", *flags]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    names = ("loss", "frequency_loss")
    scored = {f"{split}_{name}" for split in ("valid", "test") for name in names}
    assert result.keys() == scored | {"checkpoints"}
    first, last = losses(tmp_path / "run", "loss")[0], result["valid_loss"]
    assert last < 0.9 * first
    for line in (
        "the parameters begin at random",
        f"validation loss: {last:.4f} nats per token (perplexity {math.exp(last):.2f})",
        "test loss: ",
    ):
        assert line in out, out
    assert ("test bits per character: " in out) == (objective == "causal_lm")


def losses(run: Path, name: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.mark.slow
def test_classes_are_learned_and_scored(classifier, table):
    out = (classifier.parent / "out.txt").read_text()
    result = json.loads((classifier / "result.json").read_text())
    names = ("loss", "accuracy", "f1", "matthews", "frequency_loss")
    scored = {f"{split}_{name}" for split in ("valid", "test") for name in names}
    assert result.keys() == scored | {"checkpoints"}
    assert result["valid_accuracy"] > 0.9 and result["test_matthews"] > 0.8
    for name in names[1:4]:
        shown = "f1 of class good" if name == "f1" else name
        assert f"test {shown}: {100 * result[f'test_{name}']:.2f} %" in out
    assert "train: 2 classes, the largest" in out
    # The command uses the best checkpoint by train.metric; the first one if several are equal.
    scores = losses(classifier, "valid_accuracy")
    assert f"parameters of step {40 * (1 + scores.index(max(scores)))}\n" in out


@pytest.mark.slow
def test_numbers_are_learned_and_scored(tmp_path, capsys):
    flags = sentiment(toy.write_table(tmp_path, toy.number), tmp_path / "run", steps=40, every=20)
    flags += ["--data.objective", "regression", "--train.metric", "spearman"]
    flags += ["--train.optimizer.peak-lr", "1e-2"]
    assert cli.run(flags) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test_pearson"] > 0.5 and result["test_loss"] < 0.1
    out = capsys.readouterr().out
    assert "test mean squared error: " in out and "test spearman: " in out


def test_classify_a_text_or_each_line(classifier, capsys, pipe):
    assert cli.run(["classify", str(classifier), "small red cat"]) == 0
    got = capsys.readouterr()
    name, chance = got.out.removesuffix("\n").split("\t")
    assert name == "good" and 0.5 < float(chance) <= 1
    assert "parameters of step" in got.err  # not in the standard output

    lines = b"small red cat\nblue dog\r\nbird\nno newline"
    out = pipe(["classify", str(classifier), "--checkpoint", "last"], lines)
    names = [line.split("\t")[0] for line in out.splitlines()]
    assert names[:3] == ["good", "bad", "bad"] and len(names) == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--run-dir", "FILE/run"], ["FILE/run: Not a directory; give another path"]),
        (["--run-dir", "FILE"], ["FILE is a file: give a directory to --run-dir"]),
        (["--run-dir", f"run/{300 * 'x'}"], ["xxx: File name too long; give another path"]),
        (["--run-dir=~/run", "--data.train=~/a.en", "~/a.de"], ["HOME/a.en"]),
        (["--train.checkpoints", "FILE"], ["FILE is a file: give a folder to train.checkpoints"]),
    ],
)
def test_places_that_cannot_be_used(flags, words, corpus, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here = lambda text: (  # noqa: E731
        text.replace("FILE", str(tmp_path / "file")).replace("HOME", str(tmp_path / "home"))
    )
    command = ["train", *toy.flags(corpus, tmp_path / "run"), *map(here, flags)]
    fails(capsys, command, *map(here, words))


@pytest.mark.slow
def test_a_picture_needs_a_folder_that_can_be_written(trained, tmp_path, capsys, monkeypatch):
    """The test replaces os.access, because root may write to every folder."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    fails(capsys, ["attention", str(trained), "red cat"], f"{trained} cannot be written: give")
    fails(capsys, ["masks", str(trained)], f"{trained} cannot be written: give another --output")


SPEAK = """
import sys
from heedful.train import cli
def run(_):
    print("grün → 日本")
    print("grün →", file=sys.stderr)
    return 0
cli.run = run
cli.main()
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_is_utf_8_whatever_is_the_encoding_here(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", SPEAK]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert (done.stdout.decode(), done.stderr.decode()) == ("grün → 日本\n", "grün →\n")


def test_a_terminal_gets_what_it_can_show():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-c", SPEAK]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=theirs, stderr=subprocess.PIPE)
    assert os.read(ours, 1000).decode("latin-1") == "grün ? ??\r\n"
    assert done.stderr.decode() == "grün →\n"
    os.close(theirs)
    os.close(ours)


def test_arguments_are_text():
    bad = os.fsencode("gr") + b"\xff"
    done = run_piped(["generate", "run", bad], b"")  # type: ignore[list-item]
    assert done.returncode == 2
    said = "heedful: error: the argument 'gr\\udcff' is not UTF-8: convert or rename it\n"
    assert done.stderr.decode() == said


@pytest.mark.slow
def test_a_mistake_that_is_found_late_leaves_no_run_behind(corpus, tmp_path, capsys):
    """Each mistake is found after the run has begun; the corrected command begins the run again."""
    flags = ["train", *toy.flags(corpus, tmp_path / "run", steps=2)]
    (tmp_path / "empty").touch()
    lost = [*flags, "--train.optimizer.peak-lr", "1e30", "--train.optimizer.warmup-steps", "0"]
    fails(
        capsys,
        [*flags, "--model.attention.core", "flsh"],
        "core 'flsh': did you mean flash? choose",
    )
    fails(capsys, [*flags, "--data.test", *2 * [str(tmp_path / "empty")]], "empty")
    fails(capsys, [*flags, "--train.mesh.fsdp", "3"], "3")
    assert cli.run([*lost, "--model.norm.position", "pre", "--train.steps", "40"]) == 2
    assert "if the run has a checkpoint, also give another --run-dir" in capsys.readouterr().err
    assert cli.run(flags) == 0
    said = capsys.readouterr().out
    assert "was started before and has no checkpoint: the run starts again" in said
    assert "another environment" not in said
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 2]
    fails(capsys, [*flags, "--model.attention.core", "flash"], "another config")


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_tab_is_what_it_was_in_the_training(classifier, capsys, tmp_path):
    def answer(run: Path, *arguments: str) -> tuple[str, str]:
        assert cli.run(["classify", str(run), *arguments]) == 0
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    capsys.readouterr()
    tabs = "dog\tblue\tcat"  # three texts, not a pair
    assert answer(classifier, tabs)[0] == answer(classifier, "dog blue cat")[0]
    fails(capsys, ["classify", str(classifier), tabs, "--tab", "pair"], "line 1 has 3 texts")
    copy = Path(shutil.copytree(classifier, tmp_path / "run"))
    values = json.loads((copy / "config.json").read_text())
    values["data"]["train"] = [str(tmp_path / "gone.tsv")]
    (copy / "config.json").write_text(json.dumps(values))
    assert answer(copy, tabs, "--tab", "text")[0] == answer(classifier, tabs)[0]
    assert "unknown if the training data had pairs" in answer(copy, "dog\tblue")[1]
    assert "unknown" not in answer(copy, "dog blue")[1]
    assert cli.run(["classify", str(copy), tabs]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("mark", ["\n", "\r", "\u2028"])
def test_a_class_is_one_line(mark, tmp_path, capsys):
    table = toy.write_table(tmp_path).with_suffix(".jsonl")
    rows = [{"text": s, "label": f"{toy.label(s)}{mark}!"} for s in toy.sentences(499)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.run(sentiment(table, tmp_path / "run", steps=2, every=2)) == 0
    capsys.readouterr()
    assert cli.run(["classify", str(tmp_path / "run"), "red"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"(good|bad) !\t0\.\d{4}", line)


STDIN = [
    ("\ufeffred cat\nblue dog\n".encode(), ["red cat", "blue dog"]),
    (b"red cat\r\nblue dog\r\n", ["red cat", "blue dog"]),
    (b"red cat\n\nblue", ["red cat", "", "blue"]),
    (b"", []),
]
NO_STDIN = [
    (gzip.compress(b"red cat\n", mtime=0), "standard input is compressed with gzip: decompress it"),
    ("red cat\n".encode("utf-16"), "standard input is UTF-16: convert it to UTF-8"),
    ("red cat\n".encode("utf-16-le"), "standard input is UTF-16 or not text"),
    ("\ufeffred\nschön".encode().replace(b"\xc3\xb6", b"\xf6"), "line 2: byte 4"),
    (b"red cat\rblue dog\r", "standard input has line ends of \\r alone"),
]


@pytest.mark.parametrize(("stdin", "lines"), STDIN)
def test_standard_input_is_read_as_a_file_is(stdin, lines, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    assert terminal.read_lines() == lines


@pytest.mark.parametrize(("stdin", "words"), NO_STDIN)
def test_standard_input_that_is_no_text_is_called_what_it_is(stdin, words, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(DataError, match=re.escape(words)):
        terminal.read_lines()


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 59.6 GiB"), RuntimeError("RESOURCE_EXHAUSTED: Out\nx")],
)
def test_memory_that_is_not_there_is_said_in_a_line(error, monkeypatch, capsys):
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    fails(capsys, ["cores"], "out of memory (", str(error).splitlines()[0])


@pytest.mark.slow
def test_names_with_brackets_are_printed_as_they_are(tmp_path, capsys):
    table = toy.write_table(tmp_path, lambda line: "[/pos]" if "red" in line else "[bold]:smile:")
    assert cli.run([*sentiment(table, tmp_path / "run", steps=4)]) == 0
    assert "train: 2 classes, the largest '[bold]:smile:' with" in capsys.readouterr().out
    assert cli.run(["classify", str(tmp_path / "run"), "red [/cat]"]) == 0
    assert capsys.readouterr().out.split("\t")[0] in ("[/pos]", "[bold]:smile:")


@pytest.mark.parametrize("name", ["[/pos]", "[bold]x[/bold]", ":smile:", "[link=x]"])
def test_tables_and_lines_show_brackets(name, capsys):
    console = terminal.console()
    console.print(name)
    table = Table(name, title=name)
    table.add_row(name)
    console.print(table)
    assert capsys.readouterr().out.count(name) == 4


@pytest.mark.slow
def test_patience(table, tmp_path, capsys):
    """The learning rate is so small that all checkpoints are equally accurate: the first counts."""
    flags = sentiment(table, tmp_path / "run", steps=60, every=3)
    flags += [
        "--train.optimizer.peak-lr",
        "1e-30",
        "--train.patience",
        "4",
        "--train.average-last",
        "1",
    ]
    assert cli.run(flags) == 0
    out = capsys.readouterr().out
    assert "no better checkpoint since step 3: stopped" in out
    assert "step 15: validation" in out and "step 18: validation" not in out
    assert "parameters of step 3\n" in out  # The parameters of step 3 are evaluated.
    there = (tmp_path / "run" / "checkpoints").iterdir()
    kept = sorted(int(path.name) for path in there if path.name.isdigit())
    assert kept == [3, 9, 12, 15]
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert cli.run(flags) == 0  # The same command does not continue the training.
    assert "no better checkpoint since step 3: stopped" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_the_loss_that_is_trained_decides(tmp_path):
    """The smoothed loss decides which checkpoint is the best if it is the metric."""
    flags = ["train", *toy.flags(toy.write_corpus(tmp_path), tmp_path / "run")]
    flags += ["--train.metric", "smoothed_loss", "--train.label-smoothing", "0.5"]
    assert cli.run(flags) == 0
    run = Run.open(tmp_path / "run")
    found = losses(run.directory, "valid_smoothed_loss")
    assert found != losses(run.directory, "valid_loss")
    with Checkpoints(
        run.checkpoints, run.tokenizer().fingerprint, run.train.max_checkpoints
    ) as checkpoints:
        assert checkpoints.scores == dict(zip((4, 8, 12), [-loss for loss in found], strict=True))


def test_patience_begins_again_with_a_better_one():
    config = TrainConfig(patience=2, checkpoint_every=5)
    patience = Patience(config, {})
    ended = []
    for step, score in {5: 0.2, 10: 0.1, 15: 0.3, 20: 0.3, 25: 0.25, 30: 0.4}.items():
        patience.add(step, score)
        ended += [step] if patience.is_over(step) else []
    assert ended == [25] and patience.best_step == 30
    assert Patience(config, {15: 0.3, 20: 0.3}).is_over(25)  # scores that a resumed run reads
    assert not Patience(TrainConfig(), {15: 0.3}).is_over(10**9)


@pytest.mark.slow
def test_evaluate_every_choice_of_checkpoint(trained, capsys):
    shown = {}
    for which in ("average", "last", "best", "8"):
        assert cli.run(["evaluate", str(trained), "--checkpoint", which]) == 0
        shown[which] = re.search(r"parameters of step (.*)", capsys.readouterr().out).group(1)
    assert shown["average"] == "8, 12 averaged"
    assert shown["last"] == "12"
    assert shown["8"] == "8"
    found = losses(trained, "valid_loss")
    assert shown["best"] == str(4 * (1 + found.index(min(found))))


def test_translate_gives_a_line_per_line(trained):
    done = run_piped(["translate", str(trained)], b"red cat\n\nsmall dog runs\r\nno newline")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().split("\n")
    assert len(lines) == 5 and lines[1] == lines[4] == ""
    assert run_piped(["translate", str(trained)], b"").stdout == b""


@pytest.mark.slow
def test_unknown_words_are_said_beside_the_answers(trained, classifier, capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"red cat\nred hat, hat\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert cli.run(["translate", str(trained)]) == 0
    got = capsys.readouterr()
    assert "2 tokens in 1 of 2 lines, the first in line 2, are <unk>" in got.err
    assert len(got.out.splitlines()) == 2
    for text, is_known in (("red cat", True), ("red\N{SNOWMAN}cat", False)):
        assert cli.run(["classify", str(classifier), text]) == 0
        assert ("in 1 of 1 lines" in capsys.readouterr().err) != is_known


@pytest.mark.slow
def test_translate_samples_by_seed(trained, pipe):
    flags = ["--decode.beam", "1", "--decode.temperature", "2"]
    texts = [
        pipe(["translate", str(trained), *flags, "--seed", seed], b"red cat runs\n")
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
        (["tarin"], ["unknown command 'tarin'", "did you mean train?"]),
        (["train"], ["needs a config or a run directory"]),
        (["train", "."], [". is no run directory: it has no config.json"]),
        (["runs", "nowhere"], ["nowhere is no folder"]),
        (["compare", "a"], ["two runs or more"]),
        (["completion", "bsh"], ["did you mean bash?"]),
        (["train", "tranlate_tiny"], ["'tranlate_tiny': did you mean translate_tiny?"]),
        (
            ["train", "translate_tiny", "--model.widht", "3"],
            ["unknown --model.widht 3: did you mean --model.width?"],
        ),
        (["train", "translate_tiny", "--model.width", "wide"], ["--model.width", "'wide'"]),
        (["train", "translate_tiny", "--model.norm.kind", "batch"], ["batch", "layernorm"]),
        (["train", "translate_tiny", "--model.norm.kind", "rmsnrm"], ["did you mean rmsnorm?"]),
        (["train", "vaswani_table3:head_4"], ["did you mean heads_4?"]),
        (["train", "translate_tiny", "--model.width", "130"], ["heads = 4", "width = 130"]),
        (["train", "translate_tiny", "--data.source", "nowhere"], ["nowhere", "homeassistant"]),
        (
            ["train", "translate_tiny", "--train.max-checkpoints", "1"],
            ["train.average_last", "train.max_checkpoints"],
        ),
        (["train", "bert_tiny", "--data.objective", "causal_lm"], ["causal_lm", "decoder_only"]),
        (["train", "shakespeare_char", "--train.metric", "f1"], ["train.metric f1", "loss"]),
        (["train", "sentiment_tiny", "--train.metric", "pearson"], ["pearson", "accuracy"]),
        (["train", "sentiment_tiny", "--data.objective", "regression"], ["accuracy", "pearson"]),
        (["train", "bert_tiny", "--train.reinit", "head"], ["train.reinit", "train.init_from"]),
        (["train", "bert_tiny", "--init-from", "package:gpt9"], ["package:gpt9", "minilm"]),
        (["train", "bert_tiny", "--init-from", "no/run"], ["no/run is no run directory"]),
        (["import", "hf:no/dir"], ["no/dir is not a directory", "hf:"]),
        (["import", "hf:~/no/dir"], [f"{Path.home()}/no/dir is not a directory"]),
        (["export", "no/such/run"], ["needs an output: heedful export no/such/run DIR"]),
        (["classify", "no/such/run", "text"], ["no/such/run is no run directory"]),
        (["evaluate", "no/such/run"], ["no/such/run is no run directory: it does not exist"]),
        (["evaluate", "."], [". is no run directory: it has no config.json"]),
        (["evaluate", 300 * "x"], ["x/config.json: File name too long; give another path"]),
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


def test_mistakes_with_labelled_data(capsys, table, tmp_path):
    flags = sentiment(table, tmp_path / "run", steps=2)
    number = [*flags, "--data.objective", "regression", "--train.metric", "loss"]
    fails(capsys, number, "table.tsv", "number")
    fails(capsys, [*flags, "--data.label", "stars"], "data.label", "'stars'", "text, label")
    other = tmp_path / "valid.tsv"
    other.write_text("text\tlabel\nred cat\todd\n")
    unknown = [*flags, "--data.valid", str(other)]
    fails(capsys, unknown, "'odd'", "bad, good", "data.classes")


def test_mistakes_about_what_trains_and_where(capsys, table, tmp_path):
    for number, (more, words) in enumerate([
        (["--train.optimizer.freeze", "decoder"], ["optimizer.freeze", "'decoder'", "matches no"]),
        (["--train.optimizer.freeze", "."], ["optimizer.freeze leaves nothing to train"]),
        (["--train.accumulate", "3"], ["train.accumulate = 3", "data.batch_multiple to 24"]),
        (["--train.mesh.tensor", "3"], ["tensor 3", "8"]),
    ]):  # fmt: skip
        fails(capsys, [*sentiment(table, tmp_path / str(number)), *more], *words)


@pytest.mark.slow
def test_a_model_is_asked_for_what_it_does_not_do(capsys, trained, classifier, monkeypatch):
    fails(capsys, ["classify", str(trained), "red"], "translation model", "does not classify")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"red\n")))
    fails(capsys, ["translate", str(classifier)], "encoder_only does not translate")
    fails(capsys, ["generate", str(classifier), "red"], "encoder_only", "does not generate texts")
    fails(capsys, ["evaluate", str(classifier), "--stride", "3"], "--stride", "causal_lm")
    fails(capsys, ["classify", str(classifier), "red " * 20], "line 1 has", "data.max_length = 16")
    fails(capsys, ["classify", str(classifier), "a\tb\tc", "--tab", "pair"], "line 1 has 3 texts")


@pytest.mark.slow
def test_too_long_sentences_are_counted(capsys, tmp_path):
    corpus = toy.write_corpus(tmp_path / "corpus")
    lines = (tmp_path / "corpus" / "train.en").read_text().splitlines()
    flags = [*toy.flags(corpus, tmp_path / "run", steps=2), "--data.max-length", "5"]
    assert cli.run(["train", *flags]) == 0
    out = capsys.readouterr().out
    too_long = sum(len(line.split()) + 1 > 5 for line in lines)
    assert f"{too_long} examples left out" in out and "--data.max-length" in out
    assert len((tmp_path / "run" / "translations.test.txt").read_text().splitlines()) == 29


@pytest.mark.slow
def test_a_sentence_longer_than_learned_positions(corpus, tmp_path, capsys, monkeypatch):
    positions = PositionConfig(kind="learned", max_length=20)
    texts = tuple(corpus[corpus.index("--data.train") + 1 :][:2])
    data = DataConfig(source="files", train=texts, tokenizer=TokenizerConfig(kind="words"))
    decode = DecodeConfig(extra_length=5)
    toy.random_run(
        tmp_path / "run",
        toy.model("encoder_decoder", positions=positions),
        data,
        TrainConfig(decode=decode),
    )
    lines = io.BytesIO(b"red\n" + b"cat " * 15 + b"\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines))
    words = ("1 sentences have more than 15 tokens, the first in line 2", "max_length")
    fails(capsys, ["translate", str(tmp_path / "run")], *words)


def test_translate_input_that_is_not_utf8(trained):
    done = run_piped(["translate", str(trained)], b"red\ncat \xff\n")
    assert done.returncode == 2 and b"line 2" in done.stderr and done.stdout == b""


def test_a_run_directory_of_another_config(capsys, copy, corpus):
    arguments = ["train", *toy.flags(corpus, copy), "--train.optimizer.peak-lr", "0.5"]
    before = sorted(path for path in copy.rglob("*"))
    fails(capsys, arguments, "train.optimizer.peak_lr", "0.5", "--run-dir")
    assert sorted(path for path in copy.rglob("*")) == before


def test_a_run_directory_that_is_a_file(capsys, corpus, tmp_path):
    (tmp_path / "run").write_text("notes")
    fails(capsys, ["train", *toy.flags(corpus, tmp_path / "run")], "run is a file", "--run-dir")


@pytest.mark.slow
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
    """Truncate every data file of the parameters and the optimizer state."""
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.slow
def test_a_corrupt_checkpoint(copy, corpus):
    corrupt(copy / "checkpoints" / "12")
    train = ["train", *toy.flags(corpus, copy)]
    # Each command runs in a process of its own. After a failed read, orbax leaves a state behind
    # that breaks `ast.parse` of CPython 3.11, which parses the next command line.
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
    assert (copy / "checkpoints.corrupt" / "12").is_dir()  # moved, not deleted


def test_no_such_checkpoint(capsys, copy):
    fails(capsys, ["evaluate", str(copy), "--checkpoint", "5"], "'5'", "4, 8, 12")
    shutil.rmtree(copy / "checkpoints")
    fails(capsys, ["evaluate", str(copy)], "no checkpoint yet")


def test_a_config_that_cannot_be_read(capsys, copy):
    (copy / "config.json").write_text("{")
    fails(capsys, ["evaluate", str(copy)], "config.json cannot be read")


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_it_usable(copy, corpus):
    """A limit on the size of files replaces the full disk, as both make write() fail."""
    shutil.rmtree(copy / "checkpoints" / "12")
    code = (
        "import resource, sys; from heedful.train import cli;"
        "from heedful.train.checkpoint import Checkpoints; save = Checkpoints.save\n"
        "def limited(self, *arguments, **how):\n"
        "    import jax\n"  # jax would leave broken files in the cache that all tests share.
        "    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1e9)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))\n"
        "    save(self, *arguments, **how); self.wait()\n"
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


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_the_norms(corpus, tmp_path, capsys):
    flags = [*toy.flags(corpus, tmp_path / "run", steps=40), "--train.optimizer.peak-lr", "1e30"]
    flags += ["--model.norm.position", "pre", "--train.optimizer.warmup-steps", "0"]
    assert cli.run(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(r"at step \d+ the loss is (nan|inf)", error)
    assert "decoder.blocks.self_attention.query.kernel[0]: gradient" in error
    assert "peak_lr" in error
