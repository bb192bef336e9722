"""The story of one job, on one screen."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svnup.evaluation import check_dense
from svnup.pruning import prune_model
from svnup.types import ResultRow, ShapleyValues

if TYPE_CHECKING:
    from svnup.config import Job

logger = logging.getLogger(__name__)


def run(job: Job, folder: Path, provenance: dict[str, Any]) -> ResultRow:
    """Run a checked job: measure the blocks, divide the budget, prune, evaluate. `folder` takes the model, if it is saved."""
    start = time.perf_counter()
    lm = job.model.load()
    tokens = job.tokens()
    logger.info("%s: %d blocks, %s prunable weights, on %s", job.name, lm.n_blocks, f"{lm.block_params.sum():,}", lm.device)

    dense = job.evaluation.dense(lm, job.cache_dir)
    check_dense(dense, job.model.dense_ppl, job.protocol_gate, job.model.name)
    logger.info("dense: %s", ", ".join(f"{k} {m.value:.4g}" for k, m in dense.items()) or "not evaluated")

    scores = job.scorer.score(lm, tokens, job.cache_dir) if job.scorer is not None else None
    if scores is not None:
        cost = scores.cost
        logger.info(
            "%s: %d evaluations, %d of them new, in %.1f s",
            scores.method,
            cost.n_evaluations,
            cost.n_new_evaluations,
            cost.seconds,
        )

    profile = job.allocator.allocate(scores, lm.block_params, job.sparsity, job.pattern)
    report = prune_model(lm, profile, job.pruner, tokens)
    logger.info("pruned: %.2f %% zeros in %.1f s", 100 * report.sparsity, report.seconds["total"])

    metrics = job.evaluation.run(lm)
    logger.info("pruned: %s", ", ".join(f"{k} {m.value:.4g}" for k, m in metrics.items()) or "not evaluated")
    if job.save_model:
        lm.save(folder / "model")

    return ResultRow(
        status="finished",
        config_key=job.key,
        config=job.config,
        provenance=provenance,
        fingerprints=job.fingerprints(),
        metrics=metrics.to_dict(),
        dense=dense.to_dict(),
        sparsity={"target": job.sparsity, "actual": report.sparsity, "pattern": job.pattern},
        profile=profile.to_dict() | {"actual": report.block_sparsity(lm.n_blocks).tolist()},
        shapley=scores.to_dict() if isinstance(scores, ShapleyValues) else None,
        pruning=report.to_dict(),
        seconds=time.perf_counter() - start,
    )
