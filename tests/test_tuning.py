"""Options that are chosen on held-out text."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import last_row
from games import Given, LossOf
from hydra import compose, initialize_config_dir
from rows import changed
from rows import run as made_up

from svnup import NUMBERS_VERSION, config
from svnup.allocation import Budget
from svnup.allocation.maps import Atp, Ratios, ScoreBudget, Tuned
from svnup.allocation.splits import ErrorSplit, OutliersSplit, UniformSplit
from svnup.allocation.trial import Trial
from svnup.memo import Memo
from svnup.model.offload import HostBlockStore
from svnup.naming import moving_numbers, named
from svnup.pipeline import trial_of
from svnup.pruning.magnitude import Magnitude
from svnup.pruning.nothing import Nothing
from svnup.pruning.sparsegpt import SparseGPT
from svnup.pruning.walk import prune_model, temporarily_pruned
from svnup.pruning.wanda import Wanda
from svnup.reports.runs import show
from svnup.reports.tables import describe, render
from svnup.results.row import ResultRow
from svnup.results.select import uniform_taken
from svnup.types import BlockScores, SparsityProfile

WHOLE = UniformSplit()
PARAMS, SCORES = np.array([100, 200, 100]), BlockScores([1.0, 2.0, 3.0], "x")


# -- the choice


@pytest.mark.parametrize("allocator", [ScoreBudget("raw"), Ratios(), Atp()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("best", [0.0, 0.1, 1.0])
def test_the_value_with_the_least_loss_is_taken(allocator, best):
    """The loss is least where the spread of the profile is that share of the largest that is tried."""
    spreads = []

    def loss(profile, label, n_seq):
        spreads.append((float(np.ptp(profile.sparsity)), label))
        return abs(spreads[-1][0] - best)

    chosen = Tuned(allocator).allocate(Budget(PARAMS, 0.6), SCORES, LossOf(loss))
    assert len(spreads) == 7  # as many for all
    assert spreads == sorted(spreads)
    assert spreads[0][0] == pytest.approx(0, abs=1e-12)
    assert [label.partition("=")[0] for _, label in spreads] == [allocator.tuned_option] * 7
    nearest = min(spread for spread, _ in spreads if abs(spread - best) == min(abs(s - best) for s, _ in spreads))
    assert np.ptp(chosen.sparsity) == nearest


def test_uniform_where_nothing_beats_it():
    for loss in (lambda *_: 1.0, lambda *_: math.inf, lambda profile, *_: np.ptp(profile.sparsity)):
        chosen = Tuned(ScoreBudget("raw")).allocate(Budget(PARAMS, 0.6), SCORES, LossOf(loss))
        np.testing.assert_allclose(chosen.sparsity, 0.6, atol=1e-12)


# -- how far inputs move


def norms_of_inputs(block, hidden, call):
    """Norms over all tokens of what each linear layer of a block reads, as shares of their sum, in float64; and the outputs."""
    found, hooks = {}, []
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            see = lambda m, args, name=name: found.update({name: args[0].double().flatten(0, -2).norm(dim=0)})  # noqa: E731
            hooks.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        out = block(hidden, *call[0], **call[1])
    for hook in hooks:
        hook.remove()
    return {name: norm / norm.sum() for name, norm in found.items()}, out


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()], ids=["wanda", "sparsegpt"])
def test_misalignment_is_how_far_the_inputs_of_linear_layers_move(random_model, tokens, tmp_path, pruner):
    lm, pruned = random_model(), random_model()
    before, profile = lm.fingerprint(), SparsityProfile([0.4, 0.7, 0.6, 0.7], lm.block_params, 0.6)
    trial = Trial(lm, pruner, WHOLE, tokens, None, tmp_path)
    found = trial.misalignment(profile, "steep", 2)
    assert lm.fingerprint() == before
    prune_model(pruned, profile, pruner, tokens[:2])
    (batch,) = lm.micro_batches(tokens[:2])
    hidden, expected = batch.hidden, 0.0
    for index, call in enumerate(batch.calls):
        a, _ = norms_of_inputs(lm.blocks[index], hidden, call)
        b, hidden = norms_of_inputs(pruned.blocks[index], hidden, call)
        expected += sum(float((a[name] - b[name]).norm()) / len(b[name]) for name in a)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found > 1e-4
    told = trial.to_dict()
    assert (told["kind"], told["curve"]) == ("misalignment", [{"label": "steep", "loss": found}])
    assert (told["best"], told["n_sequences"]) == (told["curve"], 2)


def test_neuronal_as_a_job(svnup):
    job = ("allocator=neuronal", "allocator.n_seq=2", "allocator.lambdas=[0.05,0.1,0.2]", "pruner=wanda")
    code, _, err = svnup(*job)
    assert code == 0, err
    (row,) = (json.loads(path.read_text()) for path in Path("results").glob("runs/*/result.json"))
    tuning = row["tuning"]
    assert [tried["label"] for tried in tuning["curve"]] == ["lambda=0.05", "lambda=0.1", "lambda=0.2"]
    (best,) = tuning["best"]
    steepness = float(best["label"].partition("=")[2])
    assert row["profile"]["sparsity"] == pytest.approx([0.7 - steepness, 0.7, 0.7 + steepness])
    assert next(Path("results").glob("runs/*/figures/tuning.png")).is_file()
    assert "by misalignment" in describe(ResultRow.from_json(json.dumps(row)))["allocator"]
    assert "tuning evaluations" in svnup(*job, "dry_run=true").out
    done = svnup(*job, "offload=disk")
    assert (done.code, "offload=disk" in done.err, len(done.err.splitlines())) == (2, True, 1)


# -- the loss


def test_the_loss_is_that_of_the_pruned_model_and_is_measured_once(random_model, tokens, tmp_path):
    lm, other = random_model(3), random_model(3)
    before, profile = lm.fingerprint(), SparsityProfile([0.3, 0.5, 0.7], [10, 10, 10], 0.5)

    def held_out(per="matrix", text=tokens):
        return Trial(lm, Magnitude(per=per), UniformSplit(), text, Given(text), tmp_path)

    trial = held_out()
    assert trial.to_dict() is None
    assert not any(tmp_path.iterdir())  # nothing is read or written before something is asked
    value = trial.loss(profile, "first")
    prune_model(other, profile, Magnitude(), tokens)
    assert value == float(other.nll(tokens).mean())
    assert lm.fingerprint() == before
    noise = SparsityProfile(np.array([0.3, 0.5, 0.7]) + 1e-15, [10, 10, 10], 0.5)
    assert trial.loss(noise, "again") == value
    report = trial.to_dict()
    assert report["curve"] == [{"label": "first", "loss": value}, {"label": "again", "loss": value}]
    assert (report["n_evaluations"], report["n_new_evaluations"], report["n_sequences"]) == (2, 1, 3)
    assert report["n_full_evaluations"] == 2
    # another process finds it; another way of pruning, another text or another profile does not
    for fresh, asked, new in (
        (held_out(), profile, 0),
        (held_out("row"), profile, 1),
        (held_out(text=tokens[:2]), profile, 1),
        (held_out(), SparsityProfile([0.7, 0.5, 0.3], [10, 10, 10], 0.5), 1),
    ):
        fresh.loss(asked)
        assert fresh.to_dict()["n_new_evaluations"] == new


def test_losses_on_the_first_sequences_are_kept_apart(random_model, tokens, tmp_path):
    lm, other = random_model(3), random_model(3)
    profiles = [SparsityProfile(s, [10, 10, 10], 0.5) for s in ([0.5, 0.5, 0.5], [0.3, 0.5, 0.7], [0.7, 0.5, 0.3])]
    trial = Trial(lm, Magnitude(), UniformSplit(), tokens, Given(tokens), tmp_path)
    whole = trial.loss(profiles[0], "start")
    prune_model(other, profiles[0], Magnitude(), tokens)
    nll = other.nll(tokens)
    assert (trial.loss(profiles[0], "part", 1), trial.loss(profiles[0], "part", 2)) == pytest.approx(
        (nll[0], nll[:2].mean()), rel=1e-6
    )
    assert trial.loss(profiles[0], "all", 3) == trial.loss(profiles[0], "more than there are", 9) == whole
    others = [trial.loss(profile, "rest") for profile in profiles[1:]]
    report = trial.to_dict()
    assert [point.get("n_seq") for point in report["curve"]] == [None, 1, 2, None, None, None, None]
    assert (report["n_evaluations"], report["n_new_evaluations"]) == (7, 5)
    assert report["n_full_evaluations"] == pytest.approx(5 + 1 / 3 + 2 / 3)
    best = [("start", whole), ("all", whole), ("more than there are", whole), ("rest", min(whole, *others))]
    assert report["best"] == [{"label": label, "loss": value} for label, value in best]


def test_losses_of_another_kind_of_device_are_named(random_model, tokens, tmp_path, caplog):
    """A cache that machines share may hold them; where both kinds are there, the own one counts."""
    lm = random_model(2)
    one, other = some_profiles(lm, 4)[:2]

    def trial() -> Trial:
        return Trial(lm, Magnitude(), UniformSplit(), tokens, Given(tokens), tmp_path)

    own = trial().loss(one)
    (file,) = (tmp_path / "losses").glob("*/*.jsonl")
    key = json.loads(file.read_text())["coalition"]
    Memo(file.parent, "cuda").add(key, 7.0)
    assert trial().loss(one) == own
    file.unlink()
    Memo(file.parent, "cuda").add(key, 7.0)
    again = trial()
    assert again.loss(one) == 7.0
    assert "several kinds" not in caplog.text
    again.loss(other)
    assert "of several kinds of device: ['cpu', 'cuda']" in caplog.text
    assert again.to_dict()["kinds"] == ["cpu", "cuda"]


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        (["pruner=magnitude"], "92053a4690a24b1bd0e20c8ee8b5c563"),
        (["pruner=wanda", "selection_loss=kl", "split=error"], "aab646a02f7ff238e195a0c3967779ea"),
    ],
)
def test_losses_lie_where_they_lay(options, folder, tiny, tmp_path, monkeypatch):
    """Losses of hours are looked up by model, texts, pruner, split and kind: a folder that moves is work that is lost."""
    config.register()
    texts = [f"{text}.{size}" for text in ("dataset", "selection") for size in ("n_seq=2", "seq_len=32")]
    overrides = ["allocator=atp", "allocator.beta=auto", "evaluation=none", *texts, f"cache_dir={tmp_path}", *options]
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        job = config.build(compose("config", overrides=overrides))
    monkeypatch.setattr(Trial, "_divide", lambda _, profile: profile)  # what the losses are does not matter here
    monkeypatch.setattr(Trial, "_measure", lambda self, keys, *_: self._memo.add(keys[0], 1.0))
    trial = trial_of(job, tiny, job.tokens())
    trial.loss(job.budget(tiny).uniform(), "uniform")
    (found,) = (tmp_path / "losses").iterdir()
    assert found.name == folder
    key = json.loads(next(found.glob("*.jsonl")).read_text())["coalition"]
    assert key == "a19226331d9b27cf3b1c4f8b1a7d5e02a6197ed7abbb667047d3e2f5808f0f32"


# -- shared prefixes


def some_profiles(lm, n, seed=0):
    """Profiles of few levels, so that many begin alike, dense blocks among them, and the dense model itself."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate([np.zeros((1, lm.n_blocks)), rng.choice([0.0, 0.3, 0.7], size=(n, lm.n_blocks))])
    rows = rng.permutation(np.unique(rows, axis=0))
    return [SparsityProfile(row, lm.block_params, float(np.average(row, weights=lm.block_params))) for row in rows]


