"""Weights pruned in advance, values at the margin, and the budgets that follow."""

from __future__ import annotations

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from cli import last_row
from games import Given
from test_search import C, Toy

from svnup.allocation import Budget
from svnup.allocation.maps import ScoreBudget
from svnup.allocation.margins import marginal_values
from svnup.allocation.rounds import MarginsAndInfluence, ShapleyMargins
from svnup.allocation.splits import UniformSplit
from svnup.allocation.trial import Trial
from svnup.game import LayerGame
from svnup.pruning.advance import PrunedInAdvance
from svnup.pruning.magnitude import Magnitude
from svnup.pruning.sparsegpt import SparseGPT
from svnup.pruning.walk import prune_model, temporarily_pruned
from svnup.pruning.wanda import Wanda
from svnup.reports.tables import describe
from svnup.results.row import ResultRow
from svnup.shapley import all_coalitions, exact_values
from svnup.types import BlockScores, SparsityProfile


def profile_of(lm, *sparsity, granularity="block"):
    params = lm.budget_params(granularity)
    return SparsityProfile(np.array(sparsity), params, float(np.average(sparsity, weights=params)))


def held_out(lm, pruner, tokens, cache_dir, kind="nll"):
    text = np.random.default_rng(3).integers(5, 2048, size=(4, 24))
    return Trial(lm, pruner, UniformSplit(), tokens, Given(text), cache_dir, payoff=Given(text[:3]), kind=kind)


# -- weights pruned in advance


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), SparseGPT(block_size=16)], ids=["magnitude", "wanda", "sparsegpt"])
def test_the_first_block_is_pruned_as_the_walk_prunes_it_and_the_model_stays_as_it_was(random_model, tokens, pruner):
    lm = random_model()
    before = lm.fingerprint()
    profile = profile_of(lm, 0.5, 0.25, 0.75, 0.5)
    advance = PrunedInAdvance(lm, pruner, tokens)
    ours = [advance.block(index, profile) for index in range(lm.n_blocks)]
    assert lm.fingerprint() == before
    prune_model(lm, profile, pruner, tokens)
    alike = lm.n_blocks if pruner == Magnitude() else 1  # behind pruned blocks the statistics are others
    for index in range(alike):
        for name, linear in lm.linears(index).items():
            assert torch.equal(ours[index][f"{name}.weight"], linear.weight), f"{index} {name}"
    for index in range(lm.n_blocks):
        zeros = sum(int((w == 0).sum()) for w in ours[index].values())
        assert zeros == pytest.approx(profile.sparsity[index] * lm.block_params[index], abs=len(ours[index]))


def test_matrices_that_were_not_used_lately_are_forgotten_and_made_again(lm, tokens):
    small = PrunedInAdvance(lm, Wanda(), tokens, max_bytes=1)
    large = PrunedInAdvance(lm, Wanda(), tokens)
    for index in (0, 1, 0):
        for name in lm.linears(index):
            assert torch.equal(small.weight(index, name, 0.4), large.weight(index, name, 0.4))
    assert len(small._kept) == 1
    assert len(large._kept) == 2 * len(lm.linears(0))


def test_a_conv1d_keeps_its_shape(tokens):
    from transformers import GPT2Config, GPT2LMHeadModel

    from svnup.language_model import LanguageModel

    lm = LanguageModel(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=2048, n_positions=64)))
    advance = PrunedInAdvance(lm, Wanda(), tokens)
    profile = profile_of(lm, 0.5, 0.5)
    weights = advance.block(0, profile)
    prune_model(lm, profile, Wanda(), tokens)
    for name, linear in lm.linears(0).items():
        assert torch.equal(weights[f"{name}.weight"], linear.weight), name


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_a_trial_is_the_loss_of_the_weights_pruned_in_advance_and_shares_prefixes(random_model, tokens, tmp_path, kind):
    lm = random_model()
    trial = held_out(lm, Magnitude(), tokens, tmp_path, kind)  # whose weights depend on no statistics
    rows = [(0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.25, 0.75), (0.75, 0.25, 0.5, 0.5)]
    tried = [(str(row), profile_of(lm, *row)) for row in rows]
    assert trial.losses(tried, in_advance=True) == trial.losses(tried)
    assert trial.to_dict()["n_new_evaluations"] == 6  # trials and real losses are kept apart
    assert trial.to_dict()["n_selection_block_forwards"] == 2 * (4 + 2 + 4)
    again = held_out(lm, Magnitude(), tokens, tmp_path, kind)
    assert again.losses(tried, in_advance=True) == trial.losses(tried, in_advance=True)
    assert again.to_dict()["n_new_evaluations"] == 0


