"""Measured values on disk: append-only, one file per process, safe under kill and on shared file systems."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svnup import distributed
from svnup.claims import claimed_of, holders
from svnup.files import naming

logger = logging.getLogger(__name__)
CLAIMS = "claims"  # in the folder: of the values that are being measured


class Memo:
    """Measured values on disk, such as payoffs by coalition: append-only JSON lines, one file per process, merged on read.

    Each line carries its name, value, kind of device and a checksum; a torn or changed line is dropped with a warning. Of
    several processes that need a value one measures it (`share`).
    """

    def __init__(self, folder: Path | None, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.values: dict[str, float] = {}
        self.kinds: dict[str, str] = {}  # of each value
        self._file: FileIO | None = None
        self._read: dict[Path, int] = {}  # bytes of each file that are known
        self._told = False
        if dropped := self._read_on(torn=True):
            logger.warning("%d damaged lines in %s were dropped; their coalitions are evaluated again", dropped, folder)

    def share(self, names: Iterable[str], measure: Callable[[list[str]], object], what: str) -> None:
        """Have a value for each of some names: `measure` those that no other process is measuring, and wait for the others.

        What a process was measuring that fails or dies is measured here. `what` the values are is said where this one waits.
        Of the processes of one job the first finds what is missing, each measures a share of it alone, and all get all values.
        """
        names = list(dict.fromkeys(names))
        if distributed.n_processes() == 1:
            self._share(names, measure, what)
            return
        if distributed.is_first():
            self._share(names, lambda new: self._shared_out(distributed.from_first(lambda: new), measure), what)
            distributed.from_first(list)
        else:
            while new := distributed.from_first(list[str]):
                self._shared_out(new, measure)
        self._know(distributed.from_first(lambda: {name: (self.values[name], self.kinds[name]) for name in names}))

    def _shared_out(self, names: list[str], measure: Callable[[list[str]], object]) -> None:
        """Have these names measured by all processes of the job, neighbours by the same one."""
        mine, before = names[distributed.share(len(names))], set(self.values)
        with distributed.alone():
            if mine:
                measure(mine)
        found = {name: (self.values[name], self.kinds[name]) for name in self.values.keys() - before}
        for of_one in distributed.gathered(found):
            self._know(of_one)

    def _know(self, found: dict[str, tuple[float, str]]) -> None:
        """Take over values that another process has, with their kinds."""
        self.values |= {name: value for name, (value, _) in found.items()}
        self.kinds |= {name: kind for name, (_, kind) in found.items()}

    def _share(self, names: list[str], measure: Callable[[list[str]], object], what: str) -> None:
        while missing := [name for name in names if name not in self.values]:
            if self.folder is None:
                measure(missing)
                continue
            with claimed_of(self.folder / CLAIMS, missing) as mine:
                self._read_on()
                if new := [name for name in mine if name not in self.values]:
                    measure(new)
            if not mine:
                self._wait(missing, what)

    def together(self, name: str, n: int, measure: Callable[[], Iterable[float]], what: str) -> NDArray[np.float64]:
        """n values under one name that one measurement gives, float64 (n,); shared as those of `share` are."""
        names = [f"{name} {i}" for i in range(n)]

        def measure_all(_: list[str]) -> None:
            for one, value in zip(names, measure(), strict=True):
                self.add(one, float(value))

        self.share(names[-1:], measure_all, what)  # the last one is written last
        self.share(names, measure_all, what)  # of a damaged file
        return np.array([self.values[one] for one in names])

    def _wait(self, missing: list[str], what: str) -> None:
        """Wait until all values are there, or the process that measures the first of them holds its claim no more."""
        assert self.folder is not None
        start = time.monotonic()
        for who in holders(self.folder / CLAIMS / missing[0]):
            self._read_on()
            if all(name in self.values for name in missing):
                return
            if not self._told and time.monotonic() - start > 0.5:
                self._told = True
                logger.info("%s are computed by %s: this process waits for them", what, who)

    def _read_on(self, torn: bool = False) -> int:
        """Take in what is new in the folder; returns the number of damaged lines, with `torn` also of lines without an end."""
        dropped = 0
        for path in sorted(self.folder.glob("*.jsonl")) if self.folder is not None and self.folder.is_dir() else []:
            known = self._read.get(path, 0)
            if self._file is not None and str(path) == self._file.name:
                continue
            try:
                if path.stat().st_size == known:
                    continue
                with path.open("rb") as file:
                    file.seek(known)
                    data = file.read()
            except OSError as error:
                logger.warning("%s: cannot be read (%s); its coalitions are evaluated again", path, error.strerror)
                continue
            whole = data[: data.rfind(b"\n") + 1]
            self._read[path] = known + len(whole)
            for line in (data if torn else whole).decode(errors="replace").splitlines():
                entry = _parse(line)
                if entry is None:
                    dropped += 1
                elif entry[0] not in self.values or (entry[2] == self.kind != self.kinds[entry[0]]):  # its own kind first
                    self.values[entry[0]], self.kinds[entry[0]] = entry[1:]
        return dropped

    def add(self, name: str, value: float) -> None:
        self.values[name], self.kinds[name] = value, self.kind
        if self.folder is None:
            return
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"
            torn = path.exists() and not path.read_bytes().endswith(b"\n")
            self._file = path.open("ab", buffering=0)
            if torn:  # a process of the same number died here
                self._file.write(b"\n")
        line = {"coalition": name, "value": value, "kind": self.kind}
        left = f"{json.dumps(line | {'crc': _checksum(line)})}\n".encode()
        with naming(Path(self._file.name)):
            while left:  # a disk that is filling up takes a part, then says so
                left = left[self._file.write(left) :]


def _checksum(line: dict[str, object]) -> int:
    return zlib.crc32(json.dumps(line, sort_keys=True).encode())


def _parse(line: str) -> tuple[str, float, str] | None:
    try:
        entry = json.loads(line)
        crc = entry.pop("crc")
        if crc == _checksum(entry):
            return str(entry["coalition"]), float(entry["value"]), str(entry["kind"])
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # torn: counted by the caller
    return None