def one_by_one(lm, pruner, profiles, calibration, text, split=WHOLE):
    losses = []
    for profile in profiles:
        with temporarily_pruned(lm, split.divide(lm, profile, pruner, calibration), pruner, calibration):
            losses.append(float(np.mean(lm.nll(text))))
    return losses


@pytest.mark.thinned(3)
@pytest.mark.parametrize("state_bytes", [None, 1, 1_200_000])
@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), SparseGPT(), Nothing()], ids=lambda p: type(p).__name__)
def test_losses_of_many_are_those_of_one_after_the_other(random_model, tokens, tmp_path, pruner, state_bytes):
    lm, text = random_model(4), np.random.default_rng(1).integers(5, 2048, size=(90, 24))  # 85 + 5 sequences on a CPU
    before, profiles = lm.fingerprint(), some_profiles(lm, 10)
    trial = Trial(lm, pruner, UniformSplit(), tokens, Given(text), tmp_path, state_bytes=state_bytes)
    tried = [(f"{i}", profile) for i, profile in enumerate(profiles)]
    assert trial.losses(tried, 7) == one_by_one(lm, pruner, profiles, tokens, text[:7])
    assert trial.losses(tried) == one_by_one(lm, pruner, profiles, tokens, text)
    assert lm.fingerprint() == before
    assert not any(p.is_inference() for p in lm.model.parameters()), "gradients can still pass"
    report = trial.to_dict()
    assert [point["label"] for point in report["curve"]] == [label for label, _ in tried] * 2
    n, n_blocks = len(profiles), lm.n_blocks
    most = n * n_blocks * (1 + 7 / 90)
    bound = {None: 0.8, 1_200_000: 0.95, 1: 1 + 1e-9}[state_bytes]
    assert 0 < report["n_selection_block_forwards"] <= bound * most
    assert report["n_calibration_block_forwards"] < 2 * n * (2 * n_blocks - 1)
    assert (report["n_calibration_block_forwards"] > 0) == pruner.needs_inputs


