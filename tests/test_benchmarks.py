"""Test the benchmarks: their arithmetic, and tiny runs without peers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import toy
from tiny import tiny

from benchmarks import attention, beside, decoding, kernels, pipeline, training
from benchmarks.report import growth, plot, tables
from benchmarks.turns import Process
from benchmarks.worker import RETURNS_MEMORY, Case
from heedful.configs import base
from heedful.data.config import ListOpsConfig, TokenizerConfig
from heedful.data.tokenizer import Tokenizer
from heedful.train.conversion.source import Source

ROOT = Path(__file__).parent.parent
MIB = 2**20
CASE = Case(
    name="dense", length=64, causal=False, backward=True, heads=2, head_dim=8, window=4,
    features=8, rank=8, dtype="float32", memory=4 * 2**30, budget=10.0,
)  # fmt: skip
CHARS = TokenizerConfig(kind="chars")
SMALL = ListOpsConfig(examples=64, held_out=8, min_length=20, max_length=60)


def point(name, length, seconds, mib=1.0):
    where = {"name": name, "length": length, "causal": False, "backward": True}
    return where | {"seconds": seconds, "memory": int(mib * MIB)}


def skipped(name, length, reason):
    where = {"name": name, "length": length, "causal": False, "backward": True}
    return where | {"skipped": reason}


POINTS = [
    point("flash", 4096, [0.5, 0.1, 0.2], 3),
    point("torch sdpa", 4096, [0.5, 0.3, 0.4], 1.5),
    point("flash", 8192, [0.8, 0.8, 0.8], 6),
    skipped("torch sdpa", 8192, "needs 99.0 GiB"),
    skipped("torch sdpa", 16384, "needs 99.0 GiB"),
]
RESULTS = {
    "points": POINTS,
    "settings": {"core": ["flash"]},
    "environment": {"machine": {"cpus": 2}},
}


def test_growth_is_the_exponent():
    lengths = [1000, 2000, 4000, 8000]
    assert growth(lengths, [3e-9 * n**1.5 for n in lengths]) == pytest.approx(1.5)
    assert growth([1000], [1.0]) is None


def test_tables_have_medians_ratios_growth_and_reasons():
    text = tables(RESULTS, attention.PEERS)
    rows = {line.split("  ")[0]: line.split() for line in reversed(text.splitlines())}
    assert "full, forward+backward: time (ms)" in text
    assert rows["flash"][1:] == ["200", "800", "-", "2.00"]
    assert rows["torch sdpa"][2:] == ["400", "-", "-", "-"]
    # The ratio of times is the median of 1, 3 and 2; the memory of torch is half of ours.
    assert rows["torch sdpa / flash"][4:] == ["2", "-", "-"]
    assert "torch sdpa / flash       0.5" in text
    assert "- torch sdpa, full, forward+backward, 8,192 16,384: needs 99.0 GiB" in text
    assert "machine: cpus 2" in text


def test_plot(tmp_path):
    plot(RESULTS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"


def test_plot_of_nothing(tmp_path):
    plot(RESULTS | {"points": POINTS[-1:]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_what_will_take_too_long_is_told_from_shorter_lengths():
    flash = replace(CASE, name="flash", length=16384)
    # Time grows at least linearly.
    assert attention.expected(POINTS[:2], flash) == pytest.approx(0.8)
    # The last measured doubling of the length took four times as long.
    assert attention.expected(POINTS, flash) == pytest.approx(3.2)
    assert attention.expected(POINTS, replace(flash, causal=True)) == 0
    assert attention.expected(POINTS, replace(flash, name="dense")) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_counts_what_a_run_allocates_and_nothing_else():
    code = """
from benchmarks.worker import peak_resident
before = bytearray(99 << 20)
for size in (64, 16, 32):
    print(peak_resident(lambda: bytearray(size << 20)) / 2**20)
