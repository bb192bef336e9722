"""Tables over seeds: what is averaged, what is compared, and what is refused."""

from __future__ import annotations

import csv
import io
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rows import run, write

from svnup.cli.results import main
from svnup.reports.grid import FORMATS
from svnup.reports.pivot import grid, pivot
from svnup.reports.tables import render
from svnup.results.row import ResultRow
from svnup.results.select import MISSING, choose, metrics_of, runs_of, settings

GOLDEN = Path(__file__).parent / "golden"
BY, ACROSS = ["pruner", "allocator"], ["model", "sparsity"]


def table(rows, by=BY, across=ACROSS, metrics=("docs/ppl",), **options):
    return pivot(runs_of(rows), by, across, metrics, **options)


def refused(rows, *words, **options):
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        table(rows, **options)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@st.composite
def some_rows(draw):
    """Runs of a grid with holes, several seeds and failures, each perplexity its own."""
    places = [
        {"pruner": p, "allocator": a, "model": m, "sparsity": s, "seed": seed}
        for p in ("wanda", "magnitude")
        for a in ("uniform", "shapley", "owl")
        for m in ("svnup/tiny", "other/opt")
        for s in (0.5, 0.7)
        for seed in (0, 1, 2)
    ]
    chosen = draw(st.lists(st.sampled_from(places), min_size=1, max_size=24, unique_by=lambda p: tuple(p.items())))
    values = draw(st.lists(st.floats(5, 1000), min_size=len(chosen), max_size=len(chosen), unique=True))
    failed = draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen)))
    return [
        run(**place, status="failed") if bad else run(value, **place)
        for place, value, bad in zip(chosen, values, failed, strict=True)
    ]


# -- what is in a cell


@given(some_rows())
def test_every_number_is_in_the_mean_of_exactly_one_cell(rows):
    cells = table(rows).cells
    assert sorted(v for cell in cells.values() for v in cell.values) == sorted(
        row.metrics["docs/ppl"].value for row in rows if row.status == "finished"
    )
    for cell in cells.values():
        if cell.values:
            assert cell.mean == pytest.approx(sum(cell.values) / cell.n)
        assert cell.state == ("fail" if cell.states else MISSING)
    for row in rows:
        place = (row.config["pruner"]["_target_"].rpartition(".")[2].lower(), settings(row.config)["allocator"])
        label = (row.config["model"]["pretrained_model_name_or_path"].rpartition("/")[2], str(row.config["sparsity"]))
        cell = cells[place, label]
        assert "fail" in cell.states if row.status == "failed" else row.metrics["docs/ppl"].value in cell.values


@pytest.mark.slow
@given(some_rows(), st.randoms(use_true_random=False))
def test_the_order_of_runs_does_not_matter(rows, random):
    shuffled = random.sample(rows, len(rows))
    one, other = grid(table(rows)), grid(table(shuffled))
    assert [one.render(form) for form in FORMATS] == [other.render(form) for form in FORMATS]


@given(some_rows())
def test_a_number_under_another_protocol_is_refused_whatever_the_table(rows):
    measured = next((row for row in rows if row.status == "finished"), None)
    if measured is None:
        return
    for changed in ({"seq_len": 128}, {"complete": False, "n_windows": 4}, {"role": "selection"}, {"task_version": 2}):
        odd = run(33.0, measured=changed, pruner="sparsegpt", model=measured.config["model"]["pretrained_model_name_or_path"])
        refused([*rows, odd], "different protocols", next(iter(changed)), "--where protocol.")


def by_seed(cell):
    return zip(cell.values, cell.seeds, strict=True)


