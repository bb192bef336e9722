"""Ours beside published numbers: the same cell under the same protocol, or no difference at all."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
import yaml
from rows import changed, run, write

from svnup.cli.results import main
from svnup.reports.published import FOLDER, Published

CONF = Path(__file__).parent.parent / "conf" / "model"
GOLDEN = Path(__file__).parent / "golden"
FIELD = {"dataset": "wikitext2", "seq_len": 2048, "n_windows": 166}
TABLES = json.loads((FOLDER / "tables.json").read_text())


def llama(ppl, *, model="huggyllama/llama-7b", measured=FIELD, **options):
    text = {"_target_": "svnup.data.C4", "n_seq": 128, "seq_len": measured["seq_len"], "seed": 0, "role": "calibration"}
    return run(metrics={"wikitext2/ppl": ppl}, model=model, measured=measured, **{"dataset": text} | options)


OURS = [
    llama(26.0, pruner="sparsegpt"),
    llama(21.0, pruner="sparsegpt", allocator="shapley"),
    llama(90.0),
    run(status="failed", allocator="shapley", model="huggyllama/llama-7b", dataset=llama(90.0).config["dataset"]),
    llama(25.0, pruner="sparsegpt", model="/data/Llama-2-7b-hf"),
    run(15.0),
]


def cells(capsys, folder, *args: str) -> dict[tuple[str, ...], dict[str, str]]:
    assert main(["published", folder, "--format", "csv", *args]) == 0
    lines = csv.DictReader(io.StringIO(capsys.readouterr().out))
    out: dict[tuple[str, ...], dict[str, str]] = {}
    for line in lines:  # of several sources the first
        out.setdefault((line["pruner"], line["allocator"], line["model"]), line)
    return out


def test_every_number_has_a_source_and_one_place():
    with (FOLDER / "numbers.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 101
    assert all(line["source"] and float(line["value"]) > 1 and line["kind"] in ("reported", "implied") for line in lines)
    numbers = Published.load("llama_70").numbers.values()
    assert sum(map(len, numbers)) == len(lines)
    assert all(len({one.source for one in found}) == len(found) for found in numbers), "one of each source"
    known = {
        (line["model"], line["pruner"], line["allocator"]): float(line["value"])
        for line in lines
        if line["sparsity"] == "0.7" and (line["kind"] == "implied" or line["source"] == "OWL repository README")
    }
    with (FOLDER / "headline.csv").open() as file:
        for line in csv.DictReader(file):
            uniform, implied = (known[line["model"], "sparsegpt", budget] for budget in ("uniform", "shapley"))
            assert implied == pytest.approx(uniform * (1 + float(line["change"])), abs=0.005)


def test_the_checkpoints_are_those_of_the_model_group():
    in_both = 0
    for name, path in TABLES["checkpoints"].items():
        config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
        assert config["pretrained_model_name_or_path"] == path
        known = {(d["dataset"], str(d["seq_len"])): d["ppl"] for d in config.get("dense_ppl", [])}
        numbers = Published.load("llama_70").numbers
        table = {("wikitext2", seq_len): of[0].value for (key, seq_len), of in numbers.items() if key[:2] == (name, "none")}
        assert {k: v for k, v in known.items() if k in table} == {k: v for k, v in table.items() if k in known}
        if name in Published.load("llama_70").columns["model"]:
            assert ("wikitext2", "2048") in table
            assert ("wikitext2", "2048") in known
        in_both += len(known.keys() & table.keys())
    assert in_both >= len(Published.load("llama_70").columns["model"])


@pytest.mark.parametrize("name", TABLES["tables"])
@pytest.mark.parametrize("form", ["terminal", "markdown", "csv", "latex", "html"])
def test_every_table_without_any_run_of_ours(name, form, tmp_path, capsys):
    assert main(["published", str(tmp_path), "--table", name, "--format", form]) == 0
    assert capsys.readouterr().out


def test_table_and_headline_are_one_page(tmp_path, capsys):
    assert main(["published", str(tmp_path), "--format", "html"]) == 0
    out = capsys.readouterr().out
    assert [out.count(tag) for tag in ("<!doctype html>", "</html>", "<table>", "</table>")] == [1, 1, 2, 2]


def test_the_headline_is_of_one_table(tmp_path, capsys):
    assert main(["published", str(tmp_path), "--headline", "--table", "nm"]) == 2
    assert "--table nm: the headline is of llama_70" in capsys.readouterr().err


def test_without_runs_every_cell_of_ours_is_missing(tmp_path, capsys):
    found = cells(capsys, str(tmp_path))
    assert len(found) == 3 * 8 * 8
    assert {line["state"] for line in found.values()} == {"missing"}
    assert {line["difference"] for line in found.values()} == {""}
    assert found["sparsegpt", "owl", "llama_30b"]["published"] == "10.28"
    assert found["sparsegpt", "owl", "llama_30b"]["source"] == "OWL repository README"
    assert found["wanda", "uniform", "llama3_8b"]["published"] == ""


def test_ours_published_and_the_difference(tmp_path, capsys):
    folder = write(tmp_path, *OURS)
    found = cells(capsys, folder)
    line = found["sparsegpt", "uniform", "llama_7b"]
    assert (line["mean"], line["published"]) == ("26.0", "26.3")
    assert float(line["difference"]) == pytest.approx(26 / 26.3 - 1)
    assert found["wanda", "shapley", "llama_7b"]["state"] == "fail"
    assert float(found["sparsegpt", "uniform", "llama2_7b"]["difference"]) == pytest.approx(25 / 27.84 - 1), "a local copy"
    assert main(["published", folder]) == 0
    out = capsys.readouterr().out
    assert "Runs in this folder that are not of this table: 1." in out
    assert "[1] OWL repository README." in out
    assert "~21.56" in out


def test_the_comparison_is_as_the_golden_file(tmp_path, capsys):
    assert main(["published", write(tmp_path, *OURS), "--format", "markdown", "--title", "At 70 %"]) == 0
    assert capsys.readouterr().out == (GOLDEN / "published.markdown").read_text(encoding="utf-8")


def test_the_headline_is_computed_from_runs(tmp_path, capsys):
    folder = write(tmp_path, *OURS)
    assert main(["published", folder, "--headline", "--format", "csv"]) == 0
    lines = {line["model"]: line for line in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert float(lines["llama_7b"]["change"]) == pytest.approx(21 / 26 - 1)
    assert float(lines["llama_7b"]["published_change"]) == -0.1801
    assert float(lines["llama_13b"]["published_change"]) == -0.1955
    assert lines["llama_13b"]["change"] == lines["llama2_7b"]["change"] == ""
    assert main(["published", folder, "--headline"]) == 0
    assert "-19.23 %" in (out := capsys.readouterr().out)
    assert "-18.01 %" in out
    assert "-19.55 %" in out


def test_other_protocols_have_no_difference(tmp_path, capsys):
    part = write(tmp_path / "part", llama(26.0, pruner="sparsegpt", measured={**FIELD, "complete": False}))
    assert cells(capsys, part)["sparsegpt", "uniform", "llama_7b"]["difference"] == ""
    assert main(["published", part]) == 0
    assert "no differences" in capsys.readouterr().out
    long = write(tmp_path / "long", llama(26.0, pruner="sparsegpt", measured={**FIELD, "seq_len": 4096}))
    assert cells(capsys, long)["sparsegpt", "uniform", "llama_7b"]["published"] == ""
    assert main(["published", long]) == 0
    assert "published numbers at seq_len 2048; ours is 4096" in capsys.readouterr().out
    limited = write(tmp_path / "limit", llama(26.0, pruner="sparsegpt", measured={**FIELD, "limit": 5}))
    assert cells(capsys, limited)["sparsegpt", "uniform", "llama_7b"]["state"] == "limit"


def test_pruned_models_of_another_calibration_have_no_difference(tmp_path, capsys):
    """The published ones have 128 sequences of C4; dense models have none."""
    text = {"_target_": "svnup.data.WikiText2", "n_seq": 2, "seq_len": 64, "seed": 0, "role": "calibration"}
    odd = [llama(v, pruner="sparsegpt", allocator=a, dataset=text) for a, v in (("uniform", 30.0), ("shapley", 18.0))]
    folder = write(tmp_path / "odd", *odd)
    assert cells(capsys, folder)["sparsegpt", "uniform", "llama_7b"]["difference"] == ""
    assert main(["published", folder]) == 0
    out = capsys.readouterr().out
    said = "ours have dataset wikitext2, dataset.n_seq 2, dataset.seq_len 64: no differences of pruned models"
    assert out.count(said) == 2, "of the table and of the headline"
    assert "+0.0 %" in out, "of the dense model"
    split = {"_target_": "svnup.allocation.splits.ErrorSplit", "lam": 0.05, "scale": "log"}
    folder = write(tmp_path / "split", llama(26.0, pruner="sparsegpt", split=split))
    assert cells(capsys, folder)["sparsegpt", "uniform", "llama_7b"]["difference"] == ""
    assert main(["published", folder]) == 0
    assert "ours have split error: no differences" in capsys.readouterr().out


def test_mixed_protocols_and_mixed_settings_are_refused(tmp_path, capsys):
    long = llama(20.0, pruner="sparsegpt", measured={**FIELD, "seq_len": 4096}, dataset=llama(26.0).config["dataset"])
    mixed = write(tmp_path / "a", llama(26.0), long)
    assert main(["published", mixed]) == 2
    assert "different protocols" in capsys.readouterr().err
    assert main(["published", mixed, "--where", "protocol.seq_len=2048"]) == 0
    capsys.readouterr()
    two = write(tmp_path / "b", *(llama(20.0 + lam, allocator="shapley", allocator__lam=lam) for lam in (0.1, 0.2)))
    assert main(["published", two]) == 2
    assert "differ in allocator.lam" in capsys.readouterr().err
    assert cells(capsys, two, "--where", "allocator.lam=0.1")["wanda", "shapley", "llama_7b"]["mean"] == "20.1"


def test_sources_keep_their_own_baselines(tmp_path, capsys):
    """Of one cell each source has a line, and what is best is marked within a source."""
    folder = write(tmp_path, *OURS)
    assert main(["published", folder, "--format", "csv"]) == 0
    lines = [line for line in csv.DictReader(io.StringIO(capsys.readouterr().out)) if line["model"] == "llama_7b"]
    uniform = [line for line in lines if (line["pruner"], line["allocator"]) == ("sparsegpt", "uniform")]
    assert [(line["published"], line["source"]) for line in uniform] == [
        ("26.3", "OWL repository README"),
        ("25.38", "DLP repository README"),
    ]
    assert [float(line["difference"]) for line in uniform] == pytest.approx([26 / 26.3 - 1, 26 / 25.38 - 1])
    assert main(["published", folder, "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    numbers = dict(re.findall(r"- \[(\d+)\] ((?:OWL|DLP) repository README)\.", out))
    of = {source: number for number, source in numbers.items()}
    assert f"| sparsegpt | owl | - | 19.49* [{of['OWL repository README']}] |" in out
    assert f"| sparsegpt | dlp | - | 17.76* [{of['DLP repository README']}] |" in out
    assert "compare published numbers within one" in out


def test_a_budget_that_came_out_uniform_is_said_to_be_no_comparison(tmp_path, capsys):
    even = {"sparsity": [0.5, 0.5], "params": [10, 10], "target": 0.5, "pattern": "mixed:4"}
    nm = {"sparsity": 0.5, "pattern": "mixed:4", "pruner__pattern": "mixed:4", "measured": {**FIELD, "seq_len": 4096}}
    nm |= {"model": "meta-llama/Llama-2-7b-hf"}
    rows = [
        changed(llama(11.5, **nm), profile=even),
        changed(llama(11.5, allocator="shapley", **nm), profile=even),
        changed(llama(11.0, allocator="shapley", **nm | {"pruner": "sparsegpt"}), profile=even | {"sparsity": [0.25, 0.75]}),
    ]
    assert main(["published", write(tmp_path, *rows), "--table", "nm"]) == 0
    said = "because the budget came out uniform: wanda, shapley, llama2_7b, mixed:4."
    assert said in " ".join(capsys.readouterr().out.split())


def test_budgets_of_sublayers_are_a_row_of_their_own(tmp_path, capsys):
    shapley = {"pruner": "sparsegpt", "allocator": "shapley"}
    rows = [llama(21.0, **shapley), llama(20.0, **shapley, allocator__granularity="sublayer")]
    found = cells(capsys, write(tmp_path, *rows))
    assert found["sparsegpt", "shapley", "llama_7b"]["mean"] == "21.0"
    assert found["sparsegpt", "shapleysublayers", "llama_7b"]["mean"] == "20.0"


def test_n_m_by_their_mixed_names(tmp_path, capsys):
    nm = {"sparsity": 0.5, "pattern": "mixed:4", "pruner__pattern": "mixed:4", "measured": {**FIELD, "seq_len": 4096}}
    folder = write(tmp_path, llama(11.5, model="meta-llama/Llama-2-7b-hf", **nm))
    assert main(["published", folder, "--table", "nm", "--format", "csv"]) == 0
    lines = [line for line in csv.DictReader(io.StringIO(capsys.readouterr().out)) if line["mean"]]
    assert [(line["pattern"], line["published"]) for line in lines] == [("mixed:4", "11.02")]


def test_the_tiny_model_in_the_same_tables(tmp_path, capsys):
    rows = [run(30.0), run(20.0, allocator="shapley"), run(19.0, allocator="shapley", allocator__scorer__window=3)]
    folder = write(tmp_path, *rows)
    tiny = ["--model", "tiny", "--metric", "docs/ppl", "--format", "markdown"]
    assert main(["published", folder, "--table", "window_ablation", *tiny]) == 0
    out = capsys.readouterr().out
    assert "| uniform | - | 30.00 | - |" in out
    assert "| shapley | 3 | **19.00** | - |" in out
    assert "| shapley | 5 | 20.00 | - |" in out
    assert "published |" not in out


def test_a_table_that_is_none(tmp_path, capsys):
    assert main(["published", str(tmp_path), "--table", "lama_70"]) == 2
    assert "did you mean llama_70?" in capsys.readouterr().err


def test_a_folder_that_is_none_is_refused(tmp_path, capsys):
    assert main(["published", str(tmp_path / "typo")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_model_of_no_run_and_no_published_number_is_refused(tmp_path, capsys):
    folder = write(tmp_path, run(30.0))
    assert main(["published", folder, "--table", "window_ablation", "--model", "tinyy"]) == 2
    said = capsys.readouterr().err
    assert "--model tinyy: no run here" in said
    assert "llama_7b" in said
    assert said.endswith(", tiny\n")


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    folder = write(tmp_path, run(30.0))
    assert main(["published", folder, "--output", f"{tmp_path}/"]) == 2
    assert capsys.readouterr().err == f"svnup-results: {tmp_path}: Is a directory; name another\n"
