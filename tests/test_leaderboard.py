"""What the leaderboard makes of its entries: statistics, ranking and tables, on made-up numbers."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent / "experiments" / "leaderboard" / "run.py"


@pytest.fixture(scope="module")
def board_of():
    spec = importlib.util.spec_from_file_location("leaderboard_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def entry(run, cell, name, nll, least=None):
    """Perplexities near exp(nll), and the least loss on selection text."""
    losses = nll + np.array([[-0.01], [0.0], [0.01]]) + np.linspace(-0.5, 0.5, 40)
    curve = [{"label": "layer 0 at 0.4", "loss": 0.1}, {"label": "best", "loss": nll if least is None else least}]
    return run.Entry(cell, name, "lam=0.1", losses, np.full((3, 12), 0.7), 7, 42.0, curve)


def made_up(run, searched=True):
    nll = {
        "uniform": 4.0,
        run.ROUNDS: 3.0,
        "shapley": 3.1,
        "leave_one_out": 3.2,
        "block_influence": 3.3,
        "curves": 3.4,
        "search": 2.9,
    }
    cells = [(m, p, s) for s in run.SPARSITIES for m in run.MODELS for p in run.PRUNERS]
    return {(c, a): entry(run, c, a, nll.get(a, 3.9)) for c, a in run.entries(run.ALLOCATORS, cells, searched)}


def test_a_change_is_that_of_the_mean_loss_with_the_error_of_the_seeds(board_of):
    cell = ("tiny", "wanda", 0.7)
    one, other = entry(board_of, cell, "a", 3.1), entry(board_of, cell, "b", 3.0)
    mean, error, low, high = board_of.change(one, other)
    assert mean == pytest.approx(100 * math.expm1(0.1))
    assert error == pytest.approx(0, abs=1e-9), "the same seeds move both alike"
    assert low == pytest.approx(high) == pytest.approx(mean), "and so do the same windows"
    one.losses[2] += 0.03
    mean, error, _, _ = board_of.change(one, other)
    assert mean == pytest.approx(100 * math.expm1(0.11))
    assert error == pytest.approx(100 * math.exp(0.11) * 0.03 / 3)  # std(0, 0, 0.03) / sqrt(3)


def test_the_ranking_goes_by_selection_text_and_whole_profiles(board_of):
    board = made_up(board_of)
    for cell in {cell for cell, _ in board}:
        board[cell, "owl"] = entry(board_of, cell, "owl", 3.9, least=2.5)  # better on selection text, worse on test text
    best = board_of.ranking(board, board_of.MODELS, (board_of.ROUNDS, *board_of.TUNED, "curves"))
    assert best[:6] == ["owl", board_of.ROUNDS, "shapley", "leave_one_out", "block_influence", "curves"]


@pytest.mark.parametrize("searched", [True, False])
def test_the_report_has_every_cell_and_marks_the_best_but_for_search(board_of, searched):
    board = made_up(board_of, searched)
    text = board_of.report(board, dict.fromkeys(board_of.MODELS, 12.0), board_of.MODELS, ["shapley"])
    rows = [line for line in text.splitlines() if line.startswith(f"| {board_of.ROUNDS} | **")]
    assert len(rows) == 4  # two models, two sparsities
    assert all(line.count("**") == 6 for line in rows)
    assert text.count("**") == 24
    assert f"{100 * math.expm1(-1.0):+.2f} %" in text  # of the rounds against uniform
    assert len(board_of.csv(board).splitlines()) == 1 + 3 * len(board)


def test_what_a_loss_costs(board_of):
    assert board_of.loss_cost("magnitude", board_of.N_CALIBRATION) == 1
    assert board_of.loss_cost("wanda", board_of.N_CALIBRATION) == 3, "two runs of each block to prune it"
    assert board_of.round_cost("wanda", {"n_block_forwards": 120}, 12) == 10 * board_of.N_PAYOFF / board_of.N_CALIBRATION + 4
