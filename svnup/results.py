"""One folder with one JSON per run, written atomically."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from svnup.provenance import redact
from svnup.types import ResultRow

logger = logging.getLogger(__name__)

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
        temporary.write_text(redact(text), encoding="utf-8")
        temporary.replace(self.path / name)


def run_folders(results_dir: str | Path) -> list[RunFolder]:
    """Every folder with a result below a folder, in the order of their paths."""
    return [RunFolder(folder) for folder in sorted({path.parent for path in Path(results_dir).rglob("result.json")})]


def load(results_dir: str | Path) -> list[ResultRow]:
    """Every readable result below a folder, in the order of their keys; the others are named in a warning, and so are copies
    of one run with other numbers."""
    rows = []
    first: dict[str, tuple[Path, ResultRow]] = {}
    for folder in run_folders(results_dir):
        if (row := folder.read()) is None:
            logger.warning("%s: left out, since it is torn or of another version", folder.path / "result.json")
            continue
        rows.append(row)
        path, other = first.setdefault(row.config_key, (folder.path, row))
        if row.status == other.status == "finished" and row.metrics != other.metrics:
            logger.warning("%s, %s: one run with different numbers; name the folder of one", path, folder.path)
    return rows
