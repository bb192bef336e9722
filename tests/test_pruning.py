"""Every pruner keeps the contract; each against its formula; and the walk that prunes a model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from svnup.model.language_model import BATCH_TOKENS, LanguageModel, make_config
from svnup.pattern import Pattern
from svnup.progress import listening
from svnup.pruning.magnitude import Magnitude
from svnup.pruning.nothing import Nothing
from svnup.pruning.sparsegpt import Hessian, SparseGPT, cholesky_of_inverse
from svnup.pruning.walk import Inputs, prune_model, temporarily_pruned
from svnup.pruning.wanda import Wanda
from svnup.types import SparsityProfile

CONF = Path(__file__).parent.parent / "conf" / "pruner"
NAMES = sorted(path.stem for path in CONF.glob("[!_]*.yaml"))
PATTERNS = ["unstructured", "2:4", "4:8"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(name, pattern):
    return instantiate(OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), {"pattern": pattern}))


def a_case(d_out, d_in, *, n_tokens=160, seed=0, dtype=torch.float32):
    """A weight matrix, and inputs with correlations and very different norms."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=g)
    mix = torch.randn(d_in, d_in, generator=g) / d_in**0.5 + torch.eye(d_in)
    x = torch.randn(n_tokens, d_in, generator=g) @ mix * torch.exp(torch.randn(d_in, generator=g))
    return weight.to(dtype), x.to(dtype)


def prune(pruner, weight, x, sparsity, n_batches=2):
    stats = pruner.new_stats(weight)
    for part in x.chunk(n_batches):
        pruner.observe(stats, part)
    return pruner.prune(weight, stats, sparsity)


def exact_zeros(sparsity, size):
    """floor(sparsity * size) in whole numbers, for sparsities of two decimals."""
    return round(sparsity * 100) * size // 100


def cases():
    for pattern in PATTERNS:
        yield from ((pattern, s) for s in ((0.29, 0.5, 0.7) if pattern == "unstructured" else (0.5,)))


# -- the contract of every pruner


