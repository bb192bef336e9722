"""Masks keep a pruned model pruned; what a run saves is asked for, found, and evaluates to the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import HERE, SMALL_W2, command, only_row, run_folder
from models import family_model
from safetensors.torch import load_file, save_file

from svnup.language_model import LanguageModel
from svnup.pruning import apply_masks, save_masks
from svnup.pruning.magnitude import Magnitude
from svnup.pruning.walk import prune_model
from svnup.types import SparsityProfile

pytestmark = pytest.mark.usefixtures("own_place")
NO_TEXT = np.zeros((0, 8), dtype=np.int64)


def pruned(lm, sparsity=0.6):
    prune_model(lm, SparsityProfile(np.full(lm.n_blocks, sparsity), lm.block_params, sparsity), Magnitude(), NO_TEXT)
    return lm


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("whole", [True, False], ids=["LanguageModel", "its model"])
def test_masks_prune_a_model_again_after_it_was_trained_on(family, whole, tmp_path):
    lm = pruned(family_model(family))
    save_masks(lm, tmp_path / "masks.safetensors")
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    with torch.no_grad():
        for p in lm.model.parameters():
            p.add_(1)
    apply_masks(lm if whole else lm.model, tmp_path / "masks.safetensors")
    masked = set(lm.pruned_names())
    for name, p in lm.model.named_parameters():
        expected = before[name] + 1
        assert torch.equal(p, expected.masked_fill(before[name] == 0, 0) if name in masked else expected), name
    apply_masks(pruned(family_model(family)), tmp_path / "masks.safetensors")  # of a model already pruned: nothing to do
    size = (tmp_path / "masks.safetensors").stat().st_size
    assert size < lm.block_params.sum() / 8 + 28 * 250, "a bit per weight, and a name and a checksum per linear"


def test_masks_of_minus_zeros_and_of_models_in_training(random_model, tmp_path):
    lm = random_model(2, dtype="bfloat16")
    weight = lm.linears(0)["mlp.up_proj"].weight
    weight[0, :5] = torch.tensor([-0.0, 0.0, 1.0, -0.0, 2.0])
    save_masks(lm, tmp_path / "m")
    weight.fill_(3)
    lm.model.requires_grad_(True)
    apply_masks(lm.model, tmp_path / "m")
    assert weight[0, :5].tolist() == [0, 0, 3, 0, 3]
    assert weight[1:].eq(3).all()
    assert weight.requires_grad


def test_masks_of_another_model_change_nothing(random_model, tmp_path):
    save_masks(pruned(random_model(2)), tmp_path / "two")
    save_masks(pruned(random_model(2, model_type="opt")), tmp_path / "opt")
    save_masks(pruned(random_model(3)), tmp_path / "three")
    wide = random_model(2)
    with torch.no_grad():
        wide.linears(1)["mlp.down_proj"].weight = torch.nn.Parameter(torch.ones(32, 40))
    cases = [(random_model(2), "opt"), (random_model(2), "three"), (wide, "two")]
    for lm, name in cases:
        before = lm.fingerprint()
        with pytest.raises(ValueError, match=r"masks of another model: .*give the masks of this model"):
            apply_masks(lm, tmp_path / name)
        assert lm.fingerprint() == before
    apply_masks(random_model(3), tmp_path / "two")  # the first blocks alone may be masked


def test_files_that_hold_no_masks(random_model, tmp_path):
    lm = random_model(2)
    save_file({"a": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"no masks; give a file that save_masks=true wrote"):
        apply_masks(lm, tmp_path / "weights")
    (tmp_path / "text").write_text("no tensors")
    for name in ("text", "nothing"):
        with pytest.raises(ValueError, match=rf"{name}: cannot be read"):
            apply_masks(lm, tmp_path / name)


# -- what a run saves

UNIFORM = [*SMALL_W2, *HERE, "allocator=uniform"]
SAVED = ["save_masks=true", "save_model=true", "save_format=bitmask"]
PRETRAINED = [
    *("model=pretrained", "model.seq_len=32", "model.test_text=docs", "evaluation.datasets=[docs]", "evaluation.n_seq=4"),
    *("dataset=docs", "dataset@shapley.game.data=docs", "pruner=none", "allocator=uniform", "cache_dir=cache"),
]


def test_what_a_run_saves_evaluates_to_the_same():
    done = command(*UNIFORM, *SAVED)
    assert done.code == 0, done.err
    row, run = only_row(), run_folder()
    lm = LanguageModel.load(str(run / "model"), device="cpu")
    zeros = sum(int((m.weight == 0).sum()) for i in range(3) for m in lm.linears(i).values())
    assert zeros / lm.block_params.sum() == row["sparsity"]["actual"]
    assert len(load_file(run / "masks.safetensors")) == 21
    saved = lm.fingerprint()
    dense = {name: p.clone() for name, p in lm.model.named_parameters()}
    with torch.no_grad():
        for i in range(3):
            for m in lm.linears(i).values():
                m.weight.add_((m.weight == 0).float())
    assert lm.fingerprint() != saved
    apply_masks(lm, run / "masks.safetensors")
    assert all(torch.equal(p, dense[name]) for name, p in lm.model.named_parameters())
    for offload in ("none", "disk"):
        path = f"model.pretrained_model_name_or_path={run}/model"
        done = command(*PRETRAINED, path, f"offload={offload}", f"results_dir={offload}")
        assert done.code == 0, done.err
        again = only_row(offload)
        assert again["metrics"]["docs/ppl"]["value"] == row["metrics"]["docs/ppl"]["value"]
        assert again["sparsity"]["actual"] == row["sparsity"]["actual"]


@pytest.mark.slow
def test_a_finished_run_runs_again_for_what_it_lacks_and_only_then():
    def runs(*args):
        done = command(*UNIFORM, *args)
        assert done.code == 0, done.err
        return "already finished" not in done.out

    assert runs()
    metrics, key = only_row()["metrics"], only_row()["config_key"]
    assert not runs()
    assert runs("save_masks=true")
    assert not runs("save_masks=true")
    assert not runs(), "what is there does no harm"
    assert runs("save_model=true")
    assert not runs("save_model=true", "save_masks=true")
    dense = (run_folder() / "model" / "model.safetensors").stat()
    assert runs("save_model=true", "save_format=bitmask"), "in another form"
    assert (run_folder() / "model_bitmask" / "svnup_bitmask.json").is_file()
    assert not runs(*SAVED)
    assert not runs("save_model=true"), "that is there, too"
    assert (run_folder() / "model" / "model.safetensors").stat() == dense
    assert (only_row()["metrics"], only_row()["config_key"]) == (metrics, key)


@pytest.mark.slow
def test_what_was_saved_of_other_weights_is_not_taken_for_this_model(random_model, tmp_path):
    args = [*PRETRAINED, f"model.pretrained_model_name_or_path={tmp_path / 'm'}", "save_model=true", "save_masks=true"]
    random_model(2, seed=0).save(tmp_path / "m")
    assert command(*args).code == 0
    random_model(2, seed=1).save(tmp_path / "m")
    assert command(*args[:-2]).code == 0
    assert not (run_folder() / "model").exists()
    assert not (run_folder() / "masks.safetensors").exists()
    done = command(*args)
    assert "already finished" not in done.out
    assert (run_folder() / "masks.safetensors").is_file()


def test_masks_of_a_model_on_disk_are_those_of_one_in_memory(random_model, tmp_path):
    random_model(2).save(tmp_path / "m")
    for offload in ("none", "disk"):
        save_masks(pruned(LanguageModel.load(str(tmp_path / "m"), device="cpu", offload=offload)), tmp_path / offload)
    plain, disk = (load_file(tmp_path / n) for n in ("none", "disk"))
    assert plain.keys() == disk.keys()
    assert all(torch.equal(plain[n], disk[n]) for n in plain)
    assert json.loads(Path(tmp_path / "m" / "config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "then", ["the same", "other weights", *(pytest.param(n, marks=pytest.mark.slow) for n in ("force", "in memory"))]
)
def test_an_interrupted_job_on_disk_goes_on_unless_something_changed(then, random_model, tmp_path, monkeypatch):
    from svnup.pruning.wanda import Wanda

    for seed in (0, 1):
        random_model(3, seed=seed).save(tmp_path / f"seed{seed}")
    (tmp_path / "seed0").rename(tmp_path / "source")
    job = [*(a for a in PRETRAINED if "pruner" not in a), "model.pretrained_model_name_or_path=source", "dataset.n_seq=4"]
    prune, calls = Wanda.prune, []

    def fails(self, weight, stats, sparsity):
        calls.append(sparsity)
        if len(calls) == 7 + 3:
            raise RuntimeError("power cut")
        return prune(self, weight, stats, sparsity)

    monkeypatch.setattr(Wanda, "prune", fails)
    with pytest.raises(RuntimeError, match="power cut"):
        command(*job, "offload=disk", "results_dir=results")
    assert (only_row()["status"], only_row()["metrics"]) == ("failed", {})
    assert [p.name for p in sorted((run_folder() / "unfinished" / "offload").glob("block-*"))] == ["block-00000.safetensors"]
    if then == "other weights":
        (tmp_path / "source").rename(tmp_path / "before")
        (tmp_path / "seed1").rename(tmp_path / "source")
    calls[:] = [0.0] * 100  # past the power cut
    more = {"the same": ["offload=disk"], "force": ["offload=disk", "force=true"], "in memory": []}.get(then, ["offload=disk"])
    done = command(*job, *more, "results_dir=results")
    assert done.code == 0, done.err
    assert len(calls) - 100 == (14 if then == "the same" else 21)
    assert not (run_folder() / "offload").exists()
    assert command(*job, "results_dir=alone").code == 0
    for key in ("metrics", "dense", "sparsity", "profile", "config_key"):
        assert only_row()[key] == only_row("alone")[key], key
