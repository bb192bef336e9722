"""Local reconstruction: kept weights follow the gradient of the dense model's outputs, and zeros stay zeros."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import HERE, SMALL, command, results
from models import FAMILIES, family_model

from svnup.allocation import Budget
from svnup.config import build, composed
from svnup.config.job import config_key
from svnup.model.language_model import LanguageModel
from svnup.pruning import prune_model
from svnup.pruning.magnitude import Magnitude
from svnup.pruning.nothing import NoRecovery
from svnup.pruning.reconstruct import Reconstruct, _rate
from svnup.pruning.sparsegpt import SparseGPT
from svnup.pruning.wanda import Wanda
from svnup.types import SparsityProfile

TEXT = np.random.default_rng(9).integers(3, 97, size=(6, 16))
QUICK = Reconstruct(lr=3e-3, epochs=3, batch_tokens=32)


def uniform(lm, sparsity=0.6, pattern="unstructured"):
    return Budget(lm.block_params, sparsity, pattern).uniform()


def matrices(lm):
    return {f"{i}.{name}": p.detach().clone() for i in range(lm.n_blocks) for name, p in lm.linear_parameters(i).items()}


def states(lm):
    """Hidden states before each block and after the last, by the model's own forward."""
    with torch.no_grad():
        return lm.model.model(torch.as_tensor(TEXT), output_hidden_states=True).hidden_states


def pair(pruner, recovery, family="llama", **options):
    """The weights after pruning alone, those after recovery, and the report of the latter."""
    alone, recovered = family_model(family), family_model(family)
    prune_model(alone, uniform(alone, **options), pruner, TEXT)
    report = prune_model(recovered, uniform(recovered, **options), pruner, TEXT, recovery)
    return matrices(alone), matrices(recovered), report


@pytest.mark.thinned(3)
@pytest.mark.parametrize("recovery", [QUICK, replace(QUICK, inputs="dense")], ids=["pruned inputs", "dense inputs"])
@pytest.mark.parametrize(
    "pruner", [Wanda(), Magnitude(), SparseGPT(), Wanda("2:4")], ids=["wanda", "magnitude", "sparsegpt", "2:4"]
)
def test_errors_fall_and_zeros_stay_where_pruning_put_them(pruner, recovery):
    options = {"sparsity": 0.5, "pattern": "2:4"} if pruner.pattern == "2:4" else {}
    alone, recovered, report = pair(pruner, recovery, **options)
    first = [name for name in alone if name.startswith("0.")]  # behind the first block masks see other inputs
    for name in first if pruner.needs_inputs else alone:
        assert torch.equal(recovered[name] == 0, alone[name] == 0)
    assert all((recovered[name] != alone[name]).any() for name in alone)
    if pruner.pattern == "2:4":
        assert all(((w == 0).reshape(len(w), -1, 4).sum(-1) == 2).all() for w in recovered.values())
    assert [block.block for block in report.recovered] == [0, 1, 2, 3]
    assert all(block.taken and block.error_after < 0.9 * block.error_before for block in report.recovered)
    assert report.sparsity == pytest.approx(options.get("sparsity", 0.6), abs=1e-3)
    assert sum(r.n_zeros for r in report.per_linear) == sum(int((w == 0).sum()) for w in recovered.values())


def test_one_step_of_adamw_moves_each_kept_weight_by_the_rate_against_its_gradient():
    lm, rate = family_model("llama"), 1e-4
    dense = states(lm)
    alone = family_model("llama")
    profile = SparsityProfile([0.6, 0.0, 0.0, 0.0], lm.block_params, 0.15)
    prune_model(alone, profile, Wanda(), TEXT)
    block = alone.blocks[0].requires_grad_()
    with torch.enable_grad():
        inside = states_of(alone, dense[0])
        (inside - dense[1]).square().mean().backward()
    report = prune_model(lm, profile, Wanda(), TEXT, Reconstruct(lr=rate, epochs=1, batch_tokens=10**6))
    assert [(b.block, b.n_steps) for b in report.recovered] == [(0, 1)], "a block that is dense is left alone"
    for name, before in alone.linear_parameters(0).items():
        kept, gradient = before != 0, block.get_parameter(name).grad
        clear = kept & (gradient.abs() > 1e-4 * gradient.abs().max())
        moved = lm.linear_parameters(0)[name] - before
        torch.testing.assert_close(moved[clear], -rate * gradient[clear].sign(), rtol=0, atol=2e-2 * rate)
        assert not moved[~kept].any()