# -- marginal values


def exact(lm, denser, sparser, tokens):
    """Shapley values of the blocks of the same game with players that are there or not."""
    with temporarily_pruned(lm, denser, Magnitude(), tokens):
        absent = [PrunedInAdvance_of(lm, sparser, tokens)(index) for index in range(lm.n_blocks)]
        return exact_values(LayerGame(lm, tokens, pruned=absent)(all_coalitions(lm.n_blocks)))


def PrunedInAdvance_of(lm, profile, tokens):
    return partial(PrunedInAdvance(lm, Magnitude(), tokens).block, profile=profile)


def test_values_sum_to_the_difference_of_the_two_models_and_are_near_the_shapley_values(random_model, tokens):
    lm = random_model(louder=3.0)
    denser, sparser = profile_of(lm, 0.5, 0.3, 0.4, 0.5), profile_of(lm, 0.6, 0.4, 0.5, 0.6)
    versions = [PrunedInAdvance_of(lm, profile, tokens) for profile in (denser, sparser)]
    values = marginal_values(lm, *versions, tokens, nodes=12)
    losses = []
    for profile in (denser, sparser):
        with temporarily_pruned(lm, profile, Magnitude(), tokens):
            losses.append(float(lm.nll(tokens).mean()))
    assert sum(values.values()) == pytest.approx(losses[1] - losses[0], abs=2e-4)
    of_blocks = [sum(v for (block, _), v in values.items() if block == index) for index in range(lm.n_blocks)]
    shapley = exact(lm, denser, sparser, tokens)
    assert np.abs(np.array(of_blocks) - shapley).max() < 0.25 * np.abs(shapley).max()


def test_both_versions_of_a_block_are_asked_for_twice_whatever_the_text_is_long(random_model, tokens, monkeypatch):
    lm = random_model()
    versions = [PrunedInAdvance_of(lm, profile_of(lm, *[s] * 4), tokens) for s in (0.4, 0.6)]
    asked = []

    def counted(version, index):
        asked.append(index)
        return version(index)

    monkeypatch.setattr(lm, "_rows", lambda *_: 1)
    assert len(list(lm.micro_batches(tokens))) > 2
    values = marginal_values(lm, *(partial(counted, version) for version in versions), tokens)
    assert sorted(asked) == sorted(2 * 2 * [*range(lm.n_blocks)])
    monkeypatch.setattr("svnup.allocation.margins.max_states", lambda *_: 2)  # states of one micro-batch at a time
    assert marginal_values(lm, *versions, tokens) == values


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_a_value_is_the_derivative_by_the_degree_of_presence(random_model, tokens, kind):
    lm = random_model(louder=3.0)
    denser, sparser = profile_of(lm, 0.4, 0.4, 0.4, 0.4), profile_of(lm, 0.6, 0.6, 0.6, 0.6)
    present, absent = (PrunedInAdvance_of(lm, p, tokens) for p in (denser, sparser))
    values = marginal_values(lm, present, absent, tokens, kind)  # one node, at one half
    batches = list(lm.micro_batches(tokens))

    def loss(degree, layer):
        total = []
        for batch in batches:
            dense = batch
            for index in range(lm.n_blocks):
                degrees = {n: degree if (index, n.removesuffix(".weight")) == layer else 0.5 for n in present(index)}
                weights = {n: absent(index)[n] + degrees[n] * (w - absent(index)[n]) for n, w in present(index).items()}
                batch, dense = lm.run_block(index, batch, weights=weights), lm.run_block(index, dense)
            total.append((lm.token_kl(batch, dense) if kind == "kl" else lm.token_nll(batch)).double().mean(1))
        return float(torch.cat(total).mean())

    with torch.inference_mode():
        for layer in [(0, "self_attn.q_proj"), (1, "mlp.down_proj"), (3, "self_attn.o_proj")]:
            slope = (loss(0.6, layer) - loss(0.4, layer)) / 0.2
            assert values[layer] == pytest.approx(-slope, rel=0.05, abs=2e-5), layer


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT(block_size=16)])
def test_behind_a_profile_a_trial_of_it_is_a_real_pruning(random_model, tokens, tmp_path, pruner):
    lm = random_model(louder=3.0)
    trial = held_out(lm, pruner, tokens, tmp_path)
    profile, other = profile_of(lm, 0.3, 0.6, 0.5, 0.4), profile_of(lm, 0.6, 0.3, 0.4, 0.5)
    by_the_dense = trial.losses([("", profile), ("", other)], in_advance=True)
    values = trial.marginal_values(other, profile, 0, 2)
    trial.calibrate_behind(profile)
    assert trial.loss(profile, in_advance=True) == pytest.approx(trial.loss(profile), abs=1e-6)
    assert abs(by_the_dense[0] - trial.loss(profile)) > 1e-4
    assert not np.array_equal(trial.marginal_values(other, profile, 0, 2), values), "what was kept is told apart"
    assert held_out(lm, pruner, tokens, tmp_path).losses([("", profile), ("", other)], in_advance=True) == by_the_dense


