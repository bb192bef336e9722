"""Every family goes the whole way: Shapley values, budget, pruning, evaluation, saving, reloading."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import command
from models import FAMILIES as WALKED
from models import GROUPED, MIXED, OPT, SHAPE
from transformers import AutoModelForCausalLM

from svnup.allocation import Budget
from svnup.allocation.maps import ScoreBudget
from svnup.game import LayerGame
from svnup.model.language_model import LanguageModel, make_config
from svnup.model.linears import matrix
from svnup.model.loading import read_tokenizer
from svnup.model.source import BUILT_IN_FOLDER
from svnup.pruning import prune_model
from svnup.pruning.masks import n_zeros
from svnup.pruning.sparsegpt import SparseGPT
from svnup.pruning.wanda import Wanda
from svnup.shapley.sliding_window import SlidingWindow
from svnup.types import SparsityProfile

TEXT = np.random.default_rng(3).integers(3, 97, size=(3, 16))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA = GROUPED | {"sliding_window": 4, "layer_types": MIXED, "query_pre_attn_scalar": 8}

# family: (model type, shape, the sizes (d_out, d_in) of a block's linears)
Q, KV, UP, DOWN = (32, 32), (16, 32), (48, 32), (32, 48)
SEPARATE = [Q, KV, KV, Q, UP, UP, DOWN]
FUSED = [(96, 32), (32, 32), (128, 32), (32, 128)]
FAMILIES = {
    "llama": ("llama", GROUPED, SEPARATE),
    "llama3": ("llama", GROUPED | {"rope_parameters": LLAMA3}, SEPARATE),
    "mistral": ("mistral", GROUPED | {"sliding_window": 4}, SEPARATE),
    "qwen2": ("qwen2", GROUPED, SEPARATE),
    "qwen3": ("qwen3", GROUPED, SEPARATE),
    "gemma2": ("gemma2", GEMMA, SEPARATE),
    "gemma3": ("gemma3_text", GEMMA, SEPARATE),
    "phi3": ("phi3", WALKED["phi3"][1], [(32 + 2 * 16, 32), Q, (96, 32), DOWN]),  # q-k-v, and gate with up
    "opt": ("opt", OPT, [Q, Q, Q, Q, UP, DOWN]),
    "opt_350m": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, [Q, Q, Q, Q, UP, DOWN]),
    "gpt2": ("gpt2", WALKED["gpt2"][1], FUSED),
    "gpt_neox": ("gpt_neox", SHAPE, [(96, 32), (32, 32), UP, DOWN]),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 3}, [Q, KV, KV, Q, *[(96, 32), DOWN] * 3]),
}


class NoTokenizer:
    def save_pretrained(self, folder):
        return None


def make(family, tokenizer=None, **changes):
    kind, shape, _ = FAMILIES[family]
    lm = LanguageModel.random(make_config(kind, **(shape | changes)), tokenizer or NoTokenizer(), seed=0, device="cpu")
    with torch.no_grad():  # loud enough for every block to matter
        for index in range(lm.n_blocks):
            for linear in lm.linears(index).values():
                linear.weight.mul_(6)
    return lm


def values(lm):
    return SlidingWindow(window=2).estimate(LayerGame(lm, TEXT, payoff="neg_nll"))


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_count_as_what_they_are(family):
    lm, (_, _, sizes) = make(family), FAMILIES[family]
    for index in range(4):
        assert sorted(tuple(matrix(m).shape) for m in lm.linears(index).values()) == sorted(sizes)
    assert lm.block_params.tolist() == [sum(a * b for a, b in sizes)] * 4


WAYS = {
    "wanda": (Wanda(), 0.6),
    "sparsegpt": (SparseGPT(), 0.6),
    "2:4": (SparseGPT("2:4"), 0.5),
}
QUICK = [("llama3", "sparsegpt"), ("gemma3", "wanda"), ("phi3", "sparsegpt"), ("gpt2", "sparsegpt"), ("gpt2", "2:4")]
QUICK += [("opt_350m", "wanda"), ("gpt_neox", "sparsegpt"), ("mixtral", "sparsegpt")]
ALL = [
    (f, w) if (f, w) in QUICK else pytest.param(f, w, marks=pytest.mark.slow)
    for f in FAMILIES
    for w in WAYS
    if w != "2:4" or f in ("gpt2", "llama", "phi3")
]


@pytest.mark.parametrize(("family", "way"), ALL)
def test_a_family_goes_the_whole_way(family, way, tmp_path):
    lm, (pruner, sparsity) = make(family), WAYS[way]
    dense, scores = lm.nll(TEXT), values(lm)
    assert np.isfinite(scores.values).all()
    assert len(set(scores.values)) == 4
    if way == "2:4":
        profile = SparsityProfile(np.full(4, 0.5), lm.block_params, 0.5, "2:4")
    else:
        profile = ScoreBudget(scale="rank", lam=0.1).allocate(Budget(lm.block_params, sparsity), scores)
        assert np.argmin(profile.sparsity) == np.argmax(scores.values)
        assert np.ptp(profile.sparsity) > 0.1
    report = prune_model(lm, profile, pruner, TEXT)
    names = set()
    for row in report.per_linear:
        weight = lm.linears(row.block)[row.name].weight
        asked = n_zeros(float(profile.sparsity[row.block]), weight.numel())
        assert int((weight == 0).sum()) == row.n_zeros == asked
        assert row.size == weight.numel()
        names.add((row.block, row.name))
        if way == "2:4":
            groups = (matrix(lm.linears(row.block)[row.name]) == 0).reshape(-1, 4).sum(1)
            assert (groups == 2).all(), row.name
    assert names == {(i, name) for i in range(4) for name in lm.linears(i)}
    pruned = lm.nll(TEXT)
    assert np.isfinite(pruned).all()
    assert not np.allclose(pruned, dense)
    rows = torch.as_tensor(TEXT)
    with torch.no_grad():
        expected = lm.model(input_ids=rows).logits
        lm.save(tmp_path / "model")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        assert torch.equal(again(input_ids=rows).logits, expected)
    reloaded = LanguageModel.load(str(tmp_path / "model"), tokenizer=NoTokenizer(), device="cpu")
    assert np.array_equal(reloaded.nll(TEXT), pruned)
    for (index, name), row in zip(sorted(names), sorted(report.per_linear, key=lambda r: (r.block, r.name)), strict=True):
        assert int((reloaded.linears(index)[name].weight == 0).sum()) == row.n_zeros


# -- through the command


JOB = [
    *("model=pretrained", "model.pretrained_model_name_or_path=source", "model.seq_len=32", "model.test_text=docs"),
    *("dataset=docs", "dataset.n_seq=4", "dataset@shapley.game.data=docs", "shapley.game.data.n_seq=2", "shapley.window=2"),
    *("evaluation.datasets=[docs]", "evaluation.n_seq=4", "allocator.scale=rank", "results_dir=results", "cache_dir=cache"),
]
VOCABULARY = {"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize(
    ("family", "offload"),
    [
        ("gpt2", "none"),
        ("gemma3", "disk"),
        pytest.param("gpt2", "disk", marks=pytest.mark.slow),
        pytest.param("mixtral", "disk", marks=pytest.mark.slow),
        pytest.param("gemma3", "none", marks=pytest.mark.slow),
    ],
)
def test_a_family_through_the_command(family, offload, tmp_path, own_place):
    make(family, read_tokenizer(str(BUILT_IN_FOLDER)), **VOCABULARY).save(tmp_path / "source")
    done = command(*JOB, "compare_uniform=off", "pruner=sparsegpt", "save_model=true", f"offload={offload}")
    assert done.code == 0, done.err
    (run,) = Path("results/runs").iterdir()
    row = json.loads((run / "result.json").read_text())
    assert row["status"] == "finished"
    assert len(row["shapley"]["values"]) == 4
    assert row["sparsity"]["actual"] == pytest.approx(0.7, abs=1e-3)
    assert not (run / "offload").exists()
    again = ["model.pretrained_model_name_or_path=" + str(run / "model"), "allocator=uniform", "pruner=none"]
    done = command(*[a for a in JOB if "scale" not in a], *again, "results_dir=again")
    assert done.code == 0, done.err
    (run,) = Path("again/runs").iterdir()
    other = json.loads((run / "result.json").read_text())
    assert other["metrics"]["docs/ppl"]["value"] == row["metrics"]["docs/ppl"]["value"]
    assert other["sparsity"]["actual"] == row["sparsity"]["actual"]
