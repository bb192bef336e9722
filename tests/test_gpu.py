"""What only a CUDA device can show: run with `pytest -m gpu` where there is one.

Here without Hydra and the fixtures of the other tests, so that `make bench-gpu` can run it where only torch, transformers
and pytest are installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from svnup.allocation import Budget
from svnup.game import LayerGame
from svnup.language_model import LanguageModel
from svnup.model.digest import CHUNK, tensor_sha256
from svnup.model.source import Random
from svnup.pruning.sparsegpt import SparseGPT
from svnup.pruning.walk import prune_model, pruned_weights
from svnup.pruning.wanda import Wanda
from svnup.shapley.exact import Exact
from svnup.shapley.gates import Gates

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PRUNERS = Path(__file__).parent.parent / "conf" / "pruner"
TOKENS = np.random.default_rng(0).integers(0, 2048, (4, 64))


def model(device: str, dtype: str = "float32", n_blocks: int = 4) -> LanguageModel:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": n_blocks}
    return Random(device=device, dtype=dtype, **shape).load()  # type: ignore[arg-type]


def made(node: Any, pattern: str) -> Any:
    """A component as its file in conf/ says."""
    if not isinstance(node, dict):
        return pattern if node == "${pattern}" else node
    module, _, name = node["_target_"].rpartition(".")
    return getattr(import_module(module), name)(**{k: made(v, pattern) for k, v in node.items() if k != "_target_"})


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05), ("float16", 0.01)])
def test_games_agree_with_the_cpu(dtype: str, tolerance: float) -> None:
    here, there = Exact().estimate(LayerGame(model("cpu"), TOKENS)), Exact().estimate(LayerGame(model("cuda", dtype), TOKENS))
    np.testing.assert_allclose(there.values, here.values, atol=tolerance)
    gates = Gates(4).estimate(LayerGame(model("cuda", dtype), TOKENS))
    np.testing.assert_allclose(gates.values, Gates(4).estimate(LayerGame(model("cpu"), TOKENS)).values, atol=tolerance)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", sorted(p.stem for p in PRUNERS.glob("[!_]*.yaml") if p.stem != "none"))
def test_pruning(name: str, dtype: str, pattern: str) -> None:
    pruner = made(yaml.safe_load((PRUNERS / f"{name}.yaml").read_text(encoding="utf-8")), pattern)
    lm = model("cuda", dtype, n_blocks=2)
    report = prune_model(lm, Budget(lm.block_params, 0.5, pattern).uniform(), pruner, TOKENS)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert report.peak_memory_bytes > 0


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_offloaded_model_is_the_same(offload: str, dtype: str, tmp_path: Path) -> None:
    plain = model("cuda", dtype)
    plain.save(tmp_path / "model")
    lm = LanguageModel.load(str(tmp_path / "model"), dtype=dtype, device="cuda", offload=offload, scratch=tmp_path / "scratch")
    np.testing.assert_array_equal(lm.nll(TOKENS), plain.nll(TOKENS))
    np.testing.assert_array_equal(
        Exact().estimate(LayerGame(lm, TOKENS)).values, Exact().estimate(LayerGame(plain, TOKENS)).values
    )
    for each in (lm, plain):
        prune_model(each, Budget(each.block_params, 0.5).uniform(), SparseGPT(), TOKENS)
    assert lm.fingerprint() == plain.fingerprint()
    on_device = {p.device.type for block in lm.blocks for p in block.parameters()}
    assert on_device == {"cuda", "cpu" if offload == "cpu" else "meta"}
    assert all(p.is_pinned() for block in lm.blocks for p in block.parameters() if p.device.type == "cpu")
    for form in ("dense", "bitmask"):
        lm.save(tmp_path / form, form)  # type: ignore[arg-type]
        assert LanguageModel.load(str(tmp_path / form), dtype=dtype, device="cuda").fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_hashed_as_on_the_cpu(dtype: torch.dtype) -> None:
    """Several at a time, in more than one part, and where they do not lie in one piece."""
    of_parts = [torch.randn(rows, 4000, generator=torch.Generator().manual_seed(rows)).to(dtype) for rows in range(4300, 4306)]
    assert all(tensor.nbytes > CHUNK for tensor in of_parts)
    given = {
        str(i): tensor for i, tensor in enumerate([*of_parts, *(tensor.T for tensor in of_parts), torch.ones((), dtype=dtype)])
    }
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda name: tensor_sha256(name, given[name].cuda()), given)]
    assert found == [tensor_sha256(name, tensor) for name, tensor in given.items()]


def test_the_pruned_game_and_bounded_memory() -> None:
    lm = model("cuda")
    replacements = pruned_weights(lm, Budget(lm.block_params, 0.5).uniform(), Wanda(), TOKENS)
    free, tight = LayerGame(lm, TOKENS, pruned=replacements), LayerGame(lm, TOKENS, pruned=replacements, state_bytes=1)
    np.testing.assert_array_equal(Exact().estimate(free).values, Exact().estimate(tight).values)


SHARED = """
import sys
from pathlib import Path
import numpy as np
from svnup import distributed
from test_gpu import TOKENS, Budget, SparseGPT, model, prune_model
with distributed.joined():
    lm = model(sys.argv[1])
    prune_model(lm, Budget(lm.block_params, 0.5).uniform(), SparseGPT(), TOKENS)
    np.save(Path(sys.argv[2]) / f"nll{distributed.rank()}.npy", lm.nll(TOKENS))
    (Path(sys.argv[2]) / f"weights{distributed.rank()}").write_text(lm.fingerprint())
"""


def of_two_processes(device: str, folder: Path) -> list[tuple[str, Any]]:
    """The pruned model's fingerprint and losses in each of two processes that share out its calibration."""
    (folder / "shared.py").write_text(SHARED, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(folder / "shared.py"),
    ]
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([*command, device, str(folder)], env=env, check=True, timeout=300)
    return [((folder / f"weights{i}").read_text(), np.load(folder / f"nll{i}.npy")) for i in range(2)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_prune_one_model_by_nccl(tmp_path: Path) -> None:
    (weights, nll), (other, same) = of_two_processes("cuda", tmp_path)
    assert weights == other
    np.testing.assert_array_equal(nll, same)
    lm = model("cuda")
    prune_model(lm, Budget(lm.block_params, 0.5).uniform(), SparseGPT(), TOKENS)
    np.testing.assert_allclose(nll, lm.nll(TOKENS), rtol=1e-3)
