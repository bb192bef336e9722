"""What a run leaves behind, and the tables made of it."""

import csv
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rows import changed, run

from svnup.cli.results import main
from svnup.files import unsealed
from svnup.reports.grid import FORMATS, Cell, Grid
from svnup.reports.tables import frame, render
from svnup.results.row import ResultRow
from svnup.results.store import RunFolder, load


def row(key: str, ppl: float | None, *, measured: dict[str, Any] | None = None, **given: Any) -> ResultRow:
    """A row under a key that tells it from others, of a model whose windows are those of the others."""
    return run(ppl, key=key, measured={"tokens_sha256": "abc"} | (measured or {}), **given)


UNIFORM, SHAPLEY = row("a1", 40.0), row("b2", 30.0, allocator="shapley")


def cells(markdown: str) -> list[dict[str, str]]:
    """The lines of the Markdown table by column."""
    lines = [[c.strip() for c in line.strip("|\n ").split("|")] for line in markdown.splitlines() if line.startswith("|")]
    head, rule, *body = lines
    assert set("".join(rule)) <= set("-: ")
    assert all(len(line) == len(head) for line in body)
    return [dict(zip(head, line, strict=True)) for line in body]


# -- one run


def test_a_run_is_read_as_it_was_written(tmp_path):
    folder = RunFolder.of(tmp_path, "b2")
    assert folder.read() is None
    assert list(tmp_path.iterdir()) == [], "to look is not to write"
    folder.write(SHAPLEY)
    assert folder.path == tmp_path / "runs" / "b2"
    assert folder.read() == SHAPLEY
    assert unsealed(json.loads((folder.path / "profile.json").read_text())) == SHAPLEY.profile.to_dict()
    assert json.loads((folder.path / "shapley.json").read_text()) == SHAPLEY.shapley.to_dict()
    folder.write_text("config.yaml", "a: 1\n")
    assert (folder.path / "config.yaml").read_text() == "a: 1\n"
    assert {p.name for p in folder.path.iterdir()} == {"result.json", "profile.json", "shapley.json", "config.yaml"}


def test_a_run_without_values_or_profile_has_no_files_of_them(tmp_path):
    folder = RunFolder.of(tmp_path, "c3")
    folder.write(row("c3", None, status="failed"))
    assert [p.name for p in folder.path.iterdir()] == ["result.json"]
    assert folder.read().error == "ValueError: no luck"


def test_a_write_that_breaks_off_leaves_the_old_result(tmp_path, monkeypatch):
    folder = RunFolder.of(tmp_path, "a1")
    folder.write(UNIFORM)
    before = (folder.path / "result.json").read_bytes()
    write = Path.write_text

    def half(self: Path, text: str, **options: Any) -> int:
        write(self, text[: len(text) // 2], **options)
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        folder.write(row("a1", 99.0))
    monkeypatch.undo()
    assert (folder.path / "result.json").read_bytes() == before
    assert folder.read() == UNIFORM
    assert load(tmp_path) == [UNIFORM]


def test_a_result_is_replaced_whole(tmp_path):
    """Who opened the old file goes on reading it: the new one is another file under its name."""
    folder = RunFolder.of(tmp_path, "a1")
    folder.write(UNIFORM)
    (tmp_path / "old.json").hardlink_to(folder.path / "result.json")
    folder.write(row("a1", 99.0))
    assert ResultRow.from_json((tmp_path / "old.json").read_text()) == UNIFORM
    assert folder.read() == row("a1", 99.0)
    assert {p.name for p in folder.path.iterdir()} == {"result.json", "profile.json"}, "no temporary file is left"


def test_nan_never_gets_into_a_result(tmp_path):
    folder = RunFolder.of(tmp_path, "a1")
    with pytest.raises(ValueError, match="JSON"):
        folder.write(replace(UNIFORM, seconds=float("nan")))
    assert folder.read() is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"schema_version": 1, "status": "fini',
        "[]",
        "null",
        json.dumps({"schema_version": 1, "status": "finished"}),
        json.dumps(json.loads(UNIFORM.to_json()) | {"schema_version": 0}),
        json.dumps(json.loads(UNIFORM.to_json()) | {"schema_version": 2}),
        json.dumps(json.loads(UNIFORM.to_json()) | {"a_field_of_the_future": 1}),
    ],
)
def test_what_this_version_cannot_read_is_no_result(content, tmp_path):
    folder = RunFolder.of(tmp_path, "a1")
    folder.path.mkdir(parents=True)
    (folder.path / "result.json").write_text(content)
    RunFolder.of(tmp_path, "b2").write(SHAPLEY)
    assert folder.read() is None
    assert load(tmp_path) == [SHAPLEY]