# -- budgets


class Smooth(Toy):
    def marginal_values(self, denser, sparser, first, n_seq, nodes=1):
        return self.shapley_values(denser, sparser)


def test_rounds_reach_the_budget_at_which_another_weight_costs_the_same_everywhere():
    a, params = np.array([8.0, 1.0, 2.0, 0.5]), np.array([10, 10, 20, 10])
    trial = Smooth(a)
    margins = ShapleyMargins(data=None, rounds=40, lower=0.0, upper=1.0, step=0.1)
    profile = margins.allocate(Budget(params, 0.6), trial=trial)
    cost = a * np.exp(C * profile.sparsity) / params
    assert np.ptp(np.log(cost)) < 1e-3
    assert float(np.average(profile.sparsity, weights=params)) == pytest.approx(0.6, abs=1e-9)
    assert trial.calls[-2][1] == "uniform", "for real, at the end"
    assert re.fullmatch(r"round \d+", trial.calls[-1][1])


def test_where_no_round_is_better_the_uniform_profile_stays():
    class Wrong(Toy):
        def marginal_values(self, denser, sparser, first, n_seq, nodes=1):
            return 1 / self.shapley_values(denser, sparser)

    profile = ShapleyMargins(data=None, rounds=3).allocate(Budget(np.array([10] * 4), 0.6), trial=Wrong([8.0, 1.0, 2.0, 0.5]))
    assert profile.sparsity.tolist() == [0.6] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"trial_n_seq": 0}, "trial_n_seq=0"),
        ({"nodes": 0}, "nodes=0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ShapleyMargins(data=None, **options)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_block_influence(share):
    """Between the profiles of the two, with finer parts as their block."""
    sensitivity, budget = [8.0, 1.0, 2.0, 0.5, 1.0, 4.0], Budget(np.array([10, 20] * 3), 0.6)
    scores = BlockScores(np.array([0.3, 0.1, 0.2]), "BlockInfluence")
    margins = ShapleyMargins(data=None, rounds=3).allocate(budget, trial=Smooth(sensitivity)).sparsity
    of_blocks = ScoreBudget().allocate(Budget(np.array([30] * 3), 0.6), scores).sparsity
    assert np.ptp(margins) > 0
    allocator, of_parts = MarginsAndInfluence(data=None, rounds=3, influence=share), scores.per_unit(6, [0, 0, 1, 1, 2, 2])
    mixed = allocator.allocate(budget, of_parts, Smooth(sensitivity)).sparsity
    np.testing.assert_allclose(mixed, (1 - share) * margins + share * of_blocks.repeat(2), atol=1e-9)
    with pytest.raises(ValueError, match=r"influence=1\.5"):
        MarginsAndInfluence(data=None, influence=1.5)


@pytest.mark.parametrize("granularity", ["block", pytest.param("linear", marks=pytest.mark.slow)])
def test_a_job_of_margins_and_influence(svnup, granularity):
    options = ["allocator.rounds=2", "allocator.n_seq=2", "allocator.trial_n_seq=2", f"allocator.granularity={granularity}"]
    code, _, err = svnup("allocator=margins_and_influence", *options)
    assert code == 0, err
    row = last_row()
    assert row["scores"]["method"] == "BlockInfluence"
    assert [c["label"] for c in row["tuning"]["curve"]][-1].endswith(" and influence")
    name = describe(ResultRow.from_json(json.dumps(row)))["allocator"]
    assert name.startswith("marginsandinfluence" + ("linears (" if granularity == "linear" else " ("))
    assert "influence=0.5" in name


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("sublayer", "linear")]


