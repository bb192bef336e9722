"""What a job or a sweep will cost, told before anything is loaded: evaluations, block-forwards, operations, bytes of memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from svnup.allocation import Chooser
from svnup.game.layer_game import state_bytes
from svnup.game.walk_plan import WalkPlan
from svnup.memory import least_seconds, resident
from svnup.model.language_model import BATCH_TOKENS, HEAD_TOKENS, LanguageModel, pick_device
from svnup.model.linears import Linear, expert_of, matrix
from svnup.naming import identity, moving_numbers
from svnup.pruning.nothing import Nothing
from svnup.pruning.walk import ERROR_TOKENS, Inputs, workspace
from svnup.shapley import block_forwards

if TYPE_CHECKING:
    from svnup.config import Job

FLOAT = 4


def plan(job: Job) -> dict[str, int]:
    """Blocks, prunable weights, bytes by what takes them, the peak to expect, operations, and what the Shapley values cost.

    The peak is that of the device; on a CPU that of the process, with what it has taken already. It counts weights, hidden
    states, statistics and the matrices that a pruner works with; `result.json` has the peak that it was.
    """
    lm = job.check_shapes()
    config, device = lm.model.config.get_text_config(), pick_device(job.config["model"]["device"])
    size = _itemsize(lm, job.config["model"]["dtype"])
    here = device.type == "cpu"  # where blocks and states wait takes the same memory, unless that is a disk
    states_here = job.offload == "none" or (here and job.offload == "cpu")

    block = max(sum(p.numel() for p in b.parameters()) for b in lm.blocks) * size
    weights = sum(p.numel() for p in lm.model.parameters()) * size
    resident_weights = weights
    if not states_here:
        in_blocks = sum(p.numel() for p in lm.blocks.parameters()) * size
        resident_weights = weights - in_blocks + block * (2 if job.offload == "disk" else 1)  # one is read or written

    n_calibration = _n_tokens(job) if job.calibrates else 0
    batch = max(BATCH_TOKENS[device.type], job.dataset.seq_len)
    shapes = {tuple(matrix(m).shape) for i in range(lm.n_blocks) for m in lm.linears(i).values()}
    inner = max(map(max, shapes))
    activations = batch * (8 * config.hidden_size + 4 * inner) * size
    states = n_calibration * config.hidden_size * size
    statistics = _statistics(job, lm) if job.pruner.needs_inputs else 0
    stages = {
        "pruning": states * states_here + activations + statistics + max(workspace(job.pruner, *shape) for shape in shapes),
        "evaluation": activations + 3 * min(HEAD_TOKENS, batch) * lm.vocab_size * FLOAT,
    }
    out = {"blocks": lm.n_blocks, "prunable weights": int(lm.block_params.sum()), "bytes of weights": weights}
    if left := lm.left_alone():
        out["weights of blocks that are not pruned"] = sum(left.values())
    out |= {"bytes of calibration states": states, "bytes of statistics of a block": statistics}
    of_token = 2 * int(lm.block_params.sum())  # operations in all blocks, but for the products of attention
    if n_calibration:
        out["GFLOP of pruning's passes"] = 2 * n_calibration * of_token // 10**9
    if job.recovery.n_passes:
        out["GFLOP of recovery's passes"] = job.recovery.n_passes * n_calibration * of_token // 10**9
        masters = 4 * FLOAT * int(lm.block_params.max())  # with their gradients and both moments of AdamW
        stages["recovery"] = 3 * states * states_here + 3 * activations + masters + block
    needs = job.allocator.needs
    if needs.selection or needs.calibration:
        out["tuning evaluations"] = cast(Chooser, job.allocator).n_losses(job.budget(lm))
    if needs.selection:
        assert job.selection is not None
        read = job.selection.tokens(job.model.tokenizer).size * config.hidden_size * size
        per_state = read + states * job.pruner.needs_inputs
        room = state_bytes(device) - (0 if here else weights // 2)
        held = 2 if needs.once else min(lm.n_blocks + 1, max(2, room // per_state))
        out["bytes of tuning states, at most"] = tuning = per_state * held
        stages["tuning"] = tuning + max(stages["pruning"] - states + block, stages["evaluation"])
    if job.scorer is not None:
        named, cost = "scores'" if job.shapley is None else "shapley", job.scorer.plan(lm.n_blocks)
        out |= {f"{named} {k.replace('_', ' ')}": v for k, v in cost.items()}
    if job.shapley is not None:
        data = job.shapley.game.data
        per_token = (
            cost["block_forwards"] * of_token // lm.n_blocks + cost["evaluations"] * 2 * config.hidden_size * lm.vocab_size
        )
        out["GFLOP of shapley passes"] = (data.n_seq or 0) * data.seq_len * per_token // 10**9
        out["bytes of shapley states"] = cost["peak_states"] * (data.n_seq or 0) * data.seq_len * config.hidden_size * size
        if job.offload == "disk":
            out["bytes that shapley reads"] = cost["block_forwards"] * block
        if needs.n_games:
            again = job.shapley.estimator.plan(job.shapley.game.n_players(lm.n_blocks))
            out["evaluations of later rounds"] = needs.n_games * len(again)
            out["block forwards of later rounds"] = needs.n_games * block_forwards(again, absent_costs=True)
        replacements = int(lm.block_params.sum()) * size * (2 if needs.n_games else job.game_prunes)
        out |= {"bytes of pruned replacements": replacements} if replacements else {}
        stages["shapley"] = out["bytes of shapley states"] + replacements + stages["evaluation"]
    if job.scorer is not None and job.scorer.needs_inputs:  # which may hold a score of every weight of a block
        stages["scores"] = states * states_here + activations + 2 * int(lm.block_params.max()) * FLOAT
    if job.split.trial:  # the dense weights wait beside the pruned ones
        stages["pruning"] += int(lm.block_params.sum()) * size
    out["bytes at the peak, about"] = (resident() if here else 0) + resident_weights + max(stages.values())
    return out


@dataclass(frozen=True)
class SharedWork:
    """What jobs of a sweep need alike and one of them computes: a game, dense numbers, losses.

    Args:
        what: it is.
        n_jobs: that need it.
        counts: of its work, by their names.
        flop: operations of its passes.
    """

    what: str
    n_jobs: int
    counts: dict[str, int]
    flop: float


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will cost.

    Args:
        shared: what its jobs need alike.
        flop: operations of all passes: those of the shared work, of pruning and of evaluation.
        peak: bytes of the job that needs most.
        seconds: of all passes, one after the other, by the speed of a block of each model here.
    """

    shared: list[SharedWork]
    flop: float
    peak: int
    seconds: float


