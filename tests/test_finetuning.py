"""Training after pruning: zeros stay zeros to the last one, in every kind of training, and come back without the masks."""

from __future__ import annotations

import re
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import HERE, command, only_row
from models import GROUPED, family_model, random_model
from pages import blocks
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from svnup.data import Docs
from svnup.language_model import LanguageModel
from svnup.model.language_model import make_config, prunable_parameters
from svnup.pruning import prune_model, save_masks
from svnup.pruning.magnitude import Magnitude
from svnup.recovery import KeepZeros, Masks
from svnup.types import SparsityProfile

TEXT = torch.as_tensor(np.random.default_rng(3).integers(3, 97, size=(12, 16)))
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
}
EXPERTS = GROUPED | {"num_hidden_layers": 2, "num_experts_per_tok": 2, "intermediate_size": 16, "num_local_experts": 4}


def pruned(lm, sparsity=0.6):
    profile = SparsityProfile(np.full(lm.n_blocks, sparsity), lm.block_params, sparsity)
    prune_model(lm, profile, Magnitude(), np.zeros((0, 8), dtype=np.int64))
    return lm.model.train().requires_grad_(True)


def experts(dtype="float32"):
    return LanguageModel.random(make_config("mixtral", **EXPERTS), None, seed=0, dtype=dtype, device="cpu")


MODELS = {
    "llama": lambda: family_model("llama"),
    "tied": lambda: family_model("llama", tie_word_embeddings=True),
    "conv1d": lambda: family_model("gpt2"),
    "experts": experts,
    "bfloat16": lambda: random_model(2, dtype="bfloat16"),
    "experts in bfloat16": lambda: experts("bfloat16"),
}


def zeros(model):
    return {name: p.detach() == 0 for name, p in prunable_parameters(model).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(model, optimizer, n_steps=4, clip=None):
    norms = []
    for step in range(n_steps):
        x = TEXT[3 * step % 12 :][:3]
        model(input_ids=x, labels=x).loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)) if clip else 0.0)
        optimizer.step()
        optimizer.zero_grad()
    return norms


# -- a loop of one's own


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_zeros_stay_and_kept_weights_learn(name, kind):
    model = pruned(MODELS[name]())
    before, weights = zeros(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = OPTIMIZERS[kind](model.parameters())
    masks = Masks.of(model)
    assert masks.n_zeros == sum(int(gone.sum()) for gone in before.values()) > 1000
    with masks.held(optimizer):
        train(model, optimizer)
    after = zeros(model)
    assert all(torch.equal(after[n] & before[n], before[n]) for n in before), "no zero comes back"
    if "bfloat16" not in name:  # where a step may land on zero
        assert same(after, before)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, weights[n])]
    assert len(changed) > 0.9 * len(weights), "of what is not pruned, everything is trained"
    if name == "tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_without_masks_the_zeros_are_gone(kind):
    """So that the tests above say something."""
    model = pruned(family_model("llama"))
    before = zeros(model)
    train(model, OPTIMIZERS[kind](model.parameters()), n_steps=1)
    assert not same(zeros(model), before)
    assert (
        sum(int((zeros(model)[n] & gone).sum()) for n, gone in before.items())
        < 0.1 * Masks.of(pruned(family_model("llama"))).n_zeros
    )


def test_a_momentum_of_before_brings_nothing_back():
    """Whose pruned weights the optimizer has moved already, and moves on without any gradient."""
    model = family_model("llama").model.train().requires_grad_(True)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer)
    pruned(LanguageModel(model))
    before = zeros(model)
    with Masks.of(model).held(optimizer):
        train(model, optimizer)
    assert same(zeros(model), before)


