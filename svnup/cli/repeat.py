"""The process of a repetition (`svnup.rerun`): `python -m svnup.cli.repeat RESULT INTO CACHE_DIR TRUST`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from svnup import config
from svnup.cli.outcome import outcome, tell
from svnup.execute import execute
from svnup.outside import OURS
from svnup.reports import figures
from svnup.results.provenance import Asked
from svnup.results.row import ResultRow


def repeat(result: Path, into: str, cache_dir: str, trust: bool) -> int:
    """Build the job of a result and run it as the `svnup` command would; returns its exit code."""
    import torch

    row = ResultRow.from_json(result.read_text(encoding="utf-8"))
    made = row.provenance
    threads = made.hardware.threads if made.hardware is not None else None
    if threads and threads <= (os.cpu_count() or 1):
        torch.set_num_threads(threads)
    if made.cwd and Path(made.cwd).is_dir():
        os.chdir(made.cwd)
    changes: dict[str, Any] = {"results_dir": into, "cache_dir": cache_dir, "force": True, "dry_run": False}
    changes["tracker"] = {"_target_": "svnup.results.tracker.NoTracker"}
    if row.config.get("offload") != "disk":  # which has to write a checkpoint; others repeat the numbers only
        changes |= {"save_model": False, "save_masks": False, "save_format": "dense"}
    config.register()
    try:
        job = config.build(config.stored(row.config, trust, **changes))
        execute(job, Asked(made.command or OURS, list(made.overrides), made.sweep), figures)
    except Exception as error:
        if (told := outcome(error)) is None:
            raise
        message, code = told
        tell("svnup-results", message)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(repeat(Path(sys.argv[1]), sys.argv[2], sys.argv[3], trust=sys.argv[4] == "True"))