@given(some_rows(), st.sampled_from(["uniform", "shapley", "owl"]))
def test_the_change_of_the_baseline_is_zero_and_others_are_against_it(rows, name):
    assume(any(settings(row.config)["allocator"] == name for row in rows))
    of = table(rows, baseline={"allocator": name})
    for (row, column), cell in of.cells.items():
        base = of.cells.get(((row[0], name), column))
        change = of.change(row, column)
        if row[1] == name and cell.values:
            assert change == 0
        elif not cell.values or base is None or not base.values:
            assert change is None
        else:
            pairs = [(v, w) for v, s in by_seed(cell) for w, t in by_seed(base) if s == t]
            mine, theirs = np.sum(pairs, axis=0) if pairs else (0, 0)
            assert change == (pytest.approx(mine / theirs - 1) if pairs else None)


def test_changes_are_those_of_the_seeds_that_both_have():
    """Else the luck of a seed would pass for the worth of a method."""
    rows = [run(18.0, seed=0), run(30.0, seed=1), run(17.0, allocator="shapley", seed=0), run(5.0, allocator="owl", seed=2)]
    of = table(rows, baseline={"allocator": "uniform"})
    changes = {row[1]: of.change(row, column) for row, column in of.cells}
    assert changes == {"uniform": 0, "shapley": pytest.approx(17 / 18 - 1), "owl": None}


def test_a_seed_of_the_calibration_text_is_one_too():
    rows = [run(20.0 + seed, dataset__seed=seed) for seed in (0, 1, 2)] + [run(18.0, allocator="shapley", dataset__seed=0)]
    of = table(rows, baseline={"allocator": "uniform"})
    changes = {row[1]: of.change(row, column) for row, column in of.cells}
    assert changes == {"uniform": 0, "shapley": pytest.approx(18 / 20 - 1)}


@given(some_rows())
def test_the_best_of_a_column_is_the_lowest_perplexity_of_it(rows):
    of = table(rows)
    for column in of.columns:
        means = {row: of.cells[row, column].mean for row in of.rows if (row, column) in of.cells}
        means = {row: mean for row, mean in means.items() if mean is not None}
        best = {row for row, c in of.best() if c == column}
        lowest = f"{min(means.values(), default=0):.2f}"
        assert best == ({row for row, mean in means.items() if f"{mean:.2f}" == lowest} if len(means) > 1 else set())


def test_higher_accuracies_are_better():
    rows = [run(metrics={"boolq/acc": v}, allocator=a) for a, v in (("uniform", 60.0), ("shapley", 62.0))]
    assert table(rows, metrics=["boolq/acc"]).best() == {(("wanda", "shapley"), ("tiny", "0.7"))}


def test_the_best_is_sought_among_methods_of_the_same_model():
    rows = [run(v, allocator=a, model=m) for a, m, v in (("uniform", "svnup/tiny", 30.0), ("shapley", "svnup/tiny", 20.0))]
    rows += [run(9.0, model="other/opt"), run(8.0, model="other/opt", allocator="shapley")]
    assert table(rows, ["model"], ["allocator"]).best() == {(("tiny",), ("shapley",)), (("opt",), ("shapley",))}
    assert table(rows, ["model", "allocator"], ["sparsity"]).best() == {
        (("tiny", "shapley"), ("0.7",)),
        (("opt", "shapley"), ("0.7",)),
    }


def test_mean_and_standard_deviation_over_seeds():
    rows = [run(v, seed=s) for s, v in enumerate((30.0, 31.0, 35.0))]
    (cell,) = table(rows).cells.values()
    assert (cell.n, cell.mean, cell.std) == (3, 32.0, pytest.approx(statistics.stdev([30, 31, 35])))
    text = grid(table(rows)).render("markdown")
    assert "| wanda | uniform | 32.00 ± 2.65 |" in text
    assert "(n=3)" in text.splitlines()[-2]
    uneven = grid(table([*rows, run(20.0, allocator="shapley")])).render("markdown")
    assert "32.00 ± 2.65 (n=3)" in uneven
    assert "20.00 (n=1)" in uneven


