"""One folder with one JSON per run, written atomically."""

from __future__ import annotations

import json
import logging
import os
import shutil
import typing
from dataclasses import dataclass
from pathlib import Path

from svnup.results.row import ResultRow
from svnup.secrets import redact
from svnup.types import SaveFormat

logger = logging.getLogger(__name__)
SCRATCH = "offload"  # in the run's folder: the blocks that an interrupted job has pruned, and hidden states


@dataclass(frozen=True)
class RunFolder:
    """`<results_dir>/runs/<config_key>/`: result.json with a status, shapley.json, profile.json, config.yaml, svnup.log,
    figures/ and, if asked for, model/ and masks.safetensors.

    A finished result.json comes last. A model that is also asked for in another form goes beside the one that is there, to
    model_dense/ or model_bitmask/.
    """

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
        """Write result.json, and before it what else the row makes."""
        for name, text in self._parts(row).items():
            self._write(name, text)
        self._write("result.json", row.to_json())

    def complete(self, row: ResultRow) -> None:
        """Write what the row makes beside result.json, as far as it is not there."""
        for name, text in self._parts(row).items():
            if not (self.path / name).is_file():
                self._write(name, text)

    @staticmethod
    def _parts(row: ResultRow) -> dict[str, str]:
        parts = {"profile.json": row.profile, "shapley.json": row.shapley}
        return {name: json.dumps(part, indent=1) + "\n" for name, part in parts.items() if part is not None}

    def has(self, model: bool, form: SaveFormat, masks: bool) -> bool:
        """Whether what was asked to be saved is there, in the form that was asked for."""
        saved = form in self.models()
        return (saved or not model) and ((self.path / "masks.safetensors").is_file() or not masks)

    def models(self) -> dict[SaveFormat, Path]:
        """The folders of the models that were saved here, by their form."""
        found: dict[SaveFormat, Path] = {}
        for folder in (self.path / "model", *(self.path / f"model_{form}" for form in typing.get_args(SaveFormat))):
            if (folder / "profile.json").is_file() and any(folder.glob("*.safetensors*")):  # the profile is saved last
                found.setdefault("bitmask" if (folder / "svnup_bitmask.json").is_file() else "dense", folder)
        return found

    def place(self, form: SaveFormat) -> Path:
        """Where a model of this form goes: in the place of its like, and never in that of another form."""
        models = self.models()
        taken = self.path / "model" in models.values()
        return models.get(form) or self.path / (f"model_{form}" if taken else "model")

    def clear_scratch(self) -> None:
        """Remove what an offloaded job keeps while it is not finished."""
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)

    def clear_saved(self) -> list[str]:
        """Remove what was saved of a model that is pruned anew; returns the names of what there was."""
        folders = [self.path / name for name in ("model", *(f"model_{form}" for form in typing.get_args(SaveFormat)))]
        saved = [path for path in (*folders, self.path / "masks.safetensors") if path.exists()]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        (self.path / "masks.safetensors").unlink(missing_ok=True)
        return [path.name for path in saved]

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
            logger.warning("%s: left out, since it is torn, of another version or no run's", folder.path / "result.json")
            continue
        rows.append(row)
        path, other = first.setdefault(row.config_key, (folder.path, row))
        if row.status == other.status == "finished" and row.metrics != other.metrics:
            logger.warning("%s, %s: one run with different numbers; name the folder of one", path, folder.path)
    return rows