def test_bytes_that_are_no_text_are_no_result(tmp_path):
    folder = RunFolder.of(tmp_path, "a1")
    folder.path.mkdir(parents=True)
    (folder.path / "result.json").write_bytes(b"\xff\xfe\x00")
    assert folder.read() is None


def test_load_finds_every_run_below_a_folder(tmp_path):
    for name, one in (("x", UNIFORM), ("y/z", SHAPLEY)):
        RunFolder.of(tmp_path / name, one.config_key).write(one)
    assert load(tmp_path) == [UNIFORM, SHAPLEY]
    assert load(tmp_path / "y") == [SHAPLEY]
    assert load(tmp_path / "nothing") == []


# -- tables


def test_copies_of_a_run_with_other_numbers_are_named(tmp_path, caplog):
    for name, ppl in (("x", 20.0), ("y", 25.0), ("z", 20.0)):
        RunFolder.of(tmp_path / name, "a").write(row("a", ppl))
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path)) == 3
    (said,) = caplog.messages
    assert said == f"{tmp_path}/x/runs/a, {tmp_path}/y/runs/a: one run with different numbers; name the folder of one"


def of_version(key: str, ppl: float, numbers: int) -> ResultRow:
    made = row(key, ppl)
    return replace(made, provenance=replace(made.provenance, numbers=numbers)) if numbers else made