def test_failed_and_missing_cells_stay_visible():
    rows = [
        run(30.0),
        run(status="failed", allocator="shapley"),
        run(20.0, sparsity=0.5),
        run(status="running", pruner="magnitude"),
    ]
    text = grid(table([*rows, run(status="failed", seed=1)])).render("markdown")
    assert "| wanda | shapley | - | fail |" in text
    assert "| magnitude | uniform | - | running |" in text
    assert "| wanda | uniform | 20.00 | 30.00 (1 fail) |" in text
    assert "no luck" in text


def test_a_fallback_and_a_limit_stay_out_of_the_means_visibly():
    rows = [
        run(30.0),
        run(25.0, allocator="shapley", fallback="damping 0.1 instead of 0.01"),
        run(1.0, allocator="owl", measured={"limit": 10, "complete": False}),
    ]
    of = table(rows, baseline={"allocator": "uniform"})
    text = grid(of).render("markdown")
    assert "| wanda | shapley | fallback |" in text
    assert "| wanda | owl | limit |" in text
    assert "damping 0.1 instead of 0.01" in text
    assert "limit=10" in text
    assert "25.00" not in text
    assert "1.00" not in text
    assert of.best() == set()


def test_a_number_that_is_none_is_a_failed_cell_with_its_reason():
    rows = [run(30.0), run(25.0, allocator="shapley"), run(20.0, allocator="owl")]
    rows[1].metrics["docs/ppl"] = replace(rows[1].metrics["docs/ppl"], value=None, reason="the loss is nan")
    text = grid(table(rows)).render("markdown")
    assert "| wanda | shapley | fail |" in text
    assert re.search(r"Failed: \w+ .*shapley\), the loss is nan\.", text)
    assert "failed" in render(rows, "markdown")


def test_standard_errors_over_items_are_told():
    rows = [run(metrics={"boolq/acc": 60.0}), run(metrics={"boolq/acc": 50.0}, allocator="shapley")]
    for row, error in zip(rows, (1.5, 1.75), strict=True):
        row.metrics["boolq/acc"] = replace(row.metrics["boolq/acc"], stderr=error)
        row.dense["boolq/acc"] = replace(row.dense["boolq/acc"], stderr=1.25)
    of = table(rows, metrics=["boolq/acc"])
    text, notes = grid(of).render("markdown"), of.notes
    assert "| wanda | uniform | **60.00 ± 1.50** |" in text
    assert f"| dense |  | {rows[0].dense['boolq/acc'].value:.2f} ± 1.25 |" in text
    more = run(metrics={"boolq/acc": 64.0}, seed=1)
    more.metrics["boolq/acc"] = replace(more.metrics["boolq/acc"], stderr=1.5)
    assert "62.00 ± 2.83" in grid(table([*rows, more], metrics=["boolq/acc"])).render("markdown"), "over seeds, that of seeds"
    assert (
        "Standard error of boolq/acc over its items, of each run: 1.50 to 1.75; it stands behind the ± of a single run."
        in notes
    )


def test_runs_of_other_weights_or_texts_are_no_seeds_of_one_cell():
    rows = [run(30.0), run(31.0, seed=1)]
    assert len(table(rows).cells) == 1
    rows[1].fingerprints["weights"] = "other"
    refused(rows, "read different weights (w, other)", "force=true")
    rows = [run(30.0), run(31.0, seed=1), run(20.0, model="other/opt")]
    for row, digest in zip(rows, ("t", "t", "u"), strict=True):
        row.fingerprints["dataset"] = digest  # another model's own text is no mistake
    assert len(table(rows).cells) == 2
    rows[1].fingerprints["dataset"] = "u"
    refused(rows, "read different dataset (t, u)")


def test_a_run_that_failed_and_was_run_again_has_not_failed():
    rows = [run(status="failed", evaluation__seq_len=512), run(30.0)]  # another evaluation is another run of the same settings
    (cell,) = table(rows).cells.values()
    assert (cell.values, cell.states) == ((30.0,), ())