@pytest.mark.parametrize("model_type", ["opt", "gpt2"])
def test_other_families_too(random_model, tokens, tmp_path, model_type):
    lm = random_model(3, model_type=model_type)
    profiles = some_profiles(lm, 8)
    trial = Trial(lm, Wanda(), UniformSplit(), tokens, Given(tokens), tmp_path)
    assert trial.losses([("", p) for p in profiles]) == one_by_one(lm, Wanda(), profiles, tokens, tokens)


@pytest.mark.parametrize("split", [ErrorSplit(), OutliersSplit(), UniformSplit()], ids=lambda s: type(s).__name__)
def test_budgets_of_linears_and_of_sublayers(random_model, tokens, tmp_path, split):
    lm = random_model(3)
    if split.uniform:
        rows = [[0.2, 0.5, 0.4, 0.7, 0.6, 0.6], [0.2, 0.5, 0.4, 0.6, 0.6, 0.7], [0.2, 0.4, 0.4, 0.7, 0.6, 0.6]]
        profiles = [
            SparsityProfile(r, lm.budget_params("sublayer"), np.average(r, weights=lm.budget_params("sublayer"))) for r in rows
        ]
    else:
        profiles = some_profiles(lm, 8)

    trial = Trial(lm, Wanda(), split, tokens, Given(tokens), tmp_path)
    expected = one_by_one(lm, Wanda(), profiles, tokens, tokens, split)
    assert trial.losses([("", p) for p in profiles]) == expected
    assert len(set(expected)) == len(profiles)
    assert trial.to_dict()["n_selection_block_forwards"] < len(profiles) * 3


