"""What the leaderboard makes of its entries: statistics, ranking and tables, on made-up numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from experiments.leaderboard import fair
from experiments.leaderboard import run as board_of
from svnup.results.row import Round, Tried, Tuning


def entry(run, cell, name, nll, least=None):
    """Perplexities near exp(nll), and the least loss on selection text."""
    losses = nll + np.array([[-0.01], [0.0], [0.01]]) + np.linspace(-0.5, 0.5, 40)
    curve = (Tried("layer 0 at 0.4", 0.1), Tried("best", nll if least is None else least))
    return run.Entry(cell, name, "lam=0.1", losses, np.full((3, 12), 0.7), 7, 42.0, curve)


def made_up(run, searched=True):
    nll = {
        "uniform": 4.0,
        run.SUBLAYERS: 2.95,
        run.ROUNDS: 3.0,
        "shapley": 3.1,
        "leave_one_out": 3.2,
        "block_influence": 3.3,
        "curves": 3.4,
        "search": 2.9,
    }
    cells = [(m, p, s) for s in run.FULL.sparsities for m in run.MODELS for p in run.FULL.pruners]
    return {(c, a): entry(run, c, a, nll.get(a, 3.9)) for c, a in run.entries(run.ALLOCATORS, cells, searched)}


def test_a_change_is_that_of_the_mean_perplexity_with_the_error_of_the_seeds():
    cell = ("tiny", "wanda", 0.7)
    one, other = entry(board_of, cell, "a", 3.1), entry(board_of, cell, "b", 3.0)
    mean, error, low, high = board_of.change(one, other)
    assert mean == pytest.approx(100 * math.expm1(0.1))
    assert error == pytest.approx(0, abs=1e-9), "the same seeds move both alike"
    assert low == pytest.approx(high) == pytest.approx(mean), "and so do the same windows"
    one.losses[2] += 0.03
    mean, error, low, high = board_of.change(one, other)
    ratio = one.perplexities.mean() / other.perplexities.mean()
    assert mean == pytest.approx(100 * (ratio - 1)), "as the perplexities that are shown"
    off = one.perplexities / other.perplexities - ratio
    assert error == pytest.approx(100 * off.std(ddof=1) / math.sqrt(3), rel=0.02)
    assert low == pytest.approx(100 * math.expm1(0.1), rel=1e-6), "a bootstrap without the seed that is off"
    assert high == pytest.approx(100 * math.expm1(0.13), rel=1e-6)


def test_the_targets_are_computed():
    board = made_up(board_of)
    for cell in {cell for cell, _ in board}:
        board[cell, "reversed"] = entry(board_of, cell, "reversed", 4.5)
    board[("tiny", "wanda", 0.7), "owl"] = entry(board_of, ("tiny", "wanda", 0.7), "owl", 4.1)
    text = "\n".join(board_of.targets(board, board_of.MODELS))
    of_blocks = f"{board_of.ROUNDS} | shapley, {100 * math.expm1(0.1):.2f} ± 0.00 % behind |"
    best = f"{board_of.SUBLAYERS} | {board_of.ROUNDS}, {100 * math.expm1(0.05):.2f} ± 0.00 % behind |"
    against = [f"{100 * math.expm1(x):+.2f} ± 0.00 %, search cost 1.0 times as much" for x in (0.2, 0.1, 0.05)]
    assert f"| tiny, wanda | {best} {of_blocks} {' | '.join(against)} |" in text
    assert f"| tiny, magnitude | {best} {of_blocks} - | - | - |" in text
    assert "reversed: worse than uniform in 12 of 12 cells; 0 of 36 single runs are better." in text
    assert "random: worse than uniform in 0 of 12 cells; 36 of 36 single runs are better." in text
    assert "search_long" not in text
    for cell in {cell for cell, name in board if name == "search"}:
        board[cell, "search_long"] = entry(board_of, cell, "search_long", 2.95)
    text = "\n".join(board_of.targets(board, board_of.MODELS))
    assert f"{100 * math.expm1(0.05):+.2f} ± 0.00 %, search cost 1.0 times as much |" in text
    assert f"controls apart: owl (tiny, wanda, 0.7: {100 * math.expm1(0.1):+.1f} %)." in text


def test_the_ranking_goes_by_selection_text_and_whole_profiles():
    board = made_up(board_of)
    for cell in {cell for cell, _ in board}:
        board[cell, "owl"] = entry(board_of, cell, "owl", 3.9, least=2.5)  # better on selection text, worse on test text
    best = board_of.ranking(board, board_of.MODELS, (board_of.ROUNDS, *board_of.TUNED, "curves"))
    assert best[:7] == ["owl", board_of.SUBLAYERS, board_of.ROUNDS, "shapley", "leave_one_out", "block_influence", "curves"]


@pytest.mark.parametrize("searched", [True, False])
def test_the_report_has_every_cell_and_marks_the_best_but_for_search(searched):
    board = made_up(board_of, searched)
    text = "\n".join(board_of.report(board, dict.fromkeys(board_of.MODELS, 12.0), board_of.MODELS, ["shapley"]))
    rows = [line for line in text.splitlines() if line.startswith(f"| {board_of.SUBLAYERS} | **")]
    assert len(rows) == 4  # two models, two sparsities
    assert all(line.count("**") == 6 for line in rows)
    assert text.count("**") == 24
    assert f"{100 * math.expm1(-1.0):+.2f} %" in text  # of the rounds against uniform
    assert len(board_of.csv(board).splitlines()) == 1 + 3 * len(board)


def test_what_a_loss_costs():
    full = board_of.FULL
    assert board_of.loss_cost("magnitude", full.n_calibration) == 1
    assert board_of.loss_cost("wanda", full.n_calibration) == 3, "two runs of each block to prune it"
    assert (
        board_of.round_cost("wanda", Round("Exact", (), n_block_forwards=120), 12)
        == 10 * full.n_payoff / full.n_calibration + 4
    )


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path, monkeypatch):
    """What was measured is read back, a line that a kill tore is measured again, and nothing comes out otherwise."""
    sizes = replace(board_of.FULL, n_calibration=2, n_selection=2, n_test=3, n_payoff=1, seeds=(0, 1))
    measured: list[str] = []
    measure = board_of.Bench._measure
    monkeypatch.setattr(
        board_of.Bench, "_measure", lambda self, cell, name, *rest: measured.append(name) or measure(self, cell, name, *rest)
    )
    cell = ("tiny", "magnitude", 0.7)
    names = ("uniform", "leave_one_out", board_of.SUBLAYERS, "random")  # random has the amplitude that shapley chose
    first = {name: board_of.Bench(tmp_path, sizes).entry(cell, name) for name in names}
    assert sorted(measured) == ["leave_one_out", "random", "shapley", board_of.SUBLAYERS, "uniform"]
    assert first["random"].cost == board_of.Bench(tmp_path, sizes).entry(cell, "shapley").cost > 0

    (file,) = (tmp_path / "leaderboard").glob("*.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines()
    torn = next(i for i, line in enumerate(lines) if '"lam=0' in line)
    lines[torn] = lines[torn][: len(lines[torn]) // 2]
    file.write_text("\n".join(lines), encoding="utf-8")
    measured.clear()
    bench = board_of.Bench(tmp_path, sizes)
    again = {name: bench.entry(cell, name) for name in names}
    assert len(measured) == 1
    for name in names:
        assert np.array_equal(again[name].losses, first[name].losses)
        assert np.array_equal(again[name].profiles, first[name].profiles)
        assert (again[name].chosen, again[name].n_losses) == (first[name].chosen, first[name].n_losses)


# -- on even terms


def test_all_have_eight_trials_uniform_among_them_and_finer_budgets():
    for name, row in fair.ROWS.items():
        if row.tries:
            values = [v for _, some in row.tries for v in some]
            assert len(values) == 7, name
            assert all(v > 0 for v in values), "uniform is the eighth"
    for score in ("shapley", "block_influence", "leave_one_out", "shapley_rounds", "shapley_margins", "curves"):
        assert {score, f"{score}_sublayers"} <= fair.ROWS.keys()
        assert fair.ROWS[score].tries == fair.ROWS[f"{score}_sublayers"].tries


@pytest.mark.parametrize(("sparsity", "lower", "upper"), [(0.4, "0", "0.75"), (0.6, "0.1", "0.95"), (0.7, "0.2", "0.95")])
def test_bounds_are_the_same_for_all_that_take_bounds(sparsity, lower, upper):
    for name, row in fair.ROWS.items():
        bounds = [option for option in row.overrides(sparsity) if "lower" in option or "upper" in option]
        without = name in ("uniform", "alpha_pruning", "atp")
        assert bounds == ([] if without else [f"allocator.lower={lower}", f"allocator.upper={upper}"])


def result(nll, seeds=(0,), label="lam=0.1"):
    windows = np.linspace(-0.5, 0.5, 64)
    return fair.Result({seed: [*(nll + 0.01 * seed + windows)] for seed in seeds}, fair.Choice(label, {}, 8, 0, 42.0))


def test_segments_and_common_seeds_make_the_interval():
    mine, theirs = result(3.1, (0,)), result(3.0, (0, 1))
    mean, low, high = fair.against(mine, theirs)
    assert mean == pytest.approx(100 * math.expm1(0.1))
    assert low == pytest.approx(high) == pytest.approx(mean), "windows move both alike; the seed of one alone does not count"
    first = [*np.add(mine.losses[0][:4], 0.16), *mine.losses[0][4:]]  # a segment of four windows
    mean, low, high = fair.against(fair.Result({0: first}, mine.choice), theirs)
    assert mean == pytest.approx(100 * math.expm1(0.11))
    assert low == pytest.approx(100 * math.expm1(0.1))
    assert low < mean < high


def test_the_table_says_what_has_not_been_run():
    cell, other = ("tiny", "wanda", 0.7), ("tiny", "sparsegpt", 0.7)
    board = {
        (cell, "uniform"): result(4.0, (0, 1), "-"),
        (cell, "owl"): result(3.9, label="5, lam=0.08"),
        (other, "uniform"): result(3.0, label="-"),
    }
    stages = (fair.Stage(("uniform", "owl"), ("wanda", "sparsegpt"), (0.7,), (0, 1)),)
    lines = fair.report(board, stages, ("tiny",), board_of.FULL)
    assert any(line.startswith("| owl | **49.40** |") and line.endswith("| 42 | - | - | - | - |") for line in lines)
    assert any(line.startswith(f"| uniform | {np.mean(np.exp([4.0, 4.01])):.2f} ± ") for line in lines)
    assert "| 1 | uniform, owl | wanda, sparsegpt | 70 % | 0, 1 | 4 of 8 |" in lines
    assert len(fair.csv(board).splitlines()) == 1 + 4


def test_a_trial_prunes_nothing_and_statistics_in_advance_are_taken_once():
    full = board_of.FULL
    trial, values = Tried("round 1", 3.0, n_seq=16, trial=True), Round("AumannShapley", (), n_sequences=8)
    tuning = Tuning(curve=(trial, trial, Tried("uniform", 3.0)), rounds=(values, values))
    whole = 2 + full.n_selection / full.n_calibration
    assert board_of.allocation_cost(None, "wanda", None, tuning, 12, full) == 2 + 2 * 4 * 8 / 16 + 2 * 16 / 16 + whole
    assert board_of.allocation_cost(None, "wanda", None, Tuning(), 12, full) == 0
