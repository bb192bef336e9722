"""One folder with one JSON per run, written atomically."""

from __future__ import annotations

import contextlib
import json
import logging
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from svnup.claims import claimed, holder, is_dead
from svnup.files import remove, sealed, set_aside, take_place, write_text
from svnup.progress import Listener
from svnup.results import stored
from svnup.results.row import ResultRow
from svnup.secrets import redact
from svnup.types import SaveFormat

logger = logging.getLogger(__name__)
CLAIM = ".claim"  # of the process that computes a run
PROGRESS = ".progress"  # there, while it does
UNFINISHED = "unfinished"  # in the run's folder: what a job makes, until all of it is there
MOVES = "moves.json"  # there, when all of it is: the finished row, what goes where, and what goes
SCRATCH = "offload"  # there: the blocks that an interrupted job has pruned, and hidden states
MASKS = "masks.safetensors"
MODELS = ("model", *(f"model_{form}" for form in typing.get_args(SaveFormat)))
SAVED = (*MODELS, MASKS)


@dataclass(frozen=True)
class RunFolder:
    """`<results_dir>/runs/<config_key>/`: result.json with a status, shapley.json, profile.json, config.yaml, svnup.log,
    figures/ and, if asked for, model/ and masks.safetensors.

    A job makes model and masks in unfinished/ and they move when the result is there too, so that a run which is done anew
    keeps what it had until then. A model that is also asked for in another form goes beside the one that is there, to
    model_dense/ or model_bitmask/.
    """

    path: Path

    @classmethod
    def of(cls, results_dir: str | Path, config_key: str) -> RunFolder:
        return cls(Path(results_dir) / "runs" / config_key)

    def read(self) -> ResultRow | None:
        """The result that lies here; None where there is none, or none that this version reads.

        A run whose process is not there any more is `dead`.
        """
        try:
            return self.result()
        except (OSError, ValueError):
            return None

    def result(self) -> ResultRow:
        """The same; raises OSError or ValueError, with the file and the key at fault, where there is none."""
        file = self.path / "result.json"
        try:
            row = ResultRow.from_json(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: no result of this version ({error})") from None
        if row.status == "running" and row.process and is_dead(self.path / CLAIM, row.process.host, row.process.pid):
            return replace(row, status="dead", error=row.error or "its process is not there any more; run it again")
        return row

    def written(self) -> int | None:
        """When the result that lies here was written, in ns; None where there is none."""
        try:
            return (self.path / "result.json").stat().st_mtime_ns
        except OSError:
            return None

    @contextlib.contextmanager
    def telling(self) -> Iterator[Listener]:
        """Give what writes down how far the job is, at most every two seconds, for those who ask meanwhile (`progress`)."""
        last = 0.0

        def tell(name: str, done: int, total: int, unit: str, numbers: Mapping[str, float]) -> None:
            nonlocal last
            if time.monotonic() - last < 2.0 and 0 < done < total:
                return
            last = time.monotonic()
            with contextlib.suppress(OSError):  # a full disk stops no work here
                self._write(PROGRESS, json.dumps({"stage": name, "done": done, "total": total, "unit": unit}))

        try:
            yield tell
        finally:
            remove(self.path / PROGRESS)

    def progress(self) -> str | None:
        """How far a running job is, in words: its stage, and how much of that is done."""
        try:
            told = stored.plain(json.loads((self.path / PROGRESS).read_text(encoding="utf-8")))
            return f"{told['stage']}, {int(told['done']):,} of {int(told['total']):,} {told['unit']}"
        except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
            return None

    def set_aside_unread(self) -> Path | None:
        """Move a result.json out of the way that is damaged, or of another version; returns its new place, if there was one."""
        file = self.path / "result.json"
        return set_aside(file) if file.exists() and self.read() is None else None

    @contextlib.contextmanager
    def claimed(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Be the one process that computes this run; others wait, after `waiting` is called with who has it."""
        with claimed(self.path / CLAIM, lambda: waiting(holder(self.path / CLAIM) or "another process")):
            yield

    def write(self, row: ResultRow) -> None:
        """Write result.json, and before it what else the row makes."""
        for name, text in self._parts(row).items():
            self._write(name, text)
        self._write("result.json", row.sealed_json())

    def complete(self, row: ResultRow) -> None:
        """Write what the row makes beside result.json, as far as it is not there."""
        for name, text in self._parts(row).items():
            if not (self.path / name).is_file():
                self._write(name, text)

    @staticmethod
    def _parts(row: ResultRow) -> dict[str, str]:
        parts = {"profile.json": sealed(row.profile.to_dict())} if row.profile is not None else {}  # which jobs read again
        parts |= {"shapley.json": row.shapley.to_dict()} if row.shapley is not None else {}
        return {name: json.dumps(part, indent=1) + "\n" for name, part in parts.items()}

    def has(self, model: bool, form: SaveFormat, masks: bool) -> bool:
        """Whether what was asked to be saved is there, in the form that was asked for."""
        saved = form in self.models()
        return (saved or not model) and ((self.path / MASKS).is_file() or not masks)

    def models(self) -> dict[SaveFormat, Path]:
        """The folders of the models that were saved here, by their form."""
        found: dict[SaveFormat, Path] = {}
        for folder in (self.path / name for name in MODELS):
            if (folder / "profile.json").is_file() and any(folder.glob("*.safetensors*")):  # the profile is saved last
                found.setdefault("bitmask" if (folder / "svnup_bitmask.json").is_file() else "dense", folder)
        return found

    def place(self, form: SaveFormat) -> Path:
        """Where a model of this form goes: in the place of its like, and never in that of another form."""
        models = self.models()
        taken = self.path / "model" in models.values()
        return models.get(form) or self.path / (f"model_{form}" if taken else "model")

    @property
    def unfinished(self) -> Path:
        return self.path / UNFINISHED

    def begin(self, keep_blocks: bool) -> Path:
        """The folder in which a job makes model and masks; there stay, if at all, the blocks that an interrupted one pruned."""
        self.unfinished.mkdir(parents=True, exist_ok=True)
        for path in self.unfinished.iterdir():
            if path.name != SCRATCH or not keep_blocks:
                remove(path)
        return self.unfinished

    def publish(self, row: ResultRow, anew: bool) -> list[str]:
        """Put a finished row, and what its job has made, in their places; returns the names of what was removed.

        `anew`: what was saved before is of another pruning, and goes.
        """
        made = RunFolder(self.unfinished)
        moves = {folder.name: self.place(form).name for form, folder in made.models().items()}
        moves |= {MASKS: MASKS} if (made.path / MASKS).is_file() else {}
        gone = [name for name in SAVED if (self.path / name).exists() and name not in moves.values()] if anew else []
        if moves or gone:
            made._write(MOVES, json.dumps({"row": row.to_json(), "moves": moves, "gone": gone}))
        self._move(row, moves, gone)
        return gone

    def finish_publishing(self) -> None:
        """Finish what `publish` had begun in a process that was killed."""
        if not (self.unfinished / MOVES).is_file() or holder(self.path / CLAIM) is not None:
            return
        with self.claimed(lambda _: None), contextlib.suppress(FileNotFoundError):  # another process was faster
            try:
                told = json.loads((self.unfinished / MOVES).read_text(encoding="utf-8"))
                row, moves, gone = ResultRow.from_json(told["row"]), dict(told["moves"]), list(told["gone"])
                known = {*moves, *moves.values(), *gone} <= set(SAVED)  # whoever wrote it: nothing else is moved or removed
            except (ValueError, TypeError, KeyError):
                known = False
            if not known:
                logger.warning("%s: damaged; what it was about to move is made again", set_aside(self.unfinished / MOVES))
                return
            self._move(row, moves, gone)

    def clear(self) -> None:
        """Remove what is unfinished, beside a result that is, if no process works on it."""
        if holder(self.path / CLAIM) is None:
            for name in (UNFINISHED, CLAIM, PROGRESS, SCRATCH):  # the last as earlier versions had it
                remove(self.path / name)

    def _move(self, row: ResultRow, moves: dict[str, str], gone: list[str]) -> None:
        for name, target in moves.items():
            if (self.unfinished / name).exists():  # else it has moved
                take_place(self.unfinished / name, self.path / target)
        self.write(row)
        for name in gone:
            remove(self.path / name)
        remove(self.unfinished)

    def write_text(self, name: str, text: str) -> None:
        self._write(name, redact(text))

    def _write(self, name: str, text: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / name, text)


def run_folders(results_dir: str | Path) -> list[RunFolder]:
    """Every folder with a result below a folder, in the order of their paths."""
    return [RunFolder(folder) for folder in sorted({path.parent for path in Path(results_dir).rglob("result.json")})]


def load(results_dir: str | Path) -> list[ResultRow]:
    """Every readable result below a folder, in the order of their keys; the others are named in a warning with what is wrong,
    and so are copies of one run with other numbers."""
    rows = []
    first: dict[str, tuple[Path, ResultRow]] = {}
    for folder in run_folders(results_dir):
        try:
            row = folder.result()
        except (OSError, ValueError) as error:
            logger.warning("%s; it is left out", error)
            continue
        rows.append(row)
        path, other = first.setdefault(row.config_key, (folder.path, row))
        if row.status == other.status == "finished" and row.metrics != other.metrics:
            logger.warning("%s, %s: one run with different numbers; name the folder of one", path, folder.path)
    return rows
