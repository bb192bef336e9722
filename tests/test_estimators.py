"""Estimators beyond enumeration: regression, gates, early stopping, truncation, the shapiq adapter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svnup.shapley import all_coalitions
from svnup.shapley.exact import Exact
from svnup.shapley.gates import Gates
from svnup.shapley.kernel import Kernel, constrained_least_squares
from svnup.shapley.permutation import Permutation
from svnup.shapley.sliding_window import SlidingWindow
from svnup.shapley.stopping import kendall_tau


class Tabulated:
    """A game given by its table, extended to degrees of presence by its multilinear extension (Owen 1972)."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self.n_players = int(table.size).bit_length() - 1
        self._rows = all_coalitions(self.n_players)

    def __call__(self, coalitions: np.ndarray) -> np.ndarray:
        return self.table[coalitions @ (1 << np.arange(self.n_players)[::-1])]

    def gate_gradient(self, gate: float) -> np.ndarray:
        gradient = np.zeros(self.n_players)
        for player in range(self.n_players):
            others = np.delete(self._rows, player, axis=1).sum(axis=1)
            chance = gate**others * (1 - gate) ** (self.n_players - 1 - others)
            gradient[player] = (np.where(self._rows[:, player], 1.0, -1.0) * chance * self.table).sum()
        return gradient


def random_game(n: int, seed: int) -> Tabulated:
    return Tabulated(np.random.default_rng(seed).normal(size=2**n))


games = st.tuples(st.integers(2, 6), st.integers(0, 10**6)).map(lambda pair: random_game(*pair))


@given(games)
@settings(max_examples=30, deadline=None)
def test_gates_on_the_multilinear_extension_are_the_shapley_values(game: Tabulated) -> None:
    """The diagonal integral of the multilinear extension is the Shapley value (Owen); its degree is n - 1."""
    found = Gates(nodes=4).estimate(game)
    np.testing.assert_allclose(found.values, Exact().estimate(game).values, atol=1e-9)
    assert abs(found.efficiency_gap) < 1e-9
    assert found.cost.n_backward_passes == 4


@given(games, st.sampled_from(["kernel", "leverage"]), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_kernel_is_efficient_and_respects_its_budget(game: Tabulated, sampling: str, seed: int) -> None:
    budget = 60
    found = Kernel(budget, seed, sampling=sampling).estimate(game)  # type: ignore[arg-type]
    assert abs(found.efficiency_gap) < 1e-9
    assert found.cost.n_evaluations <= budget
    again = Kernel(budget, seed, sampling=sampling).estimate(game)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.values, again.values)


@pytest.mark.parametrize("sampling", ["kernel", "leverage"])
def test_kernel_on_an_additive_game_is_exact(sampling: str) -> None:
    worth = np.array([3.0, -1.0, 0.5, 0.0, 2.0])
    game = Tabulated(all_coalitions(5) @ worth)
    found = Kernel(60, sampling=sampling).estimate(game)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.values, worth, atol=1e-9)
    np.testing.assert_allclose(found.stderr, 0, atol=1e-9)


@pytest.mark.parametrize("sampling", ["kernel", "leverage"])
def test_kernel_converges_to_the_exact_values(sampling: str) -> None:
    game = random_game(6, 1)
    exact = Exact().estimate(game).values
    errors = [np.abs(Kernel(b, 3, sampling=sampling).estimate(game).values - exact).max() for b in (100, 20000)]  # type: ignore[arg-type]
    assert errors[1] < 0.05 < errors[0]


def test_kernel_regression_with_all_coalitions_is_exact() -> None:
    """Weighted by the Shapley kernel over all coalitions, the regression gives the Shapley values (Charnes et al. 1988)."""
    game = random_game(5, 2)
    rows = all_coalitions(5)[1:-1]
    sizes = rows.sum(axis=1)
    binomials = np.array([1, 5, 10, 10, 5, 1])[sizes]
    weights = 4 / (binomials * sizes * (5 - sizes))
    v_empty, v_full = game.table[0], game.table[-1]
    found = constrained_least_squares(rows.astype(float), game(rows) - v_empty, weights, v_full - v_empty)
    np.testing.assert_allclose(found, Exact().estimate(game).values, atol=1e-9)


@pytest.mark.parametrize("estimator", [Kernel(21), Permutation(17)])
def test_the_least_budget_is_named(estimator: Kernel | Permutation) -> None:
    with pytest.raises(ValueError, match=r"the least budget is (22|18)"):
        estimator.estimate(random_game(5, 0))


