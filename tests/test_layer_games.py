"""Games besides the plain one: absent means pruned, sublayers as players, other payoffs, bounded memory, gates, shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from svnup.allocation import Budget
from svnup.game.layer_game import LayerGame
from svnup.game.walk_plan import WalkPlan
from svnup.language_model import LanguageModel
from svnup.model.source import Random
from svnup.pruning.walk import pruned_weights
from svnup.pruning.wanda import Wanda
from svnup.shapley import all_coalitions, block_forwards
from svnup.shapley.exact import Exact
from svnup.shapley.gates import Gates
from svnup.shapley.sliding_window import SlidingWindow
from svnup.types import CHOICES

TOKENS = np.random.default_rng(0).integers(0, 2048, (4, 24))


def model(model_type: str = "llama", blocks: int = 4, scale: float = 4.0) -> LanguageModel:
    """Random weights, enlarged so that blocks matter."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": blocks}
    lm = Random(model_type=model_type, device="cpu", **shape).load()  # type: ignore[arg-type]
    for index in range(lm.n_blocks):
        for linear in lm.linears(index).values():
            linear.weight.data *= scale
    return lm


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return model()


@pytest.fixture(scope="module")
def replacements(lm: LanguageModel) -> list[dict[str, torch.Tensor]]:
    uniform = Budget(lm.block_params, 0.6).uniform()
    return pruned_weights(lm, uniform, Wanda(), TOKENS)