def test_a_job_that_takes_its_statistics_anew(svnup):
    few = ["allocator.rounds=2", "allocator.n_seq=2", "allocator.trial_n_seq=2", "allocator.refresh=true"]
    code, _, err = svnup("allocator=shapley_margins", *few)
    assert code == 0, err
    assert "refresh" in describe(ResultRow.from_json(json.dumps(last_row())))["allocator"]


@pytest.mark.parametrize("granularity", ["block", *OTHERS])
def test_a_job_goes_from_the_uniform_budget_to_one_of_its_parts_and_resumes(svnup, granularity):
    options = [
        "allocator=shapley_margins",
        "allocator.rounds=2",
        "allocator.n_seq=2",
        "allocator.trial_n_seq=2",
        "sparsity=0.5",
        f"allocator.granularity={granularity}",
    ]
    code, _, err = svnup(*options)
    assert code == 0, err
    row = last_row()
    tuning = row["tuning"]
    assert [c["label"] for c in tuning["curve"]] == ["round 1", "round 2", "uniform", tuning["curve"][-1]["label"]]
    n_units = {"block": 3, "sublayer": 6, "linear": 21}[granularity]
    assert [len(of_round["values"]) for of_round in tuning["rounds"]] == [n_units] * 2
    assert tuning["n_payoff_sequences"] == 2 * 2
    assert row["sparsity"]["actual"] == pytest.approx(0.5, abs=1e-3)
    if granularity != "block" and tuning["best"][-1]["loss"] < tuning["best"][0]["loss"]:
        assert len(row["profile"]["linears"]) == 3
    code, _, err = svnup(*options, "force=true")
    assert code == 0, err
    assert last_row()["tuning"]["n_new_evaluations"] == 0
    assert "n_payoff_sequences" not in last_row()["tuning"]
    assert last_row()["metrics"] == row["metrics"]
    name = describe(ResultRow.from_json(json.dumps(last_row())))["allocator"]
    named = {"block": "shapleymargins (", "sublayer": "shapleymarginssublayers (", "linear": "shapleymarginslinears ("}
    assert name.startswith(named[granularity])
    assert "data" not in name, "texts are told by their hashes"


@pytest.mark.parametrize("granularity", ["block", "linear"])
def test_a_search_by_trials_prunes_the_best_and_the_uniform_profile_alone(svnup, granularity):
    options = ["allocator=search", "allocator.trial=true", f"allocator.granularity={granularity}", "sparsity=0.5"]
    options += ["allocator.generations=2", "allocator.offspring=3", "allocator.sequences=[1]", "allocator.survivors=[1]"]
    code, _, err = svnup(*options)
    assert code == 0, err
    curve = last_row()["tuning"]["curve"]
    assert [c["label"] for c in curve if not c.get("trial")] == ["uniform", "best"]
    assert len([c for c in curve if c.get("trial")]) == 1 + 2 * (3 + 1)
    best = min(c["loss"] for c in curve if not c.get("trial"))
    assert last_row()["tuning"]["best"][-1]["loss"] == best


def test_the_payoff_text_must_be_payoff_text(svnup):
    code, _, err = svnup("allocator=shapley_margins", "allocator.data.role=test")
    assert code == 2
    assert "allocator.data.role=test" in err


def test_a_split_of_blocks_does_not_divide_finer_budgets(svnup):
    code, _, err = svnup("allocator=shapley_margins", "allocator.granularity=linear", "split=outliers")
    assert code == 2
    assert "split=outliers" in err