def test_there_are_pruners():
    assert {"none", "magnitude", "wanda", "sparsegpt"} <= set(NAMES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pattern", "sparsity"), list(cases()))
@pytest.mark.parametrize("name", NAMES)
def test_contract_of_pruning(name, pattern, sparsity, dtype):
    pruner = make(name, pattern)
    weight, x = a_case(13, 48, dtype=dtype)
    before = weight.clone()
    pruned = prune(pruner, weight, x, sparsity)
    assert torch.equal(weight, before), "prune writes a new matrix"
    assert pruned.shape == weight.shape
    assert pruned.dtype == dtype
    assert pruned.isfinite().all()
    assert torch.equal(pruned, prune(pruner, weight, x, sparsity)), "the same every time"
    if not pruner.prunes:
        assert torch.equal(pruned, weight)
        return
    assert int((pruned == 0).sum()) == exact_zeros(sparsity, weight.numel())
    if group := Pattern.parse(pattern).steps(sparsity):
        zeros = (pruned == 0).reshape(len(pruned), -1, group[1]).sum(-1)
        assert (zeros == group[0]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_contract_of_sparsity_zero(name, pattern, dtype):
    weight, x = a_case(6, 16, dtype=dtype)
    pruned = prune(make(name, pattern), weight, x, 0.0)
    assert pruned.dtype == dtype
    assert torch.equal(pruned.view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_contract_of_shared_statistics(name, pattern):
    pruner = make(name, pattern)
    first, x = a_case(6, 32)
    second, _ = a_case(9, 32, seed=1)
    stats = pruner.new_stats(first)
    pruner.observe(stats, x)
    pruner.prune(first, stats, 0.5)
    assert torch.equal(pruner.prune(second, stats, 0.5), prune(pruner, second, x, 0.5, n_batches=1))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "none"])
def test_contract_of_extremes(name):
    pruner = make(name, "unstructured")
    weight, x = a_case(5, 24)
    assert int((prune(pruner, weight, x, 1.0) == 0).sum()) == weight.numel()
    assert int((prune(pruner, weight, x, 0.001) == 0).sum()) == 0  # 0.12 of a weight
    assert int((prune(pruner, weight, x, 0.01) == 0).sum()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_contract_of_construction(name):
    pruner = make(name, "unstructured")
    assert isinstance(pruner.needs_inputs, bool)
    assert isinstance(pruner.prunes, bool)
    assert pruner.pattern == "unstructured"
    with pytest.raises(AttributeError):
        pruner.pattern = "2:4"  # frozen


@pytest.mark.parametrize("name", [n for n in NAMES if n != "none"])
def test_contract_of_groups_that_do_not_fit(name):
    weight, x = a_case(4, 10)
    with pytest.raises(ValueError, match=r"2:4"):
        prune(make(name, "2:4"), weight, x, 0.5)


def test_nothing_gives_back_the_weights_themselves():
    weight, _ = a_case(3, 8)
    assert Nothing().prune(weight, None, 0.9) is weight


# -- magnitude and Wanda by their formulas


def smallest(scores, sparsity, pattern, whole_matrix=False):
    """The mask by sorting in float64, row by row with the shares of the rounding rule."""
    rows, columns = scores.shape
    mask = np.zeros(scores.shape, dtype=bool)
    if group := Pattern.parse(pattern).steps(sparsity):
        for row in range(rows):
            for start in range(0, columns, group[1]):
                mask[row, start + np.argsort(scores[row, start : start + group[1]])[: group[0]]] = True
    elif whole_matrix:
        mask.reshape(-1)[np.argsort(scores.reshape(-1))[: exact_zeros(sparsity, scores.size)]] = True
    else:
        for row in range(rows):
            count = exact_zeros(sparsity, (row + 1) * columns) - exact_zeros(sparsity, row * columns)
            mask[row, np.argsort(scores[row])[:count]] = True
    return mask


@pytest.mark.parametrize(("pattern", "sparsity"), list(cases()))
def test_magnitude_takes_the_smallest_weights_of_the_matrix(pattern, sparsity):
    weight, x = a_case(7, 40, seed=2)
    mask = smallest(np.abs(weight.double().numpy()), sparsity, pattern, whole_matrix=True)
    pruned = prune(Magnitude(pattern), weight, x, sparsity)
    np.testing.assert_array_equal(pruned.numpy(), np.where(mask, 0, weight.numpy()))


@pytest.mark.parametrize(("pattern", "sparsity"), list(cases()))
def test_wanda_takes_the_smallest_weight_times_input_norm_of_each_row(pattern, sparsity):
    weight, x = a_case(7, 40, seed=3)
    norms = np.sqrt((x.double().numpy() ** 2).sum(axis=0))
    mask = smallest(np.abs(weight.double().numpy()) * norms, sparsity, pattern)
    pruned = prune(Wanda(pattern), weight, x, sparsity, n_batches=3)
    np.testing.assert_array_equal(pruned.numpy(), np.where(mask, 0, weight.numpy()))
    assert (mask != smallest(np.abs(weight.numpy()), sparsity, pattern)).any()  # the inputs matter here


def test_wanda_prunes_dead_inputs_first():
    weight, x = a_case(4, 8)
    x[:, [1, 5]] = 0
    assert (prune(Wanda(), weight, x, 0.25) == 0).nonzero()[:, 1].tolist() == [1, 5] * 4


# -- SparseGPT against the optimal brain surgeon


def surgeon(weight, x, sparsity, pattern="unstructured", block_size=128, damp=0.01):
    """The algorithm of arXiv 2301.00774 in float64 without a Cholesky factor: after column j is settled it is eliminated
    from the inverse Hessian (equation 4 there), which then is that of the columns to the right."""
    w, x = weight.double().numpy().copy(), x.double().numpy()
    rows, columns = w.shape
    h = x.T @ x / len(x)
    dead = np.diag(h) == 0
    damping = (
        damp * np.diag(h).mean()
    )  # dead inputs count as 0: as with the paper's sums over tokens, beside which 1 is nothing
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * np.eye(columns)
    gone = np.zeros(w.shape, dtype=bool)
    group = Pattern.parse(pattern).steps(sparsity)
    inverse = np.linalg.inv(h)

    def eliminated(inverse):
        return inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]

    def leading(inverse, count):
        out = []
        for _ in range(count):
            out.append(inverse[0, 0])
            inverse = eliminated(inverse)
        return np.array(out)

    for j in range(columns):
        if group is None and j % block_size == 0:
            end = min(j + block_size, columns)
            scores = w[:, j:end] ** 2 / leading(inverse, end - j)
            count = exact_zeros(sparsity, rows * end) - exact_zeros(sparsity, rows * j)
            mask = np.zeros(scores.size, dtype=bool)
            mask[np.argsort(scores.reshape(-1), kind="stable")[:count]] = True
            gone[:, j:end] = mask.reshape(scores.shape)
        elif group is not None and j % group[1] == 0:
            scores = w[:, j : j + group[1]] ** 2 / leading(inverse, group[1])
            for row in range(rows):
                gone[row, j + np.argsort(scores[row], kind="stable")[: group[0]]] = True
        step = np.where(gone[:, j], w[:, j], 0) / inverse[0, 0]
        w[:, j:] -= np.outer(step, inverse[0])
        inverse = eliminated(inverse)
    w[gone] = 0
    return w, gone


@pytest.mark.parametrize(
    ("d_in", "block_size", "pattern", "sparsity"),
    [
        (40, 128, "unstructured", 0.5),
        (40, 128, "unstructured", 0.29),
        (40, 40, "unstructured", 0.7),
        (64, 16, "unstructured", 0.5),
        (60, 16, "unstructured", 0.7),  # the last block is narrower
        (40, 128, "2:4", 0.5),
        (64, 16, "2:4", 0.5),
        (48, 16, "4:8", 0.5),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_is_the_optimal_brain_surgeon(d_in, block_size, pattern, sparsity, seed):
    weight, x = a_case(10, d_in, n_tokens=300, seed=seed)
    expected, gone = surgeon(weight, x, sparsity, pattern, block_size)
    pruned = prune(SparseGPT(pattern, block_size=block_size), weight, x, sparsity)
    np.testing.assert_array_equal((pruned == 0).numpy(), gone)
    np.testing.assert_allclose(pruned.double().numpy(), expected, atol=2e-4 * np.abs(expected).max())
    kept = ~gone
    assert np.abs(expected - weight.numpy())[kept].max() > 0.05  # it does make up for errors


@pytest.mark.parametrize("d_in", [192, 301])
def test_the_factor_of_a_wide_hessian_is_that_of_float64(d_in):
    weight, x = a_case(1, d_in, n_tokens=2 * d_in)
    stats = Hessian.empty(weight)
    for part in x.split(100):
        stats.add(part)
    h, u = stats.damped(0.01, cholesky_of_inverse)
    expected = damped_hessian(x)
    np.testing.assert_allclose(h, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert torch.equal(h, h.T)
    assert torch.equal(u, u.triu())
    inverse = np.linalg.inv(expected)
    np.testing.assert_allclose(u.double().T @ u.double(), inverse, rtol=0, atol=1e-4 * inverse.max())


@pytest.mark.parametrize("place", [3, 140, 290])
def test_a_wide_hessian_without_a_factor_has_none(place):
    h = torch.eye(300)
    assert cholesky_of_inverse(h) is not None
    h[place, place + 5] = h[place + 5, place] = 1.5
    assert cholesky_of_inverse(h) is None
    h = torch.eye(300)
    h[place, place] = torch.nan
    assert cholesky_of_inverse(h) is None


def has_kernels_of_avx512():
    """Whether MKL multiplies by its kernels of AVX-512, which it has for Intel's processors alone."""
    info = Path("/proc/cpuinfo")
    intel = info.is_file() and "GenuineIntel" in info.read_text(encoding="utf-8")
    return intel and torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@pytest.mark.skipif(not has_kernels_of_avx512(), reason="products of other kernels depend on the number of threads")
@pytest.mark.parametrize("d_in", [192, 304])
def test_sparsegpt_is_the_same_for_any_number_of_threads(d_in):
    weight, x = a_case(24, d_in, n_tokens=700)
    before, pruned = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            pruned.append(prune(SparseGPT(), weight, x, 0.5))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(pruned[0], pruned[1])
    assert torch.equal(pruned[0], pruned[2])


def test_sparsegpt_blocks_make_a_difference_to_the_mask():
    weight, x = a_case(10, 64, n_tokens=300)
    masks = [prune(SparseGPT(block_size=b), weight, x, 0.5) == 0 for b in (16, 64)]
    assert (masks[0] != masks[1]).any()


def damped_hessian(x, damp=0.01):
    h = x.double().numpy().T @ x.double().numpy() / len(x)
    return h + damp * np.diag(h).mean() * np.eye(len(h))


def least_squares(weight, mask, h):
    """The weights on the rest of a mask that change the outputs least, row by row from the normal equations."""
    w = np.where(mask, 0, weight)
    for row, gone in enumerate(mask):
        kept = ~gone
        w[row, kept] = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ weight[row])
    return w


def test_sparsegpt_is_least_squares_where_all_that_goes_is_on_the_left():
    weight, x = a_case(9, 32)
    x /= x.std(dim=0)
    weight[:, :8] *= 1e-3
    weight[:, 8:] += weight[:, 8:].sign()
    pruned = prune(SparseGPT(), weight, x, 0.25)
    mask = (pruned == 0).numpy()
    assert mask[:, :8].all()
    assert not mask[:, 8:].any()
    expected = least_squares(weight.double().numpy(), mask, damped_hessian(x))
    np.testing.assert_allclose(pruned.double().numpy() - weight.numpy() * ~mask, expected - weight.numpy() * ~mask, atol=1e-6)
    assert np.abs(expected - weight.numpy())[:, 8:].max() > 1e-4


def test_sparsegpt_is_never_better_than_least_squares_on_its_mask():
    for seed in range(5):
        weight, x = a_case(12, 32, seed=seed)
        pruned, h = prune(SparseGPT(), weight, x, 0.5).double().numpy(), damped_hessian(x)
        dense = weight.double().numpy()
        best = least_squares(dense, pruned == 0, h)
        errors = [np.trace((dense - w) @ h @ (dense - w).T) for w in (pruned, best)]
        assert errors[1] <= errors[0] * (1 + 1e-6)


def test_sparsegpt_sets_dead_inputs_to_zero_and_leaves_the_others_alone():
    weight, x = a_case(8, 24)
    dead = [2, 3, 17]
    x[:, dead] = 0
    expected, gone = surgeon(weight, x, 0.5)
    pruned = prune(SparseGPT(), weight, x, 0.5)
    assert (pruned[:, dead] == 0).all()
    np.testing.assert_array_equal((pruned == 0).numpy(), gone)
    np.testing.assert_allclose(pruned.double().numpy(), expected, atol=1e-4)
    assert int((pruned == 0).sum()) == 96


def test_sparsegpt_damps_more_where_it_must_and_no_more():
    weight, _ = a_case(6, 12)
    # diagonal 1, eigenvalues 1 - 1.05 twice over: indefinite until the damping exceeds 0.05, so 0.01 fails and 0.1 serves
    h = torch.eye(12)
    h[0, 1] = h[1, 0] = h[4, 7] = h[7, 4] = 1.05
    damped = SparseGPT().prune(weight, Hessian(h.clone() * 50, 50), 0.5)
    assert torch.equal(damped, SparseGPT(damp=0.1).prune(weight, Hessian(h.clone() * 50, 50), 0.5))
    assert damped.isfinite().all()
    assert int((damped == 0).sum()) == 36


def test_sparsegpt_climbs_to_a_damping_of_ten_thousand_times_as_much():
    weight, _ = a_case(6, 12)
    h = torch.eye(12)
    h[0, 1] = h[1, 0] = 50.0  # needs more than 49 times the mean diagonal: 0.01, 0.1, 1 and 10 fail, 100 serves
    climbed = SparseGPT().prune(weight, Hessian(h.clone(), 1), 0.5)
    expected = SparseGPT(damp=100.0).prune(weight, Hessian(h.clone(), 1), 0.5)
    torch.testing.assert_close(climbed, expected, rtol=1e-5, atol=1e-6)  # 0.01 times ten, four times, is not quite 100
    assert torch.equal(climbed == 0, expected == 0)


@pytest.mark.parametrize("worst", ["indefinite", "nan", "inf"])
def test_sparsegpt_gives_up_with_the_range_of_the_diagonal(worst):
    weight, _ = a_case(6, 4)
    h = torch.diag(torch.tensor([0.25, 1.0, 2.0, 8.0]))
    if worst == "indefinite":
        h[0, 3] = h[3, 0] = 1e6
    else:
        h[0, 3] = h[3, 0] = float(worst)
    message = r"damping 100 of its mean diagonal.*from 0\.25 to 8"
    with pytest.raises(ValueError, match=message):
        SparseGPT().prune(weight, Hessian(h, 1), 0.5)


def test_sparsegpt_options_are_checked():
    for damp in (0, -0.1):
        with pytest.raises(ValueError, match=rf"damp={damp}: choose a positive"):
            SparseGPT(damp=damp)
    with pytest.raises(ValueError, match="block_size=0"):
        SparseGPT(block_size=0)
    with pytest.raises(ValueError, match=r"block_size=130.*pattern=2:4"):
        SparseGPT("2:4", block_size=130)
    assert SparseGPT("4:8", block_size=64).block_size == 64


# -- pruning a model


def uniform(lm, sparsity):
    return SparsityProfile(np.full(lm.n_blocks, sparsity), lm.block_params, sparsity)


@dataclass(frozen=True)
class Spy:
    """Zeroes what Wanda would, and remembers what it was shown."""

    pattern: str = "unstructured"
    seen: list = field(default_factory=list)
    made: list = field(default_factory=list)
    needs_inputs: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    def new_stats(self, weight):
        self.made.append(weight)
        return Wanda().new_stats(weight)

    def observe(self, stats, x):
        self.seen.append(x.clone())
        Wanda().observe(stats, x)

    def prune(self, weight, stats, sparsity):
        return Wanda().prune(weight, stats, sparsity)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sparsities", [[0.5, 0.5, 0.5], [0.31, 0.62, 0.57], [0.0, 0.3, 0.9]])
def test_the_model_gets_the_profile_to_the_rounding_rule(random_model, tokens, name, sparsities):
    lm = random_model(3)
    profile = SparsityProfile(sparsities, lm.block_params, np.mean(sparsities))
    pruner = make(name, "unstructured")
    others = {k: v.clone() for k, v in lm.model.state_dict().items() if "proj" not in k}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(others)
    report = prune_model(lm, profile, pruner, tokens)
    for block, sparsity in enumerate(sparsities):
        for linear, module in lm.linears(block).items():
            (row,) = [r for r in report.per_linear if (r.block, r.name) == (block, linear)]
            zeros, size = int((module.weight == 0).sum()), module.weight.numel()
            assert (row.n_zeros, row.size) == (zeros, size)
            assert zeros == (exact_zeros(sparsity, size) if pruner.prunes else 0)
    if pruner.prunes:
        assert abs(report.sparsity - profile.target) < len(report.per_linear) / profile.params.sum()
        np.testing.assert_allclose(report.block_sparsity(3), sparsities, atol=7 / profile.params.min())
    else:
        assert report.sparsity == 0
    assert all(torch.equal(others[k], v) for k, v in lm.model.state_dict().items() if k in others)
    assert report.peak_memory_bytes > 0
    assert report.seconds["total"] >= report.seconds["prune"] > 0


@pytest.mark.parametrize("name", [n for n in NAMES if n != "none"])
def test_the_model_gets_its_pattern(random_model, tokens, name):
    lm = random_model(2)
    report = prune_model(lm, uniform(lm, 0.5), make(name, "2:4"), tokens)
    assert report.sparsity == 0.5
    for block in range(2):
        for module in lm.linears(block).values():
            assert ((module.weight == 0).reshape(-1, 4).sum(-1) == 2).all()


def test_pruning_is_deterministic(random_model, tokens):
    models = [random_model(2) for _ in range(2)]
    for lm in models:
        prune_model(lm, uniform(lm, 0.6), SparseGPT(), tokens)
    assert models[0].fingerprint() == models[1].fingerprint() != random_model(2).fingerprint()


def test_linears_that_read_the_same_input_share_one_statistic(random_model):
    lm, spy = random_model(2), Spy()
    tokens = np.random.default_rng(0).integers(5, 2048, size=(33, 128))  # 16 + 16 + 1 sequences on a CPU
    prune_model(lm, uniform(lm, 0.5), spy, tokens)
    # q, k, v; o; gate, up; down
    assert len(spy.made) == 2 * 4
    assert len(spy.seen) == 2 * 4 * 3
    assert [x.shape[0] for x in spy.seen[:12]] == [16 * 128] * 4 + [16 * 128] * 4 + [128] * 4


def inputs_of(lm, block, tokens):
    """What the linears of a block read when the whole model runs as it is, by a forward of the model itself."""
    read, hooks = {}, []
    for name, module in lm.linears(block).items():
        hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: read.__setitem__(name, args[0].detach())))
    with torch.no_grad():
        lm.model(input_ids=torch.as_tensor(tokens))
    for hook in hooks:
        hook.remove()
    return {name: x.reshape(-1, x.shape[-1]).double().numpy() for name, x in read.items()}


def wanda_by_hand(lm, block, read, sparsity):
    with torch.no_grad():
        for name, module in lm.linears(block).items():
            scores = np.abs(module.weight.double().numpy()) * np.sqrt((read[name] ** 2).sum(axis=0))
            module.weight[torch.as_tensor(smallest(scores, sparsity, "unstructured"))] = 0


def test_statistics_come_from_the_pruned_blocks_before_and_the_block_itself_still_dense(random_model, tokens):
    lm, by_hand, dense = random_model(2), random_model(2), random_model(2)
    report = prune_model(lm, uniform(lm, 0.6), Wanda(), tokens)
    other = copy.deepcopy(by_hand)
    expected_error = {}
    for block in range(2):
        read = inputs_of(by_hand, block, tokens)
        before = {name: m.weight.double().numpy().copy() for name, m in by_hand.linears(block).items()}
        wanda_by_hand(by_hand, block, read, 0.6)
        for name, m in by_hand.linears(block).items():
            change = ((read[name] @ (before[name] - m.weight.double().numpy()).T) ** 2).sum()
            expected_error[block, name] = change / ((read[name] @ before[name].T) ** 2).sum()
        wanda_by_hand(other, block, inputs_of(dense, block, tokens), 0.6)
    assert lm.fingerprint() == by_hand.fingerprint()
    assert lm.fingerprint() != other.fingerprint()  # a dense prefix gives other masks
    assert {(r.block, r.name): r.error for r in report.per_linear} == pytest.approx(expected_error, rel=1e-4)


def test_a_block_that_is_not_pruned_is_still_passed_through(random_model, tokens):
    lm, by_hand = random_model(3), random_model(3)
    profile = SparsityProfile([0.0, 0.6, 0.6], lm.block_params, 0.4)
    prune_model(lm, profile, Wanda(), tokens)
    for block in (1, 2):
        wanda_by_hand(by_hand, block, inputs_of(by_hand, block, tokens), 0.6)
    assert lm.fingerprint() == by_hand.fingerprint()


def test_nothing_is_measured_in_a_block_that_is_not_pruned(random_model, tokens):
    class Counts(Wanda):
        asked: ClassVar[list] = []

        def new_stats(self, weight):
            self.asked.append(tuple(weight.shape))
            return super().new_stats(weight)

    lm, pruner = random_model(3), Counts()
    before = lm.linears(0)["mlp.down_proj"].weight.clone()
    report = prune_model(lm, SparsityProfile([0.0, 0.6, 0.0], lm.block_params, 0.2), pruner, tokens)
    assert len(pruner.asked) == 4  # q with k and v, o, gate with up, down
    assert torch.equal(lm.linears(0)["mlp.down_proj"].weight, before)
    assert {r.error for r in report.per_linear if r.block != 1} == {0.0}
    assert report.block_sparsity(3).tolist() == pytest.approx([0.0, 0.6, 0.0], abs=1e-3)
    report = prune_model(lm, SparsityProfile([0.0, 0.6, 0.0], lm.block_params, 0.2), Magnitude(), tokens)
    assert {r.error for r in report.per_linear} == {None}


def test_blocks_run_once_for_their_inputs_and_once_more_if_that_changed_them(random_model, tokens):
    lm, runs = random_model(4), [0] * 4
    lm.nll(tokens)  # the first use asks the blocks what they return
    for index, block in enumerate(lm.blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    prune_model(lm, SparsityProfile([0.0, 0.6, 0.6, 0.6], lm.block_params, 0.45), Wanda(), tokens)
    assert runs == [1, 2, 2, 1]  # nobody reads what the last one makes


def test_hooks_are_gone_afterwards_also_after_an_error(random_model, tokens):
    class Breaks(Spy):
        def observe(self, stats, x):
            raise RuntimeError("stop")

    lm = random_model(2)
    prune_model(lm, uniform(lm, 0.5), Wanda(), tokens)
    with pytest.raises(RuntimeError, match="stop"):
        prune_model(lm, uniform(lm, 0.5), Breaks(), tokens)
    for module in lm.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_pruners_without_inputs_run_no_block(random_model):
    lm = random_model(2)
    for index in range(2):
        lm.blocks[index].register_forward_hook(lambda *_: pytest.fail("ran"))
    report = prune_model(lm, uniform(lm, 0.5), Magnitude(), np.zeros((0, 8), dtype=np.int64))
    assert report.sparsity == 0.5
    assert {r.error for r in report.per_linear} == {None}


def test_nothing_reports_the_zeros_that_are_there(random_model, tokens):
    lm = random_model(2)
    with torch.no_grad():
        lm.linears(0)["mlp.up_proj"].weight[0] = 0
    before = lm.fingerprint()
    report = prune_model(lm, uniform(lm, 0.5), Nothing(), tokens)
    assert lm.fingerprint() == before
    assert sum(r.n_zeros for r in report.per_linear) == 32


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.index_fill(1, torch.tensor([1]), float("nan")), "not all finite"),
        (lambda w: w.index_fill(1, torch.tensor([1]), float("inf")), "not all finite"),
        (lambda w: w.masked_fill(torch.ones_like(w, dtype=torch.bool), 0), r"1024 zeros where 512 were asked for"),
        (lambda w: w + 1e-3, r"0 zeros where 512 were asked for"),
    ],
)
def test_pruners_that_go_wrong_are_named_with_block_and_linear(random_model, tokens, spoil, message):
    class Spoils(Spy):
        def prune(self, weight, stats, sparsity):
            pruned = super().prune(weight, stats, sparsity)
            self.seen.append(None)
            return spoil(weight.clone()) if weight is target else pruned

    lm = random_model(2)
    target = lm.linears(1)["self_attn.o_proj"].weight
    with pytest.raises(ValueError, match=rf"stage pruning: block 1, self_attn\.o_proj: .*{message}"):
        prune_model(lm, uniform(lm, 0.5), Spoils(), tokens)