def states_of(lm, hidden):
    """The outputs of the first block for inputs (n_seq, seq_len, d), with gradients."""
    batch = next(lm.micro_batches(TEXT, 10**6))
    return lm.run_block(0, replace(batch, hidden=hidden.clone())).hidden


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_errors_are_those_of_the_outputs_beside_the_dense_model_s(inputs):
    lm = family_model("llama")
    dense = states(lm)
    profile = SparsityProfile([0.0, 0.6, 0.0, 0.6], lm.block_params, 0.3)
    report = prune_model(lm, profile, Wanda(), TEXT, replace(QUICK, inputs=inputs))
    assert [b.block for b in report.recovered] == [1, 3]
    after = states(lm)
    change = float((dense[2] - dense[1]).square().sum())
    assert report.recovered[0].error_after == pytest.approx(float((after[2] - dense[2]).square().sum()) / change, rel=1e-4)


def test_rates_rise_over_a_tenth_of_the_steps_and_fall_to_nothing():
    rates = [_rate(step, 40) for step in range(40)]
    assert rates[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert np.allclose(np.diff(rates[4:]), -1 / 36)
    assert _rate(0, 5) == 1  # too few steps to warm up


def test_a_block_that_would_be_worse_keeps_its_pruned_weights(caplog):
    alone, recovered, report = pair(Magnitude(), Reconstruct(lr=1.0, epochs=2, batch_tokens=32))
    assert not any(block.taken for block in report.recovered)
    assert all(block.error_after == block.error_before for block in report.recovered)
    assert all(torch.equal(recovered[name], alone[name]) for name in alone)
    assert caplog.text.count("recovery.lr=1 ") == 4


def test_a_block_that_adds_nothing_has_nothing_to_recover():
    lm = family_model("llama")
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            lm.linears(0)[name].weight.zero_()
    report = prune_model(lm, uniform(lm), Wanda(), TEXT, QUICK)
    first, second = report.recovered[:2]
    assert (first.error_before, first.error_after, first.n_steps, first.taken) == (0, 0, 0, False)
    assert second.taken


@pytest.mark.parametrize("pruner", [Wanda(), Magnitude()], ids=["wanda", "magnitude"])
def test_no_recovery_is_pruning_alone_to_the_last_bit(pruner):
    alone, recovered, report = pair(pruner, NoRecovery())
    assert all(torch.equal(recovered[name], alone[name]) for name in alone)
    assert report.recovered is None
    assert "recovered" not in report.to_dict()
    assert "recovery" not in report.seconds


def test_the_same_text_gives_the_same_weights():
    _, first, _ = pair(Wanda(), QUICK)
    _, second, _ = pair(Wanda(), QUICK)
    assert all(torch.equal(first[name], second[name]) for name in first)


DTYPES = ["float32", "bfloat16", "float16"]
QUICKLY = {("gpt2", dtype) for dtype in DTYPES} | {("opt_post_norm_projected", "bfloat16"), ("gemma3_text_mixed", "bfloat16")}
CASES = [
    pytest.param(family, dtype, marks=() if (family, dtype) in QUICKLY else pytest.mark.slow)
    for family in FAMILIES
    for dtype in DTYPES
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_families_and_dtypes(family, dtype):
    lm = family_model(family)
    lm.model.to(getattr(torch, dtype))
    lm = LanguageModel(lm.model)
    report = prune_model(lm, uniform(lm), Wanda(), TEXT, replace(QUICK, epochs=6))
    assert all(block.error_after < block.error_before for block in report.recovered if block.taken)
    assert sum(block.taken for block in report.recovered) >= 3
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)
    assert {p.dtype for p in matrices(lm).values()} == {getattr(torch, dtype)}


class NoTokenizer:
    def save_pretrained(self, folder):
        return None


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_from_disk_blocks_are_refitted_alike_and_go_on_after_an_interruption(tmp_path, monkeypatch, inputs):
    source, recovery = family_model("llama"), replace(QUICK, inputs=inputs)
    source.tokenizer = NoTokenizer()
    source.save(tmp_path / "model")
    whole = prune_model(source, uniform(source), Wanda(), TEXT, recovery)

    def load():
        options = {"tokenizer": NoTokenizer(), "device": "cpu", "offload": "disk", "scratch": tmp_path / "scratch"}
        return LanguageModel.load(str(tmp_path / "model"), **options)

    lm, store = load(), LanguageModel.store_block

    def interrupted(self, index, key, note):
        store(self, index, key, note)
        if index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "store_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_model(lm, uniform(lm), Wanda(), TEXT, recovery)
    monkeypatch.undo()
    del lm
    lm = load()
    report = prune_model(lm, uniform(lm), Wanda(), TEXT, recovery)
    assert lm.fingerprint() == source.fingerprint()
    assert [(b.block, b.error_before, b.error_after) for b in report.recovered] == [
        (b.block, b.error_before, b.error_after) for b in whole.recovered
    ]
    assert [r.n_zeros for r in report.per_linear] == [r.n_zeros for r in whole.per_linear]
    del lm
    other, alone = load(), family_model("llama")
    for model in (other, alone):
        prune_model(model, uniform(model), Wanda(), TEXT)
    assert other.fingerprint() == alone.fingerprint(), "blocks that were refitted are not taken for blocks that were not"


# -- as a job

JOB = [*SMALL, "allocator=uniform", "sparsity=0.6"]


@pytest.mark.slow
def test_a_job_records_what_recovery_did_and_is_told_apart(own_place):
    more = ["recovery=reconstruct", "recovery.epochs=2", "recovery.batch_tokens=64"]
    assert command(*JOB, *HERE).code == 0
    done = command(*JOB, *HERE, *more)
    assert done.code == 0
    assert "wanda + reconstruct uniform" in done.err
    assert "already finished" in command(*JOB, *HERE, *more).out
    rows = [json.loads(path.read_text()) for path in Path("results").glob("runs/*/result.json")]
    plain, recovered = sorted(rows, key=lambda row: "recovered" in row["pruning"])
    assert "recovered" not in plain["pruning"]
    blocks = recovered["pruning"]["recovered"]
    assert [b["block"] for b in blocks] == [0, 1, 2]
    assert all(b["n_steps"] == 4 and 0 < b["error_after"] <= b["error_before"] for b in blocks)
    assert recovered["pruning"]["seconds"]["recovery"] > 0
    assert recovered["sparsity"]["actual"] == plain["sparsity"]["actual"]
    table = results("table", "results", "--format", "csv").out
    assert "wanda + reconstruct" in table


def test_jobs_without_recovery_are_those_of_before():
    job = build(composed(*JOB))
    config = {k: v for k, v in job.config.items() if k != "recovery"}
    assert config_key(config, chooses=False) == job.key
    keys = {build(composed(*JOB, "recovery=reconstruct", *more)).key for more in ([], ["recovery.lr=0.0002"])}
    assert len(keys | {job.key}) == 3


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["recovery=reconstruct", "pruner=none"], "recovery=reconstruct: a model of which nothing is pruned"),
        (["recovery=reconstruct", "recovery.lr=0"], "recovery.lr=0: a rate of AdamW; choose"),
        (["recovery=reconstruct", "recovery.epochs=0"], "recovery.epochs=0: choose 1 or more"),
        (["recovery=reconstruct", "recovery.inputs=sparse"], "recovery.inputs=sparse: choose one of pruned, dense"),
        (["recovery=reconstruct", "recovery.rate=1"], "rate"),
    ],
)
def test_mistakes_are_one_line(own_place, overrides, told):
    done = command(*JOB, *HERE, *overrides)
    assert done.code == 2
    assert told in done.err
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_plan_tells_the_passes_of_recovery(own_place):
    job = [*JOB, *HERE, "dry_run=true", "dataset.n_seq=512"]
    line = re.compile(r"^ +recovery +[\d.]+ [MGT]FLOP", re.MULTILINE)
    assert not line.search(command(*job).out)
    assert line.search(command(*job, "recovery=reconstruct").out)
