"""Repeat a run from its result and compare the two number by number."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from svnup.config.construction import refuse_outside
from svnup.keys import flatten
from svnup.results.provenance import MOVES_NUMBERS
from svnup.results.row import ResultRow
from svnup.results.store import load

Verdict = Literal["equal", "within 1 %", "different", "other protocol"]
VERDICTS: tuple[Verdict, ...] = typing.get_args(Verdict)
TOLERANCE = 0.01
# Fields of the provenance that are equal if two results have the same origin; NEEDED are those without which it is not known.
ENDS = (
    *("code_sha256", "outside", "git", "dirty", "diff_sha256", "untracked"),
    *("numbers", "versions", "hardware", "environment", "texts"),
)
NEEDED = {"code": "code_sha256", "packages": "versions", "machine": "hardware"}


@dataclass(frozen=True)
class Repeated:
    """A result and its repetition.

    Args:
        first: the result.
        second: its repetition.
        folder: of the repetition.
    """

    first: ResultRow
    second: ResultRow
    folder: Path

    def verdicts(self) -> dict[str, tuple[Any, Any, Verdict]]:
        """For each number by name: that of the first run, that of the second, and how they compare.

        They are equal bit for bit, within 1 % (of the largest in a list), different (also if only one exists), or measured
        under other protocols.
        """
        first, second = _numbers(self.first), _numbers(self.second)
        return {
            name: (first.get(name), second.get(name), _compare(first.get(name), second.get(name)))
            for name in dict.fromkeys([*first, *second])
        }

    @property
    def same(self) -> bool:
        """Whether every number is equal or within 1 %."""
        return all(verdict in ("equal", "within 1 %") for *_, verdict in self.verdicts().values())

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Differences in the origin of the two results by key; keys that a result of an earlier version lacks are left out."""
        told = self.first.provenance.to_dict()
        first, second = _origin(self.first, told), _origin(self.second, told)
        both = [k for k in first if k in second or k.startswith(("versions", "environment", "inputs", "outside"))]
        both += [k for k in second if k not in first and k.startswith(("environment", "outside"))]
        return {k: (first.get(k), second.get(k)) for k in both if first.get(k) != second.get(k)}

    def report(self) -> str:
        """Verdicts and differences as text."""
        lines = [f"rerun of {self.first.config_key}: {self.folder}"]
        verdicts = self.verdicts()
        width = max(map(len, verdicts), default=0)
        lines += [f"  {n:{width}}  {_shown(a):>24}  {_shown(b):>24}  {verdict}" for n, (a, b, verdict) in verdicts.items()]
        differences = self.differences()
        told = self.first.provenance.to_dict()
        unknown = [what for what, key in NEEDED.items() if key not in told]
        if not (differences or unknown):
            lines += ["both have the same code, packages and machine"]
        if differences:
            lines += ["their origins differ in"]
            lines += [f"  {key}: {_shown(a)} -> {_shown(b)}" for key, (a, b) in differences.items()]
        if unknown:
            lines += [f"whether both have the same {' and '.join(unknown)} is not known: the first result does not say"]
        counts = {v: sum(one == v for *_, one in verdicts.values()) for v in VERDICTS}
        return "\n".join([*lines, ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)]) + "\n"


def rerun(row: ResultRow, into: str | Path, trust: bool = False) -> Repeated:
    """Run the configuration of a result again, with empty caches, and compare.

    It runs in a process of its own, with the environment variables that can move a number as they were, and in the working
    directory of the first run if it still exists, so that relative paths are the same.

    Args:
        row: the result.
        into: the repetition has a new folder below this one.
        trust: run code from outside svnup that the configuration names; results may come from an untrusted source.

    Raises:
        ValueError: the run cannot be repeated as it was.
        RuntimeError: the repetition fails.
    """
    if not trust:
        refuse_outside(row.config)
    if row.status != "finished":
        raise ValueError(f"{row.config_key}: this run is {row.status}, so it has no numbers to compare; finish it first")
    Path(into).mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f"{row.config_key}-", dir=into)).resolve()
    original = place / "original.json"
    original.write_text(row.to_json(), encoding="utf-8")
    env = dict(os.environ)
    if (was := row.provenance.environment) is not None:  # earlier versions did not record it
        env = {k: v for k, v in env.items() if k not in MOVES_NUMBERS} | {k: was[k] for k in MOVES_NUMBERS if k in was}
    path = [str(Path(__file__).parent.parent), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    env["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path))  # the result chooses the working directory, not modules
    with tempfile.TemporaryDirectory(prefix="cache-", dir=place) as cache_dir:
        command = [sys.executable, "-P", "-m", "svnup.cli.repeat", str(original), str(place), cache_dir, str(trust)]
        code = subprocess.run(command, env=env, check=False).returncode
    second = load(place)
    if code == 2:
        raise ValueError(f"{row.config_key}: it cannot be repeated as it was, for the reason above; mend that, then repeat it")
    if code or [one.status for one in second] != ["finished"]:
        raise RuntimeError(f"{row.config_key}: its repetition failed; see {place}")
    return Repeated(row, second[0], place)


def _numbers(row: ResultRow) -> dict[str, Any]:
    """Every number that a repetition should reproduce by name; metrics with their protocols."""
    out: dict[str, Any] = {}
    for prefix, metrics in (("", row.metrics), ("dense ", row.dense)):
        out |= {prefix + name: (metric.value, metric.protocol.to_dict()) for name, metric in metrics.items()}
    if row.sparsity:
        out["sparsity"] = row.sparsity.actual
    for name, scores in (("Shapley values", row.shapley), ("scores", row.scores)):
        out |= {name: list(scores.values)} if scores else {}
    return out | ({"profile": list(row.profile.sparsity)} if row.profile else {})


def _origin(row: ResultRow, told: Mapping[str, Any]) -> dict[str, Any]:
    """The origin of a result with dotted keys, as far as the provenance `told` has it; of outside code version and hash."""
    known = {k: v for k, v in row.provenance.to_dict().items() if k in ENDS and k in told}
    if "outside" in known:
        code = row.provenance.outside or {}
        known["outside"] = {package: {"version": of.version, "sha256": of.sha256} for package, of in code.items()}
    return flatten(known | {"inputs": row.fingerprints, "config_key": row.config_key})


def _compare(first: Any, second: Any) -> Verdict:
    if first == second:
        return "equal"
    if first is None or second is None:
        return "different"
    if isinstance(first, tuple):
        (first, was), (second, now) = first, second
        if any(was[k] != now[k] for k in was if k in now):
            return "other protocol"
        return _compare(first, second)
    a, b = (v if isinstance(v, list) else [v] for v in (first, second))
    if len(a) != len(b):
        return "different"
    scale = max(map(abs, a))
    close = all(math.isfinite(y) and abs(x - y) <= TOLERANCE * scale for x, y in zip(a, b, strict=True))
    return "within 1 %" if close else "different"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        value = value[0]
    if isinstance(value, list) and value and isinstance(value[0], float):
        return f"{len(value)} numbers"
    return f"{value!r}" if isinstance(value, float) else "-" if value is None else str(value)
