"""What only a CUDA device can show: run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svnup.allocation import Uniform
from svnup.game import LayerGame
from svnup.language_model import LanguageModel
from svnup.model import Random
from svnup.pruning import prune_model, pruned_weights
from svnup.pruning.column_block import can_build_kernels, settle, settle_by_torch
from svnup.pruning.sparsegpt import SparseGPT, cholesky_of_inverse
from svnup.pruning.wanda import Wanda
from svnup.shapley.exact import Exact
from svnup.shapley.gates import Gates

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TOKENS = np.random.default_rng(0).integers(0, 2048, (4, 64))


def model(device: str, dtype: str = "float32") -> LanguageModel:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}
    return Random(device=device, dtype=dtype, **shape).load()  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05), ("float16", 0.01)])
def test_games_agree_with_the_cpu(dtype: str, tolerance: float) -> None:
    here, there = Exact().estimate(LayerGame(model("cpu"), TOKENS)), Exact().estimate(LayerGame(model("cuda", dtype), TOKENS))
    np.testing.assert_allclose(there.values, here.values, atol=tolerance)
    gates = Gates(4).estimate(LayerGame(model("cuda", dtype), TOKENS))
    np.testing.assert_allclose(gates.values, Gates(4).estimate(LayerGame(model("cpu"), TOKENS)).values, atol=tolerance)


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT(), Wanda("2:4"), SparseGPT("2:4")], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pruning(pruner: Wanda | SparseGPT, dtype: str) -> None:
    lm = model("cuda", dtype)
    profile = Uniform().allocate(None, lm.block_params, 0.5, pruner.pattern)
    report = prune_model(lm, profile, pruner, TOKENS)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert report.peak_memory_bytes > 0


@pytest.mark.parametrize("width", [128, 96])
@pytest.mark.parametrize("group", [None, (2, 4), (4, 8)], ids=str)
def test_the_kernel_settles_as_torch_does(group: tuple[int, int] | None, width: int) -> None:
    assert can_build_kernels(), "no Triton, or no C compiler"
    g = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(4099, 4096, generator=g, device="cuda")
    x = torch.randn(8192, 4096, generator=g, device="cuda") * torch.randn(4096, generator=g, device="cuda").exp()
    factor = cholesky_of_inverse(x.T @ x / len(x))
    assert factor is not None
    factor, block = factor[:width, :width], weight[:, 256 : 256 + width]
    scale = factor.diagonal().clone()
    scale[5:8] = torch.inf
    mask = torch.rand(block.shape, generator=g, device="cuda") < 0.5 if group is None else None
    new, errors = settle(block, factor, mask, group, scale)
    expected, expected_errors = settle_by_torch(block, factor, mask, group, scale)
    same = ((new == 0) == (expected == 0)).all(1)  # of scores that differ by rounding another may be the smallest
    assert same.float().mean() > (0.999 if group else 1 - 1e-9)
    torch.testing.assert_close(new[same], expected[same], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(errors[same], expected_errors[same], atol=1e-4, rtol=1e-4)


def test_the_pruned_game_and_bounded_memory() -> None:
    lm = model("cuda")
    stand_ins = pruned_weights(lm, Uniform().allocate(None, lm.block_params, 0.5), Wanda(), TOKENS)
    free, tight = LayerGame(lm, TOKENS, pruned=stand_ins), LayerGame(lm, TOKENS, pruned=stand_ins, state_bytes=1)
    np.testing.assert_array_equal(Exact().estimate(free).values, Exact().estimate(tight).values)
