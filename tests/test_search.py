"""Allocators that measure profiles instead of blocks."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli import command, last_row
from games import Given, LossOf
from hypothesis import given, settings
from hypothesis import strategies as st

from svnup.allocation import Budget
from svnup.allocation import maps as allocation
from svnup.allocation.curves import Curves, water_fill
from svnup.allocation.maps import Uniform
from svnup.allocation.rounds import ShapleyRounds
from svnup.allocation.search import Search
from svnup.allocation.splits import UniformSplit
from svnup.allocation.trial import Trial
from svnup.pruning.magnitude import Magnitude
from svnup.pruning.walk import pruned_weights, temporarily_pruned
from svnup.pruning.wanda import Wanda
from svnup.reports.tables import render
from svnup.results.row import ResultRow
from svnup.scoring.shapley import GameOptions, ShapleyScorer
from svnup.shapley import all_coalitions, exact_values
from svnup.shapley.exact import Exact
from svnup.types import BlockScores, SparsityProfile

A = np.array([8.0, 1.0, 2.0, 0.5])  # of the toy losses: how much each block matters
C = 4.0


class Toy(allocation.Trial):
    """A separable convex loss, sum of a_l exp(c s_l); on few sequences it is off by a little of its own for each profile."""

    def __init__(self, a, noise=0.0):
        self.a, self.noise, self.calls = np.asarray(a), noise, []

    def loss(self, profile, label="", n_seq=None, in_advance=False):
        self.calls.append((profile, label, n_seq))
        off = 0.0 if n_seq is None else self.noise * math.sin(1e4 * float(profile.sparsity @ np.arange(1, len(self.a) + 1)))
        return float(self.a @ np.exp(C * profile.sparsity)) * (1 + off / (n_seq or 1))

    def shapley_values(self, denser, sparser):
        return self.a * (np.exp(C * sparser.sparsity) - np.exp(C * denser.sparsity))


PARAMS = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


# -- search


@settings(max_examples=20)
@given(PARAMS, st.floats(0, 0.94), st.integers(0, 5), st.sampled_from([0.02, 0.1]))
def test_every_candidate_keeps_the_exact_budget_inside_the_bounds(params, sparsity, seed, step):
    trial, params = Toy(np.arange(1, len(params) + 1)), np.array(params)
    search = Search(generations=4, offspring=6, sequences=[1, 2], survivors=[3, 2], step=step, seed=seed)
    chosen = search.allocate(Budget(params, sparsity), trial=trial)
    lower, upper = Budget(params, sparsity).bounds()
    for profile, _, _ in trial.calls:
        assert (
            abs(math.fsum(s * int(p) for s, p in zip(profile.sparsity, params, strict=True)) / params.sum() - sparsity) < 1e-12
        )
        assert profile.sparsity.min() >= lower - 1e-12
        assert profile.sparsity.max() <= upper + 1e-12
    assert len(trial.calls) <= search.n_losses(Budget(params, sparsity))
    assert trial.loss(chosen) <= trial.loss(Budget(params, sparsity).uniform()) + 1e-12


def test_stages_measure_fewer_candidates_on_more_text():
    trial = Toy(A)
    search = Search(generations=3, offspring=8, sequences=[2, 5], survivors=[4, 2])
    search.allocate(Budget(np.full(4, 10), 0.7), trial=trial)
    first = [("uniform", None)]
    for generation in (1, 2, 3):
        first += [(f"generation {generation}", n) for n in [2] * 8 + [5] * 4 + [None] * 2]
    assert [(label, n_seq) for _, label, n_seq in trial.calls] == first
    assert len(first) == search.n_losses(Budget(np.full(4, 10), 0.7))
    for stage in (2, 5, None):  # who goes on is who was best before
        asked = [p.sparsity.tolist() for p, label, n in trial.calls if (label, n) == ("generation 2", stage)]
        assert len({tuple(s) for s in asked}) == len(asked), "none twice"
    by_stage = {n: [p for p, label, m in trial.calls if (label, m) == ("generation 1", n)] for n in (2, 5, None)}
    best = sorted(by_stage[2], key=lambda p: Toy(A).loss(p, n_seq=2))
    assert [p.sparsity.tolist() for p in by_stage[5]] == [p.sparsity.tolist() for p in best[:4]]
    assert [p.sparsity.tolist() for p in by_stage[None]] == [p.sparsity.tolist() for p in best[:2]]


def test_moves_are_steps_of_the_smaller_block():
    trial = Toy([1.0, 1.0])
    Search(generations=1, offspring=2, sequences=[], survivors=[], step=0.1).allocate(
        Budget(np.array([10, 40]), 0.5), trial=trial
    )
    assert len(trial.calls) > 1
    for profile, _, _ in trial.calls[1:]:
        steps = (profile.sparsity - 0.5) / [0.1, -0.025]
        assert steps[0] == pytest.approx(steps[1])
        assert steps[0] == pytest.approx(round(steps[0]))


def test_blocks_that_did_not_move_keep_their_sparsity_to_the_last_bit():
    """Or candidates would not begin alike."""
    params, rng = np.array([17, 30, 23, 40, 31, 29]), np.random.default_rng(0)
    parent = Budget(params, 0.7).uniform()
    for _ in range(5):
        mutants = Search()._offspring(Budget(params, 0.7), parent, rng)
        for mutant in mutants:
            off = np.abs(mutant.sparsity - parent.sparsity)
            assert ((off == 0) | (off > 1e-3)).all()
            assert off.max() > 0
        parent = mutants[-1]


@pytest.mark.parametrize("params", [[10, 10, 10, 10], [10, 30, 20, 40]])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_it_comes_near_the_optimum_and_is_never_worse_than_its_start(params, noise):
    params, grid = np.array(params), np.arange(0.4, 0.901, 0.05)
    best = math.inf  # over all profiles of three free blocks
    for first in itertools.product(grid, repeat=3):
        last = (0.7 * params.sum() - params[:3] @ first) / params[3]
        if 0.4 - 1e-9 <= last <= 0.9 + 1e-9:
            best = min(best, float(A @ np.exp(C * np.array([*first, last]))))
    trial = Toy(A, noise)
    start = trial.loss(Budget(params, 0.7).uniform())
    found = trial.loss(Search().allocate(Budget(params, 0.7), trial=trial))
    assert found <= start
    assert found - best < 0.05 * (start - best)


def test_a_start_that_nothing_beats_stays():
    spread, broken = LossOf(lambda profile, *_: float(np.ptp(profile.sparsity))), LossOf(lambda *_: math.inf)
    assert Search(generations=3).allocate(Budget(np.full(4, 10), 0.7), trial=spread).sparsity.tolist() == [0.7] * 4
    assert Search(generations=3).allocate(Budget(np.array([10]), 0.7), trial=broken).sparsity.tolist() == [0.7]
    assert Search().allocate(Budget(np.array([10, 10]), 0.0), trial=Toy([1, 1])).sparsity.tolist() == [0.0, 0.0]


def test_the_seed_decides():
    def asked(seed):
        trial = Toy(A)
        Search(seed=seed, generations=3).allocate(Budget(np.array([10, 30, 20, 40]), 0.7), trial=trial)
        return [(p.sparsity.tolist(), label, n) for p, label, n in trial.calls]

    assert asked(0) == asked(0)
    assert asked(0) != asked(1)


def test_search_takes_steps_of_mixed_patterns():
    trial = Toy(A)
    chosen = Search(generations=5).allocate(Budget(np.array([10, 30, 20, 40]), 0.7, "mixed:8"), trial=trial)
    assert trial.loss(chosen) < trial.loss(trial.calls[0][0])
    for profile, _, _ in trial.calls:
        np.testing.assert_allclose(profile.sparsity * 8, np.round(profile.sparsity * 8), atol=1e-9)
    levels = [tuple(p.sparsity) for p, label, n in trial.calls if (label, n) == ("generation 1", 4)]
    assert len(set(levels)) == len(levels)


def test_a_search_that_was_interrupted_goes_on(random_model, tokens, tmp_path):
    lm = random_model(3)

    def held_out():
        return Trial(lm, Magnitude(), UniformSplit(), tokens, Given(tokens), tmp_path)

    def run(trial, generations):
        search = Search(generations=generations, offspring=4, sequences=[1], survivors=[2])
        return search.allocate(Budget(lm.block_params, 0.6), trial=trial)

    killed, resumed, again = held_out(), held_out(), held_out()
    run(killed, 2)
    profile = run(resumed, 4)
    reports = [trial.to_dict() for trial in (killed, resumed, again) if trial.to_dict()]
    assert reports[1]["n_new_evaluations"] <= reports[1]["n_evaluations"] - reports[0]["n_evaluations"]
    assert run(again, 4).sparsity.tolist() == profile.sparsity.tolist()
    assert again.to_dict()["n_new_evaluations"] == 0
    assert again.to_dict()["curve"] == reports[1]["curve"]
    best = [point["loss"] for point in reports[1]["best"]]
    assert [point["label"] for point in reports[1]["best"]] == ["uniform", *(f"generation {g}" for g in range(1, 5))]
    assert best == sorted(best, reverse=True)


def test_a_search_killed_within_a_generation_ends_as_if_it_had_not_been(random_model, tokens, tmp_path, monkeypatch):
    lm, measured, left = random_model(3), Trial._loss, iter(range(7))

    def search(cache):
        trial = Trial(lm, Magnitude(), UniformSplit(), tokens, Given(tokens), tmp_path / cache)
        profile = Search(generations=3, offspring=4, sequences=[1], survivors=[2]).allocate(
            Budget(lm.block_params, 0.6), trial=trial
        )
        return profile.sparsity.tolist(), trial.to_dict()

    def killed(self, *args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return measured(self, *args)

    profile, report = search("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trial, "_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            search("killed")
    again, resumed = search("killed")
    assert again == profile
    assert resumed["curve"] == report["curve"]
    assert resumed["n_new_evaluations"] == report["n_new_evaluations"] - 7


SMALL_SEARCH = ["allocator=search", "allocator.generations=2", "allocator.offspring=3", "allocator.sequences=[1]"]


@pytest.mark.slow
def test_a_job_that_searches(svnup):
    args = [*SMALL_SEARCH, "allocator.survivors=[1]", "pruner=magnitude"]
    code, out, _ = svnup(*args, "dry_run=true")
    assert code == 0
    assert "tuning evaluations" in out
    assert svnup(*args)[0] == 0
    row = last_row()
    tuning = row["tuning"]
    assert (tuning["n_evaluations"], tuning["n_sequences"]) == (9, 3)  # 1 + 2 * (3 + 1)
    assert tuning["n_full_evaluations"] == pytest.approx(3 + 6 / 3)
    assert row["profile"]["target"] == 0.7
    assert "selection" in row["fingerprints"]
    assert next(Path("results").glob("runs/*/figures/tuning.png")).is_file()
    assert "already finished" in svnup(*args)[1]
    assert svnup(*args, "force=true")[0] == 0
    assert last_row()["tuning"]["n_new_evaluations"] == 0
    assert last_row()["metrics"] == row["metrics"]
    assert svnup(*args, "allocator.seed=1", "selection.n_seq=2", "dry_run=true")[0] == 0
    assert "already finished" not in svnup(*args, "selection.n_seq=2")[1], "the text that chooses counts"
    (line,) = [line for line in render([ResultRow.from_json(json.dumps(row))], "csv").splitlines() if "search" in line]
    assert "search (" in line
    assert "sequences=1" in line


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["allocator.generations=0"], "allocator.generations=0: must be at least 1"),
        (["allocator.step=0"], "allocator.step=0"),
        (["allocator.sequences=[4,2]"], "allocator.sequences=[4, 2]: must be whole numbers from 1 that grow"),
        (["allocator.sequences=[1,a]"], "allocator.sequences=[1, 'a']: its entry a must be a whole number"),
        (["allocator.sequences=8"], "allocator.sequences=8: must be a list"),
        (["allocator.survivors=[1,4]"], "allocator.survivors=[1, 4]: must be whole numbers from 1 that shrink"),
        (["allocator.survivors=[1]"], "allocator.survivors=[1]: as many stages"),
        (["allocator.survivors=[99,1]"], "allocator.survivors=[99, 1]: more than the 16 offspring"),
        (["allocator.seed=-1"], "allocator.seed=-1"),
        (["allocator.lower=0.8"], "allocator.lower=0.8"),
        (["allocator.step=auto"], "allocator.step=auto: cannot be tuned"),
        (["pattern='2:4'", "sparsity=0.5"], "pattern=2:4: a fixed N:M"),
        (["selection.role=test"], "selection.role=test: this text chooses; use selection.role=selection"),
        (["offload=cpu"], "offload=cpu: allocator options that are auto, and allocators that try many profiles"),
    ],
)
def test_mistakes_of_search(svnup, args, said):
    code, _, err = svnup("allocator=search", *args)
    assert code == 2
    assert said in err.rstrip("\n").splitlines()[-1]
    assert not Path("results").exists()


def test_only_those_that_ask_for_losses_choose():
    assert Search().needs.selection
    assert Curves().needs.selection
    assert not Uniform().needs.selection


# -- rounds


@settings(max_examples=20)
@given(PARAMS, st.floats(0.1, 0.94), st.integers(1, 6), st.integers(0, 5))
def test_rounds_keep_the_budget_and_never_lose_to_uniform(params, sparsity, rounds, seed):
    params, rng = np.array(params), np.random.default_rng(seed)
    trial, scores = Toy(rng.random(len(params)) + 0.01), BlockScores(rng.random(len(params)) + 0.01, "any")
    method = ShapleyRounds(rounds=rounds)
    profile = method.allocate(Budget(params, sparsity), scores, trial)
    assert profile.mean == pytest.approx(sparsity, abs=1e-9)
    lower, upper = Budget(params, sparsity).bounds()
    assert ((profile.sparsity >= lower - 1e-12) & (profile.sparsity <= upper + 1e-12)).all()
    assert 3 <= len(trial.calls) <= method.n_losses(Budget(params, sparsity))
    least = min(Toy(trial.a).loss(tried) for tried, _, _ in trial.calls)
    assert Toy(trial.a).loss(profile) == least
    uniform = Toy(trial.a).loss(Budget(params, sparsity).uniform())
    assert least <= uniform * (1 + 1e-12)  # that of equal blocks, but for a bit


def test_rounds_leave_a_budget_whose_blocks_cost_the_same():
    """Per weight that differs: near 0 and 1, where a block has less to gain or lose, as well."""

    class Level(Toy):
        def shapley_values(self, denser, sparser):
            return denser.params * (sparser.sparsity - denser.sparsity)

    for sparsity in (0.05, 0.5, 0.93):
        trial, params = Level([1.0, 2.0, 4.0]), np.array([10, 30, 20])
        scores = BlockScores(np.array([1.0, 2.0, 9.0]), "any")
        ShapleyRounds(rounds=2).allocate(Budget(params, sparsity), scores, trial)
        first = min((profile for profile, _, _ in trial.calls[:3]), key=Toy(trial.a).loss)
        for profile, _, _ in trial.calls[3:5]:
            np.testing.assert_allclose(profile.sparsity, first.sparsity, atol=1e-9)


def test_rounds_correct_a_budget_that_misleading_scores_gave():
    """In the toy the least loss has equal slopes a_l exp(c s_l) per weight, from which scores that know nothing lead away."""
    trial, params = Toy(A), np.array([10, 20, 10, 10])
    scores = BlockScores(np.array([1.0, 3.0, 1.5, 4.0]), "misleading")

    def spread(rounds):
        profile = ShapleyRounds(rounds=rounds, step=0.2, lower=0.0, upper=1.0).allocate(Budget(params, 0.6), scores, trial)
        return np.ptp(np.log(A * np.exp(C * profile.sparsity) / params)), trial.loss(profile)

    (first, before), (second, after), (last, best) = spread(1), spread(2), spread(8)
    assert first > 2 * second > 4 * last
    assert before > after > best
    assert [label for _, label, _ in trial.calls[:3]] == ["lam=0", "lam=0.1", "lam=0.2"]


def test_rounds_end_where_neither_step_helps():
    class Flat(Toy):
        def shapley_values(self, denser, sparser):
            return np.array([-1.0, -2.0])

    for trial in (Toy([1.0, 1.0]), Flat([1.0, 1.0])):
        method = ShapleyRounds(rounds=9)
        profile = method.allocate(Budget(np.array([5, 5]), 0.5), BlockScores(np.array([1.0, 1.0]), "equal"), trial)
        assert profile.sparsity.tolist() == [0.5, 0.5]
        assert len(trial.calls) == (3 if isinstance(trial, Flat) else 5)


@pytest.mark.parametrize("players", ["block", "sublayer"])
@torch.no_grad()
def test_values_of_a_pruned_model_are_those_of_the_definition(random_model, tokens, players):
    lm = random_model(3)
    denser, sparser = (SparsityProfile([s, s + 0.1, s], lm.block_params, s + 0.1 / 3) for s in (0.3, 0.6))
    present, absent = (pruned_weights(lm, p, Magnitude(), tokens) for p in (denser, sparser))
    text = SimpleNamespace(n_seq=2, tokens=lambda tokenizer: tokens[:2])
    scorer = ShapleyScorer(Exact(), GameOptions(data=text, payoff="recip_ppl", players=players))
    with temporarily_pruned(lm, denser, Magnitude(), tokens):
        found = scorer.reestimate(lm, absent, None)
    payoffs = []
    for coalition in all_coalitions(3 if players == "block" else 6):
        for index in range(3):
            for name, linear in lm.linears(index).items():
                player = index if players == "block" else 2 * index + name.startswith("mlp")
                linear.weight.copy_((present if coalition[player] else absent)[index][f"{name}.weight"])
        payoffs.append(-lm.nll(tokens[:2]).mean())
    np.testing.assert_allclose(found.values, exact_values(np.array(payoffs)), atol=1e-6)
    assert np.ptp(found.values) > 1e-3


ROUNDS = ["allocator=shapley_rounds", "shapley.window=2"]
PARTS = ["shapley.game.players=sublayer", "allocator.granularity=sublayer"]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [[], PARTS[:1], PARTS], ids=["blocks", "blocks by their sublayers", "sublayers"])
def test_a_job_of_rounds(svnup, parts):
    code, out, _ = svnup(*ROUNDS, *parts, "dry_run=true")
    assert code == 0
    planned = int(re.search(r"evaluations of later rounds +(\d+)", out)[1])
    assert svnup(*ROUNDS, *parts, "allocator.step=0.01")[0] == 0
    row = last_row()
    assert planned == 2 * row["shapley"]["n_evaluations"]
    tuning = row["tuning"]
    labels = [call["label"] for call in tuning["curve"]]
    assert labels[:5] == ["lam=0", "lam=0.1", "lam=0.2", "round 2, step=0.005", "round 2, step=0.01"]
    assert len(tuning["rounds"]) == 1 + any("round 3" in label for label in labels)
    for values in tuning["rounds"]:
        assert values["n_evaluations"] == row["shapley"]["n_evaluations"]
        assert values["n_block_forwards"] > row["shapley"]["n_block_forwards"], "absent blocks are run as well"
    assert row["config"]["allocator"]["_target_"].endswith("ShapleyRounds")
    assert svnup(*ROUNDS, *parts, "allocator.step=0.01", "force=true")[0] == 0
    again = last_row()
    assert again["tuning"]["n_new_evaluations"] == 0
    assert [v["n_new_evaluations"] for v in again["tuning"]["rounds"]] == [0] * len(tuning["rounds"])
    per_pruning = 2 * 3 - 1  # each block for its statistics and, but for the last, once more pruned
    assert again["tuning"]["n_calibration_block_forwards"] == 2 * per_pruning * len(tuning["rounds"]), "two prunings a round"
    assert tuning["n_calibration_block_forwards"] > again["tuning"]["n_calibration_block_forwards"]
    assert again["metrics"] == row["metrics"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["allocator.rounds=0"], "allocator.rounds=0: the first is"),
        (["allocator.step=0"], "allocator.step=0"),
        (["allocator.delta=2"], "allocator.delta=2"),
        (["allocator.lam=auto"], "allocator.lam=auto: cannot be tuned"),
        (["allocator.lower=0.8"], "allocator.lower=0.8"),
        (["allocator.scorer=null"], "allocator.scorer: rounds need Shapley values"),
        (["pattern='mixed:8'"], "pattern=mixed:8: rounds move budgets by less than its steps"),
        (["offload=cpu"], "offload=cpu: allocator options that are auto, and allocators that try many profiles"),
    ],
)
def test_mistakes_of_rounds(svnup, args, said):
    code, _, err = svnup("allocator=shapley_rounds", *args)
    assert code == 2
    assert said in err.rstrip("\n").splitlines()[-1]
    assert not Path("results").exists()


@pytest.mark.usefixtures("own_place")
def test_gates_give_no_rounds():
    done = command("allocator=shapley_rounds", "shapley=gates", "shapley.game.payoff=neg_nll")
    assert done.code == 2
    assert "shapley=gates: there are no gates in a pruned model's game" in done.err.splitlines()[-1]


# -- curves


def test_each_block_is_pruned_alone():
    trial = Toy(A)
    params = np.array([10, 30, 20, 40])
    Curves(levels=3).allocate(Budget(params, 0.7), trial=trial)
    assert len(trial.calls) == Curves(levels=3).n_losses(Budget(params, 0.7)) == 12 + 2
    for k, (profile, label, n_seq) in enumerate(trial.calls[:12]):
        wanted = np.zeros(4)
        wanted[k // 3] = (0.4, 0.65, 0.9)[k % 3]
        np.testing.assert_allclose(profile.sparsity, wanted)
        assert (label, n_seq) == (f"layer {k // 3} at {wanted.max():.3g}", None)
        assert profile.target == pytest.approx(wanted @ params / 100)


@pytest.mark.parametrize("params", [[10, 10, 10, 10], [30, 10, 20, 20]])
def test_the_optimum_of_a_separable_convex_loss(params):
    """a_l exp(c s_l) with sum p_l s_l fixed: s_l = (log(p_l / a_l) + const) / c where no bound holds it."""
    params = np.array(params)
    best = np.log(params / A) / C
    best += 0.6 - np.average(best, weights=params)
    assert best.min() > 0
    assert best.max() < 1.0
    found = Curves(levels=201, lower=0.0, upper=1.0).allocate(Budget(params, 0.6), trial=Toy(A)).sparsity
    np.testing.assert_allclose(found, best, atol=0.01)
    coarse = Curves(levels=6, lower=0.0, upper=1.0).allocate(Budget(params, 0.6), trial=Toy(A)).sparsity
    np.testing.assert_allclose(coarse, best, atol=0.2)


def test_water_by_hand():
    grid, params = np.array([0.4, 0.6, 0.8]), np.array([10, 10])
    # losses per 0.2: 1 and 2 in the first block, 1.5 and 4 in the second; the target 0.6 takes two of the four segments
    curves = np.array([[0.0, 1.0, 3.0], [0.0, 1.5, 5.5]])
    assert water_fill(grid, curves, params, 0.6).tolist() == pytest.approx([0.6, 0.6])
    assert water_fill(grid, curves, params, 0.65).tolist() == pytest.approx([0.7, 0.6])  # half of the third
    assert water_fill(grid, curves, params, 0.4).tolist() == [0.4, 0.4]
    assert water_fill(grid, curves, params, 0.8).tolist() == pytest.approx([0.8, 0.8])
    # three times the weights: per weight the second block is the cheaper
    assert water_fill(grid, curves, np.array([10, 30]), 0.55).tolist() == pytest.approx([0.4, 0.6])
    # a bump is bridged: the hull of the first is one segment as steep as the second, and they share
    bumpy = np.array([[0.0, 5.0, 4.0], [0.0, 2.0, 4.0]])
    assert water_fill(grid, bumpy, params, 0.5).tolist() == pytest.approx([0.5, 0.5])


@st.composite
def measured(draw):
    n, m = draw(st.integers(1, 6)), draw(st.integers(2, 6))
    values = st.floats(-5, 5, width=32)
    curves = np.array(draw(st.lists(st.lists(values, min_size=m, max_size=m), min_size=n, max_size=n)))
    params = np.array(draw(st.lists(st.integers(1, 1000), min_size=n, max_size=n)))
    return np.linspace(0.3, 0.9, m), curves, params, draw(st.floats(0.3, 0.9))


@given(measured())
def test_water_meets_any_budget_inside_the_grid(case):
    grid, curves, params, target = case
    sparsity = water_fill(grid, curves, params, target)
    assert np.average(sparsity, weights=params) == pytest.approx(target, abs=1e-9)
    assert sparsity.min() >= 0.3 - 1e-12
    assert sparsity.max() <= 0.9 + 1e-12
    steeper = curves.copy()
    steeper[0] += 10 * params[0] * (grid - 0.3)
    assert water_fill(grid, steeper, params, target)[0] <= sparsity[0] + 1e-9, "a block that matters more keeps more"


@given(PARAMS, st.floats(0, 0.94), st.sampled_from(["unstructured", "mixed:8"]))
def test_the_budget_of_curves_is_exact(params, sparsity, pattern):
    sparsity, params = min(sparsity, 0.875), np.array(params)
    profile = Curves().allocate(Budget(params, sparsity, pattern), trial=Toy(np.arange(1, len(params) + 1)))
    budget = profile.sparsity if profile.requested is None else profile.requested
    assert np.average(budget, weights=params) == pytest.approx(sparsity, abs=1e-12)
    equal = Curves().allocate(Budget(np.full(len(params), 7), sparsity), trial=Toy(np.ones(len(params))))
    np.testing.assert_allclose(equal.sparsity, sparsity, atol=1e-9)  # nothing tells the blocks apart


@pytest.mark.parametrize("pattern", ["unstructured", "mixed:8"])
def test_curves_that_mislead_lead_to_the_uniform_budget(pattern):
    """Losses that do not add up: what they are together is said by label."""

    def misleading(together):
        def loss(profile, label, n_seq):
            asked.append(label)
            return together.get(label, float(A @ np.exp(C * profile.sparsity)))

        return LossOf(loss)

    asked, params = [], np.array([10, 30, 20, 40])
    uniform = Budget(params, 0.7, pattern).uniform()
    for filled, of_uniform in ((2.0, 1.0), (1.0, 1.0), (math.inf, 1.0), (math.inf, math.inf), (1.0, 2.0)):
        trial = misleading({"water-filling": filled, "uniform": of_uniform})
        chosen = Curves(levels=3).allocate(Budget(params, 0.7, pattern), trial=trial)
        assert (chosen.sparsity.tolist() == uniform.sparsity.tolist()) == (filled >= of_uniform)
    assert asked[-2:] == ["water-filling", "uniform"]


def test_curves_that_are_not_finite_are_refused():
    trial = LossOf(lambda profile, *_: math.inf if profile.sparsity[1] > 0.8 else 1.0)
    with pytest.raises(ValueError, match=r"allocator.upper=0.9: the loss with layer 1 alone at 0.9 is not finite"):
        Curves().allocate(Budget(np.array([5, 5]), 0.7), trial=trial)


def test_what_curves_cost(random_model, tokens, tmp_path):
    """One block is pruned per point, and blocks run from there on; those before it once for all points."""
    lm, n, points = random_model(4), 4, 3
    trial = Trial(lm, Wanda(), UniformSplit(), tokens, Given(tokens), tmp_path)
    Curves(levels=points).allocate(Budget(lm.block_params, 0.7), trial=trial)
    report = trial.to_dict()
    assert report["n_new_evaluations"] == n * points + 2
    assert report["n_calibration_block_forwards"] == n * points + n - 1 + 2 * (2 * n - 1)
    assert report["n_selection_block_forwards"] == points * n * (n + 1) / 2 + n - 1 + 2 * n


def test_a_job_by_curves(svnup):
    args = ["allocator=curves", "allocator.levels=3", "pruner=magnitude"]
    assert svnup(*args)[0] == 0
    row = last_row()
    assert (row["tuning"]["n_evaluations"], row["tuning"]["n_new_evaluations"]) == (11, 11)
    *_, filled, uniform = row["tuning"]["curve"]
    assert (filled["label"], uniform["label"]) == ("water-filling", "uniform")
    assert row["tuning"]["curve"][0]["label"] == "layer 0 at 0.4"
    assert row["tuning"]["best"] == [], "of different budgets none is best"
    assert np.average(row["profile"]["sparsity"], weights=row["profile"]["params"]) == pytest.approx(0.7)
    assert (np.ptp(row["profile"]["sparsity"]) > 0) == (filled["loss"] < uniform["loss"])
    assert svnup(*args, "force=true")[0] == 0
    assert last_row()["tuning"]["n_new_evaluations"] == 0
    assert last_row()["profile"] == row["profile"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["allocator.levels=1"], "allocator.levels=1: a curve has at least 2 points"),
        (["allocator.upper=0.6"], "allocator.lower=0.4, upper=0.6"),
        (["pattern='2:4'", "sparsity=0.5"], "pattern=2:4: a fixed N:M"),
        (["offload=disk"], "offload=disk"),
    ],
)
def test_mistakes_of_curves(svnup, args, said):
    code, _, err = svnup("allocator=curves", *args)
    assert code == 2
    assert said in err.rstrip("\n").splitlines()[-1]
    assert not Path("results").exists()
