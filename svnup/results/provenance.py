"""Where a number came from: command, code, packages, machine, environment; and what may never be written down beside it."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from svnup import NUMBERS_VERSION, distributed
from svnup.keys import walk
from svnup.outside import OURS, code_hash, git, outside_code
from svnup.results.row import Hardware, Provenance
from svnup.secrets import redact_code

PACKAGES = (
    *("svnup", "torch", "transformers", "tokenizers", "datasets", "numpy", "safetensors", "accelerate", "triton"),
    *("hydra-core", "omegaconf", "lm_eval", "shapiq", "wandb"),
)


# Variables of the environment that can move a number, or what is found offline; none of them holds a secret.
MOVES_NUMBERS = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
    *("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA"),
)


ENVIRONMENT = (
    *MOVES_NUMBERS,
    *(
        "CUDA_VISIBLE_DEVICES",
        "PYTORCH_CUDA_ALLOC_CONF",
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "HF_DATASETS_CACHE",
    ),
)


LONGEST_DIFF = 50_000  # characters


@dataclass(frozen=True)
class Asked:
    """How a job was asked for: the shell `command` that runs it alone, its `overrides`, the name of its `sweep` if any."""

    command: str = OURS
    overrides: list[str] = field(default_factory=list)
    sweep: str | None = None


def provenance(
    asked: Asked,
    config: dict[str, Any],
    *,
    name: str | None = None,
    texts: dict[str, dict[str, Any]] | None = None,
    dequantized_from: dict[str, Any] | None = None,
) -> Provenance:
    """Where a number came from: command, seeds, texts, code and what of it is not committed, machine.

    `config` is the resolved one, `texts` says by key what was read, `dequantized_from` what the weights were dequantized from,
    if anything. Raises ValueError where code that `config` names is not found.
    """
    told = {
        "command": asked.command,
        "overrides": asked.overrides,
        "name": name,
        "sweep": asked.sweep,
        "processes": distributed.n_started(),
        "seed": config.get("seed"),
        "numbers": NUMBERS_VERSION,
        "seeds": {key: value for key, value in walk(config) if key.rpartition(".")[2] == "seed"},
        "texts": texts or {},
        "dequantized_from": dequantized_from,
        "code_sha256": code_hash(OURS),
        **_checkout(),
        "outside": outside_code(config),
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p)) is not None},
        "hardware": hardware().to_dict(),
        "environment": {k: os.environ[k] for k in ENVIRONMENT if k in os.environ},
        "pythonpath": python_path(),
        "cwd": str(Path.cwd()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Provenance.from_dict(told, "provenance")


def python_path() -> str | None:
    """PYTHONPATH with whole paths, so that it leads to the same places from anywhere; None where there is none."""
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    return os.pathsep.join(map(os.path.abspath, places)) or None


def hardware() -> Hardware:
    """The machine that this process runs on."""
    import torch

    from svnup.memory import installed

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    gpus = range(torch.cuda.device_count())
    return Hardware(
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        memory_bytes=installed(),
        gpus=tuple(torch.cuda.get_device_name(i) for i in gpus),
        gpu_memory_bytes=tuple(torch.cuda.get_device_properties(i).total_memory for i in gpus),
        cuda=torch.version.cuda if gpus else None,
        system=platform.system(),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _checkout() -> dict[str, Any]:
    """Commit of svnup's own checkout, the difference to it, and code that git does not know; None where svnup is installed
    from a wheel. `diff_sha256` is that of the whole difference, `diff` its beginning."""
    here = Path(__file__).parents[1]
    if git(here, "ls-files", "--error-unmatch", "types.py") is None:
        return dict.fromkeys(("git", "dirty", "diff", "diff_sha256", "untracked"))
    commit = git(here, "rev-parse", "HEAD")
    diff = git(here, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--", ":/", ":(exclude,top,glob)**/.env*")
    conf = [p for p in ("conf", "../conf") if (here / p).is_dir()]
    untracked = git(here, "ls-files", "--others", "--exclude-standard", "--", ".", *conf) or ""
    return {
        "git": commit.strip() if commit else None,
        "dirty": bool(git(here, "status", "--porcelain", "--untracked-files=no")),
        "diff": _cut(redact_code(diff)) if diff else None,
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "untracked": untracked.splitlines()[:100],
    }


def _cut(text: str) -> str:
    if len(text) <= LONGEST_DIFF:
        return text
    return f"{text[:LONGEST_DIFF]}\n[cut: {LONGEST_DIFF:,} of {len(text):,} characters are kept]\n"