def test_the_work_is_counted_as_it_is_done(random_model, tokens, tmp_path):
    """By hand, and against the runs that the blocks themselves count."""
    lm, runs = random_model(4), []
    trial = Trial(lm, Wanda(), UniformSplit(), tokens, Given(tokens), tmp_path)
    lm.nll(tokens)  # the first use asks the blocks what they return
    for block in lm.blocks:
        block.mlp.register_forward_hook(lambda *_: runs.append(1))
    a, b, c = 0.5, 0.6, 0.0
    rows = [[a, a, a, a], [a, a, b, c], [a, a, b, a], [c, b, c, c]]
    profiles = [SparsityProfile(r, lm.block_params, float(np.average(r, weights=lm.block_params))) for r in rows]
    trial.losses([("", p) for p in profiles])
    report = trial.to_dict()
    # from [a, a, b, a]: 2 for each block but the last, 1 for that; [a, a, b, c]: has all; [a, a, a, a]: 2 and 1 from block 2
    # on; [c, b, c, c]: 1 through the dense block, 1 for the statistics of the next, and no more
    assert report["n_calibration_block_forwards"] == (2 + 2 + 2 + 1) + 0 + (2 + 1) + (1 + 1)
    assert report["n_selection_block_forwards"] == 4 + 1 + 2 + 4
    assert sum(runs) == 12 + 11
    trial.losses([("", p) for p in profiles])
    assert trial.to_dict()["n_selection_block_forwards"] == 11, "what is known costs nothing"


