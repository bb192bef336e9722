"""Scores of blocks that are no Shapley values, against independent float64 arithmetic, and every allocator as a whole job."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig

from svnup.config import CONF
from svnup.language_model import LanguageModel
from svnup.reports.tables import describe
from svnup.results.row import ResultRow
from svnup.scoring import Context
from svnup.scoring.published import AlphaPruning, BlockInfluence, Dlp, Lsa, Owl, hill, least_error

SCORERS = [Owl(), Owl(2.0), Dlp(), Dlp("median"), BlockInfluence(), Lsa(), AlphaPruning()]


def context(tokens):
    def replacements(pruner):
        raise AssertionError("only games need replacements")

    return Context(tokens, None, replacements)


def seen(lm, tokens):
    """What the model's own forward passes through it: inputs of each linear, inputs and outputs of each block, in float64."""
    inputs, states, hooks = {}, {}, []

    def linear_hook(key):
        return lambda m, args: inputs.__setitem__(key, args[0].double().reshape(-1, args[0].shape[-1]).numpy())

    def block_hook(key):
        return lambda m, args, out: states.__setitem__(
            key, (args[0].double().numpy(), (out[0] if isinstance(out, tuple) else out).double().numpy())
        )

    for index, block in enumerate(lm.blocks):
        hooks.append(block.register_forward_hook(block_hook(index)))
        hooks += [m.register_forward_pre_hook(linear_hook((index, name))) for name, m in lm.linears(index).items()]
    with torch.no_grad():
        lm.model(torch.as_tensor(tokens))
    for hook in hooks:
        hook.remove()
    return inputs, states


def wanda_scores(lm, tokens):
    """|W_ij| ||X_j||_2 of each block, all linears in one vector."""
    inputs, _ = seen(lm, tokens)
    return [
        np.concatenate(
            [
                (np.abs(m.weight.double().numpy()) * np.sqrt((inputs[index, name] ** 2).sum(0))).ravel()
                for name, m in lm.linears(index).items()
            ]
        )
        for index in range(lm.n_blocks)
    ]