def test_numbers_of_earlier_versions_are_left_out_of_tables(tmp_path, capsys, caplog):
    """After a change that moves numbers the runs of before lie in the same folder."""
    for made in (of_version("a", 40.0, 0), of_version("b", 41.0, 2)):
        RunFolder.of(tmp_path, made.config_key).write(made)
    with caplog.at_level(logging.WARNING):
        assert main(["table", str(tmp_path), "--format", "csv"]) == 0
    shown = [float(line["docs/ppl"]) for line in csv.DictReader(io.StringIO(capsys.readouterr().out))]
    assert sorted(shown) == [40.0, 41.0], "results from before they told are of version 2"
    assert "left out" not in caplog.text
    for made in (of_version("c", 42.0, 3), of_version("d", 43.0, 3)):
        RunFolder.of(tmp_path, made.config_key).write(made)
    with caplog.at_level(logging.WARNING):
        assert main(["table", str(tmp_path), "--format", "csv"]) == 0
    assert "left out: 2 runs with numbers of versions before 3" in caplog.text
    shown = [float(line["docs/ppl"]) for line in csv.DictReader(io.StringIO(capsys.readouterr().out))]
    assert sorted(shown) == [42.0, 43.0]
    assert main(["list", str(tmp_path), "--format", "csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5  # nothing is hidden there
    assert main(["table", str(tmp_path), "--format", "csv", "--where", "key=a"]) == 0
    assert "40" in capsys.readouterr().out


def test_change_against_uniform():
    table = cells(render([SHAPLEY, UNIFORM], "markdown"))
    assert [line["allocator"] for line in table] == ["shapley (slidingwindow w=5, log, lam=0.15)", "uniform"]
    assert [line["docs/ppl"] for line in table] == ["30.00", "40.00"]
    assert [line["docs/ppl vs uniform"] for line in table] == ["-25.0 %", "-"]
    assert [line["docs/ppl dense"] for line in table] == ["12.50", "12.50"]
    assert [line["actual"] for line in table] == ["0.6999", "0.6999"]


def test_change_only_against_the_same_setting():
    """Uniform runs of another pruner, sparsity, model or seed are no base."""
    others = [
        row("u1", 50.0, pruner="sparsegpt"),
        row("u2", 20.0, sparsity=0.6),
        row("u3", 60.0, model="other/model"),
        row("u4", 70.0, seed=1),
        replace(UNIFORM, config_key="u5", fingerprints={"weights": "another checkpoint of that name"}),
    ]

    def change(*rows: ResultRow) -> str:
        (line,) = [x for x in cells(render(list(rows), "markdown")) if x["allocator"].startswith("shapley")]
        return line["docs/ppl vs uniform"]

    assert change(SHAPLEY, *others) == "-"
    assert change(SHAPLEY, *others, UNIFORM) == "-25.0 %"
    worse = row("b3", 44.0, allocator="shapley")
    assert change(worse, *others, UNIFORM) == "+10.0 %"
    wide = row("b4", 45.0, allocator="shapley", pruner="sparsegpt")
    assert change(wide, *others, UNIFORM) == "-10.0 %"


def test_a_failed_uniform_run_does_not_hide_a_finished_one():
    table = cells(render([row("a0", None, status="failed"), UNIFORM, SHAPLEY], "markdown"))
    (line,) = [x for x in table if x["allocator"].startswith("shapley")]
    assert line["docs/ppl vs uniform"] == "-25.0 %"


def test_saved_models_of_different_runs_are_different_models():
    uniform = row("a0", 80.0, model="results/runs/0123456789ab/model")
    shapley = row("b0", 30.0, model="results/runs/ba9876543210/model", allocator="shapley")
    (line,) = [x for x in cells(render([uniform, shapley], "markdown")) if x["allocator"].startswith("shapley")]
    assert line["docs/ppl vs uniform"] == "-"


def test_other_protocols_never_share_a_column():
    """Another seq_len, window count or text is another number, however alike the name."""
    rows = [
        UNIFORM,
        SHAPLEY,
        row("s1", 25.0, allocator="shapley", measured={"seq_len": 128}),
        row("s2", 35.0, measured={"n_windows": 4}),
    ]
    data = frame(rows)
    columns = [c for c in data.columns if re.fullmatch(r"docs/ppl( \[\w+\])?", c)]
    assert len(columns) == 3
    assert "docs/ppl" not in columns, "each is marked where there are several"
    assert (data[columns].notna().sum(axis=1) == 1).all(), "each run has its number in one of them"
    assert sorted(data[columns].notna().sum()) == [1, 1, 2]
    by_key = data.set_index("key")
    (shared,) = [c for c in columns if by_key[c].notna().sum() == 2]
    assert set(by_key[shared].dropna()) == {40.0, 30.0}
    table = cells(render(rows, "markdown"))
    changes = [v for line in table for k, v in line.items() if k.endswith("vs uniform") and v != "-"]
    assert changes == ["-25.0 %"], "no change is computed across protocols"


def test_failed_runs_are_visible():
    rows = [UNIFORM, row("f1", None, status="failed", pruner="sparsegpt")]
    table = cells(render(rows, "markdown"))
    assert {(line["pruner"], line["status"], line["docs/ppl"]) for line in table} == {
        ("wanda", "finished", "40.00"),
        ("sparsegpt", "failed", "-"),
    }
    assert "status" not in cells(render([UNIFORM], "markdown"))[0], "where all are finished that goes without saying"
    only = cells(render([row("f1", None, status="failed")], "markdown"))
    assert only[0]["status"] == "failed"


def test_a_failed_shapley_run_is_called_one():
    (line,) = cells(render([row("f1", None, status="failed", allocator="shapley")], "markdown"))
    assert line["allocator"].startswith("shapley")


def test_columns_that_say_the_same_are_left_out_except_in_csv():
    assert not {"seed", "pattern", "status"} & set(cells(render([UNIFORM, SHAPLEY], "markdown"))[0])
    table = cells(render([UNIFORM, row("s", 41.0, seed=1), row("n", 55.0, sparsity=0.5, pattern="2:4")], "markdown"))
    assert {line["seed"] for line in table} == {"0", "1"}
    assert {line["pattern"] for line in table} == {"unstructured", "2:4"}


def test_csv_is_for_machines():
    lines = list(csv.DictReader(io.StringIO(render([SHAPLEY, UNIFORM], "csv"))))
    assert len(lines) == 2
    assert {line["key"]: float(line["docs/ppl"]) for line in lines} == {"a1": 40.0, "b2": 30.0}
    assert {"model", "pruner", "allocator", "sparsity", "pattern", "seed", "status", "actual", "seconds"} <= set(lines[0])
    assert {float(line["actual"]) for line in lines} == {0.6999}


def test_latex():
    text = render([SHAPLEY, UNIFORM], "latex")
    comments = [line for line in text.splitlines() if line.startswith("% ")]
    assert any("Abacus 9000" in line for line in comments)
    text = "\n".join(line for line in text.splitlines() if line not in comments)
    assert text.startswith("\\begin{table}\n\\centering\n\\caption{docs/ppl.}\n\\begin{tabular}")
    assert text.endswith("\\end{tabular}\n\\end{table}")
    assert "30.00" in text
    assert r"$-$25.0 \%" in text
    assert not re.search(r"(?<!\\)%", text), "an unescaped % hides the rest of its line"
    assert text.count(r"\\") == 3


def test_terminal():
    text = render([SHAPLEY, UNIFORM], "terminal")
    assert "\x1b" not in text
    head, body = text.splitlines()[0], [line for line in text.splitlines() if "wanda" in line]
    assert "docs/ppl vs uniform" in head
    assert len(body) == 2
    assert re.search(r"30\.00 +-25\.0 % +12\.50", body[0])
    assert max(map(len, text.splitlines())) <= 200


def test_markdown_says_where_the_numbers_come_from():
    text = render([SHAPLEY, UNIFORM], "markdown", title="Smoke", command="make tables")
    assert text.startswith("# Smoke\n")
    for part in ("`make tables`", "Abacus 9000, 2 cores", "svnup 0.1.0", "torch 2.13.0", "300 windows of 256 tokens"):
        assert part in text, part


# -- the command


@pytest.fixture
def some_results(tmp_path) -> Path:
    for one in (UNIFORM, SHAPLEY):
        RunFolder.of(tmp_path / "results", one.config_key).write(one)
    return tmp_path / "results"


def test_a_table_says_what_no_setting_tells():
    origin = {"file": "m.gguf", "package": "m 1.0", "quantization": "Q4_1", "sha256": "f" * 64}
    texts = {"dataset": f"allenai/c4@sha256:{'a' * 64}", "evaluation.datasets.0": f"some/text@sha256:{'b' * 64}"}
    made = changed(
        row("c3", 50.0, measured={"skip": 32, "n_windows": 128}),
        provenance=UNIFORM.provenance.to_dict() | {"dequantized_from": origin},
        fingerprints={"weights": "w"} | texts,
    )
    for form in ("markdown", "terminal"):
        text = " ".join(render([made], form).split())
        assert f"Weights of svnup/tiny: dequantized from m.gguf of m 1.0 (Q4_1, SHA-256 {'f' * 64})." in text
        assert f"local copies: allenai/c4 (SHA-256 {'a' * 16}), some/text (SHA-256 {'b' * 16})." in text
    assert "128 windows of 256 tokens (test text, its windows 33 to 160)" in render([made], "markdown")
    plain = render([replace(UNIFORM, fingerprints={"weights": "w", "dataset": "allenai/c4@main"})], "markdown")
    assert "dequantized" not in plain
    assert "local" not in plain


def test_every_format_through_the_command(some_results, capsys):
    shown = {}
    for form in FORMATS:
        assert main(["table", str(some_results), "--format", form]) == 0
        shown[form] = capsys.readouterr().out
        assert "30.0" in shown[form]
        assert "40.0" in shown[form]
    assert set(shown) == {"terminal", "markdown", "csv", "latex", "html"}
    assert len(set(shown.values())) == 5
    assert main(["table", str(some_results)]) == 0
    assert capsys.readouterr().out == shown["terminal"]


def test_a_table_goes_into_a_file(some_results, tmp_path, capsys):
    out = tmp_path / "new" / "table.md"
    args = ["--format", "markdown", "--output", str(out), "--title", "T", "--command", "make it"]
    assert main(["table", str(some_results), *args]) == 0
    assert capsys.readouterr().out == ""
    assert out.read_text() == render([UNIFORM, SHAPLEY], "markdown", title="T", command="make it")


def test_an_empty_folder(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        assert main(["table", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"svnup-results: {folder}: ")
        assert "run svnup first" in err
    assert list(tmp_path.iterdir()) == []


def test_the_console_script(tmp_path):
    program = Path(sys.executable).with_name("svnup-results")
    done = subprocess.run([program, "table", str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("svnup-results: ")
    assert "Traceback" not in done.stderr


def test_results_that_cannot_be_read_are_named(tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("svnup"), "propagate", True)
    RunFolder.of(tmp_path, UNIFORM.config_key).write(UNIFORM)
    for key, text in (("torn", '{"schema_version": 1, "con'), ("bare", replace(UNIFORM, config={}).to_json())):
        (tmp_path / "runs" / key).mkdir()
        (tmp_path / "runs" / key / "result.json").write_text(text)
    assert main(["table", str(tmp_path)]) == 0
    bare, torn = sorted(caplog.messages)
    place = tmp_path / "runs"
    assert bare == (
        f"{place / 'bare' / 'result.json'}: no result of this version (config: lacks model, pruner, allocator, sparsity, "
        "pattern, seed); it is left out"
    )
    assert torn.startswith(f"{place / 'torn' / 'result.json'}: no result of this version (Unterminated string")
    shutil.rmtree(tmp_path / "runs" / UNIFORM.config_key)
    assert main(["table", str(tmp_path)]) == 2
    assert "that can be read" in capsys.readouterr().err


def test_latex_has_changes_in_brackets_and_a_caption():
    cells = [Cell("uniform"), Cell("30.00", True, "-25.0 %")]
    grid = Grid([("allocator",), ("x_y",)], [cells], "A 70 % table", subject="docs/ppl; changes against x.")
    text = grid.render("latex")
    assert "\\caption{A 70 \\% table. docs/ppl; changes against x.}" in text
    assert "\\textbf{30.00} ($-$25.0 \\%)" in text
    assert "30.00 -25.0 %" in grid.render("terminal")
    assert "**30.00 -25.0 %**" in grid.render("markdown")
    assert "<b>30.00 -25.0 %</b>" in grid.render("html")


def test_a_cell_that_latex_would_take_for_an_option():
    grid = Grid([("a",), ("b",)], [[Cell("[1, 2]"), Cell("*")]], None, "", [], 0, [])
    assert "{}[1, 2] & {}* " in grid.render("latex", False)


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    RunFolder.of(tmp_path, UNIFORM.config_key).write(UNIFORM)
    for output in ("/dev/null/x", str(tmp_path)):
        assert main(["table", str(tmp_path), "--output", output]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert output.partition("/x")[0] in line


def test_a_reader_who_leaves_is_no_error(tmp_path):
    RunFolder.of(tmp_path, UNIFORM.config_key).write(UNIFORM)
    program = Path(sys.executable).with_name("svnup-results")
    reads, writes = os.pipe()
    os.close(reads)  # as `| head -1` after its line
    with os.fdopen(writes, "wb") as stdout:
        done = subprocess.run([program, "table", str(tmp_path)], stdout=stdout, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


# -- what tells runs apart, and what is kept out


def test_a_fallback_keeps_its_run_out_of_the_numbers():
    fell = changed(row("c3", 25.0), pruning={"per_linear": [{"fallback": None}, {"fallback": "damping 0.1 instead of 0.01"}]})
    shown = cells(render([UNIFORM, fell], "markdown"))
    assert {line["status"] for line in shown} == {"finished", "fallback"}
    assert [line["docs/ppl"] for line in shown if line["status"] == "fallback"] == ["-"]
    assert "25.00" not in render([UNIFORM, fell], "csv")


def test_runs_that_differ_in_options_of_the_pruner_or_the_split_are_told_apart():
    def with_node(key, group, **options):
        config = {**UNIFORM.config, group: {"_target_": UNIFORM.config["pruner"]["_target_"], **options}}
        return replace(UNIFORM, config_key=key, config=config)

    per = [with_node(f"k{i}", "pruner", per=per) for i, per in enumerate(("matrix", "row"))]
    assert [line["pruner"] for line in cells(render(per, "markdown"))] == ["wanda (per=matrix)", "wanda (per=row)"]
    assert [line["pruner"] for line in cells(render(per[:1], "markdown"))] == ["wanda"]
    splits = [
        replace(UNIFORM, config={**UNIFORM.config, "split": {"_target_": f"svnup.allocation.splits.{name}", **options}})
        for name, options in (("UniformSplit", {}), ("ErrorSplit", {"lam": 0.05, "scale": "log"}))
    ]
    shown = cells(render(splits, "markdown"))
    assert [line["allocator"] for line in shown] == ["uniform", "uniform (split by error, lam=0.05, log)"]
    assert [line["docs/ppl vs uniform"] for line in shown] == ["-", "+0.0 %"]