def test_a_block_that_cannot_be_pruned_leaves_the_model_as_it_was_and_what_was_measured(
    random_model, tokens, tmp_path, monkeypatch
):
    prune, lm = Magnitude.prune, random_model(3)

    def refuses(self, weight, stats, sparsity):
        if sparsity == 0.3:
            raise ValueError("no")
        return prune(self, weight, stats, sparsity)

    before = lm.fingerprint()
    profiles = [SparsityProfile([0.7, 0.5, s], [10, 10, 10], (1.2 + s) / 3) for s in (0.3, 0.4)]
    with monkeypatch.context() as patch:
        patch.setattr(Magnitude, "prune", refuses)
        with pytest.raises(ValueError, match=r"block 2, .*: no"):
            Trial(lm, Magnitude(), UniformSplit(), tokens, Given(tokens), tmp_path).losses([("", p) for p in profiles])
    assert lm.fingerprint() == before
    again = Trial(lm, Magnitude(), UniformSplit(), tokens, Given(tokens), tmp_path)
    again.losses([("", p) for p in profiles])
    assert again.to_dict()["n_new_evaluations"] == 1


def test_divergence_from_the_dense_model(random_model, tokens, tmp_path):
    """Against probabilities written out; kept apart from the NLL, and on parts of the text from those of the same part."""
    lm, profiles = random_model(3), some_profiles(random_model(3), 6)

    def log_probabilities(text):
        with torch.no_grad():
            return lm.model(input_ids=torch.as_tensor(text)).logits[:, :-1].double().log_softmax(-1)

    def expected(profile, text):
        dense = log_probabilities(text)
        with temporarily_pruned(lm, profile, Wanda(), tokens):
            return float((dense.exp() * (dense - log_probabilities(text))).sum(-1).mean())

    def held_out(kind):
        return Trial(lm, Wanda(), UniformSplit(), tokens, Given(tokens), tmp_path, kind=kind)

    kl, tried = held_out("kl"), [("", profile) for profile in profiles]
    for n_seq in (2, None):
        np.testing.assert_allclose(
            kl.losses(tried, n_seq), [expected(p, tokens[:n_seq]) for p in profiles], rtol=1e-4, atol=1e-6
        )
    assert max(kl.losses(tried)) > 1e-3
    assert kl.to_dict()["kind"] == "kl"
    assert held_out("kl").losses(tried) == kl.losses(tried)
    nll, again = held_out("nll"), held_out("kl")
    assert nll.losses(tried) == one_by_one(lm, Wanda(), profiles, tokens, tokens)
    again.losses(tried)
    assert (nll.to_dict()["n_new_evaluations"], again.to_dict()["n_new_evaluations"]) == (len(profiles), 0)


def test_offloaded_models_and_profiles_of_others_are_refused(random_model, tokens, tmp_path):
    lm = random_model(3)
    trial = Trial(lm, Magnitude(), UniformSplit(), tokens, Given(tokens), tmp_path)
    with pytest.raises(ValueError, match="a profile of 2 blocks cannot prune 3 blocks"):
        trial.loss(SparsityProfile([0.5, 0.5], [10, 10], 0.5))
    lm._offload_to(HostBlockStore(lm.blocks, lm.device))
    with pytest.raises(ValueError, match=r"offload: .*offload=none"):
        trial.loss(SparsityProfile([0.5, 0.5, 0.5], [10, 10, 10], 0.5))


