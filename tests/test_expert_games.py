"""Games of experts: payoffs against edited models, costs and memos, the control, and budgets by what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cli import command, only_row, results
from models import GROUPED
from test_experts import JOB, N_BLOCKS, N_EXPERTS, TEXT, VOCABULARY, make
from torch import nn

from svnup.allocation import Budget
from svnup.allocation.maps import ExpertBudget
from svnup.data import Docs
from svnup.game import ExpertGame, LayerGame
from svnup.model.language_model import LanguageModel, make_config
from svnup.model.linears import NoRoutesError, without_experts
from svnup.model.loading import read_tokenizer
from svnup.model.source import BUILT_IN_FOLDER
from svnup.scoring import Context
from svnup.scoring.experts import Frequency, Shapley
from svnup.shapley import all_coalitions
from svnup.shapley.exact import Exact
from svnup.shapley.permutation import Permutation
from svnup.types import ExpertScores

ROUTED = ["mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3"]  # stacked, transposed, beside shared ones
PAYOFF_TEXT = Docs(role="payoff", n_seq=2, seq_len=16)


def with_tokenizer(family, **changes):
    return make(family, tokenizer=read_tokenizer(str(BUILT_IN_FOLDER)), **VOCABULARY | changes)


def context(tokens=TEXT, cache_dir=None):
    return Context(np.asarray(tokens), cache_dir, lambda pruner: pytest.fail("no block is pruned"))


def all_but(*absent):
    present = np.ones(N_EXPERTS, dtype=bool)
    present[list(absent)] = False
    return present[None]


# -- payoffs


@pytest.mark.parametrize("absence", ["spread", "drop"])
@pytest.mark.parametrize("family", ROUTED)
def test_with_all_experts_the_model_is_as_it_is(family, absence):
    lm = make(family)
    before = lm.fingerprint()
    for payoff in ("neg_nll", "recip_ppl", "kl"):
        plain = LayerGame(lm, TEXT, payoff=payoff)(np.ones((1, N_BLOCKS), dtype=bool))
        game = ExpertGame(lm, TEXT, 1, payoff=payoff, absence=absence)
        assert game(all_but()).tolist() == plain.tolist()
        assert game(all_but(0)).tolist() != plain.tolist()
    assert lm.fingerprint() == before
    assert not any(module._forward_pre_hooks for module in lm.model.modules())


@pytest.mark.parametrize("family", ROUTED)
def test_an_expert_that_is_dropped_gives_what_it_gives_with_its_last_matrix_at_zero(family):
    lm = make(family)
    game = ExpertGame(lm, TEXT, 1, absence="drop")
    coalitions = np.concatenate([all_but(2), all_but(0, 3), all_but(0, 1, 2, 3)])
    payoffs = game(coalitions)
    experts = lm.blocks[1].mlp.experts
    for present, payoff in zip(coalitions, payoffs, strict=True):
        edited = make(family)
        with torch.no_grad():
            for name, p in edited.blocks[1].mlp.experts.named_parameters():
                if name.startswith("down_proj"):
                    p[torch.from_numpy(~present)] = 0
        assert payoff == LayerGame(edited, TEXT)(np.ones((1, N_BLOCKS), dtype=bool))[0]
    assert experts is lm.blocks[1].mlp.experts
    assert len(set(payoffs)) == 3


def rewritten(present):
    """A hook of Mixtral's router that divides the weight of absent experts among a token's others, token by token."""

    def hook(module, args, out):
        logits, weights, index = out
        weights = weights.clone()
        for row, chosen in zip(weights, index.tolist(), strict=True):
            total = float(row.sum())
            there = [place for place, expert in enumerate(chosen) if present[expert]]
            kept = sum(float(row[place]) for place in there)
            for place in range(len(chosen)):
                row[place] = float(row[place]) / kept * total if place in there else 0
        return logits, weights, index

    return hook


def test_what_is_spread_is_what_a_router_with_other_weights_gives():
    lm = make("mixtral")
    coalitions = np.concatenate([all_but(1), all_but(0, 3), all_but(0, 1, 2), all_but(0, 1, 2, 3)])
    payoffs = ExpertGame(lm, TEXT, 0)(coalitions)
    for present, payoff in zip(coalitions, payoffs, strict=True):
        hook = lm.blocks[0].mlp.gate.register_forward_hook(rewritten(present))
        expected = -lm.nll(TEXT).mean()
        hook.remove()
        assert payoff == pytest.approx(expected, abs=1e-6)
    dropped = ExpertGame(lm, TEXT, 0, absence="drop")(coalitions)
    assert (np.abs(dropped - payoffs)[:3] > 1e-5).all()
    assert dropped[3] == payoffs[3]  # nobody is left to spread to


def test_weights_by_hand():
    present = torch.tensor([True, False, True, True])
    index = torch.tensor([[0, 1], [2, 3], [1, 4], [1, 1]])  # 4 leads nowhere
    weights = torch.tensor([[0.25, 0.5], [0.5, 0.25], [0.5, 0.125], [0.5, 0.5]])
    dropped = without_experts(present, spread=False)([0, 1, 2, 3], index, weights)
    assert dropped.tolist() == [[0.25, 0], [0.5, 0.25], [0, 0.125], [0, 0]]
    spread = without_experts(present, spread=True)([0, 1, 2, 3], index, weights)
    assert spread.tolist() == [[0.75, 0], [0.5, 0.25], [0, 0.125], [0, 0]]
    half = without_experts(torch.ones(4, dtype=torch.bool), spread=True)([0, 1, 2, 3], index, weights.bfloat16() / 3)
    assert torch.equal(half, weights.bfloat16() / 3)
    other = without_experts(present, spread=False)([2, 1], torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    assert other.tolist() == [[0.5, 0]]  # the experts of a module may be any of the block's


@pytest.mark.parametrize("payoff", ["neg_nll", "recip_ppl", "kl"])
def test_exact_values_add_up(payoff):
    game = ExpertGame(make("qwen3_moe"), TEXT, 1, payoff=payoff)
    values = Exact().estimate(game)
    assert values.efficiency_gap == pytest.approx(0, abs=1e-12)
    assert values.v_full == {"recip_ppl": 1, "kl": 0}.get(payoff, values.v_full)
    sampled = Permutation(4 * 3 + 2).estimate(game)
    assert sampled.values.sum() == pytest.approx(values.values.sum(), abs=1e-12)


# -- cost, memo, key


def test_a_coalition_costs_its_block_and_those_behind():
    lm = make("mixtral", num_hidden_layers=3)
    runs = [0] * 3
    for index, block in enumerate(lm.blocks):  # an MLP runs once in each forward of its block
        block.mlp.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    game = ExpertGame(lm, TEXT, 1)
    game(all_but())
    runs[:] = [0] * 3
    values = Exact().estimate(game)
    assert runs == [0, 15, 15]  # the text is one micro-batch
    assert (values.cost.n_evaluations, values.cost.n_block_forwards) == (16, 32)
    assert (values.cost.n_new_evaluations, values.cost.n_new_block_forwards) == (15, 30)
    assert (game.n_evaluations, game.n_block_forwards) == (16, 32)


@pytest.mark.parametrize("exact_up_to", [10, 3])
def test_the_plan_is_what_scores_cost(exact_up_to, tmp_path):
    lm, scorer = with_tokenizer("deepseek_v3", num_hidden_layers=4), Shapley(PAYOFF_TEXT, exact_up_to=exact_up_to)
    scores = scorer.score(lm, context(cache_dir=str(tmp_path)))
    cost = scores.cost
    planned = scorer.plan_of(lm)
    assert planned == {"evaluations": cost.n_evaluations, "block_forwards": cost.n_block_forwards}
    assert planned == {"evaluations": cost.n_new_evaluations, "block_forwards": cost.n_new_block_forwards}
    if exact_up_to == 10:
        assert planned == {"evaluations": 3 * 16, "block_forwards": 16 * (3 + 2 + 1) + 3}
    assert (scores.stderr is None) == (exact_up_to == 10)
    assert scores.blocks.tolist() == [1] * 4 + [2] * 4 + [3] * 4  # the first block is dense
    again = scorer.score(lm, context(cache_dir=str(tmp_path)))
    assert again.values.tolist() == scores.values.tolist()
    assert (again.cost.n_evaluations, again.cost.n_new_evaluations) == (cost.n_evaluations, 0)
    alone = Exact().estimate(ExpertGame(lm, PAYOFF_TEXT.tokens(lm.tokenizer), 2, payoff="recip_ppl"))
    if exact_up_to == 10:
        assert scores.values[4:8].tolist() == alone.values.tolist()


def test_a_game_that_is_killed_goes_on(tmp_path, monkeypatch):
    lm = make("mixtral")
    whole = ExpertGame(lm, TEXT, 0)(all_coalitions(N_EXPERTS))
    game, pay = ExpertGame(lm, TEXT, 0, cache_dir=tmp_path), ExpertGame._payoff_of

    def dies(self, states, name):
        if len(self._memo.values) == 5:
            raise KeyboardInterrupt
        return pay(self, states, name)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertGame, "_payoff_of", dies)
        with pytest.raises(KeyboardInterrupt):
            game(all_coalitions(N_EXPERTS))
    again = ExpertGame(lm, TEXT, 0, cache_dir=tmp_path)
    assert again(all_coalitions(N_EXPERTS)).tolist() == whole.tolist()
    assert (again.n_evaluations, again.n_block_forwards) == (11, 22)


def test_the_key_changes_with_whatever_changes_a_payoff():
    lm = make("mixtral")
    usual = ExpertGame(lm, TEXT, 0).key
    keys = {
        usual,
        ExpertGame(lm, TEXT, 1).key,
        ExpertGame(lm, TEXT, 0, absence="drop").key,
        ExpertGame(lm, TEXT, 0, payoff="kl").key,
        ExpertGame(lm, TEXT[1:], 0).key,
        ExpertGame(make("mixtral", seed=1), TEXT, 0).key,
        LayerGame(lm, TEXT).key,
    }
    assert len(keys) == 7
    assert ExpertGame(make("mixtral"), TEXT, 0, weights=lm.fingerprint()).key == usual


def test_of_an_offloaded_model_payoffs_are_the_same(tmp_path):
    lm = make("gpt_oss")
    lm.save(tmp_path / "model")
    disk = LanguageModel.load(str(tmp_path / "model"), tokenizer=object(), device="cpu", offload="disk")
    a, b = (ExpertGame(one, TEXT, 0)(all_coalitions(N_EXPERTS)) for one in (lm, disk))
    assert a.tolist() == b.tolist()


# -- what has no such experts


@pytest.mark.parametrize(("family", "name"), [("llama4", "Llama4TextExperts"), ("jetmoe", "JetMoe")])
def test_experts_that_take_no_routes_are_refused(family, name):
    lm = make(family)
    bare = LanguageModel.skeleton(lm.model.config)
    for check in (
        lambda: (game := ExpertGame(lm, TEXT, 1))(all_coalitions(game.n_players)[:2]),
        lm.check_routes,
        bare.check_routes,  # before weights are loaded
        lambda: Frequency().score(lm, context()),
    ):
        with pytest.raises(NoRoutesError, match=rf"{name}\w*: .*; use allocator=shapley_margins") as raised:
            check()
        assert "\n" not in str(raised.value)


def test_experts_that_a_block_calls_one_by_one_are_refused():
    lm = make("mixtral")
    mlp = lm.blocks[1].mlp

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(32, 2, bias=False)
            self.experts = nn.ModuleList([nn.Sequential(nn.Linear(32, 32)) for _ in range(2)])

        def forward(self, x):
            return sum(expert(x) for expert in self.experts)

    lm.blocks[1].mlp = Parts()
    assert lm.experts(1) == ["mlp.experts.0", "mlp.experts.1"]
    for check in (lm.check_routes, lambda: ExpertGame(lm, TEXT, 1)(all_coalitions(2))):
        with pytest.raises(NoRoutesError, match="ModuleList: its experts are not called with"):
            check()
    lm.blocks[1].mlp = mlp
    lm.check_routes()


@pytest.mark.parametrize("family", ROUTED)
def test_others_are_not(family):
    lm = make(family)
    LanguageModel.skeleton(lm.model.config).check_routes()
    lm.check_routes()


def test_blocks_without_experts_have_no_game():
    with pytest.raises(ValueError, match="block 0 of DeepseekV3ForCausalLM has no experts"):
        ExpertGame(make("deepseek_v3"), TEXT, 0)
    dense = LanguageModel.random(make_config("llama", **GROUPED), None, seed=0, device="cpu")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts; use"):
        Frequency().score(dense, context())


@pytest.mark.parametrize("name", ["shapley_experts", "frequency_experts"])
def test_a_dense_model_is_refused_before_anything_is_loaded(svnup, name):
    done = svnup(f"allocator={name}")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line == (
        "svnup: allocator.granularity=expert: LlamaForCausalLM has no experts; use allocator.granularity=sublayer, or "
        "another allocator"
    )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"exact_up_to": 21}, "exact_up_to=21: "), ({"budget": 0}, "budget=0: "), ({"seed": -1}, "seed=-1: ")],
)
def test_options_out_of_range(options, complaint):
    with pytest.raises(ValueError, match=rf"^{complaint}.*choose"):
        Shapley(PAYOFF_TEXT, **options)


def test_too_few_orders_are_refused_by_the_skeleton():
    bare = LanguageModel.skeleton(make("mixtral").model.config)
    with pytest.raises(ValueError, match=r"budget=13: .* least budget is 14"):
        Shapley(PAYOFF_TEXT, exact_up_to=3, budget=13).check_model(bare)
    Shapley(PAYOFF_TEXT, exact_up_to=3).check_model(bare)


# -- the control


@torch.inference_mode()
def test_frequencies_are_the_shares_of_the_router():
    lm = make("mixtral")
    by_weight, by_tokens = (Frequency(of).score(lm, context()) for of in ("weight", "tokens"))
    routers = []
    hooks = [b.mlp.gate.register_forward_hook(lambda _, args, out: routers.append((out[2], out[1]))) for b in lm.blocks]
    lm.nll(TEXT)
    for hook in hooks:
        hook.remove()
    for block, (index, weights) in enumerate(routers):
        own = [float(weights[index == expert].double().sum()) for expert in range(N_EXPERTS)]
        given = by_weight.values[by_weight.blocks == block]
        np.testing.assert_allclose(given, np.array(own) / sum(own), rtol=1e-6)
        times = np.array([int((index == expert).sum()) for expert in range(N_EXPERTS)])
        np.testing.assert_allclose(by_tokens.values[by_tokens.blocks == block], times / times.sum(), rtol=1e-12)
        assert np.ptp(times) > 0
    assert by_weight.experts == tuple(f"mlp.experts.{e}" for e in range(N_EXPERTS)) * N_BLOCKS
    assert Frequency().plan(lm.n_blocks) == {"block_forwards": by_weight.cost.n_block_forwards}


# -- budgets


def test_experts_share_the_budget_of_their_block_and_the_rest_keeps_it():
    lm = make("deepseek_v3", num_hidden_layers=3)
    values = np.array([3.0, 1.0, 2.0, -1.0, 0.1, 0.2, 0.3, 0.4])
    names = tuple(lm.experts(1) + lm.experts(2))
    scores = ExpertScores(values, "x", blocks=np.repeat([1, 2], 4), experts=names)
    units = lm.budget_units("expert")
    budget = Budget(lm.budget_params("expert"), 0.6)
    method = ExpertBudget(lam=0.1)
    profile = method.allocate(budget, scores.per_unit(budget.n_units, [index for index, _ in units]))
    assert len(units) == 3 + 8
    rest = [i for i, (_, linears) in enumerate(units) if not any(n.startswith("mlp.experts.") for n in linears)]
    assert profile.sparsity[rest].tolist() == [0.6] * 3
    first, second = profile.sparsity[2:6], profile.sparsity[7:]
    assert np.argsort(-first).tolist() == [3, 1, 2, 0]
    np.testing.assert_allclose(np.diff(second), -0.2 / 3, atol=1e-12)
    for index in range(3):
        own = [i for i, (block, _) in enumerate(units) if block == index]
        assert np.average(profile.sparsity[own], weights=budget.params[own]) == pytest.approx(0.6, abs=1e-12)
    mirrored = ExpertScores(-values, "x", "sparser", blocks=scores.blocks, experts=names)
    again = method.allocate(budget, mirrored.per_unit(budget.n_units, [index for index, _ in units]))
    np.testing.assert_allclose(again.sparsity, profile.sparsity, atol=1e-12)


def test_scores_need_the_block_of_each_expert():
    with pytest.raises(ValueError, match="2 scores of 1 experts in 2 blocks"):
        ExpertScores(np.ones(2), "x", blocks=np.zeros(2, dtype=int), experts=("a",))


@pytest.mark.parametrize("name", ["shapley_experts", "frequency_experts"])
def test_budgets_of_experts_through_the_command(name, tmp_path, own_place):
    with_tokenizer("deepseek_v3").save(tmp_path / "source")
    job = [*JOB, f"allocator={name}", "pruner=magnitude", "allocator.lam=0.1"]
    plan = command(*job, "dry_run=true")
    done = command(*job)
    assert done.code == 0, done.err
    row = only_row()
    scores = row["scores"]
    assert scores["experts"] == [f"mlp.experts.{e}" for e in range(N_EXPERTS)]
    assert scores["blocks"] == [1] * N_EXPERTS
    assert f"scores' block forwards {scores['n_block_forwards']}" in " ".join(plan.out.split())
    given = [row["profile"]["linears"][1][f"{expert}.down_proj"]["sparsity"] for expert in scores["experts"]]
    assert np.argmin(given) == np.argmax(scores["values"])
    assert np.ptp(given) == pytest.approx(0.2, abs=1e-9)
    assert row["profile"]["linears"][1]["self_attn.o_proj"]["sparsity"] == pytest.approx(0.7, abs=1e-9)
    assert ("shapley.game.data" in row["fingerprints"], "dataset" in row["fingerprints"]) == (False, name[0] == "f")
    assert ("allocator.scorer.data" in row["fingerprints"]) == (name[0] == "s")
    shown = results("show", "results", row["config_key"]).out
    assert f"{np.argmax(scores['values'])} " in shown.partition("experts by score")[2]
    assert results("report", "results").code == 0
    assert name.replace("_", "") in results("table", "results").out
    assert "already finished" in command(*job).out
    bad = command(*job, "split=error")
    assert (bad.code, len(bad.err.splitlines())) == (2, 1)