def test_what_is_pruned_adds_nothing_to_the_norm_of_the_gradients():
    model = pruned(family_model("llama"))
    gone, optimizer = zeros(model), torch.optim.SGD(model.parameters(), lr=0.0)
    model(input_ids=TEXT[:3], labels=TEXT[:3]).loss.backward()
    kept = [p.grad.masked_fill(gone[n], 0) if n in gone else p.grad for n, p in model.named_parameters()]
    wanted = float(torch.stack([g.norm() for g in kept]).norm())
    whole = float(nn.utils.clip_grad_norm_(model.parameters(), 1e9))
    optimizer.zero_grad()
    with Masks.of(model).held(optimizer):
        (masked,) = train(model, optimizer, 1, clip=1e9)
    assert masked == pytest.approx(wanted, rel=1e-5)
    assert masked < 0.99 * whole


def test_nothing_is_left_behind():
    model = pruned(family_model("llama"))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    before = zeros(model)

    def stop():
        with Masks.of(model).held(optimizer):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        stop()
    train(model, optimizer, 1)
    assert not same(zeros(model), before), "behind the context it is a model as any"


def test_masks_of_a_file_zero_a_model_that_has_lost_its_zeros(tmp_path):
    lm = family_model("llama")
    model = pruned(lm)
    before = zeros(model)
    save_masks(lm, tmp_path / "masks.safetensors")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer)
    masks = Masks.read(model, tmp_path / "masks.safetensors")
    with masks.held(optimizer):
        assert same(zeros(model), before), "before the first step already"
        train(model, optimizer)
    assert same(zeros(model), before)


def test_an_optimizer_that_accelerate_wraps():
    from accelerate import Accelerator

    model = pruned(family_model("llama"))
    before = zeros(model)
    model, optimizer = Accelerator(cpu=True).prepare(model, OPTIMIZERS["sgd"](model.parameters()))
    with Masks.of(model).held(optimizer):
        train(model, optimizer)
    assert same(zeros(model), before)


def test_what_cannot_be_held_is_told_in_a_line(tmp_path):
    dense, model = family_model("llama"), pruned(family_model("llama"))
    masks = Masks.of(model)
    with pytest.raises(ValueError, match=r"^masks: no weight .* is zero; give a pruned model"):
        Masks.of(dense)
    with pytest.raises(ValueError, match=r"^masks: Sequential is no model of transformers; "):
        Masks.of(nn.Sequential(model))
    for optimizer in (torch.optim.SGD(dense.model.parameters()), torch.optim.Adam([model.lm_head.weight])):
        with pytest.raises(ValueError, match=r"^optimizer=\w+: it updates no masked weight; "), masks.held(optimizer):
            pass
    frozen = torch.optim.SGD(model.requires_grad_(False).parameters())
    with pytest.raises(ValueError, match=r"^optimizer=SGD: .* after model.requires_grad_\(True\)$"), masks.held(frozen):
        pass
    save_masks(pruned_lm(family_model("opt")), tmp_path / "masks")
    with pytest.raises(ValueError, match="masks of another model"):
        Masks.read(model, tmp_path / "masks")


def pruned_lm(lm):
    pruned(lm)
    return lm


# -- the Trainer


def trainer(model, folder, steps=4, callbacks=(), **options):
    data = [{"input_ids": row, "labels": row} for row in TEXT]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=3,
        learning_rate=3e-3,
        weight_decay=0.3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **({"save_strategy": "no"} | options),
    )
    return Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_the_trainer_keeps_zeros_by_a_callback(optim, tmp_path):
    model = pruned(family_model("llama"))
    before, weights = zeros(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    options = {"optim": optim, "gradient_accumulation_steps": 2} | ({"optim_args": "momentum=0.9"} if optim == "sgd" else {})
    trainer(model, tmp_path, callbacks=[KeepZeros()], **options).train()
    assert same(zeros(model), before)
    assert not torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    trainer(model, tmp_path, steps=1, **options).train()
    assert not same(zeros(model), before), "without the callback they are gone"


def test_a_training_that_is_resumed_keeps_zeros(tmp_path):
    model = pruned(family_model("llama"))
    before = zeros(model)
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(model, tmp_path, steps=2, callbacks=[KeepZeros()], **options).train()
    fresh = pruned(family_model("llama"))
    done = trainer(fresh, tmp_path, steps=4, callbacks=[KeepZeros(Masks.of(fresh))], **options)
    done.train(resume_from_checkpoint=True)
    assert done.state.global_step == 4
    assert same(zeros(fresh), before)
    assert same(zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")), before)


# -- LoRA


def adapted(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = {"target_modules": "all-linear"} | options
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **targets))


def tune(tuned, n_steps=6):
    train(tuned, torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2), n_steps)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TEXT).logits.float()


