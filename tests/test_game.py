"""The layer game against whole forwards of the model, its counts, and its memo."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from svnup.game.layer_game import LayerGame
from svnup.game.walk_plan import WalkPlan
from svnup.language_model import LanguageModel
from svnup.shapley import all_coalitions, block_forwards
from svnup.shapley.exact import Exact
from svnup.shapley.permutation import Permutation
from svnup.shapley.sliding_window import SlidingWindow


def straightforward(lm, tokens, coalition):
    """NLL of a whole forward in which every absent block hands on what it gets: mean over sequences of their means."""
    rows = torch.as_tensor(tokens)
    absent = [block for block, present in zip(lm.blocks, coalition, strict=True) if not present]
    for block in absent:
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        with torch.no_grad():
            logits = lm.model(input_ids=rows, use_cache=False).logits.double()
    finally:
        for block in absent:
            del block.forward
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
    return float(losses.mean(dim=1).mean())


def some(n, *names):
    assert all(len(name) == n for name in names)
    return np.array([[c == "1" for c in name] for name in names])


@pytest.fixture
def count_blocks():
    """Counts real forwards of blocks: an MLP runs once in each, and never where a block is only passed by."""
    hooks = []

    def count(lm):
        runs = [0]
        for block in lm.blocks:
            hooks.append(block.mlp.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1)))
        return runs

    yield count
    for hook in hooks:
        hook.remove()


# -- values


def test_values_are_those_of_whole_forwards(lm, tokens):
    coalitions = np.random.default_rng(0).permutation(all_coalitions(4))
    values = LayerGame(lm, tokens)(coalitions)
    assert values.dtype == np.float64
    assert values.shape == (16,)
    expected = [-straightforward(lm, tokens, row) for row in coalitions]
    np.testing.assert_allclose(values, expected, atol=2e-6)
    assert np.abs(np.diff(np.sort(expected))).min() > 5e-6  # every coalition has a payoff of its own


def test_values_of_the_built_in_model_are_those_of_whole_forwards(tiny):
    tokens = np.random.default_rng(1).integers(5, 2048, size=(2, 24))
    coalitions = np.random.default_rng(2).random((6, 12)) < 0.6
    expected = [-straightforward(tiny, tokens, row) for row in coalitions]
    np.testing.assert_allclose(LayerGame(tiny, tokens)(coalitions), expected, rtol=2e-6)


def test_sequences_weigh_the_same_whatever_the_micro_batch(lm):
    tokens = np.random.default_rng(4).integers(5, 2048, size=(131, 16))  # 128 and 3 sequences on a CPU
    coalitions = some(4, "1111", "1010", "0000")
    expected = [-straightforward(lm, tokens, row) for row in coalitions]
    np.testing.assert_allclose(LayerGame(lm, tokens)(coalitions), expected, atol=2e-6)


def test_a_value_does_not_depend_on_what_else_is_asked(lm, tokens):
    together = LayerGame(lm, tokens)(all_coalitions(4))
    apart = LayerGame(lm, tokens)
    one_by_one = [apart(row[None])[0] for row in all_coalitions(4)[::-1]][::-1]
    assert together.tolist() == one_by_one


def test_opt_plays_too(random_model, tokens):
    lm = random_model(3, model_type="opt")
    values = LayerGame(lm, tokens)(all_coalitions(3))
    np.testing.assert_allclose(values, [-straightforward(lm, tokens, row) for row in all_coalitions(3)], atol=2e-6)


@pytest.mark.parametrize(
    ("payoff", "of_nll"),
    [
        ("neg_nll", lambda nll, full: -nll),
        ("neg_ppl", lambda nll, full: -math.exp(nll)),
        ("recip_ppl", lambda nll, full: math.exp(full - nll)),
    ],
)
def test_payoffs_are_functions_of_the_loss(lm, tokens, payoff, of_nll):
    coalitions = all_coalitions(4)
    nll = -LayerGame(lm, tokens)(coalitions)
    game = LayerGame(lm, tokens, payoff=payoff)
    np.testing.assert_allclose(game(coalitions), [of_nll(v, nll[-1]) for v in nll], rtol=1e-9)
    assert game.v_empty == pytest.approx(of_nll(nll[0], nll[-1]), rel=1e-9)


@pytest.mark.parametrize("payoff", ["neg_nll", "neg_ppl"])
def test_no_coalition_is_worse_than_chance_under_the_cap(random_model, tokens, payoff):
    lm = random_model(louder=20.0)
    coalitions = all_coalitions(4)
    free, capped = (LayerGame(lm, tokens, payoff=payoff, cap=cap)(coalitions) for cap in ("none", "chance"))
    chance = {"neg_nll": -math.log(2048), "neg_ppl": -2048.0}[payoff]
    assert (free < chance).any()
    np.testing.assert_allclose(capped, np.maximum(free, chance), rtol=1e-12)


def test_recip_ppl_of_everybody_is_one(lm, tokens):
    assert LayerGame(lm, tokens, payoff="recip_ppl")(np.ones((1, 4), dtype=bool))[0] == pytest.approx(1.0, abs=1e-12)


def test_asking_twice_and_in_any_order(lm, tokens):
    game = LayerGame(lm, tokens)
    rows = some(4, "1111", "0110", "1111", "0000")
    values = game(rows)
    assert values[0] == values[2]
    assert game.n_evaluations == 3
    assert game(rows[::-1]).tolist() == values[::-1].tolist()
    assert game.n_evaluations == 3
    assert game(np.zeros((0, 4), dtype=bool)).shape == (0,)


# -- counts


def test_exact_costs_what_the_method_page_says(lm, tokens, count_blocks):
    game = LayerGame(lm, tokens)
    assert game.v_empty < 0  # the first use of the model asks its blocks what they return
    runs = count_blocks(lm)
    result = Exact().estimate(game)
    cost = result.cost
    assert (game.n_evaluations, game.n_block_forwards) == (15, 15)  # nobody was known already, and costs no forward
    assert runs[0] == 15
    assert (cost.n_evaluations, cost.n_block_forwards) == (16, 15)

    runs[0], fresh = 0, LayerGame(lm, tokens)
    cost = Exact().estimate(fresh).cost
    assert (fresh.n_evaluations, fresh.n_block_forwards) == (16, 15)
    assert runs[0] == 15
    assert (cost.n_new_evaluations, cost.n_new_block_forwards) == (16, 15)
    assert abs(result.efficiency_gap) < 1e-9


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 6])
def test_windows_cost_what_the_method_page_says(random_model, tokens, count_blocks, window):
    n, w = 6, window
    lm = random_model(n)
    game = LayerGame(lm, tokens)
    assert game.v_empty < 0
    runs, evaluations = count_blocks(lm), game.n_evaluations
    cost = SlidingWindow(window).estimate(game).cost
    d = (n - w + 2) * 2 ** (w - 1)
    f = 2 ** (w - 1) - 1 + 2**w * (n - w + 1) * (n - w + 2) // 4
    assert evaluations == 0
    assert (cost.n_evaluations, cost.n_block_forwards) == (d, f)
    assert game.n_evaluations == d - (w == n)  # nobody, who was known, is in the window of everybody only
    assert game.n_block_forwards == runs[0] == f


def test_permutations_respect_their_budget(lm, tokens, count_blocks):
    game = LayerGame(lm, tokens)
    assert game.v_empty < 0
    runs, estimator = count_blocks(lm), Permutation(14)
    cost = estimator.estimate(game).cost
    assert cost.n_evaluations <= 14
    assert game.n_block_forwards == cost.n_block_forwards == runs[0] == block_forwards(estimator.plan(4))


def test_nobody_is_a_reference_and_not_counted(lm, tokens, count_blocks):
    game = LayerGame(lm, tokens)
    v_empty = game.v_empty
    assert (game.n_evaluations, game.n_block_forwards) == (0, 0)
    runs = count_blocks(lm)
    assert game.v_empty == v_empty
    assert runs[0] == 0
    assert v_empty == pytest.approx(-straightforward(lm, tokens, [False] * 4), abs=2e-6)
    assert game(np.zeros((1, 4), dtype=bool))[0] == v_empty


@pytest.mark.parametrize("seed", range(3))
def test_plans_know_what_walks_cost(lm, tokens, seed):
    coalitions = np.unique(np.random.default_rng(seed).random((9, 4)) < 0.6, axis=0)
    plan = WalkPlan.of(coalitions)
    game = LayerGame(lm, tokens)
    game(coalitions)
    assert (plan.n_evaluations, plan.n_block_forwards) == (len(coalitions), block_forwards(coalitions))
    assert (game.n_evaluations, game.n_block_forwards) == (plan.n_evaluations, plan.n_block_forwards)
    assert 1 <= plan.peak_states <= 5


# -- the memo


def lines_of(folder):
    (path,) = Path(folder).rglob("*.jsonl")
    return path, path.read_text(encoding="utf-8").splitlines()


def test_a_second_game_knows_everything(lm, tokens, tmp_path, count_blocks):
    first = LayerGame(lm, tokens, cache_dir=tmp_path)
    values, v_empty = first(all_coalitions(4)), first.v_empty
    path, lines = lines_of(tmp_path)
    assert path.parent == tmp_path / "games" / first.key
    assert len(lines) == 16
    runs = count_blocks(lm)
    second = LayerGame(lm, tokens, cache_dir=tmp_path)
    assert second(all_coalitions(4)).tolist() == values.tolist()
    assert second.v_empty == v_empty
    assert (second.n_evaluations, second.n_block_forwards, runs[0]) == (0, 0, 0)
    assert second.kinds == ["cpu/float32"]
    assert len(lines_of(tmp_path)[1]) == 16
    cost = Exact().estimate(LayerGame(lm, tokens, cache_dir=tmp_path)).cost
    assert (cost.n_evaluations, cost.n_new_evaluations, cost.n_new_block_forwards) == (16, 0, 0)


def test_values_are_written_as_they_come(lm, tokens, tmp_path, monkeypatch):
    game, done = LayerGame(lm, tokens, cache_dir=tmp_path), []
    token_nll = LanguageModel.token_nll

    def dies(self, *args):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return token_nll(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "token_nll", dies)
        with pytest.raises(KeyboardInterrupt):
            game(all_coalitions(4))
    again = LayerGame(lm, tokens, cache_dir=tmp_path)
    values = again(all_coalitions(4))
    assert again.n_evaluations == 11
    assert values.tolist() == LayerGame(lm, tokens)(all_coalitions(4)).tolist()


def test_games_without_a_cache_write_nothing(lm, tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    LayerGame(lm, tokens)(all_coalitions(4)[:3])
    assert list(tmp_path.iterdir()) == []


def tampered(line):
    entry = json.loads(line)
    return json.dumps(entry | {"value": entry["value"] + 0.5})


@pytest.mark.parametrize(
    ("damage", "n_dropped"),
    [
        (lambda lines: [*lines[:-1], lines[-1][: len(lines[-1]) // 2]], 1),
        (lambda lines: [*lines[:2], tampered(lines[2]), *lines[3:]], 1),
        (lambda lines: [lines[0], tampered(lines[1]), *lines[2:-1], lines[-1][:5]], 2),
        (lambda lines: [*lines[:4], lines[4].replace('"coalition": "0', '"coalition": "1'), *lines[5:]], 1),
        (lambda lines: ["[]", "3", "null", *lines], 3),
    ],
    ids=["torn", "tampered", "both", "renamed", "foreign"],
)
def test_damaged_lines_are_dropped_counted_and_evaluated_again(lm, tokens, tmp_path, caplog, damage, n_dropped):
    values = LayerGame(lm, tokens, cache_dir=tmp_path)(all_coalitions(4))
    path, lines = lines_of(tmp_path)
    changed = damage(lines)
    n_lost = len(lines) - len(set(lines) & set(changed))
    path.write_text("\n".join(changed), encoding="utf-8")  # the last line without its end
    with caplog.at_level(logging.WARNING, logger="svnup.game"):
        game = LayerGame(lm, tokens, cache_dir=tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.records[0].getMessage().startswith(f"{n_dropped} damaged lines in ")
    assert game(all_coalitions(4)).tolist() == values.tolist()
    assert game.n_evaluations == n_lost
    caplog.clear()
    again = LayerGame(lm, tokens, cache_dir=tmp_path)  # what was added after the torn line can be read
    assert again(all_coalitions(4)).tolist() == values.tolist()
    assert again.n_evaluations == 0


def test_intact_memos_give_no_warning(lm, tokens, tmp_path, caplog):
    for _ in range(2):
        LayerGame(lm, tokens, cache_dir=tmp_path)(all_coalitions(4))
    assert not caplog.records


def test_files_of_several_processes_are_merged(lm, tokens, tmp_path):
    values = LayerGame(lm, tokens, cache_dir=tmp_path)(all_coalitions(4))
    path, lines = lines_of(tmp_path)
    path.write_text("".join(line + "\n" for line in lines[:7]), encoding="utf-8")
    (path.parent / "elsewhere-1.jsonl").write_text("".join(line + "\n" for line in lines[5:]), encoding="utf-8")
    game = LayerGame(lm, tokens, cache_dir=tmp_path)
    assert game(all_coalitions(4)).tolist() == values.tolist()
    assert game.n_evaluations == 0


# -- the key


def test_the_key_changes_with_whatever_changes_a_value(random_model, tokens, lm):
    other_text = tokens.copy()
    other_text[-1, -1] += 1
    touched = random_model()
    with torch.no_grad():
        touched.linears(2)["mlp.down_proj"].weight[3, 5] += 1e-3
    head = random_model()
    with torch.no_grad():
        head.model.get_output_embeddings().weight[7, 0] += 1e-3
    games = [
        LayerGame(lm, tokens),
        LayerGame(touched, tokens),
        LayerGame(head, tokens),
        LayerGame(random_model(dtype="bfloat16"), tokens),
        LayerGame(lm, other_text),
        LayerGame(lm, tokens[:2]),
        LayerGame(lm, tokens.reshape(6, 12)),
        LayerGame(lm, tokens, payoff="neg_ppl"),
        LayerGame(lm, tokens, payoff="recip_ppl"),
        LayerGame(lm, tokens, cap="chance"),
    ]
    assert len({game.key for game in games}) == len(games)


def test_the_key_does_not_change_with_anything_else(random_model, tokens, tiny, tmp_path):
    assert LayerGame(random_model(), tokens).key == LayerGame(random_model(), torch.as_tensor(tokens), cache_dir=tmp_path).key
    from svnup.model.source import BUILT_IN, Pretrained

    again = Pretrained(pretrained_model_name_or_path=BUILT_IN, dtype="float32", device="cpu").load()
    assert LayerGame(again, tokens).key == LayerGame(tiny, tokens).key


def test_playing_changes_no_weight(lm, tokens):
    before = lm.fingerprint()
    Exact().estimate(LayerGame(lm, tokens))
    assert lm.fingerprint() == before
    assert not any("forward" in vars(m) for m in lm.model.modules())


# -- mistakes


def test_broken_models_are_named_with_the_stage_and_the_coalition(random_model, tokens, tmp_path):
    lm = random_model()
    with torch.no_grad():
        lm.linears(2)["mlp.down_proj"].weight[0, 0] = float("nan")
    game = LayerGame(lm, tokens, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"stage coalitions: the loss of coalition 0010 is nan; a wider dtype"):
        game(all_coalitions(4))
    assert all(math.isfinite(json.loads(line)["value"]) for line in lines_of(tmp_path)[1])


def test_perplexities_beyond_all_bounds_are_named_with_the_stage(random_model, tokens):
    lm = random_model()
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(1e5)
    nll = -LayerGame(lm, tokens)(np.ones((1, 4), dtype=bool))[0]
    assert 710 < nll < math.inf
    with pytest.raises(ValueError, match="stage coalitions"):
        LayerGame(lm, tokens, payoff="neg_ppl")(np.ones((1, 4), dtype=bool))


@pytest.mark.parametrize(
    "coalitions",
    [
        np.ones((2, 4)),
        np.ones((2, 4), dtype=np.int64),
        np.ones(4, dtype=bool),
        np.ones((2, 5), dtype=bool),
        np.ones((1, 2, 4), dtype=bool),
    ],
    ids=lambda c: f"{c.dtype}{c.shape}",
)
def test_only_bool_matrices_are_coalitions(lm, tokens, coalitions):
    with pytest.raises(ValueError, match=r"coalitions must be bool \(m, 4\), not "):
        LayerGame(lm, tokens)(coalitions)


# -- exact values of the built-in model


@pytest.mark.slow
def test_exact_values_of_the_built_in_model(tiny, tmp_path):
    text = tiny.tokenizer("Return the sum of the elements of an array over the given axis, or over all of it. " * 8)[
        "input_ids"
    ]
    tokens = np.array(text[:64]).reshape(2, 32)
    game = LayerGame(tiny, tokens, cache_dir=tmp_path)
    exact = Exact().estimate(game)
    assert (game.n_evaluations, game.n_block_forwards) == (4096, 4095)
    assert (exact.cost.n_evaluations, exact.cost.n_block_forwards) == (4096, 4095)
    assert abs(exact.efficiency_gap) < 1e-8

    windows = LayerGame(tiny, tokens)
    five = SlidingWindow(5).estimate(windows)
    assert (windows.n_evaluations, windows.n_block_forwards) == (144, 591)
    assert (five.cost.n_evaluations, five.cost.n_block_forwards) == (144, 591)
    assert abs(five.efficiency_gap) > 1e-3
    known = LayerGame(tiny, tokens, cache_dir=tmp_path)
    assert SlidingWindow(5).estimate(known).values.tolist() == five.values.tolist()
    everything = SlidingWindow(12).estimate(known)
    np.testing.assert_allclose(everything.values, exact.values, atol=1e-9)
    assert known.n_evaluations == 0
