"""Options that are chosen on held-out text."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from cli import last_row

from svnup.allocation import Atp, Ratios, ScoreBudget, Tuned
from svnup.pruning import prune_model, temporarily_pruned
from svnup.pruning.magnitude import Magnitude
from svnup.tuning import HeldOutLoss
from svnup.types import BlockScores, SparsityProfile

PARAMS, SCORES = np.array([100, 200, 100]), BlockScores([1.0, 2.0, 3.0], "x")


# -- the choice


@pytest.mark.parametrize("allocator", [ScoreBudget("raw"), Ratios(), Atp()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("best", [0.0, 0.1, 1.0])
def test_the_value_with_the_least_loss_is_taken(allocator, best):
    """The loss is least where the spread of the profile is that share of the largest that is tried."""
    spreads = []

    def loss(profile, label):
        spreads.append((float(np.ptp(profile.sparsity)), label))
        return abs(spreads[-1][0] - best)

    chosen = Tuned(allocator).allocate(SCORES, PARAMS, 0.6, loss=loss)
    assert len(spreads) == 7  # as many for all
    assert spreads == sorted(spreads)
    assert spreads[0][0] == pytest.approx(0, abs=1e-12)
    assert [label.partition("=")[0] for _, label in spreads] == [allocator.knob] * 7
    nearest = min(spread for spread, _ in spreads if abs(spread - best) == min(abs(s - best) for s, _ in spreads))
    assert np.ptp(chosen.sparsity) == nearest


def test_uniform_where_nothing_beats_it():
    for loss in (lambda profile, label: 1.0, lambda profile, label: math.inf, lambda profile, label: np.ptp(profile.sparsity)):
        chosen = Tuned(ScoreBudget("raw")).allocate(SCORES, PARAMS, 0.6, loss=loss)
        np.testing.assert_allclose(chosen.sparsity, 0.6, atol=1e-12)


# -- the loss


def test_the_loss_is_that_of_the_pruned_model_and_is_measured_once(random_model, tokens, tmp_path):
    lm, other = random_model(3), random_model(3)
    before, profile = lm.fingerprint(), SparsityProfile([0.3, 0.5, 0.7], [10, 10, 10], 0.5)

    def held_out(name="a", text=tokens):
        return HeldOutLoss(lm, lambda p: temporarily_pruned(lm, p, Magnitude(), text), lambda: text, name, tmp_path)

    loss = held_out()
    assert loss.to_dict() is None
    assert not any(tmp_path.iterdir())  # nothing is read or written before something is asked
    value = loss(profile, "first")
    prune_model(other, profile, Magnitude(), tokens)
    assert value == float(other.nll(tokens).mean())
    assert lm.fingerprint() == before
    noise = SparsityProfile(np.array([0.3, 0.5, 0.7]) + 1e-15, [10, 10, 10], 0.5)
    assert loss(noise, "again") == value
    report = loss.to_dict()
    assert report["curve"] == [{"label": "first", "loss": value}, {"label": "again", "loss": value}]
    assert (report["n_evaluations"], report["n_new_evaluations"], report["n_sequences"]) == (2, 1, 3)
    assert report["n_full_evaluations"] == 2
    # another process finds it; another way of pruning, another text or another profile does not
    for fresh, asked, new in (
        (held_out(), profile, 0),
        (held_out("b"), profile, 1),
        (held_out("a", tokens[:2]), profile, 1),
        (held_out(), SparsityProfile([0.7, 0.5, 0.3], [10, 10, 10], 0.5), 1),
    ):
        fresh(asked)
        assert fresh.to_dict()["n_new_evaluations"] == new


def test_losses_on_the_first_sequences_are_kept_apart(random_model, tokens, tmp_path):
    lm, other = random_model(3), random_model(3)
    profiles = [SparsityProfile(s, [10, 10, 10], 0.5) for s in ([0.5, 0.5, 0.5], [0.3, 0.5, 0.7], [0.7, 0.5, 0.3])]
    loss = HeldOutLoss(lm, lambda p: temporarily_pruned(lm, p, Magnitude(), tokens), lambda: tokens, "a", tmp_path)
    whole = loss(profiles[0], "start")
    prune_model(other, profiles[0], Magnitude(), tokens)
    nll = other.nll(tokens)
    assert (loss(profiles[0], "part", 1), loss(profiles[0], "part", 2)) == pytest.approx((nll[0], nll[:2].mean()), rel=1e-6)
    assert loss(profiles[0], "all", 3) == loss(profiles[0], "more than there are", 9) == whole
    others = [loss(profile, "rest") for profile in profiles[1:]]
    report = loss.to_dict()
    assert [point.get("n_seq") for point in report["curve"]] == [None, 1, 2, None, None, None, None]
    assert (report["n_evaluations"], report["n_new_evaluations"]) == (7, 5)
    assert report["n_full_evaluations"] == pytest.approx(5 + 1 / 3 + 2 / 3)
    best = [("start", whole), ("all", whole), ("more than there are", whole), ("rest", min(whole, *others))]
    assert report["best"] == [{"label": label, "loss": value} for label, value in best]


# -- whole jobs


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


def test_the_selection_text_counts_where_it_chooses(svnup):
    assert svnup("allocator=random", "pruner=magnitude")[0] == 0
    assert "already finished" in svnup("allocator=random", "pruner=magnitude", "selection.n_seq=2")[1]
    assert svnup("allocator=random", "pruner=magnitude", "allocator.lam=auto")[0] == 0
    assert "already finished" not in svnup("allocator=random", "pruner=magnitude", "allocator.lam=auto", "selection.n_seq=2")[1]
    assert "tuning evaluations" in svnup("allocator=random", "allocator.lam=auto", "dry_run=true")[1]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["allocator.lam=auto", "selection.role=test"], "selection.role=test: only the selection text may choose"),
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