def test_the_same_number_twice_counts_once_and_two_numbers_of_one_seed_are_refused():
    row = run(30.0)
    (cell,) = table([row, row]).cells.values()
    assert cell.values == (30.0,)
    other = replace(row, metrics={"docs/ppl": replace(row.metrics["docs/ppl"], value=31.0)}, config_key="ffff")
    refused([row, other], "same settings and seeds", "--where key=")


def test_dense_comes_first_and_is_never_the_best():
    shown = grid(table([run(30.0), run(31.0, model="other/opt")]))
    assert [cell.text for cell in shown.lines[0]] == ["dense", "", "20.00", "12.50"]
    assert not any(cell.best for cell in shown.lines[0])
    by_model = grid(table([run(30.0), run(31.0, model="other/opt")], ["model"], ["allocator"]))
    assert by_model.head == [("model",), ("dense",), ("uniform",)]
    assert [[c.text for c in line] for line in by_model.lines] == [["opt", "20.00", "31.00"], ["tiny", "12.50", "30.00"]]


def test_tasks_go_across():
    rows = [run(metrics={"boolq/acc": 60.0 + i, "rte/acc": 50.0}, allocator=a) for i, a in enumerate(("uniform", "shapley"))]
    shown = grid(table(rows, ["allocator"], ["model"], ["boolq/acc", "rte/acc"]))
    assert shown.head[1:] == [("tiny", "boolq/acc"), ("tiny", "rte/acc")]
    assert [c.text for c in shown.lines[1]] == ["shapley", "61.00", "50.00"]
    assert [c.best for c in shown.lines[1]] == [False, True, True]


# -- what is refused


@pytest.mark.parametrize(
    ("changed", "key", "fix"),
    [
        ({"dataset__n_seq": 128}, "dataset.n_seq", "--where dataset.n_seq=64"),
        ({"allocator__lam": 0.3}, "allocator.lam", "--rows pruner,allocator,allocator.lam"),
        ({"allocator__scorer__window": 3}, "shapley.window", "--where shapley.window=3"),
        ({"allocator__scorer__game__payoff": "kl"}, "shapley.game.payoff", "shapley.game.payoff=kl"),
        ({"pattern": "2:4"}, "pattern", "--where pattern=2:4"),
        ({"split": {"_target_": "svnup.allocation.splits.ErrorSplit", "lam": 0.1}}, "split", "--where split=error"),
    ],
)
def test_runs_that_differ_in_what_the_table_does_not_show_are_refused(changed, key, fix):
    rows = [run(30.0), run(20.0, allocator="shapley"), run(21.0, allocator="shapley", **changed)]
    refused(rows, f"differ in {key} (", fix)
    shown = table(rows, [*BY, key] if key not in BY else BY, ACROSS)
    assert sorted(v for c in shown.cells.values() for v in c.values) == [20.0, 21.0, 30.0]


def test_a_difference_between_columns_is_one_too():
    refused([run(30.0), run(20.0, sparsity=0.5, dataset__n_seq=128)], "dataset.n_seq", "neither row, column nor seed")
    refused([run(30.0), run(20.0, allocator="shapley")], "allocator", by=["pruner"])


def test_a_model_brings_its_own_texts_and_lengths_but_no_other_settings():
    own = {"dataset": {"_target_": "svnup.data.C4", "n_seq": 64, "seq_len": 2048, "seed": 0}, "model__seq_len": 2048}
    rows = [run(30.0), run(20.0, model="other/opt", **own)]
    assert len(table(rows).cells) == 2
    refused(rows, "dataset", by=["pruner"], across=["sparsity"])
    refused([run(30.0), run(20.0, model="other/opt", dataset__n_seq=8)], "dataset.n_seq")


def test_models_differ_in_what_follows_from_their_tokenizers_and_in_no_more():
    rows = [run(30.0), run(20.0, model="other/opt", measured={"n_windows": 280, "n_tokens": 71680})]
    assert len(table(rows).cells) == 2
    refused([run(30.0), run(20.0, model="other/opt", measured={"seq_len": 2048})], "seq_len is 256 or 2048")
    parts = [
        run(30.0, measured={"complete": False, "n_windows": 4}),
        run(2.0, model="other/opt", measured={"complete": False, "n_windows": 8}),
    ]
    refused(parts, "n_windows is 4 or 8", "--where protocol.n_windows=4")