# -- whole jobs


@pytest.mark.slow
def test_jobs_that_tune(svnup):
    assert svnup("allocator.lam=auto", "pruner=magnitude")[0] == 0
    row = last_row()
    tuning = row["tuning"]
    assert [p["label"] for p in tuning["curve"]] == [f"lam={v:g}" for v in (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)]
    assert (tuning["n_evaluations"], tuning["n_sequences"]) == (7, 3)
    assert "selection" in row["fingerprints"]
    assert next(Path("results").glob("runs/*/figures/tuning.png")).is_file()
    best = min(tuning["curve"], key=lambda p: p["loss"])["label"].replace("lam", "allocator.lam")
    assert "already finished" in svnup("allocator.lam=auto", "pruner=magnitude")[1]
    assert svnup(best, "pruner=magnitude")[0] == 0
    fixed = last_row()
    assert fixed["tuning"] is None
    assert fixed["profile"] == row["profile"]
    assert fixed["metrics"] == row["metrics"]
    # a job that was lost, and a neighbour of the sweep, use what is known
    assert svnup("allocator.lam=auto", "pruner=magnitude", "force=true")[0] == 0
    assert last_row()["tuning"]["n_new_evaluations"] == 0
    assert svnup("allocator=atp", "allocator.beta=auto", "pruner=magnitude")[0] == 0
    assert last_row()["tuning"]["n_new_evaluations"] == 6  # the uniform budget is shared


@pytest.mark.slow
def test_the_selection_text_counts_where_it_chooses(svnup):
    assert svnup("allocator=random", "pruner=magnitude")[0] == 0
    assert "already finished" in svnup("allocator=random", "pruner=magnitude", "selection.n_seq=2")[1]
    assert svnup("allocator=random", "pruner=magnitude", "allocator.lam=auto")[0] == 0
    assert "already finished" not in svnup("allocator=random", "pruner=magnitude", "allocator.lam=auto", "selection.n_seq=2")[1]
    assert "tuning evaluations" in svnup("allocator=random", "allocator.lam=auto", "dry_run=true")[1]


@pytest.mark.slow
def test_the_loss_that_chooses_is_part_of_the_job_where_it_chooses(svnup):
    assert svnup("allocator=block_influence", "pruner=magnitude")[0] == 0
    assert "already finished" in svnup("allocator=block_influence", "pruner=magnitude", "selection_loss=kl")[1]
    args = ("allocator=block_influence", "pruner=magnitude", "allocator.lam=auto")
    assert svnup(*args)[0] == 0
    nll = last_row()
    assert "already finished" in svnup(*args, "selection_loss=nll")[1]
    assert svnup(*args, "selection_loss=kl")[0] == 0
    kl = last_row()
    assert kl["config_key"] != nll["config_key"]
    assert (nll["tuning"]["kind"], kl["tuning"]["kind"]) == ("nll", "kl")
    assert kl["tuning"]["n_new_evaluations"] == kl["tuning"]["n_evaluations"]
    assert [p["loss"] for p in kl["tuning"]["curve"]] != [p["loss"] for p in nll["tuning"]["curve"]]
    lines = [render([ResultRow.from_json(json.dumps(row))], "csv") for row in (nll, kl)]
    assert ["by kl" in line for line in lines] == [False, True]
    kept = moving_numbers({k: v for k, v in nll["config"].items() if k != "selection_loss"})
    kept["allocator"] = {k: v for k, v in kept["allocator"].items() if k != "compare_uniform"}
    text = json.dumps([NUMBERS_VERSION, named(kept | {"selection": nll["config"]["selection"]})], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == nll["config_key"], "as before there was a choice"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["allocator.lam=auto", "selection.role=test"], "selection.role=test: this text chooses; use selection.role=selection"),
        (["allocator.lam=auto", "selection.n_seq=1000000"], "selection.n_seq=1000000"),
        (["allocator.scale=auto"], "allocator.scale=auto: cannot be tuned, only lam can"),
        (["allocator.lam=auto", "allocator.scale=auto"], "auto: cannot be tuned"),
        (["allocator.lam=auto", "offload=cpu"], "offload=cpu: allocator options that are auto"),
        (["allocator.lam=auto", "pattern='2:4'", "sparsity=0.5"], "pattern=2:4"),
        (["+selection.nseq=3"], "selection.nseq=3"),
    ],
)
def test_mistakes(svnup, args, said):
    code, _, err = svnup(*args)
    assert code == 2
    assert said in err.rstrip("\n").splitlines()[-1]
    assert not Path("results").exists()