@pytest.mark.parametrize("name", ["llama", "tied", "conv1d", "bfloat16"])
def test_adapters_are_merged_into_kept_weights_alone(name):
    model = pruned(MODELS[name]())
    before, masks = zeros(model), Masks.of(model)
    tuned = adapted(model, **({"fan_in_fan_out": True} if name == "conv1d" else {}))
    tune(tuned)
    layers = {n: m for n, m in tuned.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")}
    wanted = {
        n.removeprefix("base_model.model.") + ".weight": (m.base_layer.weight + m.get_delta_weight("default")).detach()
        for n, m in layers.items()
    }
    merged = masks.merge(tuned)
    assert type(merged) is type(model)
    after = zeros(merged)
    assert all(torch.equal(after[n] & gone, gone) for n, gone in before.items())
    assert name == "bfloat16" or same(after, before)
    for n, p in prunable_parameters(merged).items():
        kept = wanted[n].to(p.dtype).masked_fill(before[n], 0)
        assert torch.allclose(p, kept, atol=1e-6, rtol=1e-2 if name == "bfloat16" else 1e-5), n


@pytest.mark.parametrize(("name", "masked"), [("llama", False), ("llama", True), ("conv1d", True)])
def test_a_merge_of_adapters_that_were_trained_dense_loses_and_a_masked_one_does_not(name, masked):
    model = pruned(MODELS[name]())
    before, masks = zeros(model), Masks.of(model)
    tuned = adapted(model, **({"fan_in_fan_out": True} if name == "conv1d" else {}))
    first = logits(model)
    with masks.adapters_masked(tuned) if masked else nullcontext():
        assert torch.allclose(logits(tuned), first, atol=1e-5), "B is zero"
        tune(tuned)
        unmerged = logits(tuned)
    assert not any("forward" in vars(m) for m in tuned.modules()), "nothing is left behind"
    assert not torch.allclose(unmerged, first, atol=1e-2)
    merged = masks.merge(tuned)
    assert same(zeros(merged), before)
    lost = float((logits(merged) - unmerged).abs().max())
    assert lost < 1e-4 if masked else lost > 0.1


def test_plain_merging_fills_the_zeros():
    model = pruned(family_model("llama"))
    before = zeros(model)
    tuned = adapted(model)
    tune(tuned)
    assert not same(zeros(tuned.merge_and_unload()), before)


def test_adapters_of_stacked_experts_merge_into_kept_weights(tmp_path):
    model = pruned(experts())
    before, masks = zeros(model), Masks.of(model)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tuned = adapted(model, target_modules=["q_proj"], target_parameters=names)
    refused = pytest.raises(ValueError, match=r"^adapters_masked: the adapter of .*experts.* is not W \+ BA; ")
    with refused, masks.adapters_masked(tuned):
        pass
    weights = {n: p.detach().clone() for n, p in prunable_parameters(experts().model).items()}
    tune(tuned)
    merged = masks.merge(tuned)
    assert same(zeros(merged), before)
    moved = {n for n, p in prunable_parameters(merged).items() if not torch.equal(p, weights[n].masked_fill(before[n], 0))}
    assert {re.sub(r".*layers\.\d+\.", "", n) for n in moved} == {"self_attn.q_proj.weight", *names}


def test_adapters_that_do_not_fit_are_told_in_a_line():
    model = pruned(family_model("llama"))
    masks = Masks.of(model)
    with pytest.raises(ValueError, match=r"^PeftModel\w*: no LoRA adapters on masked weights; "):
        masks.merge(adapted(pruned(family_model("llama"))))
    tuned = adapted(model, lora_dropout=0.1)
    with pytest.raises(ValueError, match=r"^adapters_masked: .* lora_dropout=0, "), masks.adapters_masked(tuned):
        pass
    with pytest.raises(ValueError, match=r"^masks: \S+ has adapters; take the masks .* before adapters are added$"):
        Masks.of(tuned.get_base_model())


# -- in and out of svnup


@pytest.mark.parametrize("form", ["dense", "bitmask"])
def test_a_saved_model_is_trained_saved_and_evaluated(form, own_place):
    job = ["sparsity=0.6", "pruner=magnitude", "allocator=uniform", "dataset.n_seq=2", *HERE]
    texts = ["model.seq_len=64", "save_model=true", f"save_format={form}"]
    assert command("evaluation=none", *job, *texts).code == 0
    (folder,) = Path("results/runs").glob("*/model*")
    if form == "dense":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = LanguageModel.load(str(folder), dtype="float32", device="cpu").model.requires_grad_(True)
    tokenizer = LanguageModel.load(str(folder), device="cpu").tokenizer
    before = zeros(model)
    text = torch.as_tensor(Docs(role="training", n_seq=8, seq_len=64).tokens(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    with Masks.of(model).held(optimizer):
        for x in text.split(4):
            model(input_ids=x, labels=x).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained("trained")
    tokenizer.save_pretrained("trained")
    evaluated = [
        *("model=pretrained", "model.pretrained_model_name_or_path=trained", "model.test_text=docs", "model.seq_len=64"),
        *("dataset=docs", "dataset@selection=docs", "dataset@shapley.game.data=docs"),
        *("pruner=none", "allocator=uniform", "evaluation.n_seq=4", "results_dir=trained_results", "cache_dir=cache"),
    ]
    done = command(*evaluated)
    assert done.code == 0, done.err
    row = only_row("trained_results")
    zeros_after = sum(int(gone.sum()) for gone in zeros(AutoModelForCausalLM.from_pretrained("trained")).values())
    assert zeros_after == sum(int(gone.sum()) for gone in before.values())
    assert row["sparsity"]["actual"] == pytest.approx(0.6, abs=1e-3)
    lm = LanguageModel(model)
    nll = lm.nll(Docs(role="test", n_seq=4, seq_len=64).tokens(tokenizer))
    assert row["metrics"]["docs/ppl"]["value"] == pytest.approx(float(np.exp(nll.mean())), rel=1e-5)


# -- what docs/finetuning.md says, done

PAGE = (Path(__file__).parent.parent / "docs" / "finetuning.md").read_text(encoding="utf-8")


def test_the_page_trains_a_pruned_model_three_ways_and_evaluates_it(own_place):
    prune, evaluate = (shlex.split(line)[1:] for line in blocks(PAGE, "sh"))
    done = command(*prune)
    assert done.code == 0, done.err
    known: dict[str, Any] = {}
    trained = []
    for code in blocks(PAGE, "python"):
        assert len([line for line in code.splitlines() if line]) <= 13, "some ten lines"
        exec(compile(code, "finetuning.md", "exec"), known)
        trained.append(known.get("model"))
    before = zeros(AutoModelForCausalLM.from_pretrained(known["pruned"]))
    for model in (*trained[1:], AutoModelForCausalLM.from_pretrained("trained_by_lora")):
        assert same(zeros(model), before)
    done = command(*evaluate)
    assert done.code == 0, done.err
    pruned_row, trained_row = only_row(), only_row("results/trained")
    assert trained_row["sparsity"]["actual"] == pruned_row["sparsity"]["actual"]
    assert trained_row["metrics"]["docs/ppl"]["value"] < pruned_row["metrics"]["docs/ppl"]["value"]
