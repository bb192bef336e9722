"""From scores to an exact budget."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from cli import RANDOM
from games import LossOf
from hydra import compose, initialize_config_dir
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from svnup import config
from svnup.allocation import Budget
from svnup.allocation.budget import project, rescale, split_block
from svnup.allocation.maps import Atp, CountBudget, FromFile, Ratios, ScoreBudget, Uniform
from svnup.allocation.neuronal import LAMBDAS, Neuronal
from svnup.allocation.rounds import ShapleyMargins, ShapleyRounds
from svnup.naming import allocator_name
from svnup.types import BlockScores, SparsityProfile

REFERENCE = Path(__file__).parent / "reference"
ALLOCATORS = sorted(p.stem for p in (config.CONF / "allocator").glob("[!_]*.yaml"))
SCALES = ("clip", "rank", "log", "raw")
GOOD = {"sparsity": [0.4, 0.6], "params": [10, 10], "target": 0.5, "pattern": "unstructured"}  # a profile of a file
SCORES = st.integers(1, 12).flatmap(lambda n: arrays(np.float64, n, elements=st.floats(-50, 50, width=32)))


@pytest.fixture
def write(tmp_path):
    def write(data):
        path = tmp_path / "profile.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return str(path)

    return write


# -- scales


@pytest.mark.parametrize("scale", SCALES)
@given(scores=SCORES)
def test_scales_keep_the_order_inside_0_and_1(scale, scores):
    assume(scale != "log" or scores.max() > 0 or np.ptp(scores) == 0)
    z = rescale(scores, scale)
    assert z.shape == scores.shape
    assert z.min() >= 0
    assert z.max() <= 1
    assert (np.diff(z[np.argsort(scores, kind="stable")]) >= 0).all()
    for value in scores:
        assert len(set(z[scores == value])) == 1  # equal scores stay equal
    if scale in ("rank", "raw") and np.ptp(scores) > 0:
        assert (z.min(), z.max()) == (0, 1)
    if scale == "rank" and np.ptp(scores) > 0:
        assert (np.diff(z[np.argsort(scores, kind="stable")])[np.diff(np.sort(scores)) > 0] > 0).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("constant", [-3.0, 0.0, 2.0])
def test_constant_scores_give_zeros(scale, constant):
    assert rescale(np.full(4, constant), scale).tolist() == [0.0] * 4


def test_raw_is_min_max():
    assert rescale(np.array([3.0, -1.0, 1.0]), "raw").tolist() == [1.0, 0.0, 0.5]


def test_rank_gives_ties_their_average():
    # ranks 2.5, 1, 4, 2.5 of 1..4
    assert rescale(np.array([5.0, -2.0, 100.0, 5.0]), "rank").tolist() == [0.5, 0.0, 1.0, 0.5]


def test_log_has_a_floor_at_a_ten_thousandth_of_the_largest():
    z = rescale(np.array([1000.0, 10.0, 0.1, 0.01, 0.0, -7.0]), "log")
    assert z.tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0, 0.0, 0.0], abs=1e-12)
    z = rescale(np.array([8.0, 4.0, 2.0]), "log")  # no floor in sight: 2 is the least
    assert z.tolist() == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)


def test_log_needs_a_positive_score():
    for scores in ([-1.0, -2.0], [0.0, -2.0]):
        with pytest.raises(ValueError, match=r"scale=log: no score is positive.*clip, rank or raw"):
            rescale(np.array(scores), "log")


def test_clip_winsorises_to_the_outer_quantiles():
    scores = np.array([*range(20), 1000.0])  # 21 values: the 5 % and 95 % quantiles are the second and the last but one
    z = rescale(scores, "clip")
    assert z[:3].tolist() == pytest.approx([0.0, 0.0, 1 / 18])
    assert z[-3:].tolist() == pytest.approx([17 / 18, 1.0, 1.0])


def test_clip_of_one_outlier_among_many_is_flat():
    scores = np.array([1.0] * 99 + [50.0])
    assert rescale(scores, "clip").tolist() == [0.0] * 100


# -- projection


@st.composite
def budgets(draw):
    n = draw(st.integers(1, 40))
    wish = draw(arrays(np.float64, n, elements=st.floats(-2, 3)))
    params = draw(arrays(np.int64, n, elements=st.integers(1, 10**9)))
    lower = draw(st.floats(0, 1))
    upper = draw(st.floats(lower, 1))
    target = draw(st.floats(0, 1).map(lambda t: min(max(lower + t * (upper - lower), lower), upper)))
    return wish, params, target, lower, upper


@given(budgets())
def test_projection_is_exact_inside_the_bounds_and_keeps_the_order(budget):
    wish, params, target, lower, upper = budget
    sparsity = project(wish, params, target, lower, upper)
    mean = math.fsum(s * int(p) for s, p in zip(sparsity, params, strict=True)) / int(params.sum())
    assert abs(mean - target) < 1e-12
    assert sparsity.min() >= lower
    assert sparsity.max() <= upper
    assert (np.diff(sparsity[np.argsort(wish, kind="stable")]) >= -1e-15).all()
    free = (sparsity > lower + 1e-9) & (sparsity < upper - 1e-9)
    if free.any():  # the free ones are all moved by the same amount, the others would have gone further
        shift = (wish - sparsity)[free]
        assert np.ptp(shift) < 1e-9
        assert (wish[sparsity <= lower] - shift[0] <= lower + 1e-9).all()
        assert (wish[sparsity >= upper] - shift[0] >= upper - 1e-9).all()


def test_projection_by_hand():
    # without bounds: all move by 0.1
    got = project(np.array([0.5, 0.7, 0.9]), np.array([1, 1, 1]), 0.6, 0.0, 1.0)
    assert got.tolist() == pytest.approx([0.4, 0.6, 0.8], abs=1e-12)
    # the last stops at 0.75, the others take over its share: tau = 0.15 / 2 less
    got = project(np.array([0.5, 0.7, 0.9]), np.array([1, 1, 1]), 0.6, 0.0, 0.75)
    assert got.tolist() == pytest.approx([0.425, 0.625, 0.75], abs=1e-12)
    # weights count: 3/4 of the weights in the first block
    got = project(np.array([0.5, 0.9]), np.array([300, 100]), 0.5, 0.0, 1.0)
    assert got.tolist() == pytest.approx([0.4, 0.8], abs=1e-12)


@pytest.mark.parametrize(("target", "lower", "upper"), [(0.5, 0.6, 0.9), (0.5, 0.1, 0.4), (0.99, 0.0, 0.95)])
def test_projection_that_cannot_be_met(target, lower, upper):
    with pytest.raises(ValueError, match=rf"lower={lower:g}, upper={upper:g}.*sparsity={target:g}.*widen"):
        project(np.array([0.5, 0.5]), np.array([1, 1]), target, lower, upper)


@pytest.mark.parametrize(("lower", "upper"), [(-0.1, 0.9), (0.1, 1.1), (0.8, 0.2)])
def test_bounds_that_make_no_sense(lower, upper):
    with pytest.raises(ValueError, match="0 <= lower <= upper <= 1"):
        project(np.array([0.5]), np.array([1]), 0.5, lower, upper)
    with pytest.raises(ValueError, match="0 <= lower <= upper <= 1"):
        ScoreBudget(lower=lower, upper=upper).check(Budget.of_equal(4, 0.5))


# -- budgets from scores


PARAMS = np.array([100, 200, 100])


def test_the_budget_of_the_method_page_by_hand():
    # z = 0, 0.5, 1; 2 lam z = 0, 0.1, 0.2, its weighted mean (0 + 20 + 20) / 400 = 0.1; k = 2 lam z - 0.1 + 0.4
    profile = ScoreBudget("raw", lam=0.1).allocate(Budget(PARAMS, 0.6), BlockScores([1.0, 2.0, 3.0], "x"))
    assert profile.sparsity.tolist() == pytest.approx([0.7, 0.6, 0.5], abs=1e-12)
    assert (profile.target, profile.pattern) == (0.6, "unstructured")
    assert profile.params.tolist() == PARAMS.tolist()
    # unequal: params 100, 100, 200: mean (0 + 10 + 40) / 400 = 0.125
    profile = ScoreBudget("raw", lam=0.1).allocate(Budget(np.array([100, 100, 200]), 0.6), BlockScores([1.0, 2.0, 3.0], "x"))
    assert profile.sparsity.tolist() == pytest.approx([0.725, 0.625, 0.525], abs=1e-12)


def test_bounds_default_to_the_method_page():
    for sparsity, bounds in ((0.7, (0.4, 0.9)), (0.2, (0.0, 0.4)), (0.8, (0.5, 0.95))):
        assert Budget(PARAMS, sparsity).bounds() == pytest.approx(bounds)
    assert Budget(PARAMS, 0.7).bounds(0.1, 0.75) == (0.1, 0.75)
    assert ScoreBudget().scale == "log"
    assert ScoreBudget().lam == 0.15


def test_wide_amplitudes_stop_at_the_bounds_and_the_budget_holds():
    # wish = 0.6 + 0.5 - z: 1.1, 0.6, 0.1; the bounds are 0.3 and 0.8; 80 + 200 s_1 + 30 = 240 gives s_1 = 0.65
    profile = ScoreBudget("raw", lam=0.5).allocate(Budget(PARAMS, 0.6), BlockScores([1.0, 2.0, 3.0], "x"))
    assert profile.sparsity.tolist() == pytest.approx([0.8, 0.65, 0.3], abs=1e-12)


@given(SCORES, st.floats(0.05, 0.9), st.floats(0, 1), st.sampled_from(["clip", "rank", "raw"]))
def test_budgets_hold_and_scores_decide_the_order(scores, sparsity, lam, scale):
    params = np.arange(1, len(scores) + 1) * 1000
    profile = ScoreBudget(scale, lam).allocate(Budget(params, sparsity), BlockScores(scores, "x"))
    assert abs(float(profile.sparsity @ params) / params.sum() - sparsity) < 1e-12
    assert (np.diff(profile.sparsity[np.argsort(scores, kind="stable")]) <= 1e-12).all()
    assert profile.sparsity.min() >= max(0, sparsity - 0.3)
    assert profile.sparsity.max() <= max(min(0.95, sparsity + 0.2), sparsity)


@pytest.mark.parametrize("scale", SCALES)
def test_no_amplitude_and_equal_scores_are_uniform(scale):
    for lam, scores in ((0.0, [3.0, 1.0, 2.0]), (0.3, [2.0, 2.0, 2.0]), (0.3, [-2.0, -2.0, -2.0])):
        for direction in ("denser", "sparser"):
            if scale == "log" and direction == "sparser" and lam == 0:
                continue  # test_scores_that_ask_for_sparsity_turn_the_profile_round
            profile = ScoreBudget(scale, lam).allocate(Budget(PARAMS, 0.6), BlockScores(scores, "x", direction))
            np.testing.assert_allclose(profile.sparsity, 0.6, atol=1e-12)


@pytest.mark.parametrize(
    "scale",
    [
        "clip",
        "rank",
        "raw",
        "log",
    ],
)
def test_scores_that_ask_for_sparsity_turn_the_profile_round(scale):
    scores, params = [1.0, 4.0, 2.0, 16.0], np.array([5, 5, 5, 5])
    denser = ScoreBudget(scale, 0.05).allocate(Budget(params, 0.5), BlockScores(scores, "x", "denser")).sparsity
    sparser = ScoreBudget(scale, 0.05).allocate(Budget(params, 0.5), BlockScores(scores, "x", "sparser")).sparsity
    assert np.argmin(denser) == 3
    assert np.argmax(sparser) == 3
    np.testing.assert_allclose(denser + sparser, 1.0, atol=1e-12)  # mirrored at the mean


def test_scores_are_needed():
    with pytest.raises(ValueError, match="needs scores"):
        ScoreBudget().allocate(Budget(PARAMS, 0.5))


@pytest.mark.parametrize("lam", [-0.1, 1.5, math.nan])
def test_amplitudes_are_checked(lam):
    with pytest.raises(ValueError, match=r"lam=.*0 to 1"):
        ScoreBudget(lam=lam)


def test_uniform_is_uniform():
    profile = Budget(PARAMS, 0.37).uniform()
    assert profile.sparsity.tolist() == [0.37] * 3
    assert Budget(PARAMS, 0.5, "2:4").uniform().pattern == "2:4"
    Uniform().check(Budget.of_equal(3, 0.5, "4:8"))
    with pytest.raises(ValueError, match=r"pattern=2:4.*0\.5.*sparsity=0\.6"):
        Uniform().check(Budget.of_equal(3, 0.6, "2:4"))


# -- published values


def table(name):
    return np.genfromtxt(REFERENCE / name, delimiter=",", skip_header=1, comments="#")


def test_alphapruning_s_exponents_of_llama_7b_give_its_published_sparsities():
    exponents, published = table("alphapruning_llama_7b.csv"), table("alphapruning_llama_7b_expected.csv")[-32:]
    assert exponents.shape == (32 * 7, 3)
    scores = BlockScores(exponents[:, 2].reshape(32, 7).mean(axis=1), "alpha", "sparser")
    profile = Ratios(epsilon=0.2).allocate(Budget(np.full(32, 202_375_168), 0.7), scores)
    np.testing.assert_allclose(profile.sparsity, published[:, 1], atol=1e-6)


@pytest.mark.parametrize("direction", ["denser", "sparser"])
def test_dlp_s_densities_of_llama2_7b_follow_from_their_importance(direction):
    """What is published is the result; any affine image of it, as importance or unimportance, has to give it back."""
    densities = table("dlp_llama2_7b_densities.csv")[-32:, 1]
    values = 1 - 0.001 * (5 - densities) if direction == "denser" else 40 - 3 * densities
    profile = ScoreBudget("raw", lam=0.15).allocate(
        Budget(np.full(32, 202_375_168), 0.7), BlockScores(values, "dlp", direction)
    )
    np.testing.assert_allclose(1 - profile.sparsity, densities, atol=1e-6)


# -- budgets without a linear map of densities


def test_ratios_by_hand():
    # epsilon 0.2: r = 0.8, 1, 1.2; its weighted mean (80 + 200 + 120) / 400 = 1
    profile = Ratios(0.2).allocate(Budget(PARAMS, 0.6), BlockScores([1.0, 2.0, 3.0], "x", "sparser"))
    assert profile.sparsity.tolist() == pytest.approx([0.48, 0.6, 0.72], abs=1e-12)
    profile = Ratios(0.2).allocate(Budget(PARAMS, 0.6), BlockScores([1.0, 2.0, 3.0], "x", "denser"))
    assert profile.sparsity.tolist() == pytest.approx([0.72, 0.6, 0.48], abs=1e-12)
    # params 100, 100, 200: mean (80 + 100 + 240) / 400 = 1.05
    profile = Ratios(0.2).allocate(Budget(np.array([100, 100, 200]), 0.63), BlockScores([1.0, 2.0, 3.0], "x", "sparser"))
    assert profile.sparsity.tolist() == pytest.approx([0.48, 0.6, 0.72], abs=1e-12)


def test_ratios_stop_at_1_and_the_budget_holds():
    # 0.9 * (0.7, 1, 1.3): the last would be 1.17; at 1 the others rise by the rest, 0.17 / 3 each, weights 1, 2, 1
    profile = Ratios(0.3).allocate(Budget(PARAMS, 0.9), BlockScores([1.0, 2.0, 3.0], "x", "sparser"))
    assert profile.sparsity.tolist() == pytest.approx([0.63 + 0.17 / 3, 0.9 + 0.17 / 3, 1.0], abs=1e-12)
    for epsilon in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"epsilon=.*0\.2 to 0\.3"):
            Ratios(epsilon)


def test_atp_is_an_arithmetic_progression():
    profile = Atp(0.1).allocate(Budget(np.array([7, 7, 7, 7]), 0.6))
    assert profile.sparsity.tolist() == pytest.approx([0.45, 0.55, 0.65, 0.75], abs=1e-12)
    assert Atp(0.0).allocate(Budget(PARAMS, 0.6)).sparsity.tolist() == pytest.approx([0.6] * 3, abs=1e-12)
    half = Atp().allocate(Budget(np.array([7, 7, 7]), 0.7))  # differences of 0.3 / 2
    assert half.sparsity.tolist() == pytest.approx([0.55, 0.7, 0.85], abs=1e-12)
    assert Atp().allocate(Budget(np.array([7]), 0.7)).sparsity.tolist() == [0.7]
    # weighted mean of 0.5, 0.6, 0.7 with 100, 100, 200 is 0.625: all move by 0.025
    profile = Atp(0.1).allocate(Budget(np.array([100, 100, 200]), 0.6))
    assert profile.sparsity.tolist() == pytest.approx([0.475, 0.575, 0.675], abs=1e-12)


def test_atp_s_beta_must_keep_sparsities_between_0_and_1():
    Atp(0.2).check(Budget.of_equal(4, 0.7))
    Atp(-0.2).check(Budget.of_equal(4, 0.7))
    for beta in (0.21, -0.21, math.nan):
        with pytest.raises(ValueError, match=r"beta=.*4 blocks at sparsity=0\.7.*choose at most 0\.2, or null"):
            Atp(beta).check(Budget.of_equal(4, 0.7))


@pytest.mark.parametrize("scores", [[1.0, 2.0, 3.0, 9.0], [5.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 400.0]])
def test_reversed_is_the_mirror_of_the_shapley_budget(scores):
    scores, params = BlockScores(scores, "x"), np.array([10, 30, 20, 40])
    upright = ScoreBudget("raw", lam=0.15).allocate(Budget(params, 0.7), scores).sparsity
    mirrored = ScoreBudget("raw", lam=0.15, reverse=True).allocate(Budget(params, 0.7), scores).sparsity
    np.testing.assert_allclose(upright + mirrored, 1.4, atol=1e-12)  # also where the first stopped at a bound
    assert np.ptp(upright) > 0.1


def test_zeros_are_counted_by_scores_as_released_for_lsa():
    """d = 2 beta minmax(importance); a matrix of N weights loses S N + (mean(d) - d) mean(N) of them."""
    params, importance, beta = np.array([10, 10, 40]), np.array([0.9, 0.5, 0.7]), 0.07
    d = 2 * beta * (importance - 0.5) / 0.4
    expected = 0.6 + (d.mean() - d) * 20 / params
    profile = CountBudget(beta).allocate(Budget(params, 0.6), BlockScores(importance, "x"))
    np.testing.assert_allclose(profile.sparsity, expected, atol=1e-12)
    np.testing.assert_allclose(profile.sparsity, [0.46, 0.74, 0.6], atol=1e-12)
    even = np.array([7, 7, 7])
    np.testing.assert_allclose(
        CountBudget(0.1).allocate(Budget(even, 0.6), BlockScores(importance, "x")).sparsity,
        ScoreBudget("raw", lam=0.1).allocate(Budget(even, 0.6), BlockScores(importance, "x")).sparsity,
        atol=1e-12,
    )


def test_neuronal_takes_the_steepness_of_least_misalignment():
    """Released: densities from 1 - S + lambda in the first block to 1 - S - lambda in the last."""
    asked = []

    def misalignment(profile, label, n_seq):
        asked.append((label, n_seq, profile.sparsity.tolist()))
        return abs(float(np.ptp(profile.sparsity)) - 0.165)

    trial = LossOf(misalignment)
    profile = Neuronal().allocate(Budget(np.array([5, 5, 5]), 0.6), trial=trial)
    np.testing.assert_allclose(profile.sparsity, [0.52, 0.6, 0.68], atol=1e-12)
    assert [label for label, _, _ in asked] == [f"lambda={v:g}" for v in LAMBDAS]
    assert {n_seq for _, n_seq, _ in asked} == {8}
    for (_, _, sparsity), value in zip(asked, LAMBDAS, strict=True):
        np.testing.assert_allclose(sparsity, [0.6 - value, 0.6, 0.6 + value], atol=1e-12)
    asked.clear()
    Neuronal().allocate(Budget(np.array([5, 5, 5]), 0.8), trial=trial)
    assert len(asked) == 13, "without 0.25"
    asked.clear()
    steep = Neuronal(n_seq=2, lambdas=[0.2]).allocate(Budget(np.array([10, 10, 20]), 0.9), trial=trial)
    assert steep.sparsity.max() == pytest.approx(0.99)
    assert np.average(steep.sparsity, weights=[10, 10, 20]) == pytest.approx(0.9)
    nowhere = LossOf(lambda *_: math.inf)
    assert np.ptp(Neuronal().allocate(Budget(np.array([5, 5, 5]), 0.6), trial=nowhere).sparsity) == 0
    for lambdas in ([], [-0.1], [0.1, 0.6]):
        with pytest.raises(ValueError, match=r"lambdas=.*choose 0 to 0\.5"):
            Neuronal(lambdas=lambdas)


# -- every file in conf/allocator


@pytest.fixture(scope="module")
def _hydra():
    config.register()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        yield


@pytest.fixture
def allocator(request, _hydra, write):
    """The allocator of a yaml, its configuration node, and whether it goes by scores."""
    own = ["allocator.path=" + write(GOOD | {"sparsity": [0.5, 0.6, 0.7], "params": [1, 1, 1], "target": 0.6})]
    overrides = [*RANDOM, "shapley.window=2", "sparsity=0.6", f"allocator={request.param}"]
    job = config.build(compose("config", overrides=overrides + (own if request.param == "from_file" else [])))
    return job.allocator, job.config["allocator"], job.scorer is not None


@LossOf
def toy_loss(profile, label, n_seq):
    return float(np.exp(3 * profile.sparsity) @ np.arange(1, len(profile.sparsity) + 1))


@pytest.mark.parametrize("allocator", ALLOCATORS, indirect=True)
@pytest.mark.parametrize("direction", ["denser", "sparser"])
def test_contract_of_every_allocator(allocator, direction):
    method, node, scored = allocator
    for params in ([50, 50, 50], [100, 200, 700]):
        if "path" in node and params[0] != params[1]:
            continue  # a file is made for the blocks of one model
        for values in ([3.0, 1.0, 2.0], [0.01, 0.02, 90.0], [1.0, 1.0, 1.0]):
            scores = BlockScores(values, "x", direction) if scored else None
            profile = method.allocate(Budget(np.array(params), 0.6), scores, toy_loss)
            mean = math.fsum(s * p for s, p in zip(profile.sparsity, params, strict=True)) / sum(params)
            assert abs(mean - 0.6) < 1e-12
            assert profile.sparsity.min() >= 0
            assert profile.sparsity.max() <= 1
            again = method.allocate(Budget(np.array(params), 0.6), scores, toy_loss)
            assert profile.sparsity.tolist() == again.sparsity.tolist()
            if scored and np.ptp(values) == 0 and not isinstance(method, ShapleyRounds | ShapleyMargins):  # which measure more
                np.testing.assert_allclose(profile.sparsity, 0.6, atol=1e-12)
    if scored:
        with pytest.raises(ValueError, match=r"scorer=null: .*needs scores"):
            method.allocate(Budget(np.array([50, 50, 50]), 0.6))


@pytest.mark.parametrize("allocator", ALLOCATORS, indirect=True)
def test_only_uniform_serves_a_fixed_pattern(allocator):
    method, _, _ = allocator
    method.check(Budget.of_equal(3, 0.6))
    if isinstance(method, Uniform):
        assert np.ptp(method.allocate(Budget(np.array([50, 70, 50]), 0.6, "3:5")).sparsity) == 0
        return
    with pytest.raises(ValueError, match=r"pattern=3:5: .*allocator=uniform"):
        method.check(Budget.of_equal(3, 0.6, "3:5"))


@pytest.mark.parametrize("allocator", ALLOCATORS, indirect=True)
def test_allocators_have_names_of_their_own(allocator, request):
    stem = request.node.callspec.params["allocator"]
    known = {"leave_one_out": "shapley", "owl_nm": "owl"}  # the same scores by other options
    known |= {
        "shapley_margins": "shapleymarginslinears",
        "margins_and_influence": "marginsandinfluencelinears",
    }  # what has a budget
    assert allocator_name(allocator[1]) == known.get(stem, stem.replace("_", ""))


# -- patterns


def test_patterns_and_budgets():
    assert Budget.of_equal(2, 0.123, "unstructured").check_pattern(uniform=False) is None
    assert Budget.of_equal(2, 0.5, "2:4").check_pattern(uniform=True) is None
    assert Budget.of_equal(2, 0.25, "1:4").check_pattern(uniform=True) is None
    with pytest.raises(ValueError, match=r"pattern=1:4: prunes 0\.25 .*sparsity=0\.5; add sparsity=0\.25"):
        Budget.of_equal(2, 0.5, "1:4").check_pattern(uniform=True)
    with pytest.raises(ValueError, match=r"pattern=2:4.*allocator=uniform"):
        Budget.of_equal(2, 0.5, "2:4").check_pattern(uniform=False)
    with pytest.raises(ValueError, match="pattern=3:2"):
        Budget.of_equal(2, 0.5, "3:2").check_pattern(uniform=True)
    with pytest.raises(ValueError, match="allocator=uniform"):
        ScoreBudget().check(Budget.of_equal(3, 0.5, "2:4"))


# -- profiles from files


def test_a_profile_of_a_run_is_used_as_it_is(write):
    path = write(SparsityProfile([0.4, 0.6], [10, 10], 0.5).to_dict())
    FromFile(path).check(Budget.of_equal(2, 0.5))
    profile = FromFile(path).allocate(Budget(np.array([70, 70]), 0.5))
    assert profile.sparsity.tolist() == [0.4, 0.6]
    assert profile.params.tolist() == [70, 70]


def test_a_uniform_file_serves_fixed_patterns(write):
    path = write(GOOD | {"sparsity": [0.5, 0.5]})
    assert FromFile(path).allocate(Budget(np.array([3, 4]), 0.5, "2:4")).pattern == "2:4"
    with pytest.raises(ValueError, match="allocator=uniform"):
        FromFile(write(GOOD)).check(Budget.of_equal(2, 0.5, "2:4"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "not a sparsity profile"),
        ("", "not a sparsity profile"),
        ("[1, 2]", "not a sparsity profile"),
        ({k: v for k, v in GOOD.items() if k != "target"}, "lacks 'target'"),
        ({k: v for k, v in GOOD.items() if k != "sparsity"}, "lacks 'sparsity'"),
        ({k: v for k, v in GOOD.items() if k != "params"}, "lacks 'params'"),
        (GOOD | {"sparsity": [0.4, 0.9]}, "mean sparsity"),
        (GOOD | {"sparsity": ["a", "b"]}, "not a sparsity profile"),
        (GOOD | {"target": "0.5"}, "not a sparsity profile"),
        (GOOD | {"pattern": "half"}, "pattern=half"),
        (GOOD | {"pattern": 124}, "pattern"),
        (GOOD | {"sparsity": [0.5] * 3, "params": [1] * 3}, "profile of 3 blocks, and the model has 2"),
        (GOOD | {"sparsity": [0.3, 0.5], "target": 0.4}, r"its target is 0\.4, but sparsity=0\.5; add sparsity=0\.4"),
    ],
)
def test_files_that_will_not_do(write, data, message):
    path = write(data)
    with pytest.raises(ValueError, match=rf"path={re.escape(path)}: .*{message}"):
        FromFile(path).check(Budget.of_equal(2, 0.5))


def test_files_that_are_not_there(tmp_path):
    for path, named in ((str(tmp_path / "no.json"), r"path=.*no\.json"), (str(tmp_path), "path="), ("", "path=''")):
        with pytest.raises(ValueError, match=rf"{named}.*profile\.json"):
            FromFile(path).check(Budget.of_equal(2, 0.5))


def test_a_profile_that_does_not_fit_the_blocks_of_this_model(write):
    with pytest.raises(ValueError, match=r"path=.*does not fit the blocks of this model.*mean sparsity"):
        FromFile(write(GOOD)).allocate(Budget(np.array([10, 30]), 0.5))
    with pytest.raises(ValueError, match="3"):
        FromFile(write(GOOD)).allocate(Budget(np.array([10, 10, 10]), 0.5))


# -- steps


@st.composite
def step_budgets(draw):
    """(budget, params, target, M, whether all blocks are of one size)"""
    m, n = draw(st.sampled_from([2, 4, 8, 16])), draw(st.integers(1, 12))
    equal = draw(st.booleans())
    size = st.integers(1, 50)
    params = np.full(n, 24) if equal else np.array(draw(st.lists(size, min_size=n, max_size=n)))
    target = draw(st.floats(0.01, (m - 1) / m))
    wish = np.array(draw(st.lists(st.floats(0, 1), min_size=n, max_size=n)))
    upper = draw(st.floats(target, 1))
    return project(wish, params, target, 0.0, upper), params, target, m, equal


@given(step_budgets())
def test_steps_are_as_near_to_the_target_as_single_steps_allow(case):
    budget, params, target, m, equal = case
    profile = Budget(params, target, f"mixed:{m}").in_steps(budget)
    steps = np.round(profile.sparsity * m)
    np.testing.assert_allclose(profile.sparsity * m, steps, atol=1e-9)
    assert steps.min() >= 0
    assert steps.max() <= m - 1, "at least a weight of every group is kept"
    np.testing.assert_array_equal(profile.requested, budget)
    excess = params @ (steps - target * m)
    for index in range(len(steps)):
        for step in (-1, 1):
            if 0 <= steps[index] + step <= m - 1:
                assert abs(excess + step * params[index]) >= abs(excess) - 1e-6
    if equal:
        assert abs(profile.mean - target) <= 0.5 / m / len(steps) + 1e-9
    again = SparsityProfile.from_dict(json.loads(json.dumps(profile.to_dict())))
    assert again.to_dict() == profile.to_dict()


@given(step_budgets())
def test_steps_move_no_block_further_than_they_must(case):
    """Among blocks of one size, each has the nearest step, or all that moved on did so towards the target."""
    budget, params, target, m, equal = case
    assume(equal)
    steps = np.round(Budget(params, target, f"mixed:{m}").in_steps(budget).sparsity * m)
    nearest = np.clip(np.floor(budget * m + 0.5), 0, m - 1)
    moved = steps - nearest
    excess = params @ (nearest - target * m)
    assert (moved * np.sign(excess) <= 0).all()


def test_steps_by_hand():
    one = np.ones(4, dtype=int)
    profile = Budget(one, 0.7, "mixed:8").in_steps(np.array([0.50, 0.70, 0.72, 0.88]))
    # eighths wanted: 4, 5.6, 5.76, 7.04; nearest 4, 6, 6, 7 = 23 where 22.4 are asked for: 22 is nearer, and 5.6 was moved most
    assert (profile.sparsity * 8).tolist() == [4, 5, 6, 7]
    profile = Budget(one, 0.8, "mixed:8").in_steps(np.full(4, 0.8))  # 6.4 each: 24 where 25.6 are asked for, so two more
    assert (profile.sparsity * 8).tolist() == [6, 6, 7, 7], "among equals the first keeps more"
    profile = Budget(one, 0.7, "mixed:8").in_steps(np.full(4, 0.7))  # 5.6 each, 24 where 22.4: two less, or one
    assert (profile.sparsity * 8).tolist() == [5, 5, 6, 6]


def test_other_patterns_have_no_steps_to_take():
    budget = np.array([0.45, 0.55])
    for pattern in ("unstructured", "2:4"):
        profile = Budget(np.array([1, 1]), 0.5, pattern).in_steps(budget)
        assert profile.sparsity.tolist() == [0.45, 0.55]
        assert profile.requested is None


def test_every_allocator_takes_steps(write):
    params = np.array([10, 10, 20])
    profiles = [
        Budget(params, 0.7, "mixed:8").uniform(),
        ScoreBudget(lam=0.2).allocate(Budget(params, 0.7, "mixed:8"), BlockScores([1.0, 2.0, 3.0], "m")),
        FromFile(write(SparsityProfile([0.8, 0.6, 0.7], params, 0.7).to_dict())).allocate(Budget(params, 0.7, "mixed:8")),
    ]
    for profile in profiles:
        assert profile.pattern == "mixed:8"
        assert np.average(profile.requested, weights=params) == pytest.approx(0.7, abs=1e-9)
    path = write(profiles[1].to_dict())
    FromFile(path).check(Budget.of_equal(3, 0.7, "mixed:8"))
    assert FromFile(path).allocate(Budget(params, 0.7, "mixed:8")).to_dict() == profiles[1].to_dict()
    free = FromFile(path).allocate(Budget(params, 0.7))
    assert free.pattern == "unstructured"
    assert free.sparsity.tolist() == profiles[1].requested.tolist(), "without steps what was requested"


def test_mixed_patterns_leave_a_weight_in_every_group():
    for sparsity in (0.875, 0.2, 0.0):
        Uniform().check(Budget.of_equal(4, sparsity, "mixed:8"))
    with pytest.raises(ValueError, match=r"pattern=mixed:8: .*sparsity=0\.9; choose at most 0\.875"):
        Uniform().check(Budget.of_equal(4, 0.9, "mixed:8"))


def test_profiles_of_linears_from_files(write):
    linears = [{"a": {"sparsity": 0.3, "size": 5}, "b": {"sparsity": 0.5, "size": 5}}, {"a": {"sparsity": 0.6, "size": 10}}]
    path = write(GOOD | {"linears": linears})
    profile = FromFile(path).allocate(Budget(np.array([10, 10]), 0.5))
    assert profile.of(0, "b") == 0.5
    with pytest.raises(ValueError, match=r"does not fit.*among their linear layers"):
        FromFile(path).allocate(Budget(np.array([70, 70]), 0.5))  # dropping what it says of linears would be another profile
    half = [{"a": {"sparsity": 0.5, "size": 10}}] * 2
    with pytest.raises(ValueError, match=r"pattern=2:4: .*pattern=unstructured"):
        FromFile(write(GOOD | {"sparsity": [0.5, 0.5], "linears": half})).check(Budget.of_equal(2, 0.5, "2:4"))


# -- inside a block


@given(
    st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 10**6)), min_size=1, max_size=9),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(SCALES),
)
def test_a_block_is_divided_exactly_and_scores_decide_the_order(cases, sparsity, lam, scale):
    scores, sizes = np.array([c[0] for c in cases]), np.array([c[1] for c in cases])
    assume(scale != "log" or scores.max() > 0 or np.ptp(scores) == 0)
    shares = split_block(scores, sizes, sparsity, lam, scale)
    assert np.average(shares, weights=sizes) == pytest.approx(sparsity, abs=1e-9)
    assert shares.min() >= max(0.0, sparsity - 0.3)
    assert shares.max() <= max(sparsity, min(0.95, sparsity + 0.2))
    order = np.argsort(scores)
    assert (np.diff(shares[order]) <= 1e-9).all(), "a higher score keeps more"
    if lam == 0 or np.ptp(scores) == 0:
        np.testing.assert_allclose(shares, sparsity, atol=1e-9)


def test_a_block_divided_by_hand():
    # z = 0, 1; mean (3 * 0 + 1 * 1) / 4; wish = 0.6 - 0.2 (z - 1/4)
    np.testing.assert_allclose(split_block(np.array([5.0, 9.0]), np.array([3, 1]), 0.6, 0.1, "raw"), [0.65, 0.45], atol=1e-12)
