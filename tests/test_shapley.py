"""Estimators against games with known values, against the definition, and against METHOD's cost formulas."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from games import Additive, Combined, Glove, Ignoring, Recorder, Tabulated, Unanimity, average_over_orders
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from svnup.shapley import Ledger, all_coalitions, block_forwards, branch_points, exact_values
from svnup.shapley.exact import Exact
from svnup.shapley.permutation import Permutation
from svnup.shapley.sliding_window import SlidingWindow

NUMBERS = st.floats(-100, 100, width=32)


@st.composite
def tabulated(draw, least=2, most=6):
    return Tabulated(draw(arrays(np.float64, 2 ** draw(st.integers(least, most)), elements=NUMBERS)))


def estimators(n):
    """One of each kind, and the options that change the values."""
    window = max(1, n - 1)
    return [
        Exact(),
        SlidingWindow(window),
        SlidingWindow(window, context="absent"),
        SlidingWindow(window, aggregation="centred"),
        SlidingWindow(window, stride=window),
        Permutation(200, seed=3),
        Permutation(200, seed=3, antithetic=False),
    ]


def n_windows_evaluations(n, w):
    """D of METHOD section 1."""
    return (n - w + 2) * 2 ** (w - 1)


def n_windows_forwards(n, w):
    """F of METHOD section 1; 2^(w-2) is a half for w = 1, and its product with two neighbours is whole."""
    return 2 ** (w - 1) - 1 + 2**w * (n - w + 1) * (n - w + 2) // 4


# -- known values


@pytest.mark.parametrize(
    "game",
    [
        Additive([3.0, -1.0, 0.0, 2.5, 1e-3]),
        Additive([2.0], constant=7.0),
        Unanimity(5, [1, 3, 4], worth=6.0),
        Unanimity(4, [2]),
        Glove(2),
        Glove(5),
        Tabulated.random(1, 0),
        Tabulated.random(4, 1),
        Tabulated.random(7, 2),
        Tabulated.random(10, 3),
    ],
    ids=lambda game: f"{type(game).__name__}{game.n_players}",
)
def test_exact_values_of_known_games(game):
    result = Exact().estimate(game)
    np.testing.assert_allclose(result.values, game.values, atol=1e-12)
    np.testing.assert_allclose(SlidingWindow(game.n_players).estimate(game).values, game.values, atol=1e-12)
    assert result.stderr is None


def test_the_three_player_game_by_hand():
    # v: {}=0 {0}=1 {1}=2 {01}=4 {2}=0 {02}=3 {12}=2 {012}=9, orders 012 021 102 120 201 210
    game = Tabulated([0, 1, 2, 4, 0, 3, 2, 9])
    first = (1 + 1 + (4 - 2) + (9 - 2) + (3 - 0) + (9 - 2)) / 6
    second = ((4 - 1) + (9 - 3) + 2 + 2 + (9 - 3) + (2 - 0)) / 6
    assert Exact().estimate(game).values.tolist() == pytest.approx([first, second, 9 - first - second])


@given(tabulated(most=5))
def test_exact_is_the_average_over_all_orders(game):
    np.testing.assert_allclose(Exact().estimate(game).values, average_over_orders(game), atol=1e-9)


def test_exact_is_the_average_over_all_orders_of_six():
    game = Tabulated.random(6, 5)
    np.testing.assert_allclose(Exact().estimate(game).values, average_over_orders(game), atol=1e-12)


# -- axioms


@given(tabulated(), st.data())
def test_a_null_player_gets_nothing(game, data):
    player = data.draw(st.integers(0, game.n_players - 1))
    for estimator in estimators(game.n_players):
        assert abs(estimator.estimate(Ignoring(game, player)).values[player]) < 1e-9, estimator


@given(tabulated(), st.data(), NUMBERS)
def test_a_dummy_gets_what_it_always_adds(game, data, gift):
    player = data.draw(st.integers(0, game.n_players - 1))
    for estimator in estimators(game.n_players):
        assert estimator.estimate(Ignoring(game, player, gift)).values[player] == pytest.approx(gift, abs=1e-9), estimator


@given(st.integers(2, 5), st.data(), NUMBERS, NUMBERS)
def test_linearity(n, data, a, b):
    v, w = (Tabulated(data.draw(arrays(np.float64, 2**n, elements=NUMBERS))) for _ in range(2))
    for estimator in estimators(n):
        both = estimator.estimate(Combined(a, v, b, w)).values
        apart = a * estimator.estimate(v).values + b * estimator.estimate(w).values
        np.testing.assert_allclose(both, apart, atol=1e-7, err_msg=str(estimator))


@given(tabulated())
def test_efficiency_of_exact_and_permutation(game):
    worth = game.table[-1] - game.table[0]
    for estimator in (Exact(), Permutation(200, seed=1), Permutation(200, seed=1, antithetic=False)):
        result = estimator.estimate(game)
        assert result.values.sum() == pytest.approx(worth, abs=1e-9)
        assert (result.v_empty, result.v_full) == (game.table[0], game.table[-1])
        assert abs(result.efficiency_gap) < 1e-9


def symmetric_pair(n, seed):
    """A random game to which players 0 and 1 are the same."""
    game = Tabulated.random(n, seed)
    for code in range(2**n):
        if code & 3 == 1:
            game.table[code] = game.table[code ^ 3]
    return game


@pytest.mark.parametrize("seed", range(5))
def test_symmetric_players_get_the_same(seed):
    game = symmetric_pair(5, seed)
    exact = Exact().estimate(game).values
    assert exact[0] == pytest.approx(exact[1], abs=1e-12)
    assert abs(exact[0] - exact[2]) > 1e-3  # a game where that says something
    for antithetic in (True, False):
        sampled = Permutation(2000, seed=seed, antithetic=antithetic).estimate(game)
        assert abs(sampled.values[0] - sampled.values[1]) < 4 * np.hypot(*sampled.stderr[:2])


def test_symmetry_of_exact_values_under_renaming():
    n, rename = 5, np.array([3, 0, 4, 1, 2])
    game = Tabulated.random(n, 8)
    renamed = Recorder(game)
    renamed.game = lambda coalitions: game(coalitions[:, rename])
    np.testing.assert_allclose(Exact().estimate(renamed).values[rename], Exact().estimate(game).values, atol=1e-12)


# -- sliding windows


@given(tabulated())
def test_the_window_of_everybody_is_exact(game):
    exact = Exact().estimate(game).values
    for context in ("present", "absent"):
        for aggregation in ("mean", "centred"):
            result = SlidingWindow(game.n_players, context, aggregation).estimate(game)
            np.testing.assert_allclose(result.values, exact, atol=1e-9)
            assert abs(result.efficiency_gap) < 1e-8


@given(tabulated(), st.data())
def test_every_window_divides_what_it_adds(game, data):
    n = game.n_players
    w = data.draw(st.integers(1, n))
    everybody = 2**n - 1
    for context in ("present", "absent"):
        for start, coalitions in enumerate(SlidingWindow(w, context)._coalitions(n)):
            window = sum(1 << i for i in range(start, start + w))
            total = exact_values(game(coalitions)).sum()
            worth = {
                "present": game.table[everybody] - game.table[everybody & ~window],
                "absent": game.table[window] - game.table[0],
            }
            assert total == pytest.approx(worth[context], abs=1e-8)


def test_windows_side_by_side_divide_what_each_adds():
    game = Tabulated.random(9, 4)
    for w, starts in ((3, [0, 3, 6]), (9, [0])):
        values = SlidingWindow(w, stride=w).estimate(game).values
        for start in starts:
            window = sum(1 << i for i in range(start, start + w))
            assert values[start : start + w].sum() == pytest.approx(game.table[-1] - game.table[511 & ~window], abs=1e-12)


def test_window_one_is_leave_one_out_or_one_alone():
    game = Tabulated.random(6, 9)
    out = [game.table[63] - game.table[63 & ~(1 << i)] for i in range(6)]
    alone = [game.table[1 << i] - game.table[0] for i in range(6)]
    np.testing.assert_allclose(SlidingWindow(1).estimate(game).values, out, atol=1e-12)
    np.testing.assert_allclose(SlidingWindow(1, context="absent").estimate(game).values, alone, atol=1e-12)


@pytest.mark.parametrize("context", ["present", "absent"])
@pytest.mark.parametrize(
    ("n", "w", "stride", "starts"), [(6, 3, 1, [0, 1, 2, 3]), (7, 3, 2, [0, 2, 4]), (8, 3, 3, [0, 3, 5]), (6, 4, 4, [0, 2])]
)
def test_blocks_get_the_mean_over_the_windows_that_contain_them(n, w, stride, starts, context):
    game = Tabulated.random(n, n + w)
    collected = [[] for _ in range(n)]
    for start in starts:
        players = list(range(start, start + w))
        for player, value in zip(players, average_over_orders(game, players, context == "present"), strict=True):
            collected[player].append(value)
    assert len({len(values) for values in collected}) > 1  # edges have fewer windows
    result = SlidingWindow(w, context=context, stride=stride).estimate(game)
    np.testing.assert_allclose(result.values, [np.mean(values) for values in collected], atol=1e-12)
    assert result.v_full == game.table[-1]
    assert result.v_empty == game.table[0]
    assert result.efficiency_gap == pytest.approx(result.values.sum() - (game.table[-1] - game.table[0]), abs=1e-12)


def test_centred_takes_the_window_around_a_block_and_the_outermost_at_the_edges():
    n, w = 7, 3
    game = Tabulated.random(n, 11)
    centres = [1, 1, 2, 3, 4, 5, 5]
    expected = []
    for block, centre in enumerate(centres):
        players = [centre - 1, centre, centre + 1]
        expected.append(average_over_orders(game, players, True)[players.index(block)])
    np.testing.assert_allclose(SlidingWindow(w, aggregation="centred").estimate(game).values, expected, atol=1e-12)


def test_window_options_are_checked():
    with pytest.raises(ValueError, match=r"window=5.*4 players.*1 to 4"):
        SlidingWindow(5).check(4)
    with pytest.raises(ValueError, match="window=0"):
        SlidingWindow(0).check(4)
    for stride in (0, 4):
        with pytest.raises(ValueError, match=rf"stride={stride}.*1 to window=3"):
            SlidingWindow(3, stride=stride).check(8)
    with pytest.raises(ValueError, match="window=9"):
        SlidingWindow(9).estimate(Tabulated.random(4, 0))
    assert SlidingWindow(4, stride=4).check(4) is None


# -- what it costs


def test_all_coalitions_in_lexicographic_order():
    assert all_coalitions(2).tolist() == [[False, False], [False, True], [True, False], [True, True]]
    rows = [tuple(row) for row in all_coalitions(5).tolist()]
    assert rows == sorted(rows)
    assert len(set(rows)) == 32


def test_branch_points_by_hand():
    rows = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 0, 1], [1, 1, 1]], dtype=bool)
    assert branch_points(rows).tolist() == [0, 1, 0, 2, 1]


@given(arrays(np.bool_, st.tuples(st.integers(1, 30), st.integers(1, 8))))
def test_block_forwards_are_the_distinct_prefixes_that_end_in_a_present_block(coalitions):
    prefixes = {tuple(row[: d + 1]) for row in coalitions.tolist() for d in range(len(row))}
    assert block_forwards(coalitions) == sum(prefix[-1] for prefix in prefixes)
    assert block_forwards(coalitions, absent_costs=True) == len(prefixes)


@pytest.mark.parametrize("n", range(1, 13))
def test_costs_equal_the_formulas_of_the_method_page(n):
    exact = Exact().plan(n)
    assert len(np.unique(exact, axis=0)) == len(exact) == 2**n
    assert block_forwards(exact) == 2**n - 1
    assert block_forwards(exact, absent_costs=True) == 2 ** (n + 1) - 2
    for w in range(1, n + 1):
        present, absent = SlidingWindow(w).plan(n), SlidingWindow(w, context="absent").plan(n)
        d = n_windows_evaluations(n, w)
        assert len(np.unique(present, axis=0)) == len(present) == d
        assert block_forwards(present) == n_windows_forwards(n, w)
        pruned = 2**w - 2 + 2 ** (w - 1) * ((n - w + 2) * (n - w + 3) // 2 - 1)
        assert block_forwards(present, absent_costs=True) == pruned
        assert len(np.unique(absent, axis=0)) == len(absent) == d
        assert block_forwards(absent) == d - 1


def test_costs_that_the_method_page_names():
    plan = SlidingWindow(5).plan(12)
    assert (len(plan), block_forwards(plan), block_forwards(plan, absent_costs=True)) == (144, 591, 734)
    plan = SlidingWindow(5).plan(32)
    assert (len(plan), block_forwards(plan)) == (464, 6511)


def chain(order):
    return np.array([[order.index(i) < size for i in range(len(order))] for size in range(1, len(order))])


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_one_permutation_costs_what_the_method_page_expects(n):
    costs = [block_forwards(chain(order)) for order in permutations(range(n))]
    assert np.mean(costs) == pytest.approx((n - 1) * (n + 2) / 4, abs=1e-12)
    assert len(chain(tuple(range(n)))) == n - 1


@pytest.mark.parametrize(
    "estimator",
    [
        Exact(),
        SlidingWindow(3),
        SlidingWindow(3, stride=2),
        SlidingWindow(3, "absent"),
        Permutation(40),
        Permutation(41, antithetic=False),
    ],
    ids=str,
)
def test_what_is_asked_is_what_was_planned_and_what_is_reported(estimator):
    n = 6
    game = Recorder(Tabulated.random(n, 0))
    cost = estimator.estimate(game).cost
    plan = {tuple(row) for row in estimator.plan(n).tolist()}
    references = {(False,) * n, (True,) * n}
    assert plan | references == set(game.asked) | references
    assert cost.n_evaluations == cost.n_new_evaluations == len(plan)
    prefixes = {row[: d + 1] for row in plan for d in range(n)}
    assert cost.n_block_forwards == cost.n_new_block_forwards == sum(prefix[-1] for prefix in prefixes)
    assert cost.seconds > 0


def test_the_full_cost_does_not_depend_on_what_was_known():
    class Knows(Recorder):
        """Counts as the layer game does, but knows every value already."""

        n_evaluations = n_block_forwards = 0

    cost = SlidingWindow(3).estimate(Knows(Tabulated.random(6, 0))).cost
    assert (cost.n_evaluations, cost.n_block_forwards) == (n_windows_evaluations(6, 3), n_windows_forwards(6, 3))
    assert (cost.n_new_evaluations, cost.n_new_block_forwards) == (0, 0)


class Counting(Recorder):
    """Counts each coalition that it was asked for once, as the layer game does."""

    v_empty = 0.0

    @property
    def n_evaluations(self):
        return len(set(self.asked))

    @property
    def n_block_forwards(self):
        return block_forwards(np.array(sorted(set(self.asked)))) if self.asked else 0


@pytest.mark.parametrize(
    "estimator",
    [
        Exact(),
        SlidingWindow(3),
        Permutation(60),
        SlidingWindow(3, "absent"),
    ],
    ids=str,
)
def test_on_a_fresh_game_all_cost_is_new(estimator):
    cost = estimator.estimate(Counting(Tabulated.random(6, 0))).cost
    assert cost.n_new_evaluations == cost.n_evaluations
    assert cost.n_new_block_forwards == cost.n_block_forwards


def test_the_ledger_counts_each_coalition_once():
    ledger = Ledger(Tabulated.random(3, 0))
    rows = all_coalitions(3)
    ledger(rows[[7, 7, 3]])  # 111 and 011: 3 + 2 forwards
    ledger(rows[[7, 3, 1]])  # 001 is new: 1 forward, nothing is shared with earlier calls
    ledger(rows[[4]])  # 100: 1 forward
    cost = ledger.report("x", np.zeros(3), 0.0).cost
    assert (cost.n_evaluations, cost.n_block_forwards) == (4, 7)


def test_the_payoff_of_nobody_may_come_from_the_game():
    class WithReference(Recorder):
        v_empty = -5.0

    game = WithReference(Tabulated.random(4, 0))
    result = SlidingWindow(2).estimate(game)
    assert result.v_empty == -5.0
    assert (False,) * 4 not in game.asked


def test_exact_refuses_deep_models_before_it_enumerates():
    with pytest.raises(ValueError, match=r"2\^21.*21 blocks.*20.*sliding_window.*permutation"):
        Exact().check(21)
    assert Exact().check(20) is None

    class Deep:
        n_players = 40

        def __call__(self, coalitions):
            raise AssertionError("never asked")

    with pytest.raises(ValueError, match="shapley=exact"):
        Exact().estimate(Deep())


def test_the_ways_out_that_exact_names_exist():
    n = 32
    with pytest.raises(ValueError, match=rf"{len(SlidingWindow(5).plan(n))} evaluations.*from {4 * n - 2}\)"):
        Exact().check(n)
    Permutation(4 * n - 2).check(n)
    with pytest.raises(ValueError, match="budget"):
        Permutation(4 * n - 3).check(n)


# -- permutations


@given(st.integers(2, 8), st.integers(2, 400), st.booleans(), st.integers(0, 5))
def test_budgets_are_respected(n, budget, antithetic, seed):
    estimator = Permutation(budget, seed, antithetic)
    least = 2 + 2 * (2 if antithetic else 1) * (n - 1)
    game = Recorder(Tabulated.random(n, 0))
    if budget < least:
        with pytest.raises(ValueError, match=rf"budget={budget}\b.*least budget is {least}$"):
            estimator.estimate(game)
        assert not game.asked
        return
    cost = estimator.estimate(game).cost
    assert len(set(game.asked)) <= budget
    assert cost.n_evaluations == len(set(game.asked))
    orders, per_sample = len(game.asked) / (n + 1), 2 if antithetic else 1
    assert 2 + (orders + per_sample) * (n - 1) > budget  # one more sample could have gone beyond it


def test_the_budget_counts_orders_as_promised():
    game = Recorder(Tabulated.random(6, 0))
    Permutation(2 + 5 * 7, antithetic=False).estimate(game)
    assert game.asked.count((True,) * 6) == 7
    game = Recorder(Tabulated.random(6, 0))
    Permutation(2 + 5 * 7).estimate(game)  # three pairs
    assert game.asked.count((True,) * 6) == 6


def test_seeds_determine_the_values_and_zero_is_a_seed():
    game = Tabulated.random(6, 1)
    values = [Permutation(80, seed).estimate(game).values.tolist() for seed in (0, 0, 1, 2)]
    assert values[0] == values[1]
    assert len({tuple(v) for v in values}) == 3
    assert Permutation(80).estimate(game).values.tolist() == values[0]


def test_antithetic_orders_are_followed_by_their_reverse():
    orders = Permutation(60, seed=2)._orders(5)
    assert orders.shape == (7, 2, 5)
    assert (orders[:, 1] == orders[:, 0, ::-1]).all()
    assert (np.sort(orders, axis=-1) == np.arange(5)).all()
    assert len({tuple(order) for order in orders[:, 0].tolist()}) > 3
    assert Permutation(60, seed=2, antithetic=False)._orders(5).shape == (14, 1, 5)


def test_antithetic_pairs_settle_games_of_two_at_a_time():
    # one of the two is last in an order, the other in its reverse: no variance at all
    game = Combined(2.0, Unanimity(6, [1, 4]), -3.0, Unanimity(6, [0, 5]))
    expected = [-1.5, 1.0, 0.0, 0.0, 1.0, -1.5]
    paired = Permutation(60, seed=0).estimate(game)
    np.testing.assert_allclose(paired.values, expected, atol=1e-12)
    np.testing.assert_allclose(paired.stderr, 0, atol=1e-12)
    plain = Permutation(60, seed=0, antithetic=False).estimate(game)
    assert plain.stderr.max() > 0.1


@pytest.mark.parametrize("antithetic", [True, False])
def test_values_and_standard_errors_by_the_definition(antithetic):
    n = 5
    game, estimator = Tabulated.random(n, 6), Permutation(50, seed=4, antithetic=antithetic)
    samples = []
    for sample in estimator._orders(n).tolist():
        marginals = np.zeros((len(sample), n))
        for order, row in zip(sample, marginals, strict=True):
            code = 0
            for player in order:
                row[player] = game.table[code | 1 << player] - game.table[code]
                code |= 1 << player
        samples.append(marginals.mean(axis=0))
    samples = np.array(samples)
    m = len(samples)
    variance = ((samples - samples.sum(axis=0) / m) ** 2).sum(axis=0) / (m - 1)
    result = estimator.estimate(game)
    np.testing.assert_allclose(result.values, samples.sum(axis=0) / m, atol=1e-12)
    np.testing.assert_allclose(result.stderr, np.sqrt(variance / m), atol=1e-12)


@pytest.mark.parametrize("antithetic", [True, False])
def test_standard_errors_shrink_with_the_root_of_the_budget_and_cover(antithetic):
    game = Tabulated.random(5, 12)
    few = np.array([Permutation(202, s, antithetic).estimate(game).stderr for s in range(20)])
    many = np.array([Permutation(16 * 200 + 2, s, antithetic).estimate(game).stderr for s in range(20)])
    np.testing.assert_allclose(few.mean(axis=0) / many.mean(axis=0), 4, rtol=0.15)
    inside = []
    for seed in range(200):
        result = Permutation(202, seed, antithetic).estimate(game)
        inside.append(np.abs(result.values - game.values) < 2 * result.stderr)
    assert 0.91 < np.mean(inside) < 0.985  # 0.95 of a normal distribution


@pytest.mark.parametrize(("antithetic", "least"), [(True, 6), (False, 4)])
def test_one_player_takes_all_and_a_budget_without_a_standard_error_is_refused(antithetic, least):
    with pytest.raises(ValueError, match=f"^budget={least - 1}: .* the least budget is {least}$"):
        Permutation(least - 1, antithetic=antithetic).check(1)
    found = Permutation(least, antithetic=antithetic).estimate(Additive([2.5], constant=1.0))
    assert found.values.tolist() == [2.5]
    assert found.stderr.tolist() == [0.0]
