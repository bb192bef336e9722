"""A sweep of twelve jobs on a Slurm cluster that this script starts, with all that happens to jobs there: `make test-slurm`.

Eight of the jobs are shards of games; of the other four one fails, one is cancelled and one is queued again while they run. A
second submission of the same command brings the sweep to its end, with the numbers of a sweep without Slurm. Needs the packages
of Debian that cluster.py names, and submitit. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from cluster import cluster, missing

OWN = '''
import os, pathlib, time
from dataclasses import dataclass
from typing import ClassVar
from svnup.pruning.magnitude import Magnitude


@dataclass(frozen=True)
class Fails(Magnitude):
    """It fails until it is mended."""

    def prune(self, weight, stats, sparsity):
        if not pathlib.Path("mended").exists():
            raise RuntimeError("a bolt is loose")
        return super().prune(weight, stats, sparsity)


@dataclass(frozen=True)
class Waits(Magnitude):
    """It waits while there is a file `hold`."""

    name: str = ""

    def prune(self, weight, stats, sparsity):
        job = "_".join(os.environ.get(f"SLURM_ARRAY_{what}_ID", "") for what in ("JOB", "TASK"))
        pathlib.Path("begun-" + self.name).write_text(job)
        while pathlib.Path("hold").exists():
            time.sleep(0.1)
        return super().prune(weight, stats, sparsity)
'''
PRUNERS = {
    "fails": "_target_: own.Fails",
    "cancelled": "_target_: own.Waits\nname: cancelled",
    "requeued": "_target_: own.Waits\nname: requeued",
}
TEXT = [  # short ones, of which a job is soon done
    *("dataset=text_file", "dataset@shapley.game.data=text_file", "dataset@evaluation.datasets.test=text_file"),
    *("dataset.path=calibration.txt", "shapley.game.data.path=payoff.txt", "evaluation.datasets.test.path=test.txt"),
]
JOB = [
    *TEXT,
    *("model=random", "model.num_hidden_layers=4", "model.hidden_size=32", "model.intermediate_size=64"),
    *("model.num_attention_heads=2", "model.seq_len=32", "dataset.n_seq=4", "evaluation.n_seq=4"),
    *(
        "shapley=exact",
        "allocator.scale=rank",
        "shapley.game.data.n_seq=2",
        "compare_uniform=off",
        "cache_dir=cache",
        "results_dir=results",
    ),
]
SWEEP = ["pruner=magnitude,fails,cancelled,requeued", "shapley.shard=null,0/2,1/2"]
ASKED = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2", "hydra.launcher.timeout_min=20"]


def check(good: bool, what: str, told: object = "") -> None:
    print(f"{'ok' if good else 'WRONG'}: {what}{'' if good else f' ({told})'}", flush=True)
    if not good:
        sys.exit(1)


def results(folder: Path) -> dict[str, Any]:
    rows = [json.loads(path.read_text()) for path in folder.glob("runs/*/result.json")]
    return {row["config"]["pruner"].get("name") or row["config"]["pruner"]["_target_"]: row for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="where it works and leaves its files; else a temporary folder")
    given = parser.parse_args().folder
    if gone := missing():
        print(f"not installed: {', '.join(gone)}; apt-get install slurm-wlm munge slurmdbd mariadb-server", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        top = (given or Path(temporary)).resolve()
        with cluster(top / "cluster") as env:
            sweep(top / "work", env)
    return 0


def sweep(work: Path, env: dict[str, str]) -> None:
    (work / "conf" / "pruner").mkdir(parents=True)
    (work / "own.py").write_text(OWN)
    for role in ("calibration", "payoff", "test"):
        lines = (f"The {role} text has this line of number {n}, which comes before number {n + 1}.\n" for n in range(200))
        (work / f"{role}.txt").write_text("".join(lines))
    for name, text in PRUNERS.items():
        (work / "conf" / "pruner" / f"{name}.yaml").write_text(f"{text}\npattern: ${{pattern}}\n")
    (work / "hold").touch()
    path = os.pathsep.join([str(work), *filter(None, [env.get("PYTHONPATH")])])
    env = env | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def svnup(*args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "svnup", "--config-dir", "conf", "-m", *JOB, *args]
        return subprocess.Popen(command, cwd=work, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def slurm(*command: str) -> str:
        return subprocess.run(command, cwd=work, env=env, text=True, check=True, capture_output=True, timeout=60).stdout

    def states() -> Counter[tuple[str, str]]:
        while slurm("squeue", "-h"):  # a job has a result before Slurm knows that it has ended
            time.sleep(1)
        time.sleep(2)
        lines = slurm("sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-S", "now-1days").splitlines()
        return Counter((state.split(" by ")[0], code) for state, _, code in (line.partition("|") for line in lines))

    # what a cluster does not have
    refused = svnup("hydra/launcher=slurm_gpu", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1")
    _, err = refused.communicate(timeout=120)
    check(refused.returncode == 2 and err.count("\n") == 1, "a cluster without GPUs refuses jobs in one line", err)
    check("generic resource" in err, "with Slurm's own words", err)

    # the first submission
    first = svnup(*SWEEP, *ASKED)
    end = time.monotonic() + 1800
    while not all((work / f"begun-{name}").exists() for name in ("cancelled", "requeued")):
        if first.poll() is not None or time.monotonic() > end:
            first.kill()
            check(False, "jobs of the sweep run", first.communicate())
        time.sleep(0.5)
    for name in ("cancelled", "requeued"):
        job = (work / f"begun-{name}").read_text()
        slurm(*(("scancel", job) if name == "cancelled" else ("scontrol", "requeue", job)))
    time.sleep(3)
    (work / "hold").unlink()
    _, err = first.communicate(timeout=1800)
    check(first.returncode == 1, "the sweep ends, with exit code 1", err)
    check("Traceback" not in err, "without a traceback where it was started", err)
    told = [line for line in err.splitlines() if line.startswith("svnup: job ")]
    check(len(told) == 2, "two jobs are told", err)
    check(any("a bolt is loose" in line for line in told), "the failed one by its error", told)
    check(any("CANCELLED in Slurm" in line for line in told), "the cancelled one by its state", told)
    log = Path(next(line for line in told if "bolt" in line).rpartition("its log: ")[2])
    check("in prune\n" in (work / log).read_text(), "the traceback of the failed one is in its log", log)
    found = states()
    check(found["FAILED", "1:0"] == 1, "it is FAILED, with exit code 1, in Slurm's accounts", found)
    check(sum(n for (state, _), n in found.items() if state == "CANCELLED") == 1, "the other one is CANCELLED", found)
    check(found["COMPLETED", "0:0"] == 10, "ten jobs are COMPLETED", found)
    ended = {name: row["status"] for name, row in results(work / "results").items()}
    expected = {"own.Fails": "failed", "cancelled": "interrupted", "requeued": "finished"}
    check(ended == expected | {"svnup.pruning.magnitude.Magnitude": "finished"}, "svnup has the same of its runs", ended)

    # the second
    (work / "mended").touch()
    before = {name: row["provenance"]["started"] for name, row in results(work / "results").items()}
    second = svnup(*SWEEP, *ASKED)
    _, err = second.communicate(timeout=1800)
    check(second.returncode == 0, "the same command ends the sweep", err)
    rows = results(work / "results")
    check({row["status"] for row in rows.values()} == {"finished"} and len(rows) == 4, "all its runs are finished", rows.keys())
    again = {name for name, row in rows.items() if row["provenance"]["started"] != before[name]}
    check(again == {"own.Fails", "cancelled"}, "those that were finished have not been run again", again)

    # without Slurm
    alone = svnup(SWEEP[0], "results_dir=alone", "cache_dir=alone")
    _, err = alone.communicate(timeout=1800)
    check(alone.returncode == 0, "the same sweep ends without Slurm", err)
    same = {name: (row["metrics"], row["shapley"]["values"]) for name, row in results(work / "alone").items()}
    check(same == {name: (row["metrics"], row["shapley"]["values"]) for name, row in rows.items()}, "with the same numbers")


if __name__ == "__main__":
    sys.exit(main())