def nll(lm: LanguageModel, tokens: np.ndarray = TOKENS) -> float:
    """The loss of the model's own forward."""
    rows = torch.as_tensor(tokens)
    with torch.no_grad():
        logits = lm.model(rows, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return float(losses.double().mean())


def test_pruned_weights_leave_the_model_alone(lm: LanguageModel, replacements: list[dict[str, torch.Tensor]]) -> None:
    fresh = model()
    for index, weights in enumerate(replacements):
        for name, linear in lm.linears(index).items():
            assert torch.equal(linear.weight, fresh.linears(index)[name].weight)
            assert 0.55 < float((weights[f"{name}.weight"] == 0).double().mean()) < 0.65


def test_absent_means_pruned(lm: LanguageModel, replacements: list[dict[str, torch.Tensor]]) -> None:
    """Payoffs against a model into which the pruned weights of absent blocks are really copied; work as counted."""
    game = LayerGame(lm, TOKENS, pruned=replacements)
    coalitions = all_coalitions(4)
    payoffs = game(coalitions)
    for row, payoff in zip(coalitions[[0, 5, 9, 15]], payoffs[[0, 5, 9, 15]], strict=True):
        other = model()
        for index in np.flatnonzero(~row):
            for name, linear in other.linears(int(index)).items():
                linear.weight.data = replacements[index][f"{name}.weight"].clone()
        assert payoff == pytest.approx(-nll(other), abs=1e-5)
    assert (game.n_evaluations, game.n_block_forwards) == (16, 2**5 - 2)
    assert game.key != LayerGame(lm, TOKENS).key
    window = LayerGame(lm, TOKENS, pruned=replacements)
    found = SlidingWindow(2).estimate(window)
    n, w = 4, 2
    expected = 2**w - 2 + 2 ** (w - 1) * ((n - w + 2) * (n - w + 3) // 2 - 1)
    assert window.n_block_forwards == found.cost.n_block_forwards == expected


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_sublayers(model_type: str) -> None:
    """Attention and MLP apart: a block with both is the whole block, without one it is the model with that output zeroed."""
    lm = model(model_type, blocks=3)
    game = LayerGame(lm, TOKENS, players="sublayer")
    assert game.n_players == 6
    everybody = np.ones((1, 6), dtype=bool)
    assert game(everybody)[0] == pytest.approx(-nll(lm), abs=1e-5)
    blocks_only = LayerGame(lm, TOKENS)
    whole = np.array([[True, False, True]])
    assert game(np.repeat(whole, 2, axis=1))[0] == pytest.approx(blocks_only(whole)[0], abs=1e-5)

    without_mlp = everybody.copy()
    without_mlp[0, 3] = False
    last = lm.blocks[1].fc2 if model_type == "opt" else lm.blocks[1].mlp
    hook = last.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    expected = -nll(lm)
    hook.remove()
    assert game(without_mlp)[0] == pytest.approx(expected, abs=1e-5)
    assert game(without_mlp)[0] != pytest.approx(game(everybody)[0], abs=1e-3)


def test_sublayers_of_a_pruned_game(lm: LanguageModel, replacements: list[dict[str, torch.Tensor]]) -> None:
    game = LayerGame(lm, TOKENS, players="sublayer", pruned=replacements)
    coalition = np.ones((1, 8), dtype=bool)
    coalition[0, 2] = False  # the attention of block 1 is pruned, its MLP is not
    other = model()
    for name, linear in other.linears(1).items():
        if name.startswith("self_attn"):
            linear.weight.data = replacements[1][f"{name}.weight"].clone()
    assert game(coalition)[0] == pytest.approx(-nll(other), abs=1e-5)


def test_parallel_blocks_are_refused_as_sublayers() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_parallel_residual=True,
    )
    torch.manual_seed(0)
    parallel = LanguageModel(GPTNeoXForCausalLM(config))
    for index in range(2):
        for linear in parallel.linears(index).values():
            linear.weight.data *= 20
    with pytest.raises(ValueError, match="players=block"):
        LayerGame(parallel, TOKENS % 64, players="sublayer")


def test_payoffs_derived_from_the_loss(lm: LanguageModel) -> None:
    coalitions = all_coalitions(4)
    loss = -LayerGame(lm, TOKENS)(coalitions)
    np.testing.assert_allclose(LayerGame(lm, TOKENS, payoff="neg_ppl")(coalitions), -np.exp(loss), rtol=1e-9)
    np.testing.assert_allclose(LayerGame(lm, TOKENS, payoff="recip_ppl")(coalitions), np.exp(loss[-1] - loss), rtol=1e-9)
    capped = LayerGame(lm, TOKENS, cap="chance")(coalitions)
    np.testing.assert_allclose(capped, -np.minimum(loss, np.log(2048)), rtol=1e-9)
    assert (loss > np.log(2048)).any()  # so that the cap does something here


def test_kl_payoff(lm: LanguageModel) -> None:
    game = LayerGame(lm, TOKENS, payoff="kl")
    rows = torch.as_tensor(TOKENS)
    with torch.no_grad():
        dense = lm.model(rows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        hook = lm.blocks[2].register_forward_hook(lambda m, args, out: args[0])
        without = lm.model(rows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        hook.remove()
    expected = float((dense.exp() * (dense - without)).sum(-1).mean())
    assert expected > 1e-3
    assert game(np.array([[True, True, False, True]]))[0] == pytest.approx(-expected, rel=1e-4)
    assert game(np.ones((1, 4), dtype=bool))[0] == pytest.approx(0, abs=1e-7)


def test_accuracy_payoff(lm: LanguageModel) -> None:
    """Each sequence's own ending against those of the next three, judged by the model's own forward."""
    found = LayerGame(lm, TOKENS, payoff="accuracy")(np.ones((1, 4), dtype=bool))[0]
    ending, right = TOKENS.shape[1] // 4, 0
    for i, row in enumerate(TOKENS):
        losses = []
        for shift in range(CHOICES):
            tokens = torch.as_tensor(np.concatenate([row[:-ending], TOKENS[(i + shift) % len(TOKENS)][-ending:]]))[None]
            with torch.no_grad():
                logits = lm.model(tokens, use_cache=False).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")[-ending:].sum()))
        right += losses[0] < min(losses[1:])
    assert found == pytest.approx(right / len(TOKENS))
    with pytest.raises(ValueError, match="at least 4 sequences"):
        LayerGame(lm, TOKENS[:3], payoff="accuracy")


def test_bounded_memory_costs_work_and_moves_no_number(lm: LanguageModel) -> None:
    free, tight = LayerGame(lm, TOKENS), LayerGame(lm, TOKENS, state_bytes=1)
    coalitions = all_coalitions(4)
    np.testing.assert_array_equal(free(coalitions), tight(coalitions))
    assert tight.n_block_forwards > free.n_block_forwards == 15
    for limit in (2, 3, 4, 5):
        plan = WalkPlan.of(all_coalitions(8), max_states=limit)
        assert plan.peak_states <= limit
        assert plan.n_block_forwards >= block_forwards(all_coalitions(8))


@pytest.mark.parametrize("absent_costs", [False, True])
@pytest.mark.parametrize("together", [1, 2, 7, 100])
def test_groups_of_coalitions_share_loads(together: int, absent_costs: bool) -> None:
    """Against a count of the prefixes that each group has below the depth where it resumes."""
    rows = all_coalitions(7)[::3]
    plan = WalkPlan.of(rows, absent_costs, together=together)
    costs = rows | absent_costs
    assert [row for group in plan.groups for row in range(group.start, group.stop)] == list(range(len(rows)))
    forwards = loads = 0
    for group, start in zip(plan.groups, plan.resume, strict=True):
        for depth in range(start, 7):
            runs = {tuple(row[: depth + 1]) for row, cost in zip(rows[group], costs[group], strict=True) if cost[depth]}
            forwards, loads = forwards + len(runs), loads + bool(runs)
    assert (plan.n_block_forwards, plan.n_loads) == (forwards, loads)
    assert plan.n_block_forwards >= block_forwards(rows, absent_costs=absent_costs)
    if together in (1, 100):
        assert plan.n_block_forwards == block_forwards(rows, absent_costs=absent_costs)
    assert plan.n_loads == (7 if together == 100 else loads)


def test_gates_are_derivatives(lm: LanguageModel) -> None:
    """Against finite differences of the loss with gated residual updates."""
    game = LayerGame(lm, TOKENS)
    gate, step = 0.7, 1e-2

    def loss(gates: np.ndarray) -> float:
        hooks = [
            block.register_forward_hook(lambda m, args, out, g=float(g): args[0] + g * (out - args[0]))
            for block, g in zip(lm.blocks, gates, strict=True)
        ]
        value = nll(lm)
        for hook in hooks:
            hook.remove()
        return value

    gradient = game.gate_gradient(gate)
    for block in range(4):
        bump = np.zeros(4)
        bump[block] = step
        numeric = -(loss(gate + bump) - loss(gate - bump)) / (2 * step)
        assert gradient[block] == pytest.approx(numeric, rel=2e-2, abs=2e-3)
    found = Gates(16).estimate(game)
    assert abs(found.efficiency_gap) < 0.05 * abs(found.v_full - found.v_empty)
    with pytest.raises(ValueError, match="payoff=kl"):
        LayerGame(lm, TOKENS, payoff="kl").gate_gradient(0.5)


def test_shards_are_merged(lm: LanguageModel, tmp_path: Path) -> None:
    """Disjoint parts by separate games in one folder give what one game gives, bit for bit."""
    coalitions = Exact().plan(4)
    parts = np.array_split(coalitions, 3)
    assert sum(len(p) for p in parts) == 16
    for part in parts:
        LayerGame(lm, TOKENS, cache_dir=tmp_path)(part)
    merged = LayerGame(lm, TOKENS, cache_dir=tmp_path)
    alone = LayerGame(lm, TOKENS)
    np.testing.assert_array_equal(merged(coalitions), alone(coalitions))
    assert merged.n_evaluations == 0


def test_values_from_another_kind_of_device_are_used_and_named(lm: LanguageModel, tmp_path: Path) -> None:
    first = LayerGame(lm, TOKENS, cache_dir=tmp_path)
    first._memo.kind = "cuda/float16"
    first(all_coalitions(4)[:8])
    second = LayerGame(lm, TOKENS, cache_dir=tmp_path)
    second(all_coalitions(4))
    assert second.n_evaluations == 8
    assert second.kinds == ["cpu/float32", "cuda/float16"]