"""
    env = os.environ | RETURNS_MEMORY
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert [float(line) for line in done.stdout.split()] == pytest.approx([64, 16, 32], abs=2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_with_our_cores(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    out = tmp_path / "folder" / "attention"
    flags = "--lengths 256 --core dense nothing --mask causal --mode forward+backward --rounds 2"
    attention.main([*flags.split(), "--heads", "2", "--head-dim", "8", "--out", str(out)])
    results = json.loads(out.with_suffix(".json").read_text())
    dense, nothing = results["points"]
    assert len(dense["seconds"]) == 2 and min(dense["seconds"]) > 0
    assert dense["causal"] and dense["backward"] and dense["length"] == 256
    # Results, gradients and two arrays [2, 256, 256] take 1.1 MiB, far less than an import takes.
    assert 0 < dense["memory"] < 16 * MIB
    assert "unknown model.attention.core 'nothing'" in nothing["skipped"]
    assert out.with_suffix(".png").exists()
    assert "causal, forward+backward: time (ms)" in capsys.readouterr().out


def test_what_does_not_fit_into_memory_is_left_out(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    (found,) = attention.measure(
        [replace(CASE, length=16384, heads=8, memory=2 * 2**30)], {"dense": sys.executable}, 1
    )
    assert found["skipped"].startswith("needs ") and found["skipped"].endswith(" GiB")
    assert float(found["skipped"].split()[1]) >= 8  # The scores alone need 8 GiB.


@pytest.mark.slow
def test_training_steps_are_timed(tmp_path, capsys, monkeypatch):
    small = training.SETTINGS["gpt 4x128"]._replace(steps=2)
    low = small._replace(rows=2, dtype="bfloat16", product=64)
    monkeypatch.setattr(training, "SETTINGS", {"small": small, "gpu low": low})
    out, profile = tmp_path / "training.json", tmp_path / "profile"
    given = ["--setting", "small", "gpu low", "--rounds", "1", "--out", str(out)]
    training.main([*given, "--profile", str(profile)])
    found = {name: values["heedful"] for name, values in json.loads(out.read_text()).items()}
    # nanoGPT prints 0.80M, without the 8,192 parameters of positions.
    assert found["small"]["parameters"] == 804_096
    # A step takes six FLOPs per token and parameter of a matrix product, and those of attention.
    assert 0.9 < found["small"]["flops"] / (6 * 795_000 * 12 * 64) < 1.1
    said = capsys.readouterr().out
    assert "small: 12 x 64 tokens" in said
    assert f"ms in operations of {profile / 'gpu_low'}" in said
    shares = kernels.times(profile / "gpu_low")
    assert any("dot" in name for name in shares)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


@pytest.mark.slow
def test_decoding_is_timed(tmp_path, capsys, monkeypatch):
    small = beside.Setting("shakespeare_char", 2, 16, 65, 8, (), beam=1)
    beam = beside.Setting("translate_tiny", 2, 16, 65, 17, (), beam=3)
    monkeypatch.setattr(decoding, "SETTINGS", {"small": small, "beam": beam})
    out = tmp_path / "decoding.json"
    decoding.main(["--rounds", "1", "--out", str(out)])
    assert json.loads(out.read_text())["small"]["heedful"]["parameters"] == 804_096
    assert "beam: 2 x 16 tokens" in capsys.readouterr().out


def test_ratios_are_of_the_same_round():
    facts = {"flops": 1e9, "ceiling": 1e10, "parameters": 1, "start": 1.0, "peak": 2**20}
    found = {
        "heedful": facts | {"seconds": [1.0, 2.0, 4.0]},
        "peer": facts | {"seconds": [3.0, 4.0, 6.0]},
        "absent": {"skipped": "no such module"},
    }
    rows = beside.table("gpt2 124M", training.SETTINGS["gpt2 124M"], found).splitlines()
    assert rows[2].split() == ["heedful", "2,000.0", "1,024", "1.00", "5%", "1.0", "1"]
    assert rows[3].split()[3] == "2.00"
    assert rows[4].split(maxsplit=1) == ["absent", "no such module"]


def test_what_keeps_heedful_from_being_measured_is_said(tmp_path, capsys, monkeypatch):
    found = {"heedful": {"skipped": "no memory", "seconds": []}, "peer": {"ceiling": 1e10}}
    monkeypatch.setattr(beside, "measure", lambda *_: found)
    where = ["--out", str(tmp_path / "x.json"), "--profile", str(tmp_path / "profile")]
    training.main(["--setting", "gpt2 124M", *where])
    assert "gpt2 124M: heedful was not measured: no memory" in capsys.readouterr().out


def test_a_process_may_say_much_before_it_answers_and_its_last_words_are_kept():
    code = """
