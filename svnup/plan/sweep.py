"""What the jobs of a sweep cost together, where what they share is computed once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from svnup.allocation import Chooser
from svnup.machines import Work
from svnup.naming import identity, moving_numbers
from svnup.plan.stages import JobCounts, Plan, machine_of

if TYPE_CHECKING:
    from svnup.config import Job


@dataclass(frozen=True)
class SharedWork:
    """What jobs of a sweep need alike and one of them computes: a game, dense numbers, losses.

    Args:
        what: it is.
        n_jobs: that need it.
        counts: of its work, by their names.
        work: what it does.
    """

    what: str
    n_jobs: int
    counts: dict[str, int]
    work: Work


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will cost.

    Args:
        shared: what its jobs need alike.
        work: all that is done.
        peak: bytes on the device of the job that needs most; on a CPU those of the process.
        host_peak: bytes on the host of a GPU, likewise; 0 where the device is the CPU.
        seconds: the least and the most of all jobs, one after the other.
        largest: the job with that peak, None without jobs.
    """

    shared: list[SharedWork]
    work: Work
    peak: float
    host_peak: float
    seconds: tuple[float, float]
    largest: tuple[Job, Plan] | None


def plan_of_sweep(jobs: Sequence[Job]) -> SweepPlan:
    """What checked jobs will cost together, where what they share is computed once and nothing of it is in the cache."""
    plans: dict[str, Plan] = {}  # jobs that differ in seeds alone cost the same
    counted: dict[str, JobCounts] = {}
    groups: dict[tuple[str, str], list[Job]] = {}
    work: list[tuple[Job, Work]] = []
    for job in jobs:
        if (like := _text(_without_seeds(job.config))) not in plans:
            counted[like] = JobCounts(job, machine_of(job))
            plans[like] = counted[like].plan()
        shared = _shared(job)
        steps = [(stage.name, name, part) for stage in plans[like].stages for name, part in stage.steps.items()]
        own = [part for stage, name, part in steps if SHARED_STEPS.get(stage, SHARED_STEPS.get(name)) not in shared]
        work.append((job, sum(own, Work())))
        for what, found in shared.items():
            groups.setdefault((what, _text(found)), []).append(job)
    counts = [[counted[_text(_without_seeds(job.config))] for job in those] for those in groups.values()]
    alike = [SHARED[what](those, of) for (what, _), those, of in zip(groups, groups.values(), counts, strict=True)]
    work += [(those[0], one.work) for those, one in zip(groups.values(), alike, strict=True)]
    spans = [machine_of(job).seconds(part) for job, part in work]
    largest = max(((job, plans[_text(_without_seeds(job.config))]) for job in jobs), key=lambda one: one[1].peak, default=None)
    return SweepPlan(
        alike,
        sum((part for _, part in work), Work()),
        max((one.peak for one in plans.values()), default=0.0),
        max((one.host_peak for one in plans.values()), default=0.0),
        (sum(low for low, _ in spans), sum(high for _, high in spans)),
        largest,
    )


# By the name of a stage, or of a part of one, what is counted once for all jobs that need it.
SHARED_STEPS = {"dense": "dense numbers", "scores": "game", "losses on selection text": "losses"}


def _shared(job: Job) -> dict[str, Any]:
    """What identifies each thing that a job may share with others, before any weight is loaded."""
    config, found = moving_numbers(job.config), dict[str, Any]()
    model, calibration = [config["model"], job.config["model"].get("device")], config["dataset"] if job.calibrates else None
    if job.shapley is not None:
        pruned = [config["sparsity"], config["pattern"], calibration] if job.game_prunes else []
        found["game"] = [model, identity(job.shapley.game), *pruned]
    if job.shard is not None:
        return found
    if job.evaluation.sources() or job.evaluation.needs_whole_model:
        found["dense numbers"] = [model, config["evaluation"]]
    if job.allocator.needs.selection:
        texts = [calibration, job.config["selection"], job.selection_loss]
        found["losses"] = [model, config["pruner"], config["split"], *texts]
    return found


def _game(jobs: list[Job], counts: list[JobCounts]) -> SharedWork:
    lm, scorers = jobs[0].skeleton, [job.shapley for job in jobs if job.shapley is not None]
    coalitions = np.unique(np.concatenate([scorer.shard_coalitions(lm.n_blocks) for scorer in scorers]), axis=0)
    counted = counts[0]
    walk, _, work = counted.game(coalitions)
    found = {"evaluations": walk.n_evaluations, "block-forwards": walk.n_block_forwards}
    if jobs[0].game_prunes:
        work += sum(counted.pruning(scorers[0].game.pruner, errors=False).values(), Work())
    gates = {identity(scorer.estimator): scorer.n_backward for scorer in scorers}
    if backward := sum(gates.values()):
        found["backward passes"] = backward
        work += counted.whole(scorers[0].game.data.n_seq or 0, scorers[0].game.data.seq_len) * (4 * backward)
    return SharedWork("game", len(jobs), found, work)


def _dense(jobs: list[Job], counts: list[JobCounts]) -> SharedWork:
    tokens = sum(source.tokens(jobs[0].model.tokenizer).size for source in jobs[0].evaluation.sources().values())
    return SharedWork("dense numbers", len(jobs), {"tokens": tokens}, counts[0].judged())


def _losses(jobs: list[Job], counts: list[JobCounts]) -> SharedWork:
    most = [cast(Chooser, job.allocator).n_losses(job.budget(job.skeleton)) for job in jobs]
    work = sum((counted.losses() for counted in counts), Work())
    return SharedWork("losses", len(jobs), {"evaluations at most": sum(most)}, work)


SHARED: dict[str, Callable[[list[Job], list[JobCounts]], SharedWork]] = {
    "game": _game,
    "dense numbers": _dense,
    "losses": _losses,
}


def _without_seeds(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without_seeds(v) for k, v in node.items() if k != "seed"}
    return node


def _text(node: Any) -> str:
    return json.dumps(node, sort_keys=True)