def test_errors_of_a_pruner_are_named_with_block_and_linear(random_model, tokens):
    lm = random_model(2)
    with torch.no_grad():
        lm.blocks[1].input_layernorm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"stage pruning: block 1, self_attn\.q_proj: the Hessian cannot be factorised"):
        prune_model(lm, uniform(lm, 0.5), SparseGPT(), tokens)


def test_profiles_of_another_model_are_refused(random_model, tokens):
    lm = random_model(2)
    before = lm.fingerprint()
    with pytest.raises(ValueError, match="profile of 3 blocks cannot prune 2 blocks"):
        prune_model(lm, SparsityProfile([0.5] * 3, [1] * 3, 0.5), Magnitude(), tokens)
    assert lm.fingerprint() == before


def test_more_dead_inputs_than_sparsity_take_the_whole_budget_of_sparsegpt(random_model, tokens):
    lm = random_model(2, model_type="opt")
    with torch.no_grad():
        lm.blocks[0].fc1.bias[:20] = -1e4  # 20 of 48 ReLU units never fire
    weight = lm.linears(0)["fc2"].weight
    before = weight.clone()
    report = prune_model(lm, uniform(lm, 0.3), SparseGPT(), tokens)
    assert {linear.n_zeros == int(0.3 * linear.size) for linear in report.per_linear} == {True}
    assert (weight[:, :20] == 0).sum() == int(0.3 * weight.numel()), "and no weight more, though all of these are free"
    assert torch.equal(weight[:, 20:], before[:, 20:]), "there is no error to make up for"