# -- compared with the uniform budget


class Told(LossOf):
    """Keeps what was asked and which was taken."""

    def __init__(self, of_scores, of_uniform):
        self.asked, self.taken, self._of = [], None, {"scores": of_scores, "uniform": of_uniform}

    def loss(self, profile, label="", n_seq=None, in_advance=False):
        self.asked.append((label, in_advance))
        return self._of[label]

    def took(self, label):
        self.taken = label


@pytest.mark.parametrize(
    ("of_scores", "of_uniform", "taken"),
    [
        (2.0, 3.0, "scores"),
        (3.0, 2.0, "uniform"),
        (2.0, 2.0, "uniform"),
        (math.inf, math.inf, "uniform"),
    ],
)
def test_a_budget_that_is_no_better_than_uniform_gives_way(of_scores, of_uniform, taken, caplog):
    budget, trial = Budget(PARAMS, 0.6), Told(of_scores, of_uniform)
    alone = ScoreBudget("raw").allocate(budget, SCORES)
    profile = ScoreBudget("raw", compare_uniform="trial").allocate(budget, SCORES, trial)
    assert trial.asked == [("scores", True), ("uniform", True)]
    assert trial.taken == taken
    assert profile.sparsity.tolist() == (alone if taken == "scores" else budget.uniform()).sparsity.tolist()
    assert ("the uniform budget is taken" in caplog.text) == (taken == "uniform")


def test_nothing_is_tried_where_the_budget_is_uniform_already(caplog):
    trial = Told(1.0, 1.0)
    for method, scores in ((ScoreBudget(lam=0.0), SCORES), (ScoreBudget(), BlockScores([2.0, 2.0, 2.0], "x"))):
        replace(method, compare_uniform="trial").allocate(Budget(PARAMS, 0.6), scores, trial)
    assert (trial.asked, trial.taken, caplog.text) == ([], None, "")


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), SparseGPT(block_size=16)], ids=lambda p: type(p).__name__)
def test_losses_in_passing_are_those_of_statistics_that_are_kept(random_model, tokens, tmp_path, pruner):
    lm = random_model(3)
    before, tried = lm.fingerprint(), [(f"{i}", profile) for i, profile in enumerate(some_profiles(lm, 4))]
    kept = Trial(lm, pruner, WHOLE, tokens, Given(tokens), tmp_path / "kept")
    passing = Trial(lm, pruner, WHOLE, tokens, Given(tokens), tmp_path / "passing")
    assert passing.losses(tried, in_advance=True, keep=False) == kept.losses(tried, in_advance=True)
    assert lm.fingerprint() == before
    assert passing.to_dict()["n_selection_block_forwards"] == 3 * len(tried)
    assert "taken" not in passing.to_dict()


