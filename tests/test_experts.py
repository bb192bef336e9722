"""Mixtures of experts and hybrids: each expert's matrices are linear layers, pruned by the tokens routed to them."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import command
from models import GROUPED, SHAPE
from torch import nn
from transformers import AutoModelForCausalLM

from svnup.allocation import Budget
from svnup.model.checkpoint import Checkpoint
from svnup.model.language_model import LanguageModel, make_config
from svnup.model.linears import by_linear, by_parameter, linears_of, matrix, watched
from svnup.model.loading import read_tokenizer
from svnup.model.source import BUILT_IN_FOLDER
from svnup.pruning import apply_masks, prune_model, save_masks
from svnup.pruning.masks import n_zeros
from svnup.pruning.reconstruct import Reconstruct
from svnup.pruning.sparsegpt import SparseGPT
from svnup.pruning.walk import Inputs, temporarily_pruned
from svnup.pruning.wanda import Wanda

TEXT = np.random.default_rng(5).integers(3, 97, size=(6, 24))
N_BLOCKS, N_EXPERTS = 2, 4
MOE = GROUPED | {"num_hidden_layers": N_BLOCKS, "num_experts_per_tok": 2, "intermediate_size": 16}
OWN = {"num_experts": N_EXPERTS, "moe_intermediate_size": 16}
DEEPSEEK = {
    "n_routed_experts": N_EXPERTS,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MLA = {k: v for k, v in MOE.items() if k not in ("head_dim", "num_key_value_heads")} | {"num_key_value_heads": 4}
FAMILIES = {  # as transformers writes experts: stacked, stacked and transposed, without a word on that, one linear to a module
    "mixtral": ("mixtral", MOE | {"num_local_experts": N_EXPERTS}),
    "qwen3_moe": ("qwen3_moe", MOE | OWN),
    "qwen2_moe": ("qwen2_moe", MOE | OWN | {"shared_expert_intermediate_size": 24}),
    "gpt_oss": ("gpt_oss", MOE | {"num_local_experts": N_EXPERTS, "sliding_window": 8}),
    "deepseek_v3": ("deepseek_v3", MLA | DEEPSEEK),
    "llama4": ("llama4_text", MOE | {"num_local_experts": N_EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 24}),
    "jetmoe": ("jetmoe", SHAPE | {"num_hidden_layers": N_BLOCKS, "num_local_experts": N_EXPERTS, "kv_channels": 8}),
}
JETMOE = {"num_key_value_heads": 2, "intermediate_size": 16}


def make(family, seed=0, tokenizer=None, **changes):
    kind, shape = FAMILIES[family]
    shape = {k: v for k, v in shape.items() if family != "jetmoe" or k != "num_attention_heads"}
    lm = LanguageModel.random(
        make_config(kind, **(shape | (JETMOE if family == "jetmoe" else {}) | changes)), tokenizer, seed=seed, device="cpu"
    )
    with torch.no_grad():  # loud, so that experts matter and tokens go apart
        for name, p in lm.model.named_parameters():
            if p.dim() > 1 and "embed" not in name:
                p.mul_(6)
    return lm


def uniform(lm, sparsity=0.5):
    return Budget(lm.block_params, sparsity).uniform()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_matrix_of_each_expert_is_a_linear_layer_and_a_router_is_none(family):
    lm = make(family)
    for index in range(N_BLOCKS):
        linears = lm.linears(index)
        stacks = {n: p for n, p in lm.blocks[index].named_parameters() if p.dim() == 3}
        of_experts = {n: m for n, m in linears.items() if not isinstance(m, nn.Module)}
        assert len(of_experts) == sum(map(len, stacks.values()))
        assert sum(m.weight.numel() for m in of_experts.values()) == sum(p.numel() for p in stacks.values())
        assert not [n for n in linears if {"gate", "router", "shared_expert_gate"} & set(n.split("."))]
        for linear in of_experts.values():
            before = linear.stack.clone()
            with torch.no_grad():
                matrix(linear)[0, 1] += 1  # a view, so that assignments reach the parameter
            assert (linear.stack != before).sum() == 1
    sizes = [sum(m.weight.numel() for m in lm.linears(i).values()) for i in range(N_BLOCKS)]
    assert lm.block_params.tolist() == sizes
    named = set(lm.pruned_names())
    assert named <= set(lm.model.state_dict())
    assert not [n for n in named if "router" in n or n.endswith("gate.weight")]


def reads_of_mixtral(lm, index, batches):
    """What each matrix of a block of Mixtral reads, by the equations of its MLP, from what enters that."""
    mlp, entered = lm.blocks[index].mlp, []
    hook = mlp.register_forward_pre_hook(lambda module, args: entered.append(args[0].reshape(-1, args[0].shape[-1])))
    try:
        for batch in batches:
            lm.run_block(index, batch)
    finally:
        hook.remove()
    x = torch.cat(entered)
    chosen = (x @ mlp.gate.weight.T).topk(2, dim=-1).indices
    out = {}
    for e in range(N_EXPERTS):
        rows = x[(chosen == e).any(dim=1)]
        gate, up = (rows @ mlp.experts.gate_up_proj[e].T).chunk(2, dim=-1)
        out[f"mlp.experts.{e}.gate_up_proj"] = rows
        out[f"mlp.experts.{e}.down_proj"] = nn.functional.silu(gate) * up
    return x, out


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
@torch.inference_mode()
def test_statistics_are_those_of_the_tokens_that_are_routed_to_an_expert(way):
    lm = make("mixtral")
    lm.model.set_experts_implementation(way)
    for visit in lm.walk(TEXT):
        _, reads = reads_of_mixtral(lm, visit.index, visit.batches)
        inputs = Inputs(visit.linears, Wanda())
        inputs.collect(visit, advance=False)
        assert {len(rows) for rows in reads.values()} != {2 * TEXT.size // N_EXPERTS}  # routing is no even division
        compared = 0
        for name, rows in reads.items():
            if name not in inputs.short_of_tokens:
                assert inputs.stats(name).squares == pytest.approx(rows.square().sum(0).numpy(), rel=1e-4)
                compared += 1
        assert compared >= N_EXPERTS
        assert inputs.reads("self_attn.v_proj") == "self_attn.q_proj"


@torch.inference_mode()
def test_an_expert_of_too_few_tokens_gets_all_that_enter_and_says_so():
    lm, few = make("mixtral"), TEXT[:2, :8]  # 16 tokens for 32 inputs
    visit = next(iter(lm.walk(few)))
    before = [batch.hidden.clone() for batch in visit.batches]
    x, _ = reads_of_mixtral(lm, 0, visit.batches)
    inputs = Inputs(visit.linears, Wanda())
    inputs.collect(visit, advance=False)
    assert all(torch.equal(a, batch.hidden) for a, batch in zip(before, visit.batches, strict=True))
    gate, up = (x @ lm.blocks[0].mlp.experts.gate_up_proj[3].T).chunk(2, dim=-1)
    for name, rows in (("gate_up_proj", x), ("down_proj", nn.functional.silu(gate) * up)):
        name = f"mlp.experts.3.{name}"
        assert name in inputs.short_of_tokens
        assert inputs.stats(name).squares == pytest.approx(rows.square().sum(0).numpy(), rel=1e-4)
        assert "tokens were routed to this expert, fewer than the" in inputs.fallback(name)
        assert inputs.fallback(name).endswith("pruned by the statistics of all tokens that enter the experts")
    assert inputs.fallback("self_attn.q_proj") is None
    report = prune_model(lm, uniform(lm), Wanda(), few)
    told = {row.name: row.fallback for row in report.per_linear if row.block == 0}
    assert told["mlp.experts.3.down_proj"]
    assert told["self_attn.o_proj"] is None


@torch.inference_mode()
def test_where_experts_take_no_routes_inputs_of_equal_size_stand_in():
    lm = make("jetmoe")
    visit = next(iter(lm.walk(TEXT[:1, :4])))
    inputs = Inputs(visit.linears, Wanda())
    inputs.collect(visit, advance=True)
    (name, *_) = [n for n in inputs.short_of_tokens if n.startswith("mlp.")]
    assert inputs.stats(name).squares == pytest.approx(np.ones(matrix(visit.linears[name]).shape[1]))
    assert inputs.fallback(name).endswith("pruned by the statistics of uncorrelated inputs of equal size")


@torch.inference_mode()
def test_advancing_gives_what_the_block_gives():
    lm = make("qwen2_moe")
    visit = next(iter(lm.walk(TEXT)))
    expected = [lm.run_block(0, batch).hidden for batch in visit.batches]
    Inputs(visit.linears, Wanda()).collect(visit, advance=True)
    assert all(torch.equal(batch.hidden, hidden) for batch, hidden in zip(visit.batches, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_pruned_saved_and_reloaded(family, tmp_path):
    lm = make(family)
    dense = {name: p.clone() for name, p in lm.model.state_dict().items()}
    report = prune_model(lm, uniform(lm, 0.6), SparseGPT() if family in ("gpt_oss", "mixtral") else Wanda(), TEXT)
    assert {(row.block, row.name) for row in report.per_linear} == {(i, n) for i in range(N_BLOCKS) for n in lm.linears(i)}
    for row in report.per_linear:
        weight = lm.linears(row.block)[row.name].weight
        assert int((weight == 0).sum()) == row.n_zeros == n_zeros(0.6, weight.numel())
    pruned = set(lm.pruned_names())
    assert all(torch.equal(p, dense[name]) for name, p in lm.model.state_dict().items() if name not in pruned)
    rows = torch.as_tensor(TEXT)
    with torch.no_grad():
        expected = lm.model(input_ids=rows).logits
    for form in ("dense", "bitmask"):
        lm.save(tmp_path / form, form)
        for offload in ("none", "disk"):
            again = LanguageModel.load(str(tmp_path / form), tokenizer=object(), device="cpu", offload=offload)
            with torch.no_grad():
                assert torch.equal(again.model(input_ids=rows).logits, expected), (form, offload)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
        assert torch.equal(plain(input_ids=rows).logits, expected)
    save_masks(lm, tmp_path / "masks.safetensors")
    with torch.no_grad():
        for name in pruned:
            p = plain.get_parameter(name)
            p.add_(1)
        apply_masks(plain, tmp_path / "masks.safetensors")
        assert all(torch.equal(plain.get_parameter(name) != 0, lm.model.get_parameter(name) != 0) for name in pruned)


def test_pruning_from_disk_is_pruning_in_memory(tmp_path):
    lm = make("gpt_oss")
    lm.save(tmp_path / "model")
    disk = LanguageModel.load(str(tmp_path / "model"), tokenizer=object(), device="cpu", offload="disk")
    a, b = (prune_model(one, uniform(one), Wanda(), TEXT) for one in (lm, disk))
    assert [(r.name, r.n_zeros, r.error, r.fallback) for r in a.per_linear] == [
        (r.name, r.n_zeros, r.error, r.fallback) for r in b.per_linear
    ]
    assert np.array_equal(lm.nll(TEXT), disk.nll(TEXT))


@pytest.mark.parametrize("family", ["mixtral", "jetmoe"])
def test_an_offloaded_model_is_saved_as_one_in_memory_is(family, tmp_path):
    lm = make(family)
    prune_model(lm, uniform(lm), Wanda(), TEXT)
    lm.save(tmp_path / "model")
    disk = LanguageModel.load(str(tmp_path / "model"), tokenizer=object(), device="cpu", offload="disk")
    disk.tokenizer = None
    disk.save(tmp_path / "again")
    one, other = ((c := Checkpoint(tmp_path / folder)).read(c.names()) for folder in ("model", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_weights_come_back_after_a_trial():
    lm = make("llama4")
    dense = lm.fingerprint()
    with temporarily_pruned(lm, uniform(lm), Wanda(), TEXT):
        assert lm.fingerprint() != dense
    assert lm.fingerprint() == dense


def test_weights_by_linear_layer_and_by_parameter_are_the_same():
    lm = make("gpt_oss")
    linears = lm.linears(0)
    name = "mlp.experts.2.down_proj"
    other = torch.randn_like(linears[name].weight)
    weights = by_parameter(linears, {name: other})
    assert list(weights) == ["mlp.experts.down_proj"]
    assert torch.equal(weights["mlp.experts.down_proj"][2], other)
    assert torch.equal(weights["mlp.experts.down_proj"][1], linears["mlp.experts.1.down_proj"].weight)
    assert not torch.equal(linears[name].weight, other)
    own = {n: p.data for n, p in lm.linear_parameters(0).items()}
    assert all(torch.equal(w, linears[n].weight) for n, w in by_linear(linears, own).items())


class Experts(nn.Module):
    """Square matrices, so that their shape does not tell how they are multiplied."""

    def __init__(self, turned):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(2, 4, 4)) for _ in range(2))
        self.turned = turned

    def forward(self, x):
        for stack in (self.up, self.down):
            if self.turned:
                x = torch.einsum("etd,edo->eto", x.expand(2, -1, -1), stack).sum(0)
            else:
                x = nn.functional.linear(x, stack[1])
        return x


def test_a_product_is_seen_however_it_is_written_and_another_one_is_refused():
    seen = []
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Experts(False), "gate": nn.Linear(4, 2)})})
    linears = linears_of(block)
    assert list(linears) == [f"mlp.experts.{e}.{part}" for e in range(2) for part in ("up", "down")]
    x = torch.randn(3, 4)
    for mode in (torch.no_grad, torch.inference_mode):
        seen.clear()
        with mode(), watched(linears, lambda name, rows: seen.append((name, rows.clone()))):
            block["mlp"]["experts"](x)
        assert [name for name, _ in seen] == ["mlp.experts.1.up", "mlp.experts.1.down"]
        assert torch.equal(seen[0][1], x)
        assert torch.equal(seen[1][1], x @ block["mlp"]["experts"].up[1].T)
    turned = nn.ModuleDict({"experts": Experts(True)})
    with torch.no_grad(), pytest.raises(ValueError, match=r"experts\.0\.up: is multiplied otherwise"):  # noqa: SIM117
        with watched(linears_of(turned), lambda name, rows: None):
            turned["experts"](x)
    turned["experts"].is_transposed = True
    for mode in (torch.no_grad, torch.inference_mode):
        seen.clear()
        with mode(), watched(linears_of(turned), lambda name, rows: seen.append(name)):
            turned["experts"](x)
        assert seen == ["experts.0.up", "experts.1.up", "experts.0.down", "experts.1.down"]


def test_a_weight_on_the_left_of_a_product_is_seen():
    linear, x = nn.Linear(4, 6), torch.randn(2, 4, 3)
    for mode, trained in product((torch.no_grad, torch.inference_mode), (True, False)):
        linear.requires_grad_(trained)  # if not, torch expands the weight to a batch of matrices
        seen = []
        with mode(), watched({"dt_proj": linear}, lambda name, rows, seen=seen: seen.append(rows.clone())):
            linear.weight @ x
        assert [rows.tolist() for rows in seen] == [x.mT.reshape(-1, 4).tolist()]


def test_experts_that_multiply_copies_are_refused():
    lm = make("mixtral")
    experts = lm.blocks[1].mlp.experts

    def of_a_copy(hidden, index, weights):
        return hidden * experts.down_proj.clone().sum()

    experts.forward = of_a_copy
    with pytest.raises(ValueError, match=r"block 1: no input ever reached \['mlp\.experts\.0\.down_proj'"):
        prune_model(lm, uniform(lm), Wanda(), TEXT)


def test_experts_as_lists_of_modules():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 6), "w2": nn.Linear(6, 4)}) for _ in range(3))
            self.gate = nn.Linear(4, 3)
            self.shared_expert_gate = nn.Linear(4, 1)
            self.shared_expert = nn.Linear(4, 4)

    linears = linears_of(nn.ModuleDict({"ffn": Sparse(), "gate": nn.Linear(4, 4)}))
    experts = [f"ffn.experts.{e}.{w}" for e in range(3) for w in ("w1", "w2")]
    assert list(linears) == [*experts, "ffn.shared_expert", "gate"]  # a gate that is not beside experts is a layer like others


# -- budgets


def test_budgets_of_experts():
    lm = make("qwen2_moe")
    units = lm.budget_units("expert")
    assert len(units) == N_BLOCKS * (1 + N_EXPERTS)
    assert {name.partition(".")[0] for name in units[0][1]} == {"self_attn", "mlp"}
    assert list(units[2][1]) == ["mlp.experts.1.gate_up_proj", "mlp.experts.1.down_proj"]
    params = lm.budget_params("expert")
    assert params.sum() == lm.block_params.sum()
    assert lm.granularity_of(params) == "expert"
    assert [lm.granularity_of(lm.budget_params(g)) for g in ("block", "sublayer", "linear")] == ["block", "sublayer", "linear"]
    assert len(make("jetmoe").budget_units("expert")) == N_BLOCKS * (1 + 2 * N_EXPERTS)  # of attention and of the MLP
    dense = LanguageModel.random(make_config("llama", **GROUPED), None, seed=0, device="cpu")
    with pytest.raises(ValueError, match="granularity=expert: LlamaForCausalLM has no experts"):
        dense.budget_units("expert")


# -- hybrids


HYBRID = GROUPED | {"num_hidden_layers": 4}


def hybrid(kind):
    shapes = {
        "lfm2": HYBRID | {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48, "conv_L_cache": 3},
        "falcon_h1": HYBRID | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    }
    lm = LanguageModel.random(make_config(kind, **shapes[kind]), None, seed=0, device="cpu")
    return lm


@pytest.mark.parametrize("kind", ["lfm2", "falcon_h1"])
def test_of_a_hybrid_the_linear_layers_are_pruned_and_the_rest_is_left(kind, tmp_path):
    lm = hybrid(kind)
    left = lm.left_alone()
    assert any("conv" in name for name in left)
    assert sum(left.values()) + lm.block_params.sum() == sum(p.numel() for p in lm.blocks.parameters() if p.dim() > 1)
    dense = {name: p.clone() for name, p in lm.blocks.state_dict().items()}
    report = prune_model(lm, uniform(lm, 0.6), Wanda(), TEXT)
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)
    linears = {f"{i}.{n}.weight" for i in range(4) for n in lm.linears(i)}
    assert all(torch.equal(p, dense[name]) == (name not in linears) for name, p in lm.blocks.state_dict().items())
    lm.save(tmp_path / "model")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        rows = torch.as_tensor(TEXT)
        assert torch.equal(again(input_ids=rows).logits, lm.model(input_ids=rows).logits)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "jetmoe", "lfm2", "falcon_h1"])
def test_blocks_with_experts_and_hybrids_are_refitted(name):
    """The kept weights of every matrix move, those of each expert among them, zeros stay, and nothing else is touched."""
    lm, alone = (hybrid(name) if name in ("lfm2", "falcon_h1") else make(name) for _ in range(2))
    prune_model(alone, uniform(alone, 0.6), Wanda(), TEXT)
    report = prune_model(lm, uniform(lm, 0.6), Wanda(), TEXT, Reconstruct(lr=3e-3, epochs=4, batch_tokens=72))
    assert all(block.taken and block.error_after < block.error_before for block in report.recovered)
    assert len(report.recovered) == lm.n_blocks
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)
    for linear, other in zip(lm.linears(0).values(), alone.linears(0).values(), strict=True):
        assert torch.equal(linear.weight == 0, other.weight == 0)
        assert not torch.equal(linear.weight, other.weight)
    pruned = set(lm.pruned_names())
    for name, value in lm.model.state_dict().items():
        assert name in pruned or torch.equal(value, alone.model.state_dict()[name])


def test_what_blocks_share_is_no_blocks_own(random_model):
    lm = random_model()
    model = lm.model
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    shared = LanguageModel(model)
    assert [sum(m.weight.numel() for m in shared.linears(i).values()) for i in range(4)] == shared.block_params.tolist()
    assert ["mlp.up_proj" in shared.linears(i) for i in range(4)] == [False, True, False, True]
    assert "mlp.up_proj.weight" in shared.left_alone()


# -- through the command


VOCABULARY = {"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
JOB = [
    *("model=pretrained", "model.pretrained_model_name_or_path=source", "model.seq_len=32", "model.test_text=docs"),
    *("dataset=docs", "dataset.n_seq=8", "dataset@shapley.game.data=docs", "shapley.game.data.n_seq=2", "shapley.window=2"),
    *("evaluation.datasets=[docs]", "evaluation.n_seq=4", "dataset@selection=docs", "selection.n_seq=4"),
    *("results_dir=results", "cache_dir=cache"),
]
SEARCH = ["allocator=search", "allocator.generations=1", "allocator.offspring=2", "allocator.sequences=[2]"]
SEARCH += ["allocator.survivors=[1]", "allocator.granularity=expert"]
MARGINS = ["allocator=shapley_margins", "allocator.rounds=1", "allocator.n_seq=2", "allocator.trial_n_seq=2"]
MARGINS += ["allocator.granularity=expert"]


@pytest.mark.slow
@pytest.mark.parametrize("allocator", [pytest.param(SEARCH, id="search"), pytest.param(MARGINS, id="margins")])
def test_experts_with_budgets_of_their_own_through_the_command(allocator, tmp_path, own_place):
    tokenizer = read_tokenizer(str(BUILT_IN_FOLDER))
    make("qwen3_moe", tokenizer=tokenizer, **VOCABULARY).save(tmp_path / "source")
    done = command(*JOB, *allocator, "save_model=true", "save_format=bitmask")
    assert done.code == 0, done.err
    (run,) = Path("results/runs").iterdir()
    row = json.loads((run / "result.json").read_text())
    assert row["sparsity"]["actual"] == pytest.approx(0.7, abs=1e-3)
    assert "mlp.experts.3.down_proj" in row["profile"]["linears"][1]
    assert len(row["pruning"]["per_linear"]) == N_BLOCKS * (4 + 2 * N_EXPERTS)
    assert "weights in no linear layer of a block: mlp.gate.weight" in (run / "svnup.log").read_text()
    saved = LanguageModel.load(str(run / "model"), tokenizer=object(), device="cpu")
    zeros = [int((saved.linears(r["block"])[r["name"]].weight == 0).sum()) for r in row["pruning"]["per_linear"]]
    assert zeros == [r["n_zeros"] for r in row["pruning"]["per_linear"]]


def test_budgets_of_experts_of_a_dense_model_are_refused_before_anything_is_loaded(svnup):
    done = svnup(*SEARCH, "allocator.generations=1")
    assert done.code == 2
    assert "allocator.granularity=expert: LlamaForCausalLM has no experts" in done.err.rstrip("\n").splitlines()[-1]
    assert not Path("results").exists()


def test_a_plan_counts_experts(tmp_path, own_place):
    make("deepseek_v3", tokenizer=read_tokenizer(str(BUILT_IN_FOLDER)), **VOCABULARY).save(tmp_path / "source")
    done = command(*JOB, "allocator=uniform", "dry_run=true")
    assert done.code == 0, done.err
    assert "weights of blocks that are not pruned" in done.out
