"""Every way to divide a block's budget keeps the contract, and what it measures decides who keeps more."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from models import family_model
from omegaconf import OmegaConf

from svnup.allocation.splits import ErrorSplit, OutliersSplit, ShapleySplit, UniformSplit, _output_errors
from svnup.language_model import LanguageModel
from svnup.pruning.masks import n_zeros
from svnup.pruning.walk import prune_model, pruned_weights
from svnup.pruning.wanda import Wanda
from svnup.shapley import all_coalitions, exact_values
from svnup.types import Share, SparsityProfile

CONF = Path(__file__).parent.parent / "conf" / "split"
NAMES = sorted(path.stem for path in CONF.glob("[!_]*.yaml"))
TEXT = np.random.default_rng(3).integers(3, 97, size=(3, 16))
SPARSITIES = [0.6, 0.0, 0.85, 0.75]


def make(name, **options):
    return instantiate(OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), options))


def profile(lm, sparsities=SPARSITIES):
    return SparsityProfile(sparsities, lm.block_params, float(np.average(sparsities, weights=lm.block_params)))


def test_there_are_splits():
    assert NAMES == ["error", "outliers", "shapley", "uniform"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_contract_of_splits(name, family):
    lm, split = family_model(family), make(name)
    before, given = lm.fingerprint(), profile(lm)
    divided = split.divide(lm, given, Wanda(), TEXT)
    assert lm.fingerprint() == before, "the model is as it was"
    assert divided.sparsity.tolist() == given.sparsity.tolist()
    assert (divided.target, divided.pattern, divided.params.tolist()) == (given.target, given.pattern, given.params.tolist())
    assert split.divide(lm, given, Wanda(), TEXT).to_dict() == divided.to_dict()
    if split.uniform:
        assert divided is given
        return
    assert divided.linears is not None
    for index, (shares, sparsity) in enumerate(zip(divided.linears, SPARSITIES, strict=True)):
        assert {n: s.size for n, s in shares.items()} == {n: m.weight.numel() for n, m in lm.linears(index).items()}
        found = np.array([share.sparsity for share in shares.values()])
        sizes = [share.size for share in shares.values()]
        assert np.average(found, weights=sizes) == pytest.approx(sparsity, abs=1e-9)
        assert found.min() >= max(0.0, sparsity - 0.3)
        assert found.max() <= max(sparsity, min(0.95, sparsity + 0.2))
        assert (np.ptp(found) > 0.01) == (sparsity > 0)
        assert np.ptp(found) <= 2 * split.lam + 1e-9
    report = prune_model(lm, divided, Wanda(), TEXT)
    for row in report.per_linear:
        assert row.n_zeros == n_zeros(divided.of(row.block, row.name), row.size)
    np.testing.assert_allclose(report.block_sparsity(4), SPARSITIES, atol=7 / lm.block_params.min())


@pytest.mark.parametrize("name", [n for n in NAMES if n != "uniform"])
def test_without_an_amplitude_a_split_is_uniform(name):
    lm = family_model("llama")
    divided = make(name, lam=0.0).divide(lm, profile(lm), Wanda(), TEXT)
    for index, sparsity in enumerate(SPARSITIES):
        assert [divided.of(index, n) for n in lm.linears(index)] == pytest.approx([sparsity] * 7, abs=1e-12)


def test_linears_that_pruning_hurts_more_keep_more():
    lm = family_model("llama")
    given = profile(lm, [0.6, 0.5, 0.7, 0.6])
    divided = ErrorSplit(lam=0.05).divide(lm, given, Wanda(), TEXT)
    report = prune_model(family_model("llama"), given, Wanda(), TEXT)
    for index in range(4):
        rows = [r for r in report.per_linear if r.block == index]
        asked = [divided.of(index, r.name) for r in sorted(rows, key=lambda r: r.error)]
        assert (np.diff(asked) <= 1e-12).all()


def test_linears_with_more_outliers_keep_more():
    lm = family_model("llama")
    linear = lm.linears(2)["mlp.gate_proj"]
    linear.weight.fill_(1e-3)
    linear.weight[:, 3] = 50.0  # in every row one of 32, far above the mean; random weights have hardly any
    divided = OutliersSplit(lam=0.1).divide(lm, profile(lm, [0.5] * 4), Wanda(), TEXT)
    shares = {n: divided.of(2, n) for n in lm.linears(2)}
    assert min(shares, key=shares.get) == "mlp.gate_proj"


def test_outliers_are_measured_on_a_model_on_disk(tmp_path):
    lm = family_model("llama")
    lm.tokenizer = type("NoTokenizer", (), {"save_pretrained": lambda self, folder: None})()
    lm.save(tmp_path / "m")
    disk = LanguageModel.load(str(tmp_path / "m"), tokenizer=lm.tokenizer, device="cpu", offload="disk")
    split = OutliersSplit(lam=0.1, threshold=3.0)
    plain = split.divide(lm, profile(lm), Wanda(), TEXT)
    assert split.divide(disk, profile(disk), Wanda(), TEXT).to_dict() == plain.to_dict()
    for model in (lm, disk):
        prune_model(model, plain, Wanda(), TEXT)
    assert disk.fingerprint() == lm.fingerprint()
    with pytest.raises(ValueError, match=r"offload: .*offload=none"):
        ErrorSplit().divide(disk, profile(disk), Wanda(), TEXT)


@torch.no_grad()
def test_shapley_values_of_linears_are_those_of_the_definition(random_model):
    """Over all orders in which the linears of a block come back, with the block's output computed by hand."""
    lm = random_model(2)
    lm.blocks[1].mlp.down_proj.weight.mul_(5)
    given = profile(lm, [0.6, 0.5])
    absent = pruned_weights(lm, given, Wanda(), TEXT)
    for visit in lm.walk(TEXT[:2]):
        inputs = replace(visit.batches[0])
        names = list(visit.linears)
        found = exact_values(_output_errors(visit, absent[visit.index], all_coalitions(len(names))))
        dense = {n: m.weight.data for n, m in visit.linears.items()}
        out = visit.batches[0].hidden

        def payoff(present, names=names, visit=visit, dense=dense, inputs=inputs, out=out):
            for name in names:
                visit.linears[name].weight.data = dense[name] if name in present else absent[visit.index][f"{name}.weight"]
            error = lm.run_block(visit.index, inputs).hidden.double() - out.double()
            return -float(error.square().sum() / out.double().square().sum())

        known = {}
        for size in range(8):
            for present in combinations(names, size):
                known[frozenset(present)] = payoff(present)
        payoff(names)  # dense again
        for name, value in zip(names, found, strict=True):
            gains = [(len(c), known[c | {name}] - v) for c, v in known.items() if name not in c]
            mean = np.mean([np.mean([gain for n, gain in gains if n == size]) for size in range(7)])
            assert value == pytest.approx(mean, rel=1e-6, abs=1e-12)
        assert found.sum() == pytest.approx(-known[frozenset()], rel=1e-9)
    divided = ShapleySplit(lam=0.1, n_seq=2).divide(lm, given, Wanda(), TEXT)
    shares = {n: divided.of(1, n) for n in lm.linears(1)}
    per_weight = {n: v / lm.linears(1)[n].weight.numel() for n, v in zip(names, found, strict=True)}
    assert sorted(shares, key=shares.get) == sorted(shares, key=per_weight.get, reverse=True)


