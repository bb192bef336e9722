"""Runs one by one: in a list, in full, and for other programs."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rows import run, write

from svnup.cli.results import main
from svnup.reports.runs import records
from svnup.results.select import flatten

ROWS = [
    run(30.0),
    run(20.0, allocator="shapley", seed=3),
    run(status="failed", allocator="owl"),
    run(status="running", pruner="magnitude"),
    run(25.0, pruner="sparsegpt", fallback="damping 0.1 instead of 0.01"),
]


@pytest.fixture
def folder(tmp_path) -> str:
    return write(tmp_path / "results", *ROWS)


def said(capsys, *args: str) -> str:
    assert main(list(args)) == 0
    return capsys.readouterr().out


def test_a_list_has_every_run(folder, capsys):
    out = said(capsys, "list", folder)
    lines = [line.split() for line in out.splitlines()[2:]]
    assert {(line[0], line[1]) for line in lines} == {
        (row.config_key, "fallback" if row is ROWS[4] else row.status) for row in ROWS
    }
    assert said(capsys, "list", folder, "--where", "status=failed").count("\n") == 3
    assert (
        said(capsys, "list", folder, "--where", f"key={ROWS[1].config_key[:6]}").splitlines()[2].split()[0]
        == ROWS[1].config_key
    )


def test_a_list_is_sorted(folder, capsys):
    lines = csv.DictReader(io.StringIO(said(capsys, "list", folder, "--sort", "docs/ppl", "--format", "csv")))
    assert [line["docs/ppl"] for line in lines][:2] == ["20.0", "30.0"]
    assert main(["list", folder, "--sort", "ppl"]) == 2
    assert "--sort ppl: choose" in capsys.readouterr().err


def test_one_run_in_full(folder, capsys):
    out = said(capsys, "show", folder, ROWS[1].config_key[:6])
    assert out.startswith(f"run {ROWS[1].config_key}: finished\n")
    for line in ("dataset.n_seq 64 (default 128)", "seed 3 (default 0)", "scores n_evaluations 7", "hardware.cpu Abacus 9000"):
        assert line in " ".join(out.split()), line
    assert "sparsity 0.7 (default" not in " ".join(out.split())
    for section in ("settings apart from the defaults", "metrics", "sparsity", "layers", "cost", "provenance", "inputs"):
        assert f"\n{section}\n" in out
    assert "docs/ppl 12.50 20.00 +60.0 %" in " ".join(out.split())
    layers = out.partition("\nlayers\n")[2].split("\n\n")[0].splitlines()
    assert [line.split() for line in layers[2:]] == [["0", "1.0000", "0.6000", "0.6000"], ["1", "2.0000", "0.8000", "0.8000"]]


def test_one_that_failed_and_one_that_fell_back(folder, capsys):
    assert "ValueError: no luck" in said(capsys, "show", folder, ROWS[2].config_key)
    assert "pruning fell back: damping 0.1" in said(capsys, "show", folder, ROWS[4].config_key).splitlines()[0]


def test_a_prefix_of_no_run_or_of_several(folder, capsys):
    assert main(["show", folder, "zzz"]) == 2
    assert "zzz: no run has a key with this prefix; there are: " in capsys.readouterr().err
    write(Path(folder), *(replace(ROWS[0], config_key=f"abcd{i}") for i in "12"))
    assert main(["show", folder, "abcd"]) == 2
    assert "several runs have this prefix: abcd1, abcd2" in capsys.readouterr().err


def test_an_export_has_every_metric_with_its_whole_configuration(folder, capsys):
    lines = [json.loads(line) for line in said(capsys, "export", folder, "--format", "jsonl").splitlines()]
    assert lines == json.loads(json.dumps(records(ROWS)))
    assert {line["key"] for line in lines} == {row.config_key for row in ROWS}
    for line in lines:
        row = next(row for row in ROWS if row.config_key == line["key"])
        assert {k.removeprefix("config."): v for k, v in line.items() if k.startswith("config.")} == flatten(row.config)
        assert line["value"] == (row.metrics["docs/ppl"].value if row.metrics else None)
        assert line["status"] == row.status
    table = list(csv.DictReader(io.StringIO(said(capsys, "export", folder))))
    assert len(table) == len(lines)
    for line, full in zip(table, lines, strict=True):
        assert line["value"] == ("" if full["value"] is None else str(full["value"]))
        assert line["config.pruner._target_"] == full["config.pruner._target_"]
        assert line.get("protocol.seq_len", "") == str(full.get("protocol.seq_len", ""))


def test_several_metrics_are_several_lines():
    (first, second) = records([run(metrics={"boolq/acc": 60.0, "docs/ppl": 30.0})])
    assert [(r["metric"], r["value"]) for r in (first, second)] == [("boolq/acc", 60.0), ("docs/ppl", 30.0)]