def test_float16_and_bfloat16_models_can_be_pruned(random_model, tokens):
    for dtype in ("bfloat16", "float16"):
        lm = random_model(2, dtype=dtype)
        assert prune_model(lm, uniform(lm, 0.5), SparseGPT(), tokens).sparsity == pytest.approx(0.5, abs=1e-3)
        assert lm.dtype == dtype


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3", "gemma2"])
def test_other_families_can_be_pruned(family, tokens):
    shape = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = make_config(family, **shape, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    lm = LanguageModel.random(config, None, seed=0, device="cpu")
    assert prune_model(lm, uniform(lm, 0.5), SparseGPT(), tokens).sparsity == 0.5


def test_a_look_at_the_inputs_ends_where_the_last_linear_is_called(random_model, tokens, monkeypatch):
    """On all batches but the first, which says where that is; the pruned weights are those of whole runs, bit for bit."""
    monkeypatch.setitem(BATCH_TOKENS, "cpu", tokens.shape[1])  # a sequence a batch
    profile = SparsityProfile(np.full(2, 0.5), random_model(2).block_params, 0.5)
    runs: list[int] = []

    def forget(inputs: Inputs) -> None:
        inputs._current.clear()
        inputs._calls = 0

    def pruned(whole_runs: bool) -> dict[str, torch.Tensor]:
        lm = random_model(2)
        lm.blocks[0].mlp.down_proj.register_forward_hook(lambda *_: runs.append(0))
        with monkeypatch.context() as patch:
            if whole_runs:  # as if the outputs were wanted
                patch.setattr(Inputs, "_next_batch", forget)
            prune_model(lm, profile, SparseGPT(), tokens)
        return lm.model.state_dict()

    whole, n_whole = pruned(whole_runs=True), len(runs)
    short, n_short = pruned(whole_runs=False), len(runs) - n_whole
    assert all(torch.equal(whole[name], short[name]) for name in whole)
    assert n_whole - n_short == len(tokens) - 1


def test_a_pruning_that_is_only_tried_is_told_as_that(random_model):
    lm, heard = random_model(2), []
    profile = SparsityProfile(np.full(2, 0.5), lm.block_params, 0.5)
    with listening(lambda name, done, *_: heard.append((name, done))):
        with temporarily_pruned(lm, profile, Magnitude(), np.zeros((1, 8), dtype=np.int64)):
            pass
        prune_model(lm, profile, Magnitude(), np.zeros((1, 8), dtype=np.int64))
    assert heard == [(name, done) for name in ("trial pruning", "pruning") for done in range(3)]
