"""Test the table of cores and masks, and that the page about cores has the same table."""

import dataclasses
from pathlib import Path

import pytest

from heedful.model.attention import CORES
from heedful.model.config import ModelError
from heedful.train.cli import run
from heedful.train.inspection import cores
from heedful.train.inspection.cores import ROWS, Row, refusal, table

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "cores.md"


@pytest.mark.slow
def test_the_table_in_the_page_is_current():
    begin, end = "<!-- cores -->\n", "\n<!-- /cores -->"
    written = PAGE.read_text("utf-8").split(begin)[1].split(end)[0]
    assert written == table(), f"put the output of `heedful cores` between the markers of {PAGE}"


def test_dense_runs_everything_and_each_mask_is_another():
    assert not any(refusal("dense", row) for row in ROWS)
    assert len({(row.where, row.what) for row in ROWS}) == len(ROWS)


def row(what: str) -> Row:
    return next(row for row in ROWS if row.what == what)


def test_a_core_that_refuses_says_why():
    assert "does not support a prefix" in (refusal("splash", row("the past and a prefix")) or "")
    assert refusal("splash", row("the past")) is None
    assert "come out as NaN" in (refusal("cudnn", row("the past of its own document")) or "")
    assert refusal("cudnn", row("the past, but padding")) is None


def test_a_core_that_cannot_run_at_all_is_not_called_able(monkeypatch):
    def broken(call):
        raise ModelError("no")

    spec = dataclasses.replace(CORES["flash"], make=lambda config, shared: broken)
    monkeypatch.setitem(CORES, "flash", spec)
    with pytest.raises(ModelError, match="no"):
        refusal("flash", row("the past"))


def test_the_command_prints_it(monkeypatch, capsys):
    monkeypatch.setattr(cores, "CORES", {"dense": CORES["dense"]})
    assert run(["cores"]) == 0
    assert "| decoder | the past | yes |" in capsys.readouterr().out
