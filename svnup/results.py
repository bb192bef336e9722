"""One folder with one JSON per run, written atomically; and the `svnup-results` command that reads them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from svnup.types import ResultRow

PACKAGES = ("svnup", "torch", "transformers", "datasets", "numpy", "hydra-core", "omegaconf", "safetensors", "wandb", "lm_eval")

SCRATCH = "offload"  # in the run's folder: the blocks that an interrupted job has pruned, and hidden states


@dataclass(frozen=True)
class RunFolder:
    """`<results_dir>/runs/<config_key>/`: result.json with a status, shapley.json, profile.json, config.yaml, svnup.log,
    figures/ and, if asked for, model/."""

    path: Path

    @classmethod
    def of(cls, results_dir: str | Path, config_key: str) -> RunFolder:
        return cls(Path(results_dir) / "runs" / config_key)

    def read(self) -> ResultRow | None:
        """The result that lies here; None where there is none, or none that this version reads."""
        try:
            return ResultRow.from_json((self.path / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, row: ResultRow) -> None:
        self._write("result.json", row.to_json())
        if row.profile is not None:
            self._write("profile.json", json.dumps(row.profile, indent=1) + "\n")
        if row.shapley is not None:
            self._write("shapley.json", json.dumps(row.shapley, indent=1) + "\n")

    def has(self, model: bool, form: str, masks: bool) -> bool:
        """Whether what was asked to be saved is there, in the form that was asked for."""
        weights = {"dense": "*.safetensors*", "bitmask": "svnup_bitmask.json"}[form]
        packed = any((self.path / "model").glob("svnup_bitmask.json"))
        saved = any((self.path / "model").glob(weights)) and packed == (form == "bitmask")
        return (saved or not model) and ((self.path / "masks.safetensors").is_file() or not masks)

    def clear_scratch(self) -> None:
        """Remove what an offloaded job keeps while it is not finished."""
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)

    def clear_saved(self) -> None:
        """Remove what was saved of a model that is pruned anew."""
        shutil.rmtree(self.path / "model", ignore_errors=True)
        (self.path / "masks.safetensors").unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> None:
        self._write(name, text)

    def _write(self, name: str, text: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f".{name}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path / name)


def load(results_dir: str | Path) -> list[ResultRow]:
    """Every readable result below a folder, in the order of their keys."""
    folders = sorted({path.parent for path in Path(results_dir).rglob("result.json")})
    return [row for folder in folders if (row := RunFolder(folder).read()) is not None]


def provenance(command: list[str], overrides: list[str], seed: int) -> dict[str, Any]:
    """Where a number came from: code, packages, machine, and the command that repeats it."""
    return {
        "command": " ".join(command),
        "overrides": overrides,
        "seed": seed,
        **_git(),
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p)) is not None},
        "hardware": _hardware(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    """Commit of svnup's own checkout, and whether it differs from it; None where svnup is installed from a wheel."""
    here = Path(__file__).parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "types.py") is None:
        return {"git": None, "dirty": None}
    return {"git": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def _hardware() -> dict[str, Any]:
    import torch

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": gpus,
        "threads": torch.get_num_threads(),
    }


def main(argv: list[str] | None = None) -> int:
    """The `svnup-results` command."""
    from svnup.tables import FORMATS, render

    parser = argparse.ArgumentParser(prog="svnup-results", description="Tables of finished svnup runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="render the runs that lie in a results folder")
    table.add_argument("results_dir")
    table.add_argument("--format", choices=FORMATS, default="terminal")
    table.add_argument("--output", type=Path, help="write the table to a file instead of standard output")
    table.add_argument("--title", help="a heading above a Markdown table")
    table.add_argument("--command", dest="made_by", help="the command that makes the table, named below its title")
    options = parser.parse_args(argv)

    rows = load(options.results_dir)
    if not rows:
        print(
            f"svnup-results: {options.results_dir}: no result.json below this folder; run svnup first, or name another",
            file=sys.stderr,
        )
        return 2
    text = render(rows, options.format, title=options.title, command=options.made_by)
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
    return 0