def test_two_protocols_make_two_tables():
    rows = [run(30.0), run(20.0, measured={"seq_len": 128}), run(status="failed", allocator="owl")]
    refused(rows, "--where protocol.seq_len=128", "--where protocol.seq_len=256")
    for wanted, value in (("128", 20.0), ("256", 30.0)):
        chosen = choose(runs_of(rows), {"protocol.seq_len": [wanted]})
        cells = pivot(chosen, BY, ACROSS, ["docs/ppl"]).cells
        assert [c.values for c in cells.values() if c.values] == [(value,)]
        assert [c.state for c in cells.values()].count("fail") == 1
    with pytest.raises(ValueError, match="no metric was measured so; there are 128, 256"):
        choose(runs_of(rows), {"protocol.seq_len": ["512"]})


def test_a_baseline_of_several_cells_is_refused():
    rows = [run(30.0), *(run(20.0 + i, allocator="shapley", allocator__lam=lam) for i, lam in enumerate((0.1, 0.2)))]
    by = ["allocator", "allocator.lam"]
    of = table(rows, by, ["model"], baseline={"allocator": "uniform"})
    assert of.change(("shapley", "0.2"), ("tiny",)) == pytest.approx(21 / 30 - 1)
    many = table(rows, by, ["model"], baseline={"allocator": "shapley"})
    with pytest.raises(ValueError, match=r"2 cells qualify; name allocator\.lam"):
        many.change(("uniform", MISSING), ("tiny",))


def test_metrics_are_chosen_by_name_or_pattern():
    runs = runs_of([run(metrics={"boolq/acc": 1.0, "rte/acc": 2.0, "docs/ppl": 3.0})])
    assert metrics_of(runs, ["*/acc"]) == ["boolq/acc", "rte/acc"]
    assert metrics_of(runs, ["rte/acc", "docs/ppl"]) == ["rte/acc", "docs/ppl"]
    with pytest.raises(ValueError, match="--metric: the runs have boolq/acc, docs/ppl, rte/acc"):
        metrics_of(runs)
    with pytest.raises(ValueError, match=r"--metric docs/pl: .*did you mean docs/ppl\?"):
        metrics_of(runs, ["docs/pl"])


# -- the command


EXAMPLE = [
    *(
        run(ppl + 0.25 * seed, pruner=p, allocator=a, model=m, sparsity=s, seed=seed)
        for p, a, m, s, ppl in (
            ("wanda", "uniform", "svnup/tiny", 0.5, 15.0),
            ("wanda", "uniform", "svnup/tiny", 0.7, 31.32),
            ("wanda", "shapley", "svnup/tiny", 0.5, 14.5),
            ("wanda", "shapley", "svnup/tiny", 0.7, 22.13),
            ("sparsegpt", "uniform", "svnup/tiny", 0.5, 13.9),
            ("sparsegpt", "uniform", "svnup/tiny", 0.7, 18.54),
            ("sparsegpt", "shapley", "svnup/tiny", 0.7, 16.55),
            ("wanda", "uniform", "other/opt", 0.7, 48419.12),
        )
        for seed in (0, 1)
    ),
    run(pruner="sparsegpt", allocator="shapley", sparsity=0.5, status="failed"),
    run(20.0, pruner="sparsegpt", allocator="uniform", model="other/opt", fallback="damping 0.1 instead of 0.01"),
]
LAYOUT = ["--rows", "pruner,allocator", "--columns", "model,sparsity", "--baseline", "allocator=uniform"]


