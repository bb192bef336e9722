"""What a job will cost, told before it runs: counts against real runs, times and peaks against what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import HERE, SMALL, command
from models import FAMILIES, family_model
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks import gpu_plan
from experiments.benchmarks.scale import compared, outline_of
from svnup import config
from svnup.allocation import Budget
from svnup.language_model import LanguageModel
from svnup.machines import Machine, Work, named
from svnup.model.language_model import BATCH_TOKENS, make_config
from svnup.pipeline import trial_of
from svnup.plan import counting, plan
from svnup.plan.counting import Counting, count_pass, count_statistics
from svnup.plan.stages import SELECTION, JobCounts
from svnup.pruning.advance import PrunedInAdvance
from svnup.pruning.sparsegpt import SparseGPT
from svnup.pruning.walk import Inputs
from svnup.pruning.wanda import Wanda

MEASURED = Path(__file__).parents[1] / "results" / "benchmarks" / "scale.jsonl"
UNIFORM = [*SMALL, "allocator=uniform", *HERE]


def skeleton(family, **changes):
    kind, shape = FAMILIES[family]
    return LanguageModel.skeleton(make_config(kind, **(shape | changes)))


# -- counts


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_a_pass_are_those_of_the_real_model(family):
    eager = {"attn_implementation": "eager"}  # whose products of attention the counter of torch sees as they are
    lm, real = skeleton(family, **eager), family_model(family, **eager)
    made = counting._counted(lm, 2, 12)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        real.decoder(input_ids=torch.ones(2, 12, dtype=torch.int64), use_cache=False)
    in_blocks = sum(
        sum(flops.values())
        for name, flops in counter.flop_counts.items()
        if name.split(".")[-2:-1] == [real.blocks_path.split(".")[-1]]
    )
    assert sum(work.flop for work in made.blocks) == pytest.approx(in_blocks or counter.get_total_flops(), rel=1e-6)
    assert set(made.blocks[0].products) == {"float32"}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_which_layers_read_the_same_input(family):
    lm, real = skeleton(family), family_model(family)
    made = count_pass(lm, 1, 8)
    for visit in real.walk(torch.arange(3, 11)[None]):
        inputs = Inputs(visit.linears, Wanda())
        inputs.collect(visit, advance=True)
        assert dict(made.reads[visit.index]) == {name: inputs.reads(name) for name in visit.linears}


def test_fused_attention_holds_no_matrix_of_pairs():
    fused, eager = (count_pass(skeleton("llama", attn_implementation=how), 1, 64) for how in ("sdpa", "eager"))
    products = 4 * 64 * 64 * 32  # of queries with keys and of probabilities with values: all pairs, four heads of width 8
    assert eager.blocks[0].flop - fused.blocks[0].flop == products / 2
    assert fused.activations < eager.activations


def test_an_operation_that_needs_numbers_is_estimated():
    shape = {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    lm = LanguageModel.skeleton(make_config("mixtral", num_attention_heads=4, num_key_value_heads=2, vocab_size=97, **shape))
    made = counting._estimated(lm, 10)
    attention, experts, router = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48, 8 * 32
    weights = attention + 2 * experts + router + 2 * 32  # of the experts two of eight; and the norms
    assert made.blocks[0].flop == pytest.approx(2 * 10 * weights, rel=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_count_as_tokens_are_routed_to_them(kind):
    experts = {"num_local_experts": 8} if kind == "mixtral" else {"num_experts": 8, "moe_intermediate_size": 48, "head_dim": 8}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    lm = LanguageModel.skeleton(make_config(kind, num_experts_per_tok=2, num_key_value_heads=2, **shape, **experts))
    lm.model.to(torch.bfloat16)  # in which torch multiplies groups of rows at once
    counted, estimated = counting._counted(lm, 1, 16), counting._estimated(lm, 16)
    pairs = 16 * 16 / 2 * 2 * 2 * 32  # of the products of attention, which an estimate leaves out
    assert counted.blocks[0].flop == pytest.approx(estimated.blocks[0].flop + pairs, rel=0.05)


def test_bytes_of_a_chain_of_operations():
    with Counting() as counting_, torch.no_grad():
        x = torch.ones(10, 100, device="meta")
        y = (x.T @ x).relu_()
        del y
        z = x + 1
    assert counting_.work.products == {"float32": 2 * 10 * 100 * 100}
    assert counting_.work.moved == 4 * (1000 + (2000 + 10_000) + 2 * 10_000 + 2000)
    assert counting_.peak == 4 * (1000 + 10_000)
    assert z.shape == x.shape


def test_statistics_are_counted_as_their_pruner_gathers_them():
    weight = torch.empty(48, 32, device="meta")
    hessian, held = count_statistics(SparseGPT(), weight, 100)
    norms, few = count_statistics(Wanda(), weight, 100)
    assert 100 * 32 * 32 <= hessian.flop <= 2 * 100 * 32 * 32, "the symmetric half at least, the square at most"
    assert (norms.flop, held, few) == (0, 4 * 32 * 32, 4 * 32)


# -- times


def test_time_is_what_the_rates_make_of_work():
    machine = Machine("cpu", float32=1e9, bfloat16=4e9, bandwidth=1e8, read=1e7, call=1e-3, least=0.5, most=1.0)
    work = Work({"float32": 2e9, "bfloat16": 4e9}, moved=3e8, read=1e7, calls=1000)
    assert machine.seconds(work) == pytest.approx((2 + 1 + 3 + 1 + 1, 2 * (2 + 1 + 3 + 1) + 1))
    assert machine.seconds(work * 3 + work) == pytest.approx([4 * t for t in machine.seconds(work)])
    gpu = Machine("cuda", float32=1e9, call=1e-3, least=1.0, most=1.0)
    assert gpu.seconds(Work({"float32": 2e9}, calls=1000)) == (2, 2), "launches go on while it computes"
    assert gpu.seconds(Work({"float32": 2e9}, calls=5000)) == (5, 5)
    assert gpu.seconds(Work({"float32": 2e9}, calls=1000, stalls=3000)) == (5, 5), "but not where it waits for them"


@pytest.mark.parametrize(("upload", "seconds"), [(0.5e9, 6), (None, 2 + 1)])
def test_the_next_weights_come_while_a_gpu_computes(upload, seconds):
    machine = Machine("cuda", float32=1e9, transfer=2e9, upload=upload, least=1.0, most=1.0)
    work = Work({"float32": 2e9}, uploaded=3e9, copied=2e9)
    assert machine.seconds(work) == (seconds, seconds)
    assert work.n_bytes == 5e9
    assert machine.seconds(Work({"float32": 2e9}, sent=3e9)) == (2, 2), "from memory that is pinned, at the rate of the bus"
    assert machine.seconds(Work({"float32": 1e9}, sent=3e9)) == (1.5, 1.5)


def test_this_machine_is_measured_within_a_second_and_what_is_given_stays():
    machine = Machine(bandwidth=5.0).filled("cpu", "float32")
    assert machine.bandwidth == 5.0
    assert machine.float32 > 1e8
    assert machine.process > 1e7
    assert machine.memory > 1e9
    assert (machine.transfer, machine.upload, machine.host_memory) == (None, None, None)


@pytest.mark.parametrize(
    ("hardware", "node", "told"),
    [
        ("h10", {}, r"hardware=h10: choose gpu; or describe it: '\+machines.h10="),
        ("gpu", {"float32": -3, "device": "cuda"}, r"machines.gpu.float32=-3: must be a positive number"),
        ("gpu", {"float32": 0, "device": "cuda"}, r"machines.gpu.float32=0: must be a positive number"),
        ("gpu", {"float32": "fast", "device": "cuda"}, r"machines.gpu.float32=fast: must be a positive number"),
        ("gpu", {"float32": 1.0, "device": "tpu"}, r"machines.gpu.device=tpu: choose cuda or cpu"),
        ("gpu", {"device": "cuda"}, r"machines.gpu.float32=null: times need this rate"),
        ("gpu", {"flops32": 1.0}, r"machines.gpu.flops32: is no rate of a machine"),
        ("gpu", {"float32": 1.0, "device": "cuda", "least": 0.9}, r"machines.gpu.least=0.9: choose shares"),
        ("gpu", 7, r"machines.gpu=7: is no machine; describe it"),
    ],
)
def test_rates_that_cannot_be(hardware, node, told):
    with pytest.raises(ValueError, match=told):
        named(hardware, {"gpu": node})


def test_every_machine_of_the_table_has_what_a_plan_needs():
    for name, node in config.composed().machines.items():
        machine = named(name, {name: dict(node)})
        assert machine.source, name
        if name != "here":
            assert machine.verified == (name in ("h100", "h200")), "nothing was measured on the others"
            assert all((machine.float32, machine.tf32, machine.bfloat16, machine.bandwidth, machine.transfer, machine.memory))


# -- the command


def test_a_plan_for_a_gpu_that_is_not_here():
    done = command(*UNIFORM, "dry_run=true", "hardware=h100", "model.device=cuda")
    assert done.code == 0, done.err
    assert "on h100 (verified)" in done.out
    assert "peak, host" in done.out
    stages = [line.split()[0] for line in done.out.splitlines() if line.startswith("  ") and not line.startswith("    ")]
    assert [name for name in stages if name in ("load", "dense", "pruning", "evaluation")] == [
        "load",
        "dense",
        "pruning",
        "evaluation",
    ]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["hardware=h100", "model.device=cpu"], "model.device=cpu: hardware=h100 is a GPU"),
        (["model.device=cuda:7"], "or name the machine that has it: hardware=h100"),
        (["hardware=4090"], "hardware=4090: choose here, a100, h100, h200, rtx4090; did you mean rtx4090?"),
        (["hardware=h100", "machines.h100.read=-1"], "machines.h100.read=-1: must be a positive number"),
        (
            ["+machines.card={device: cuda, float32: 1e12, memory: 90000}", "hardware=card"],
            "of the 90 kB that the device holds with 4.5 kB for CUDA; choose another pruner or allocator, less text,",
        ),
    ],
)
def test_mistakes_about_hardware_are_one_line(args, told):
    done = command(*UNIFORM, "dry_run=true", *args)
    assert done.code == 2, done.out
    assert told in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.slow
def test_a_gpu_that_is_too_small_is_told_the_offload_that_would_do():
    large = ["model.num_hidden_layers=20", "model.hidden_size=64", "model.intermediate_size=2048"]
    card = "+machines.card={device: cuda, float32: 1e12, memory: 30e6}"
    done = command(*UNIFORM, *large, "dry_run=true", card, "hardware=card")
    assert done.code == 2
    assert "use offload=cpu, which takes" in done.err
    assert command(*UNIFORM, *large, "dry_run=true", card, "hardware=card", "offload=cpu").code == 0


def test_an_offload_that_leaves_out_the_trial_against_uniform_is_told_with_it():
    large = ["model.num_hidden_layers=20", "model.hidden_size=64", "model.intermediate_size=2048", "compare_uniform=trial"]
    card = ["+machines.card={device: cuda, float32: 1e12, memory: 30e6}", "hardware=card"]
    done = command(*SMALL, "shapley.window=2", "allocator=shapley", *HERE, *large, *card, "dry_run=true")
    assert done.code == 2
    assert "use offload=cpu, which takes" in done.err
    assert "without the trial against the uniform budget" in done.err
    done = command(*SMALL, "shapley.window=2", "allocator=shapley", *HERE, *large, *card, "dry_run=true", "offload=cpu")
    assert done.code == 0
    assert "the budget is not compared with the uniform one" in done.out


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ("device: cpu, memory: 1e6", "of the 1 MB that the device holds; choose another pruner or allocator, less text, or a"),
        (
            "device: cuda, memory: 1e9, host_memory: 1e6, process: 2e6",
            "MB of the 1 MB that the host holds; choose another pruner",
        ),
    ],
)
def test_memory_of_the_host_is_limited_too(rates, told):
    card = [f"+machines.card={{float32: 1e12, {rates}}}", "hardware=card"]
    done = command(*UNIFORM, "dry_run=true", *card)
    assert done.code == 2
    assert told in done.err
    assert len(done.err.splitlines()) == 1


def test_a_shard_is_planned_as_one():
    args = [*SMALL, "shapley=exact", "allocator=shapley", "model.num_hidden_layers=4"]
    whole, *shards = (
        plan(config.build(config.composed(*args, f"shapley.shard={shard}", "dry_run=true"))) for shard in ("null", "0/2", "1/2")
    )
    assert [[stage.name for stage in made.stages] for made in shards] == [["load", "scores"]] * 2
    assert sum(made.counts["shapley evaluations"] for made in shards) == whole.counts["shapley evaluations"]
    done = command(*SMALL, *HERE, "allocator=uniform", "shapley.shard=0/2")
    assert (done.code, "shapley.shard=0/2: this allocator has no game" in done.err) == (2, True)


def test_a_sweep_counts_equal_jobs_once_and_one_machine():
    done = command("-m", *UNIFORM, "dry_run=true", "offload=none,cpu")
    assert (done.code, "to run: 1 of 2 jobs" in done.out) == (0, True)
    done = command(*UNIFORM, "-m", "dry_run=true", "hardware=h100,a100")
    assert done.code == 2
    assert "hardware=h100,a100: a sweep is planned for one machine" in done.err


@pytest.mark.parametrize(
    ("offload", "memory", "order"),
    [("none", "80e9", "depth first: "), ("cpu", "80e9", "breadth first in groups of 32: "), ("cpu", "5e5", "depth first: ")],
)
def test_the_plan_counts_the_walk_that_the_game_takes(offload, memory, order):
    args = [
        *SMALL,
        "shapley=exact",
        "allocator=shapley",
        f"offload={offload}",
        "model.device=cuda",
        "model.num_hidden_layers=5",
    ]
    card = [f"+machines.card={{device: cuda, float32: 1e12, memory: {memory}}}", "hardware=card"]
    made = plan(config.build(config.composed(*args, *card, "dry_run=true")))
    assert made.walk.startswith(order)
    assert made.counts["shapley evaluations"] == 32
    tight = memory == "5e5"  # so that states are dropped, and computed again
    assert (made.counts["shapley block forwards"] > 31) if tight else (made.counts["shapley block forwards"] == 31)
    assert made.counts["shapley peak states"] == (33 if order.startswith("breadth") else 2 if tight else 4)


@pytest.mark.parametrize(("fits", "nodes", "held"), [(True, 3, 9), (False, 1, 9), (False, 2, 9), (False, 2, 2)])
def test_the_plan_counts_what_values_at_the_margin_prune(fits, nodes, held, monkeypatch, tmp_path):
    if not fits:  # both versions of all blocks
        monkeypatch.setattr("svnup.plan.stages.MAX_BYTES", 1)
        monkeypatch.setattr(PrunedInAdvance.__init__, "__defaults__", (1, None))
    monkeypatch.setattr("svnup.allocation.margins.max_states", lambda *_: held)
    monkeypatch.setattr(JobCounts, "_held", lambda *_: held)
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 32)  # a micro-batch a sequence
    margins = ["allocator=shapley_margins", "allocator.rounds=1", f"allocator.nodes={nodes}", "allocator.n_seq=4"]
    texts = ["shapley.game.data.n_seq=4", f"results_dir={tmp_path}", f"cache_dir={tmp_path}"]
    job = config.build(config.composed(*SMALL, "pruner=wanda", *margins, *texts))
    machine = Machine("cpu", float32=1e9, bandwidth=1e9, read=1e9, call=0.0, process=0.0)
    steps, _ = JobCounts(job, machine).margins()
    lm, pruned, prune = job.load(), list[Any](), Wanda.prune
    monkeypatch.setattr(Wanda, "prune", lambda *args: pruned.append(args) or prune(*args))
    trial_of(job, lm, job.tokens()).marginal_values(*(_uniform(job, lm, by) for by in (0.4, 0.6)), 0, 4, nodes)
    n_linears = sum(len(lm.linears(i)) for i in range(lm.n_blocks))
    assert len(pruned) == n_linears * steps["weights in advance"].moved / (SELECTION * lm.block_params.sum())


def _uniform(job, lm, sparsity):
    return Budget(job.budget(lm).params, sparsity, "unstructured").uniform()


def test_hidden_states_that_wait_take_powers_of_two_of_pinned_memory():
    card = ["+machines.card={device: cuda, float32: 1e12, memory: 80e9, process: 1}", "hardware=card", "model.device=cuda"]
    texts = ["dataset.n_seq=600", "model.seq_len=32", "evaluation.n_seq=900", "model.hidden_size=48"]
    made = plan(
        config.build(config.composed(*SMALL, "pruner=wanda", "allocator=uniform", *card, *texts, "offload=cpu", "dry_run=true"))
    )
    stages = {stage.name: stage for stage in made.stages}
    rows = BATCH_TOKENS["cuda"] // 32
    piece = 2 ** math.ceil(math.log2(rows * 32 * 48 * 4))
    assert stages["pruning"].host == 1 + made.weights + math.ceil(600 / rows) * piece
    assert stages["evaluation"].host == 1 + made.weights + math.ceil(900 / rows) * piece
    assert stages["load"].host == 1 + made.weights


def test_hardware_is_no_part_of_a_job():
    usual, other = (config.build(config.composed(*UNIFORM, *args)) for args in ([], ["hardware=a100"]))
    assert usual.key == other.key
    assert "machines" not in usual.config


# -- what was measured


@pytest.fixture(scope="module")
def texts():
    """What jobs have read, so that it is tokenized once."""
    return {}


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    "line", [json.loads(line) for line in MEASURED.read_text("utf-8").splitlines()], ids=lambda line: line["case"]
)
def test_the_plan_against_measured_jobs(line, texts, tmp_path):
    folder = outline_of(line["config"], tmp_path / "model") if line["config"] else None
    stages, peak = compared(line, folder, texts)
    assert peak == pytest.approx(max(took["peak_memory_bytes"] for took in line["stages"].values()), rel=0.15)
    whole = sum(one.seconds for one in stages)
    assert 1 / 1.5 < sum(one.planned for one in stages) / whole < 1.5
    for one in stages:
        if one.seconds > whole / 10:
            assert 1 / 1.5 < one.planned / one.seconds < 1.5, one


ON_GPU = gpu_plan.measured_gpus()
MEASURED = [(hardware, measured) for hardware, lines in ON_GPU.items() for measured in gpu_plan.jobs(lines)]


@pytest.mark.parametrize("hardware", ON_GPU)
def test_the_rates_of_a_gpu_are_those_that_were_measured(hardware):
    node, lines = config.composed().machines[hardware], ON_GPU[hardware]
    assert node.verified
    for dtype in ("float32", "bfloat16", "float16"):
        cold = (hardware, dtype) == ("h200", "bfloat16")  # its source says so, and that the rate is the H100's
        measured = ON_GPU["h100"] if cold else lines
        assert node[dtype] == pytest.approx(1e12 * measured[f"products of {dtype}"]["TFLOP/s"], rel=1e-3)
    assert node.bandwidth == pytest.approx(1e9 * lines["copies on the device"]["GB/s"], rel=1e-3)
    assert node.transfer == pytest.approx(1e9 * lines["copies to the device"]["GB/s"], rel=1e-3)
    assert node.memory == pytest.approx(lines["machine"]["memory_bytes"], rel=1e-3)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("hardware", "measured"), MEASURED, ids=lambda one: one if isinstance(one, str) else one.name)
def test_the_plan_against_jobs_measured_on_a_gpu(hardware, measured, texts):
    one = gpu_plan.compared(measured, ON_GPU[hardware][measured.name], texts, hardware)
    assert 1 / 1.5 < one.planned / one.seconds < 1.5
    assert one.peak is None or one.planned_peak == pytest.approx(one.peak, rel=0.15)


@pytest.mark.slow
def test_a_plan_grows_with_what_it_is_of():
    def cost(*args):
        job = config.build(config.composed(*SMALL, "allocator=uniform", *args))
        return plan(job, Machine("cpu", float32=1e9, bandwidth=1e9, read=1e9, call=0.0, process=0.0))

    one, two = cost(), cost("model.num_hidden_layers=6")
    blocks = [made.stages[-1].work.flop - cost_of_head(made) for made in (one, two)]
    assert blocks[1] == pytest.approx(2 * blocks[0])
    assert cost("dataset.n_seq=8").seconds("pruning") > one.seconds("pruning")
    assert cost("dataset.n_seq=8").seconds("evaluation") == one.seconds("evaluation")


def cost_of_head(made):
    return 2 * 32 * 2048 * 4 * 32  # width, vocabulary, tokens


@pytest.mark.parametrize("key", ["device", "dtype"])
def test_what_is_taken_out_of_the_model_is_its_default(key):
    done = command(*UNIFORM, "dry_run=true", f"~model.{key}")
    assert done.code == 0, done.err