import sys
print("x" * 300_000, file=sys.stderr)
print("{}", flush=True)
sys.stdin.readline()
sys.exit("the reason")
"""
    process = Process([sys.executable, "-c", code], {}, 30)
    assert process.ask() == {}
    assert process.ask("again") == process.ask("once more") == {"skipped": "the reason"}
    process.close()


def table_of_the_pipeline(config, capsys):
    """Return rows and tokens per second, and the tokens per second that training could use."""
    pipeline.main(["--config", config, "--seconds", "0.1", "--flops", "1e9"])
    name, *columns = capsys.readouterr().out.splitlines()[-1].split()
    assert name == config
    rows, tokens, takes, feeds = (float(column.replace(",", "")) for column in columns)
    assert feeds == pytest.approx(tokens / takes, abs=0.01, rel=0.1)
    return rows, tokens, takes


def test_the_pipeline_alone(capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "stand_in", lambda data: replace(data, listops=SMALL))
    rows, tokens, _ = table_of_the_pipeline("listops_tiny", capsys)
    assert 20 < tokens / rows <= 62  # A row has one target, but all of its tokens count.


@pytest.mark.parametrize(("config", "length"), [("bert_tiny", 128), ("t5_tiny", 64 + 14)])
def test_the_pipeline_counts_tokens_that_are_not_predicted(
    config, length, tmp_path, capsys, monkeypatch
):
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(999)))
    own = {"source": "files", "train": (str(tmp_path),)}
    monkeypatch.setattr(pipeline, "stand_in", lambda data: replace(data, **own))
    rows, tokens, _ = table_of_the_pipeline(config, capsys)
    assert tokens / rows == pytest.approx(length, rel=0.02)  # The last row is shorter.


def test_the_pipeline_takes_tokenizer_and_model_of_what_a_run_begins_from(
    tmp_path, capsys, monkeypatch
):
    tokenizer = Tokenizer.prepare(["abcdefghijklmnopqrstuvwxyz"], CHARS, "classification")
    body = tiny("encoder_only", vocab_size=tokenizer.vocab_size)
    source = Source("package:minilm", body, tokenizer, dict)
    monkeypatch.setattr(pipeline, "open_source", lambda *_: source, raising=False)
    own = {"source": "files", "train": (str(toy.write_table(tmp_path)),)}
    monkeypatch.setattr(pipeline, "stand_in", lambda data: replace(data, **own))
    rows, tokens, takes = table_of_the_pipeline("sentiment_minilm", capsys)
    assert tokens / rows > 12  # tokens are characters
    # The default model has 19 million parameters; 1e9 FLOP/s would train on 9 tokens per second.
    assert takes > 10_000


def test_work_of_a_masked_lm_is_that_of_all_positions_and_of_the_scores_that_are_needed():
    whole = base.load("bert_tiny")[0]
    model, length, D, F, V = replace(whole.model, vocab_size=61), 128, 128, 512, 61
    read = pipeline.Read(rows=1, source=0, positions=20, targets=3)
    body, head = 2 * (4 * D * D + 2 * D * F + 2 * length * D), D * D + D * V
    work = partial(pipeline.work, model, whole.data)
    assert work(whole.train, read) == 6 * (20 * body + 3 * head)
    assert work(replace(whole.train, loss_chunk=None), read) == 6 * (20 * body + 20 * head)


def test_work_of_an_encoder_decoder_is_that_of_either_side():
    whole = base.load("t5_tiny")[0]
    model, length, D, F, V = replace(whole.model, vocab_size=61), 64, 128, 256, 61
    source, target = pipeline.Read(1, 1, 0, 0), pipeline.Read(1, 0, 1, 1)
    scores, feed_forward, cross = 2 * length * D, 3 * D * F, 2 * D * D
    encoder = 2 * (4 * D * D + scores + feed_forward + cross)
    decoder = 2 * (4 * D * D + cross + 2 * scores + feed_forward) + D * V
    work = partial(pipeline.work, model, whole.data, whole.train)
    assert (work(source), work(target)) == (6 * encoder, 6 * decoder)


def test_what_stands_in_for_data_that_is_not_at_hand():
    for name in base.names():
        data = base.load(name)[0].data
        other = pipeline.stand_in(data)
        assert other.source in ("homeassistant", "shakespeare", "sentiment", "listops")
        assert (other.objective, other.batch_tokens) == (data.objective, data.batch_tokens)