# -- on dense activations


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_outlier_ratios_and_means_of_wanda_scores(random_model, tokens, model_type):
    lm = random_model(3, model_type=model_type)
    expected = wanda_scores(lm, tokens)
    for m in (2.0, 5.0):
        scores = Owl(m).score(lm, context(tokens))
        ratios = [(a > m * a.mean()).mean() for a in expected]
        np.testing.assert_allclose(scores.values, ratios, atol=1.5 / len(expected[0]))
        assert np.ptp(ratios) > 10 / len(expected[0])
        assert scores.higher_is == "denser"
    means = np.array([a.mean() for a in expected])
    np.testing.assert_allclose(Dlp().score(lm, context(tokens)).values, 1 - means / means.sum(), rtol=1e-5)
    medians = np.array([np.sort(a)[(len(a) - 1) // 2] for a in expected])
    np.testing.assert_allclose(Dlp("median").score(lm, context(tokens)).values, 1 - medians / medians.sum(), rtol=1e-5)


def test_outliers_by_hand(random_model, tokens):
    """A block with one weight has one outlier; one with equal scores has none; of zeros, none is above their mean."""
    lm = random_model(3)
    with torch.no_grad():
        for index in range(3):
            for linear in lm.linears(index).values():
                linear.weight.zero_()
        lm.linears(0)["self_attn.q_proj"].weight[3, 1] = 0.5
        lm.linears(1)["self_attn.q_proj"].weight[:2, 1] = 0.5
    scores = Owl().score(lm, context(tokens))
    n = int(lm.block_params[0])
    assert scores.values.tolist() == [1 / n, 2 / n, 0.0]
    assert scores.method == "Owl(m=5)"
    assert (scores.cost.n_evaluations, scores.cost.n_block_forwards) == (0, 3)
    # the mean of the second block is twice that of the first, that of the third is 0: 1 - 1/3, 1 - 2/3, 1
    assert Dlp().score(lm, context(tokens)).values.tolist() == pytest.approx([2 / 3, 1 / 3, 1.0], abs=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_block_influence_is_the_angle_between_input_and_output(random_model, tokens, model_type):
    lm = random_model(3, model_type=model_type)
    _, states = seen(lm, tokens)
    expected = []
    for index in range(3):
        before, after = states[index]
        norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
        expected.append(1 - ((before * after).sum(-1) / norms).mean())
    scores = BlockInfluence().score(lm, context(tokens))
    np.testing.assert_allclose(scores.values, expected, atol=1e-6)
    assert scores.higher_is == "denser"


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_influence_of_attention_and_mlp_is_that_of_their_residual_updates(random_model, tokens, model_type):
    """What a sublayer's output projection writes is added to the state that it was given."""
    lm = random_model(3, model_type=model_type)
    _, states = seen(lm, tokens)
    written, hooks = {}, []
    last = {"llama": ("o_proj", "down_proj"), "opt": ("out_proj", "fc2")}[model_type]
    for index in range(3):
        for name, linear in lm.linears(index).items():
            if name.endswith(last):
                part = last.index(name.rpartition(".")[2])
                key = (index, part)
                hooks.append(linear.register_forward_hook(lambda m, a, out, key=key: written.update({key: out.double()})))
    with torch.no_grad():
        lm.model(torch.as_tensor(tokens))
    for hook in hooks:
        hook.remove()
    expected = []
    for index in range(3):
        before = states[index][0]
        for part in range(2):
            after = before + written[index, part].reshape(before.shape).numpy()
            norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
            expected.append(1 - ((before * after).sum(-1) / norms).mean())
            before = after
    scores = BlockInfluence("sublayer").score(lm, context(tokens))
    np.testing.assert_allclose(scores.values, expected, atol=1e-6)
    assert np.ptp(expected) > 1e-3
    assert scores.cost.n_block_forwards == 6


def test_influence_of_sublayers_needs_blocks_that_run_one_after_the_other(random_model, tokens):
    config = GPTNeoXConfig(
        vocab_size=2048,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        use_parallel_residual=True,
    )
    parallel = LanguageModel.random(config, None, seed=0, device="cpu")
    with torch.no_grad():
        for index in range(2):
            for linear in parallel.linears(index).values():
                linear.weight.mul_(20)
    with pytest.raises(ValueError, match=r"^allocator\.granularity=sublayer: block 0 .*use allocator\.granularity=block"):
        BlockInfluence("sublayer").score(parallel, context(tokens))
    assert len(BlockInfluence().score(parallel, context(tokens)).values) == 2


def test_a_block_that_does_nothing_has_no_influence(random_model, tokens):
    lm = random_model(3)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            lm.linears(1)[name].weight.zero_()
    values = BlockInfluence().score(lm, context(tokens)).values
    assert values[1] == pytest.approx(0, abs=1e-6)
    assert min(values[0], values[2]) > 0.01


# -- errors where half of the weights go


def greedy_error(w, x, share, group):
    """What goes is chosen weight by weight, by what the whole output of the row then loses; then all of that, measured."""
    total, tokens = 0.0, len(x)
    for row in w:
        gone: list[int] = []
        for start in range(0, len(row), group):
            inside = range(start, min(start + group, len(row)))
            for _ in range(int(share * len(inside))):
                left = [j for j in inside if j not in gone]
                gone.append(min(left, key=lambda j: ((x[:, [*gone, j]] @ row[[*gone, j]]) ** 2).sum()))
        total += ((x[:, gone] @ row[gone]) ** 2).sum() / tokens
    return total


@pytest.mark.parametrize(("share", "group"), [(0.5, 8), (0.5, 20), (0.3, 7), (0.7, 10)])
def test_the_least_error_is_that_of_the_greedy_choice(share, group):
    rng = np.random.default_rng(group)
    x = rng.standard_normal((60, 20)) @ (np.eye(20) + rng.standard_normal((20, 20)) / 4)
    w = rng.standard_normal((5, 20))
    gram = torch.as_tensor(x.T @ x / 60).float()
    assert least_error(torch.as_tensor(w), gram, share, group) == pytest.approx(greedy_error(w, x, share, group), rel=1e-4)


def test_the_least_error_by_hand():
    # of independent inputs the smaller half goes; of two equal ones with opposite weights both go together for nothing
    assert least_error(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.eye(4), 0.5, 4) == 1 + 4
    assert least_error(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.eye(4), 0.5, 2) == 1 + 9
    gram = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert least_error(torch.tensor([[1.5, -1.5, 1.0, 1.0]]), gram, 0.5, 4) == 2
    assert least_error(torch.tensor([[1.5, -1.5, 2.0, 2.0]]), gram, 0.5, 4) == 0


@pytest.mark.parametrize("granularity", ["block", "sublayer", "linear"])
def test_lsa_compares_the_mean_errors_of_parts(random_model, tokens, granularity):
    lm = random_model(3)
    inputs, _ = seen(lm, tokens)
    errors = [
        {name: greedy_error(m.weight.double().numpy(), inputs[index, name], 0.25, 16) for name, m in lm.linears(index).items()}
        for index in range(3)
    ]
    parts = {
        "block": [[*of.values()] for of in errors],
        "sublayer": [[e for n, e in of.items() if n.startswith(part)] for of in errors for part in ("self_attn", "mlp")],
        "linear": [[e] for of in errors for e in of.values()],
    }[granularity]
    means = np.array([np.mean(part) for part in parts])
    scores = Lsa(0.25, 16, granularity).score(lm, context(tokens))
    np.testing.assert_allclose(scores.values, 1 - means / means.sum(), rtol=1e-4)
    assert scores.higher_is == "denser"
    assert scores.cost.n_block_forwards == 3


# -- spectra


def slow_hill(x):
    """The definition, one eigenvalue at a time."""
    logs = sorted(math.log10(v) for v in x)
    width = (logs[-1] - logs[0]) / 100
    counts = [0] * 100
    for v in logs:
        counts[min(99, int((v - logs[0]) / width))] += 1
    peak = logs[0] + counts.index(max(counts)) * width
    tail = [v for v in logs if v >= peak - 1e-12]
    return 1 + len(tail) / sum((v - tail[0]) * math.log(10) for v in tail)


@pytest.mark.parametrize("shape", [(40, 40), (64, 24), (24, 64)])
@pytest.mark.parametrize("seed", range(5))
def test_hill_against_its_definition(shape, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal(shape) * rng.pareto(2.0, size=shape[1])
    spectrum = np.linalg.svd(matrix, compute_uv=False) ** 2
    assert hill(spectrum) == pytest.approx(slow_hill(spectrum), rel=1e-9)
    assert hill(7.3 * spectrum[::-1]) == pytest.approx(hill(spectrum), rel=1e-6)  # neither scale nor order matters


def test_hill_by_hand():
    assert hill(np.array([1.0, 1.0, 1.0, 1.0, 10.0, 100.0])) == pytest.approx(1 + 6 / math.log(1000))
    assert hill(np.array([0.01, 1.0, 1.0, 1.0, 10.0])) == pytest.approx(1 + 4 / math.log(10))  # below the peak: left out
    assert hill(np.array([0.0, 1e-30, 1.0, 1.0, 1.0, 10.0])) == pytest.approx(1 + 4 / math.log(10))  # zero: left out
    # quantiles of a power law of density x^-3.5 above 1
    assert hill((1 - (np.arange(20000) + 0.5) / 20000) ** (-1 / 2.5)) == pytest.approx(3.5, rel=0.01)


@pytest.mark.parametrize("spectrum", [[2.0, 2.0, 2.0], [0.0, 0.0], [0.1, 3.0, 3.0]])
def test_spectra_without_a_tail(spectrum):
    with pytest.raises(ValueError, match="no tail"):
        hill(np.array(spectrum))


def test_exponents_of_a_block_are_averaged_over_its_linears(random_model, tokens):
    lm = random_model(2)
    expected = [
        np.mean([slow_hill(np.linalg.svd(m.weight.double().numpy(), compute_uv=False) ** 2) for m in lm.linears(i).values()])
        for i in range(2)
    ]
    scores = AlphaPruning().score(lm, context(tokens[:0]))
    np.testing.assert_allclose(scores.values, expected, rtol=1e-4)
    assert scores.higher_is == "sparser"
    with torch.no_grad():
        lm.linears(1)["mlp.up_proj"].weight.zero_()
    with pytest.raises(ValueError, match=r"block 1, mlp\.up_proj: .*no tail; choose another allocator"):
        AlphaPruning().score(lm, context(tokens[:0]))


# -- all of them


@pytest.mark.parametrize("scorer", SCORERS, ids=repr)
def test_scores_repeat_and_leave_the_model_alone(lm, tokens, scorer):
    before = lm.fingerprint()
    first, second = (scorer.score(lm, context(tokens)) for _ in range(2))
    assert first.values.shape == (lm.n_blocks,)
    assert first.values.tolist() == second.values.tolist()
    assert lm.fingerprint() == before
    assert not lm.blocks[0]._forward_hooks
    assert scorer.plan(lm.n_blocks).get("block_forwards", 0) == first.cost.n_block_forwards
    assert scorer.needs_inputs == (first.cost.n_block_forwards > 0)


# -- whole jobs


def rows():
    """Results by the time they were written."""
    return [
        json.loads(p.read_text()) for p in sorted(Path("results").glob("runs/*/result.json"), key=lambda p: p.stat().st_mtime)
    ]


WITHOUT_SCORES = {"uniform", "atp", "search", "curves", "shapley_margins", "neuronal"}
READ_INPUTS = {"owl", "owl_nm", "dlp", "lsa", "block_influence", "margins_and_influence"}
NOT_OF_DENSE_MODELS = {"from_file", "shapley_experts", "frequency_experts"}  # or of no profile
SHAPLEY = {"shapley", "shapley_rounds", "shapley_sublayers", "leave_one_out", "random", "reversed"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({p.stem for p in (CONF / "allocator").glob("[!_]*.yaml")} - NOT_OF_DENSE_MODELS))
def test_every_allocator_as_a_job(svnup, name):
    """The pruner needs no inputs: what is read of the calibration text is for the scores."""
    code, out, err = svnup(f"allocator={name}", "pruner=magnitude")
    assert code == 0, err
    (row,) = rows()
    stored = {k for k in ("shapley", "scores") if row[k] is not None}
    assert stored == (set() if name in WITHOUT_SCORES else {"shapley"} if name in SHAPLEY else {"scores"})
    assert ("dataset" in row["fingerprints"]) == (name in READ_INPUTS | {"neuronal"})
    profile = row["profile"]
    assert np.average(profile["sparsity"], weights=profile["params"]) == pytest.approx(0.7, abs=1e-9)
    assert (np.ptp(profile["sparsity"]) == 0) == (name == "uniform")
    if row["scores"]:
        assert len(row["scores"]["values"]) == 3
        assert row["scores"]["higher_is"] in ("denser", "sparser")
        figures = {"scores.png", "profile.png"} | ({"tuning.png"} if row["tuning"] else set())
        assert {p.name for p in Path("results").glob("runs/*/figures/*")} == figures
        assert "score" in out
        densest = np.argmax if row["scores"]["higher_is"] == "denser" else np.argmin
        if not row["tuning"]:  # it has measured more than the scores
            assert np.argmin(profile["sparsity"]) == densest(row["scores"]["values"])
    code, out, err = svnup(f"allocator={name}", "pruner=magnitude")
    assert (code, "already finished" in out) == (0, True)
    code, out, err = svnup(f"allocator={name}", "dry_run=true")
    assert code == 0, err
    assert ("scores' block forwards" in out) == (name in READ_INPUTS)


@pytest.mark.slow
def test_random_differs_by_its_seed(svnup):
    for given in ("allocator.shuffle=0", "allocator.shuffle=1", "seed=0"):
        assert svnup("allocator=random", "pruner=magnitude", "allocator.scale=rank", given)[0] == 0
    assert len(rows()) == 2  # the job's seed is that of the order, unless it has its own
    one, other = (row["profile"]["sparsity"] for row in rows())
    assert one != other
    np.testing.assert_allclose(sorted(one), sorted(other), atol=1e-12)  # blocks of one size: the same budgets, dealt otherwise


@pytest.mark.slow
def test_reversed_is_the_mirror_of_shapley(svnup):
    assert svnup("allocator=shapley")[0] == 0
    assert svnup("allocator=reversed")[0] == 0
    upright, mirrored = (row["profile"]["sparsity"] for row in rows())
    np.testing.assert_allclose(np.add(upright, mirrored), 1.4, atol=1e-12)
    assert rows()[1]["shapley"]["n_new_evaluations"] == 0  # the same game


def test_leave_one_out_is_shapley_with_windows_of_one(svnup):
    assert svnup("allocator=leave_one_out", "shapley.game.payoff=neg_nll")[0] == 0
    code, out, _ = svnup("allocator=shapley", "shapley.window=1", "shapley.game.payoff=neg_nll")
    assert (code, "already finished" in out) == (0, True)


@pytest.mark.slow
def test_the_group_shapley_does_not_count_where_no_game_is_played(svnup):
    assert svnup("allocator=owl")[0] == 0
    assert "already finished" in svnup("allocator=owl", "shapley.window=3", "shapley.game.payoff=neg_nll")[1]
    assert "already finished" not in svnup("allocator=owl", "allocator.scorer.m=3.0")[1]
    assert "already finished" not in svnup("allocator=owl", "allocator.lam=0.05")[1]


SUBLAYERS = ["shapley.game.players=sublayer", "allocator.granularity=sublayer", "pruner=magnitude"]


@pytest.mark.slow
def test_budgets_of_sublayers(svnup):
    code, _, err = svnup(*SUBLAYERS)
    assert code == 0, err
    assert svnup(*SUBLAYERS, "allocator.granularity=block")[0] == 0
    fine, coarse = rows()
    assert len(fine["shapley"]["values"]) == 6
    assert "linears" not in coarse["profile"]
    names = [describe(ResultRow.from_json(json.dumps(row)))["allocator"] for row in (fine, coarse)]
    assert [name.split(" ")[0] for name in names] == ["shapleysublayers", "shapley"]
    values, got = np.array(fine["shapley"]["values"]), []
    for index, linears in enumerate(fine["profile"]["linears"]):
        for part in ("self_attn", "mlp"):
            (sparsity,) = {share["sparsity"] for name, share in linears.items() if name.startswith(part)}
            got.append(sparsity)
        zeros = sum(share["sparsity"] * share["size"] for share in linears.values())
        assert zeros / fine["profile"]["params"][index] == pytest.approx(fine["profile"]["sparsity"][index])
    assert np.average(fine["profile"]["sparsity"], weights=fine["profile"]["params"]) == pytest.approx(0.7, abs=1e-9)
    assert (np.diff(np.array(got)[np.argsort(values)]) <= 1e-12).all(), "who is worth more keeps more"
    assert np.ptp(np.reshape(got, (3, 2)), axis=1).max() > 0.01
    for linear in fine["pruning"]["per_linear"]:
        asked = fine["profile"]["linears"][linear["block"]][linear["name"]]["sparsity"]
        assert linear["sparsity"] == pytest.approx(asked, abs=1e-3)
    assert fine["sparsity"]["actual"] == pytest.approx(0.7, abs=1e-3)

    path = next(p for p in Path("results").glob("runs/*/profile.json") if "linears" in p.read_text())
    assert svnup("allocator=from_file", f"allocator.path={path}", "pruner=magnitude")[0] == 0
    again = rows()[-1]
    assert again["profile"] == fine["profile"]
    assert again["metrics"] == fine["metrics"]


@pytest.mark.slow
def test_influence_makes_budgets_of_sublayers(svnup):
    args = ("allocator=block_influence", "pruner=magnitude")
    code, _, err = svnup(*args, "allocator.granularity=sublayer")
    assert code == 0, err
    assert svnup(*args)[0] == 0
    fine, coarse = rows()
    assert [len(row["scores"]["values"]) for row in (fine, coarse)] == [6, 3]
    assert "linears" in fine["profile"]
    assert "linears" not in coarse["profile"]
    assert fine["sparsity"]["actual"] == pytest.approx(0.7, abs=1e-3)
    names = [describe(ResultRow.from_json(json.dumps(row)))["allocator"] for row in (fine, coarse)]
    assert names == ["blockinfluencesublayers (log, lam=0.15)", "blockinfluence (log, lam=0.15)"]


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["sublayer", "linear"])
def test_lsa_makes_finer_budgets(svnup, granularity):
    code, _, err = svnup("allocator=lsa", "pruner=magnitude", f"allocator.granularity={granularity}", "allocator.lam=0.07")
    assert code == 0, err
    (row,) = rows()
    given = [share["sparsity"] for block in row["profile"]["linears"] for share in block.values()]
    values = np.array(row["scores"]["values"])
    assert len(values) == (6 if granularity == "sublayer" else 21)
    assert len({round(s, 9) for s in given}) == len(values)
    assert row["sparsity"]["actual"] == pytest.approx(0.7, abs=1e-3)
    assert describe(ResultRow.from_json(json.dumps(row)))["allocator"].startswith(f"lsa{granularity}s")
    figures = {p.name for p in Path("results").glob("runs/*/figures/*")}
    assert ("scores.png" in figures) == (granularity == "sublayer")


def test_amplitudes_of_sublayers_are_tuned(svnup):
    code, _, err = svnup(*SUBLAYERS, "allocator.lam=auto", "selection.n_seq=2")
    assert code == 0, err
    (row,) = rows()
    assert row["tuning"]["n_new_evaluations"] == 7
    assert len({point["loss"] for point in row["tuning"]["curve"]}) == 7


MISTAKES = {
    "sublayers without their values": (
        ["allocator.granularity=sublayer"],
        ["allocator.granularity=sublayer", "add shapley.game.players=sublayer"],
    ),
    "sublayers without a game": (
        ["allocator=owl", "+allocator.granularity=sublayer"],
        ["allocator.granularity=sublayer", "add allocator=shapley shapley.game.players=sublayer"],
    ),
    "sublayers, divided as blocks": ([*SUBLAYERS[:2], "split=outliers"], ["split=outlier", "use split=uniform"]),
    "sublayers with steps": ([*SUBLAYERS[:2], "pattern=mixed:8"], ["pattern=mixed:8", "allocator.granularity=block"]),
    "sublayers, fixed pattern": ([*SUBLAYERS[:2], "pattern='2:4'", "sparsity=0.5"], ["pattern=2:4", "allocator=uniform"]),
    "sublayers, typo": (["allocator.granularity=sublayers"], ["allocator.granularity=sublayers", "did you mean sublayer?"]),
    "owl with a strange factor": (["allocator=owl", "allocator.scorer.m=0"], ["allocator.scorer.m=0", "choose 3 to 10"]),
    "misspelt option of a scorer": (["allocator=owl", "+allocator.scorer.n=5"], ["allocator.scorer.n=5", "no such option"]),
    "dlp, statistic typo": (["allocator=dlp", "allocator.scorer.statistic=men"], ["statistic=men", "did you mean mean?"]),
    "lsa with a share in percent": (
        ["allocator=lsa", "allocator.scorer.share=50"],
        ["allocator.scorer.share=50", "such as 0.5"],
    ),
    "lsa's scores of blocks": (
        ["allocator=lsa", "allocator.granularity=linear", "allocator.scorer.granularity=block"],
        ["allocator.granularity=linear", "scores are those of blocks"],
    ),
    "neuronal, no sequences": (["allocator=neuronal", "allocator.n_seq=0"], ["allocator.n_seq=0", "1 or more"]),
    "alpha pruning, epsilon in percent": (
        ["allocator=alpha_pruning", "allocator.epsilon=30"],
        ["allocator.epsilon=30", "0.2 to 0.3"],
    ),
    "atp too steep": (["allocator=atp", "allocator.beta=0.4"], ["allocator.beta=0.4", "choose at most 0.3"]),
    "random, negative seed": (["allocator=random", "allocator.shuffle=-1"], ["allocator.shuffle=-1", "0 or more"]),
    "scores taken away": (["allocator=owl", "allocator.scorer=null"], ["allocator.scorer=null", "needs scores"]),
    "scorer that is no node": (["allocator=owl", "allocator.scorer=dlp"], ["allocator.scorer=dlp", "_target_"]),
    "scorer that does not score": (
        ["allocator=owl", "allocator.scorer._target_=svnup.allocation.maps.Uniform", "~allocator.scorer.m"],
        ["allocator.scorer._target_=svnup.allocation.maps.Uniform", "svnup.scoring"],
    ),
    "scorer that does not exist": (
        ["allocator=owl", "allocator.scorer._target_=svnup.scoring.Owls"],
        ["allocator.scorer._target_=svnup.scoring.Owls", "check the spelling"],
    ),
    "fixed pattern": (["allocator=owl", "pattern='2:4'", "sparsity=0.5"], ["pattern=2:4", "allocator=uniform"]),
    "misspelt shapley where it is not used": (
        ["allocator=owl", "+shapley.windw=3"],
        ["shapley.windw=3", "did you mean window?"],
    ),
    "unknown allocator": (["allocator=owll"], ["allocator=owll", "choose among", "alpha_pruning", "did you mean owl?"]),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_before_anything_is_loaded(svnup, case, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("svnup.model.source.Random.load", refuse)
    args, said = MISTAKES[case]
    code, _, err = svnup(*args)
    assert code == 2
    line = err.rstrip("\n").splitlines()[-1]
    assert [s for s in said if s not in line] == [], line
    assert not Path("results").exists()