def plan_of_sweep(jobs: Sequence[Job]) -> SweepPlan:
    """What checked jobs will cost together, where what they share is computed once and nothing of it is in the cache.

    Counted are passes over texts for games, trials, pruning and perplexities. Solving for the weights that are kept, published
    heuristics, values at the margin and lm-eval's tasks take time of their own.
    """
    plans: dict[str, dict[str, int]] = {}  # jobs that differ in seeds alone cost the same
    groups: dict[tuple[str, str], list[Job]] = {}
    speeds: dict[str, float] = {}
    work: list[tuple[Job, float]] = []
    for job in jobs:
        if (like := _text(_without_seeds(job.config))) not in plans:
            plans[like] = plan(job)
        if (model := _text(job.config["model"])) not in speeds:
            speeds[model] = _flop_per_second(job)
        of_pruning = sum(plans[like].get(f"GFLOP of {what}'s passes", 0) for what in ("pruning", "recovery"))
        passes = of_pruning * 1e9 + _of_rounds(job, plans[like])
        work.append((job, passes + _evaluated(job) * sum(_per_token(job))))
        for what, found in _shared(job).items():
            groups.setdefault((what, _text(found)), []).append(job)
    shared = [SHARED[what](those) for (what, _), those in groups.items()]
    work += [(those[0], one.flop) for those, one in zip(groups.values(), shared, strict=True)]
    return SweepPlan(
        shared,
        sum(flop for _, flop in work),
        max((one["bytes at the peak, about"] for one in plans.values()), default=0),
        sum(flop / speeds[_text(job.config["model"])] for job, flop in work),
    )


def _shared(job: Job) -> dict[str, Any]:
    """What identifies each thing that a job may share with others, before any weight is loaded."""
    config, found = moving_numbers(job.config), dict[str, Any]()
    model, calibration = [config["model"], job.config["model"].get("device")], config["dataset"] if job.calibrates else None
    if job.shapley is not None:
        pruned = [config["sparsity"], config["pattern"], calibration] if job.game_prunes else []
        found["game"] = [model, identity(job.shapley.game), *pruned]
    if job.evaluation.sources() or job.evaluation.needs_whole_model:
        found["dense numbers"] = [model, config["evaluation"]]
    if job.allocator.needs.selection:
        texts = [calibration, job.config["selection"], job.selection_loss]
        found["losses"] = [model, config["pruner"], config["split"], *texts]
    return found


def _game(jobs: list[Job]) -> SharedWork:
    lm, scorers = jobs[0].skeleton, [job.shapley for job in jobs if job.shapley is not None]
    coalitions = np.unique(np.concatenate([scorer.shard_coalitions(lm.n_blocks) for scorer in scorers]), axis=0)
    walk = WalkPlan.of(coalitions, absent_costs=scorers[0].game.absence == "prune")
    through, head = _per_token(jobs[0])
    flop = walk.n_block_forwards * through / coalitions.shape[1] + walk.n_evaluations * head
    counts = {"evaluations": walk.n_evaluations, "block-forwards": walk.n_block_forwards}
    gates = {identity(scorer.estimator): scorer.plan(lm.n_blocks).get("backward_passes", 0) for scorer in scorers}
    if backward := sum(gates.values()):
        counts["backward passes"] = backward
        flop += 4 * backward * (through + head)  # with the forward, which is repeated block by block
    return SharedWork("game", len(jobs), counts, _n_payoff(jobs[0]) * flop)