def test_a_block_of_too_many_linears_is_refused(random_model):
    lm = random_model(1)
    lm.blocks[0].more = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(6))
    with pytest.raises(ValueError, match=r"split=shapley: needs 2\^13 .*split=error"):
        ShapleySplit().divide(lm, profile(lm, [0.5]), Wanda(), TEXT)


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"n_seq=0: .*1 or more"):
        ShapleySplit(n_seq=0)
    for make_it in (lambda: ErrorSplit(lam=-0.1), lambda: OutliersSplit(lam=1.5), lambda: ErrorSplit(lam=float("nan"))):
        with pytest.raises(ValueError, match=r"lam=.*0 to 1"):
            make_it()
    with pytest.raises(ValueError, match=r"threshold=0.*positive"):
        OutliersSplit(threshold=0)
    assert not UniformSplit.needs_inputs


def test_a_profile_of_the_linears_of_another_model_is_refused():
    lm = family_model("llama")
    before = lm.fingerprint()
    for names in (["a"], ["a", "b"]):
        size = int(lm.block_params[0]) // len(names)
        linears = tuple({n: Share(0.5, size) for n in names} for _ in range(4))
        other = SparsityProfile([0.5] * 4, lm.block_params, 0.5, linears=linears)
        with pytest.raises(ValueError, match=r"linear layers \['a'.*cannot prune block 0"):
            prune_model(lm, other, Wanda(), TEXT)
    assert lm.fingerprint() == before


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_budgets_of_sublayers_reach_their_linears(random_model, model_type):
    lm = random_model(3, model_type=model_type)
    sizes = lm.budget_params("sublayer")
    assert sizes.reshape(3, 2).sum(axis=1).tolist() == lm.block_params.tolist()
    sparsity = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    fine = SparsityProfile(sparsity, sizes, float(np.average(sparsity, weights=sizes)))
    divided = UniformSplit().divide(lm, fine, Wanda(), TEXT)
    assert divided.target == fine.target
    assert divided.mean == pytest.approx(fine.target, abs=1e-12)
    for index in range(3):
        assert {name: share.size for name, share in divided.linears[index].items()} == {
            name: linear.weight.numel() for name, linear in lm.linears(index).items()
        }
        for name in lm.linears(index):
            assert divided.of(index, name) == sparsity[2 * index + ("attn" not in name)]
    report = prune_model(lm, divided, Wanda(), TEXT)
    assert report.sparsity == pytest.approx(fine.target, abs=1e-3)