@pytest.mark.slow
def test_a_job_compares_its_shapley_budget_with_the_uniform_one(svnup):
    options = ("pruner=magnitude", "allocator=shapley")
    assert svnup(*options, "compare_uniform=off")[0] == 0
    alone = last_row()
    node = {k: v for k, v in alone["config"]["allocator"].items() if k != "compare_uniform"}
    node["scorer"] = {k: v for k, v in node["scorer"].items() if k != "shard"}
    text = json.dumps([NUMBERS_VERSION, named(moving_numbers(alone["config"] | {"allocator": node}))], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == alone["config_key"], "as before there was a choice"
    assert alone["tuning"] is None
    assert svnup(*options, "compare_uniform=trial")[0] == 0
    row = last_row()
    assert row["config_key"] != alone["config_key"]
    tuning = row["tuning"]
    assert [(call["label"], call["trial"]) for call in tuning["curve"]] == [("scores", True), ("uniform", True)]
    scored, even = (call["loss"] for call in tuning["curve"])
    assert tuning["taken"] == ("scores" if scored < even else "uniform")
    assert row["profile"]["sparsity"] == ([0.7] * 3 if even <= scored else alone["profile"]["sparsity"])
    assert "not_compared" not in row["profile"]
    assert "selection" in row["fingerprints"]
    assert "tuning evaluations" in svnup(*options, "compare_uniform=trial", "dry_run=true")[1]
    assert "tuning evaluations" not in svnup(*options, "dry_run=true")[1]
    shown = render([ResultRow.from_json(json.dumps(row))], "csv")
    assert ("uniform taken" in shown) == (tuning["taken"] == "uniform")


@pytest.mark.slow
def test_where_no_comparison_is_possible_the_job_is_as_without_it(svnup):
    assert svnup("pruner=magnitude", "compare_uniform=off")[0] == 0
    key = last_row()["config_key"]
    code, out, err = svnup("pruner=magnitude", "offload=cpu", "force=true", "compare_uniform=trial")
    assert code == 0, err
    assert "offload=cpu: weights pruned in advance and the dense ones need both in memory; the budget is not comp" in out + err
    assert last_row()["config_key"] == key
    assert last_row()["profile"]["not_compared"].startswith("offload=cpu")
    assert svnup("pruner=none", "compare_uniform=trial")[0] == 0  # every budget leaves the same model
    assert last_row()["tuning"] is None
    assert np.ptp(last_row()["profile"]["sparsity"]) > 0
    code, _, err = svnup("pruner=magnitude", "selection.n_seq=1000000", "compare_uniform=trial")
    assert code == 2
    assert "add compare_uniform=off" in err


@pytest.mark.parametrize("allocator", ["owl", "dlp", "block_influence", "leave_one_out", "random", "reversed"])
def test_methods_that_are_compared_are_left_as_they_are(allocator):
    config.register()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        node = compose("config", overrides=[f"allocator={allocator}"]).allocator
    assert node.compare_uniform == "off"


def test_tables_and_pages_mark_a_run_whose_uniform_budget_was_taken():
    calls = [{"label": "scores", "loss": 3.25, "trial": True}, {"label": "uniform", "loss": 3.125, "trial": True}]
    taken = changed(made_up(20.0, allocator="shapley"), tuning={"curve": calls, "taken": "uniform"})
    said = "the uniform budget was taken, which loses 3.1250 nats per token by trial, by scores 3.2500"
    assert uniform_taken(taken) == said
    assert "uniform taken" in describe(taken)["allocator"]
    assert said in show(taken, taken.config)
    for tuning in (None, {"curve": calls, "taken": "scores"}, {"curve": calls}):
        other = changed(taken, tuning=tuning)
        assert uniform_taken(other) is None
        assert "uniform taken" not in describe(other)["allocator"]


def test_tables_tell_a_budget_that_was_measured_or_chosen_on_another_text_than_the_calibration_s():
    row = changed(made_up(20.0, allocator="shapley"), tuning={"curve": [{"label": "scores", "loss": 3.25}]})
    assert " on " not in describe(row)["allocator"]
    file = {"_target_": "svnup.data.TextFile", "path": "/some/where/mine.txt"}
    scorer = row.config["allocator"]["scorer"]
    game = {**scorer.get("game", {}), "data": file}
    config = {**row.config, "dataset": {"_target_": "svnup.data.C4"}, "selection": {"_target_": "svnup.data.WikiText2"}}
    config["allocator"] = {**row.config["allocator"], "scorer": {**scorer, "game": game}}
    name = describe(changed(row, config=config))["allocator"]
    assert "values on textfile mine.txt" in name
    assert "choice on wikitext2" in name
    assert "choice" not in describe(changed(row, config=config, tuning=None))["allocator"], "nothing was chosen"