def _of_rounds(job: Job, told: dict[str, int]) -> float:
    """Operations of the games in pruned models, which no other job has."""
    if job.shapley is None:
        return 0.0
    (through, head), n_players = _per_token(job), job.shapley.game.n_players(job.skeleton.n_blocks)
    forwards, evaluations = (told.get(f"{what} of later rounds", 0) for what in ("block forwards", "evaluations"))
    return _n_payoff(job) * (forwards * through / n_players + evaluations * head)


def _n_payoff(job: Job) -> int:
    """Tokens of the payoff text of a job with a game."""
    assert job.shapley is not None
    return (job.shapley.game.data.n_seq or 0) * job.shapley.game.data.seq_len


def _dense(jobs: list[Job]) -> SharedWork:
    tokens = _evaluated(jobs[0])
    return SharedWork("dense numbers", len(jobs), {"tokens": tokens}, tokens * sum(_per_token(jobs[0])))


def _losses(jobs: list[Job]) -> SharedWork:
    through, head = _per_token(jobs[0])
    counts = [cast(Chooser, job.allocator).n_losses(job.budget(job.skeleton)) for job in jobs]
    flop = 0.0
    for job, count in zip(jobs, counts, strict=True):
        assert job.selection is not None
        calibrates = job.pruner.needs_inputs and not job.allocator.needs.once
        read = job.selection.tokens(job.model.tokenizer).size
        flop += count * (read * (through + head) + _n_tokens(job) * through * calibrates)
    return SharedWork("losses", len(jobs), {"evaluations at most": sum(counts)}, flop)


SHARED: dict[str, Callable[[list[Job]], SharedWork]] = {"game": _game, "dense numbers": _dense, "losses": _losses}


def _per_token(job: Job) -> tuple[float, float]:
    """Operations of a token in all blocks, but for the products of attention, and in the head."""
    lm = job.skeleton
    return 2.0 * int(lm.block_params.sum()), 2.0 * lm.model.config.get_text_config().hidden_size * lm.vocab_size


def _evaluated(job: Job) -> int:
    """Tokens of the texts that a job is judged by."""
    return sum(source.tokens(job.model.tokenizer).size for source in job.evaluation.sources().values())


def _flop_per_second(job: Job) -> float:
    """Of a block of the model with random weights, here."""
    probe = job.model.one_block()
    with torch.inference_mode():
        batch = next(probe.micro_batches(torch.zeros(1, job.dataset.seq_len, dtype=torch.int64)))
        seconds = least_seconds(lambda: probe.run_block(0, batch))
    return 2.0 * int(probe.block_params.sum()) * job.dataset.seq_len / max(seconds, 1e-9)


def _without_seeds(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without_seeds(v) for k, v in node.items() if k != "seed"}
    return node


def _text(node: Any) -> str:
    return json.dumps(node, sort_keys=True)


def _itemsize(lm: LanguageModel, dtype: str) -> int:
    kept = lm.model.config.dtype if dtype == "auto" else getattr(torch, dtype)
    return (kept or torch.float32).itemsize


def _statistics(job: Job, lm: LanguageModel) -> int:
    """Bytes of what a pruner gathers for a block, with the first tokens of each distinct input, found by running one block."""
    probe = job.model.one_block()
    inputs = Inputs(probe.linears(0), Nothing())  # which linear layers read the same input is all that is asked
    with torch.inference_mode():
        for visit in probe.walk(np.zeros((1, 2), dtype=np.int64)):
            inputs.collect(visit, advance=False)
    reads = {name: inputs.reads(name) for name in probe.linears(0)}
    blocks = [{n: m for n, m in lm.linears(i).items() if reads.get(n, n) == n} for i in range(lm.n_blocks)]
    kinds = {tuple((n, matrix(m).shape) for n, m in block.items()): block for block in blocks}
    return max(_statistics_of(job, block) for block in kinds.values())


def _statistics_of(job: Job, linears: dict[str, Linear]) -> int:
    """Bytes of the statistics and first tokens of linear layers that read inputs of their own."""
    total, n_experts = 0, len({expert_of(name, m) for name, m in linears.items()} - {None})
    for name, linear in linears.items():
        weight = matrix(linear)
        gathered = _n_bytes(job.pruner.new_stats(weight))
        total += gathered * (3 if gathered >= FLOAT * weight.shape[1] ** 2 else 1)  # a Hessian is kept with its factor
        n_first = min(ERROR_TOKENS, _n_tokens(job)) // (n_experts if expert_of(name, linear) is not None else 1)
        total += n_first * weight.shape[1] * FLOAT
    return total


def _n_tokens(job: Job) -> int:
    return (job.dataset.n_seq or 0) * job.dataset.seq_len


def _n_bytes(stats: Any) -> int:
    if isinstance(stats, Tensor):
        return stats.numel() * stats.element_size()
    return sum(_n_bytes(getattr(stats, f.name)) for f in fields(stats)) if is_dataclass(stats) else 0