@pytest.mark.parametrize("kind", [Permutation, Kernel])
def test_stopping_on_the_standard_error(kind: type) -> None:
    game = random_game(5, 4)
    free = kind(4000).estimate(game)
    stopped = kind(4000, stop={"stderr": 0.2}).estimate(game)
    assert stopped.stderr.max() <= 0.2
    assert "standard error" in stopped.stopped
    assert free.stopped == "budget spent"
    assert kind(4000, stop={"stderr": 1e-9}).estimate(game).stopped == "budget spent"


@pytest.mark.parametrize("kind", [Permutation, Kernel])
def test_stopping_on_a_stable_ranking(kind: type) -> None:
    game = Tabulated(all_coalitions(5) @ np.array([5.0, 4.0, 3.0, 2.0, 1.0]))
    found = kind(4000, stop={"rank_tau": 1.0}).estimate(game)
    assert "Kendall" in found.stopped
    np.testing.assert_allclose(found.values, [5, 4, 3, 2, 1], atol=1e-9)


@pytest.mark.parametrize("stop", [{"stder": 0.1}, {"stderr": 0}, {"rank_tau": 1.5}, {"stderr": 0.1, "rank_tau": 0.9}, {}])
def test_wrong_stopping_rules_are_refused(stop: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="stop="):
        Permutation(100, stop=stop)


def test_truncation_saves_evaluations_and_stays_efficient() -> None:
    worth = np.array([10.0, 0.01, 0.01, 0.01, 0.01, 0.01])
    game = Tabulated(all_coalitions(6) @ worth)
    full, cut = Permutation(200).estimate(game), Permutation(200, truncation=0.02).estimate(game)
    assert cut.cost.n_evaluations < full.cost.n_evaluations
    assert abs(cut.efficiency_gap) < 1e-9
    assert cut.values[0] == pytest.approx(10, abs=0.2)


def test_kendall_tau_by_hand() -> None:
    # Pairs of (1, 2, 3, 4) against (1, 3, 2, 4): five agree, one does not.
    assert kendall_tau(np.array([1, 2, 3, 4]), np.array([1, 3, 2, 4])) == pytest.approx(4 / 6)
    assert kendall_tau(np.array([1, 2, 3]), np.array([3, 2, 1])) == -1
    assert kendall_tau(np.array([1, 1, 1]), np.array([3, 2, 1])) == 0


@pytest.mark.slow
def test_exact_agrees_with_shapiq() -> None:
    """An independent oracle."""
    shapiq = pytest.importorskip("shapiq")
    game = random_game(6, 9)
    oracle = shapiq.ExactComputer(lambda rows: game(np.asarray(rows, dtype=bool).reshape(-1, 6)), n_players=6)
    values = oracle(index="SV", order=1)
    exact = Exact().estimate(game)
    np.testing.assert_allclose(exact.values, [values[(i,)] for i in range(6)], atol=1e-9)
    np.testing.assert_allclose(SlidingWindow(6).estimate(game).values, exact.values, atol=1e-9)


def test_kernel_agrees_with_shapiq_in_the_limit() -> None:
    """With every coalition at hand both regressions are the Shapley values."""
    pytest.importorskip("shapiq")
    from svnup.shapley.library import Shapiq

    game = random_game(5, 11)
    theirs = Shapiq("KernelSHAP", budget=32).estimate(game)
    ours = Kernel(200_000, seed=1).estimate(game)
    np.testing.assert_allclose(theirs.values, Exact().estimate(game).values, atol=1e-6)
    assert (np.abs(ours.values - theirs.values) < 4 * ours.stderr + 1e-6).all()


@pytest.mark.parametrize("name", ["KernelSHAP", "SVARM", "PermutationSamplingSV"])
def test_the_shapiq_adapter_runs_any_sampler(name: str) -> None:
    pytest.importorskip("shapiq")
    from svnup.shapley.library import Shapiq

    worth = np.array([3.0, -1.0, 0.5, 0.0, 2.0])
    game = Tabulated(all_coalitions(5) @ worth)
    found = Shapiq(name, budget=200, seed=2).estimate(game)
    np.testing.assert_allclose(found.values, worth, atol=0.2)
    assert found.cost.n_evaluations <= 32
    with pytest.raises(ValueError, match="no such class; choose among"):
        Shapiq("KernalSHAP", 200).check(5)
