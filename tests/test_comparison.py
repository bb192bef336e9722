"""What counts as the same number, in folders and in tables."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import run, write

from svnup.cli.results import main
from svnup.results.compare import compare, difference
from svnup.results.row import ResultRow
from svnup.results.store import load

COMMITTED = Path(__file__).parent.parent / "results" / "tables" / "llama_70_tiny.md"


@pytest.mark.parametrize(
    ("a", "b", "apart"),
    [
        ("16.55", "16.55", 0.0),
        ("16.55", "16.72", 0.17 / 16.72),
        ("**16.55**", "16.55", 0.0),
        ("16.55*", "16.55", 0.0),
        ("16.55 ± 0.10", "16.55 ± 0.20", 0.1 / 16.55),
        ("-10.7 %", "-9.7 %", (90.3 / 89.3 - 1) / 2),
        ("16.55 (n=3)", "16.55 (n=2)", 1 / 3),
        ("0.00", "0.00", 0.0),
        ("fail", "fail", 0.0),
        ("fail", "16.55", None),
        ("-", "16.55", None),
        ("0", "1", 1.0),
    ],
)
def test_how_far_cells_are_apart(a, b, apart):
    for found in (difference(a, b), difference(b, a)):
        assert found == (None if apart is None else pytest.approx(apart, rel=0.02))


@given(st.floats(0.01, 1e6), st.floats(-0.2, 0.2))
def test_a_difference_is_relative_and_symmetric(x, change):
    a, b = f"{x!r}", f"{x * (1 + change)!r}"
    assert difference(a, b) == pytest.approx(abs(change) / max(1, 1 + change), abs=1e-9)
    assert difference(a, b) == difference(b, a)


ROWS = [run(30.0), run(20.0, allocator="shapley"), run(status="failed", allocator="owl")]


def told(tmp_path, capsys, a: list[ResultRow], b: list[ResultRow], *options: str) -> tuple[int, str]:
    code = main(["compare", write(tmp_path / "a", *a), write(tmp_path / "b", *b), *options])
    return code, capsys.readouterr().out


def test_equal_folders(tmp_path, capsys):
    code, out = told(tmp_path, capsys, ROWS, ROWS)
    assert (code, out.count("\n")) == (0, 1)
    assert "equal to the last digit" in out


def test_numbers_within_the_tolerance_and_beyond(tmp_path, capsys):
    moved = [*ROWS[:1], replace(ROWS[1], metrics={"docs/ppl": replace(ROWS[1].metrics["docs/ppl"], value=20.15)}), ROWS[2]]
    code, out = told(tmp_path, capsys, ROWS, moved)
    assert code == 0
    assert "within 1 %; the largest difference is 0.74 %" in out
    code, out = told(tmp_path, capsys, ROWS, moved, "--tolerance", "0.005")
    assert code == 1
    assert out.startswith(f"{ROWS[1].config_key} (svnup/tiny wanda shapley 0.7 unstructured, seed 0), docs/ppl: 20.0 | 20.15")
    assert "1 of 9 cells differ by more than 0.5 %" in out


def test_runs_are_matched_by_what_they_are_not_by_their_keys(tmp_path, capsys):
    code, out = told(tmp_path, capsys, ROWS, [replace(row, config_key=f"other{i}") for i, row in enumerate(ROWS)])
    assert code == 0, out


def test_what_one_side_lacks_and_other_protocols_are_differences(tmp_path, capsys):
    other = [replace(run(30.0, measured={"seq_len": 128}), config_key="x"), run(status="failed", allocator="shapley")]
    code, out = told(tmp_path, capsys, ROWS, other)
    assert code == 1
    assert "under different protocols, seq_len 256 | seq_len 128" in out
    assert "status: finished | failed" in out
    assert "owl 0.7 unstructured, seed 0): only in" in out


def test_tables_in_files(tmp_path, capsys):
    folder = write(tmp_path / "results", *ROWS, run(21.0, allocator="shapley", seed=1))
    layout = ["--rows", "allocator", "--columns", "sparsity", "--baseline", "allocator=uniform"]
    other = write(
        tmp_path / "moved", run(30.1), run(20.0, allocator="shapley"), ROWS[2], run(21.1, allocator="shapley", seed=1)
    )
    worse = write(tmp_path / "worse", run(33.0), run(20.0, allocator="shapley"), run(19.0, allocator="owl"))
    for form, flat in (("markdown", "md"), ("csv", "csv")):
        files = {}
        for name, of in (("a", folder), ("moved", other), ("worse", worse)):
            for kind, options in (("pivot", layout), ("flat", [])):
                files[name, kind] = str(tmp_path / f"{name}_{kind}.{flat}")
                assert main(["table", of, *options, "--format", form, "--output", files[name, kind]]) == 0
        for kind in ("pivot", "flat"):
            assert main(["compare", files["a", kind], files["a", kind]]) == 0
            assert "byte-equal" in capsys.readouterr().out
            assert main(["compare", files["a", kind], files["moved", kind]]) == 0
            assert "within 1 %" in capsys.readouterr().out
            assert main(["compare", files["a", kind], files["worse", kind]]) == 1
            assert "uniform" in capsys.readouterr().out


def test_tables_under_other_protocols_are_not_the_same(tmp_path, capsys):
    for name, n_windows in (("a", 32), ("b", 417), ("c", 32)):
        folder = write(tmp_path / name, run(30.0, measured={"n_windows": n_windows}))
        args = ["table", folder, "--rows", "pruner", "--columns", "model", "--format", "markdown"]
        assert main([*args, "--output", str(tmp_path / f"{name}.md"), "--command", f"make {name}"]) == 0
    assert main(["compare", str(tmp_path / "a.md"), str(tmp_path / "b.md")]) == 1
    said = capsys.readouterr().out
    assert "docs/ppl: under different protocols, 32 windows of 256 tokens (test text) | 417 windows of 256 tokens" in said
    assert main(["compare", str(tmp_path / "a.md"), str(tmp_path / "c.md")]) == 0
    several = ["Machine: X/Y 9, 2 cores. svnup 0, torch 2. docs.x/ppl: 3 windows; docs_cloze/acc: 5 items, 0-shot, in %."]
    for name, line in (("d", several[0]), ("e", several[0].replace("5 items", "6 items"))):
        (tmp_path / f"{name}.md").write_text(f"{line}\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    found = compare(tmp_path / "d.md", tmp_path / "e.md")
    assert found.different == ["docs_cloze/acc: under different protocols, 5 items, 0-shot, in % | 6 items, 0-shot, in %"]


def test_lines_and_columns_of_one_table_alone(tmp_path, capsys):
    (tmp_path / "a.md").write_text("| m | x | y |\n| --- | --- | --- |\n| p | 1.0 | 2.0 |\n| q | 3.0 | 4.0 |\n")
    (tmp_path / "b.md").write_text("Text.\n\n| m | x |\n| --- | --- |\n| q | 3.0 |\n| r | 5.0 |\n")
    assert main(["compare", str(tmp_path / "a.md"), str(tmp_path / "b.md")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == ["p: only in the first", "q, y: only in the first", "r: only in the second"]


def test_columns_of_the_same_name_are_each_compared(tmp_path):
    """The leaderboard has one `cost` per pruner."""
    for name, last in (("a", 2), ("b", 3)):
        (tmp_path / f"{name}.md").write_text(f"| m | cost | cost |\n| --- | --- | --- |\n| p | 1 | {last} |\n")
    assert compare(tmp_path / "a.md", tmp_path / "b.md").different == ["p, cost (2): 2 | 3  (33 % apart)"]


@pytest.mark.parametrize("tolerance", ["nan", "-0.1", "inf"])
def test_a_tolerance_that_is_none_is_refused(tolerance, tmp_path, capsys):
    folder = write(tmp_path / "a", *ROWS)
    assert main(["compare", folder, folder, f"--tolerance={tolerance}"]) == 2
    assert f"--tolerance {tolerance}: a relative difference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ("none", "t.md", "none: no such file or folder"),
        ("", "t.md", "one is a folder and one a file"),
        ("t.tex", "t.tex", "only tables in Markdown (.md) and CSV (.csv) are compared"),
        ("empty.md", "t.md", "empty.md: no table in this file"),
        ("", "", "no result.json below this folder"),
    ],
)
def test_a_mistake_is_one_line(a, b, words, tmp_path, capsys):
    (tmp_path / "t.md").write_text("| m | x |\n| --- | --- |\n| p | 1.0 |\n")
    (tmp_path / "t.tex").write_text("\\toprule\n")
    (tmp_path / "empty.md").write_text("nothing\n")
    assert main(["compare", str(tmp_path / a), str(tmp_path / b)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_the_committed_table_is_compared_with_itself():
    smoke = Path(__file__).parent.parent / "results" / "tables" / "smoke.md"
    found = compare(smoke, smoke)
    assert found.byte_equal
    assert found.n == 4 * 8


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["magnitude", "sparsegpt"])
def test_a_committed_number_comes_out_again(pruner, tmp_path):
    """As `make tables` measures it: within 1 % on any machine."""
    (row,) = (line for line in COMMITTED.read_text().splitlines() if line.startswith(f"| {pruner} | uniform |"))
    job = [f"pruner={pruner}", "allocator=uniform", "sparsity=0.7", "evaluation.n_seq=32", "dataset.n_seq=32"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "svnup", *job], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (made,) = load(tmp_path)
    assert made.metrics["docs/ppl"].value == pytest.approx(float(row.split("|")[3].replace("*", "")), rel=0.01)