@pytest.fixture
def folder(tmp_path) -> str:
    return write(tmp_path / "results", *EXAMPLE)


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_is_as_the_golden_file(form, folder, capsys):
    args = ["table", folder, *LAYOUT, "--format", form, "--title", "70 % & more", "--command", "make it"]
    assert main(args) == 0
    assert capsys.readouterr().out == (GOLDEN / f"pivot.{form}").read_text(encoding="utf-8")


def test_the_formats_say_the_same(folder, capsys):
    said = {}
    for form in FORMATS:
        assert main(["table", folder, *LAYOUT, "--format", form]) == 0
        said[form] = capsys.readouterr().out
    lines = list(csv.DictReader(io.StringIO(said["csv"])))
    assert len(lines) == 4 * 3
    for line in lines:
        for form in ("terminal", "markdown", "latex", "html"):
            if line["mean"]:
                assert f"{float(line['mean']):.2f}" in said[form]
                assert line["state"] == "finished"
            else:
                assert line["state"] in ("missing", "fail", "fallback")
    assert said["markdown"].count("**") == 2 * sum(line["best"] == "True" for line in lines)
    assert said["latex"].count(r"\textbf{") == said["html"].count("<b>") == said["markdown"].count("**") // 2
    assert [line["change"] for line in lines if line["allocator"] == "uniform" and line["mean"]] == ["0.0"] * 5
    assert "\x1b" not in said["terminal"]


def test_where_filters_and_orders(folder, capsys):
    args = ["table", folder, *LAYOUT, "--where", "model=tiny", "pruner=wanda,sparsegpt", "--format", "csv"]
    assert main(args) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["pruner"] for line in lines] == ["wanda"] * 4 + ["sparsegpt"] * 4
    assert {line["model"] for line in lines} == {"tiny"}
    assert main(["table", folder, "--where", "allocator=shapley", "sparsity=0.70", "--format", "csv"]) == 0
    flat = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["sparsity"] for line in flat] == ["0.7"] * 4


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rows", "alocator"], "--rows alocator: no run has such a key; did you mean allocator?"),
        (["--rows", "pruner", "--columns", "sparsty"], "did you mean sparsity?"),
        (["--rows", "pruner,pruner"], "pruner is there twice"),
        (["--rows", "pruner"], "differ in allocator (shapley, uniform)"),
        ([*LAYOUT[:4], "--baseline", "allocator=unform"], "there are shapley, uniform; did you mean uniform?"),
        ([*LAYOUT[:4], "--baseline", "seed=0"], "seed is neither a row nor a column"),
        ([*LAYOUT[:4], "--where", "allocator"], "--where allocator: write key=value"),
        ([*LAYOUT[:4], "--where", "allocator=owl"], "--where allocator=owl: no run has it"),
        ([*LAYOUT[:4], "--where", "alloc=owl"], "--where alloc: no run has such a key"),
        ([*LAYOUT[:4], "--metric", "docs/acc"], "--metric docs/acc: no run has it"),
        (["--metric", "docs/ppl"], "--metric: goes with --rows and --columns"),
        (["--baseline", "allocator=uniform"], "--baseline: goes with --rows"),
    ],
)
def test_a_mistake_is_one_line(args, words, folder, capsys):
    assert main(["table", folder, *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("svnup-results: ")
    assert err.count("\n") == 1


def test_settings_are_what_people_set():
    config = run(20.0, allocator="shapley").config
    words = settings(config)
    assert words["allocator"] == "shapley"
    assert words["shapley"] == "slidingwindow"
    assert words["shapley.window"] == "5"
    assert words["sparsity"] == "0.7"
    assert not {k for k in words if "game.pruner" in k or "shard" in k or k.startswith("results_dir") or "_target_" in k}
    assert "shapley" not in settings(run(20.0).config), "an estimator that is not used is no setting"


def test_rows_of_earlier_versions_had_no_split():
    old = run(30.0)
    config = {k: v for k, v in old.config.items() if k != "split"}
    rows: list[ResultRow] = [replace(old, config=config), run(20.0, allocator="shapley")]
    assert len(table(rows).cells) == 2
