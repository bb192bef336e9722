"""The story of one job, on one screen."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svnup import distributed
from svnup.allocation import Budget
from svnup.allocation.trial import Trial
from svnup.data import tokens_sha256
from svnup.evaluation.gate import check_dense
from svnup.files import sealed, write_text
from svnup.game.layer_game import Replacements
from svnup.memory import Stages, peak_memory
from svnup.naming import identity
from svnup.pruning import save_masks
from svnup.pruning.walk import prune_model, pruned_weights
from svnup.results.row import ResultRow
from svnup.results.store import MASKS, SCRATCH, RunFolder
from svnup.scoring import Context
from svnup.types import Ints

if TYPE_CHECKING:
    from svnup.config import Job
    from svnup.model.language_model import LanguageModel
    from svnup.pruning.walk import Pruner

logger = logging.getLogger(__name__)
LEFT_SHOWN = 6  # names in the log


def run(job: Job, folder: Path, blank: ResultRow) -> ResultRow:
    """Run a checked job: measure the blocks, divide the budget, prune, evaluate.

    `folder` takes the model and the masks, if they are saved; `blank` is the row of the job as it started, which the result
    completes. Of several processes all run this, and the first one saves.
    """
    ended = Stages()
    lm = job.load(folder / SCRATCH)
    tokens = job.tokens()
    ended("load", lm.device)
    logger.info("%s: %d blocks, %s prunable weights, on %s", job.name, lm.n_blocks, f"{lm.block_params.sum():,}", lm.device)
    if left := lm.left_alone():
        names = ", ".join([*left][:LEFT_SHOWN]) + (", ..." if len(left) > LEFT_SHOWN else "")
        logger.info("not pruned: %s weights in no linear layer of a block: %s", f"{sum(left.values()):,}", names)

    gate = partial(check_dense, known=job.model.dense_ppl, gate=job.protocol_gate, model=job.model.name)
    dense = job.evaluation.dense(lm, job.cache_dir, gate)
    ended("dense", lm.device)
    logger.info("dense: %s", ", ".join(f"{k} {m.value:.4g}" for k, m in dense.items()) or "not evaluated")

    scores = job.scorer.score(lm, Context(tokens, job.cache_dir, replacements(job, lm))) if job.scorer is not None else None
    if scores is not None:
        ended("scores", lm.device)
        cost = scores.cost
        logger.info(
            "%s: %d evaluations (%d new), %d block-forwards, in %.1f s",
            scores.method,
            cost.n_evaluations,
            cost.n_new_evaluations,
            cost.n_block_forwards,
            cost.seconds,
        )

    budget, trial = job.budget(lm), trial_of(job, lm, tokens)
    if job.not_compared is not None:
        logger.warning("%s; the budget is not compared with the uniform one", job.not_compared)
    blocks = [index for index, _ in lm.budget_units(lm.granularity_of(budget.params))]
    profile = job.allocator.allocate(budget, scores.per_unit(budget.n_units, blocks) if scores is not None else None, trial)
    profile = job.split.divide(lm, profile, job.pruner, tokens)
    profile = distributed.from_first(lambda: profile)  # of several processes each may have found it, rounded in its own way
    ended("allocation", lm.device)
    report = prune_model(lm, profile, job.pruner, tokens, job.recovery)
    ended("pruning", lm.device)
    logger.info("pruned: %.2f %% zeros in %.1f s", 100 * report.sparsity, report.seconds["total"])
    if report.recovered:
        before, after = report.recovery_errors()
        logger.info("recovered: mean error of a block %.4g, before %.4g, in %.1f s", after, before, report.seconds["recovery"])

    metrics = job.evaluation.run(lm)
    ended("evaluation", lm.device)
    logger.info("pruned: %s", ", ".join(f"{k} {m.value:.4g}" for k, m in metrics.items()) or "not evaluated")
    saves = distributed.is_first()
    if saves and job.save_model:
        place = RunFolder(folder).place(job.save_format)
        lm.save(place, job.save_format)
        write_text(place / "profile.json", json.dumps(sealed(profile.to_dict()), indent=1) + "\n")
    if saves and job.save_masks:
        save_masks(lm, folder / MASKS)
    if job.save_model or job.save_masks:
        ended("saving", lm.device)

    not_compared = {"not_compared": job.not_compared} if job.not_compared is not None else {}
    stored: dict[str, Any] = {scores.stored_as: scores.to_dict()} if scores is not None else {}
    return blank.finished(
        metrics=metrics.to_dict(),
        dense=dense.to_dict(),
        sparsity={"target": job.sparsity, "actual": report.sparsity, "pattern": job.pattern},
        profile=profile.to_dict() | {"actual": report.block_sparsity(lm.n_blocks).tolist()} | not_compared,
        **stored,
        tuning=trial.to_dict(),
        pruning=report.to_dict(),
        peak_memory_bytes=peak_memory(lm.device),
        stages=ended.done,
        seconds=ended.seconds,
    )


def trial_of(job: Job, lm: LanguageModel, tokens: Ints) -> Trial:
    """What a profile costs where this job prunes by it, with calibration `tokens`, on its selection text."""
    return Trial(
        lm,
        job.pruner,
        job.split,
        tokens,
        job.selection,
        job.cache_dir,
        payoff=job.sources().get("allocator.data"),
        shapley=job.shapley,
        kind=job.selection_loss,
    )


def run_shard(job: Job) -> int:
    """Evaluate one shard of the job's coalitions into the cache, for a job without a shard to use; returns how many are new."""
    assert job.shapley is not None
    lm = job.load()
    game = job.shapley.build_game(lm, replacements(job, lm), job.cache_dir)
    game(job.shapley.shard_coalitions(lm.n_blocks))
    return game.n_evaluations


def replacements(job: Job, lm: LanguageModel) -> Callable[[Pruner], Replacements]:
    """How the game gets what stands in for absent blocks: a uniform pass at the job's sparsity over its calibration text.

    They are named by what makes them and not by their bits, which differ between machines: so these can share a game.
    """

    def make(pruner: Pruner) -> Replacements:
        tokens = job.tokens()
        uniform = Budget(lm.block_params, job.sparsity, job.pattern).uniform()
        name = f"{identity(pruner)} {job.sparsity!r} {job.pattern} {tokens_sha256(tokens)}"
        return Replacements(pruned_weights(lm, uniform, pruner, tokens), name)

    return make
