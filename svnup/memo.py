"""Measured values on disk: append-only, one file per process, safe under kill and on shared file systems."""

from __future__ import annotations

import json
import logging
import os
import socket
import zlib
from io import FileIO
from pathlib import Path

from svnup.files import naming

logger = logging.getLogger(__name__)


class Memo:
    """Coalition values on disk: append-only JSON lines, one file per process, merged on read.

    Each line carries its coalition, value, kind of device and a checksum; a torn or changed line is dropped with a warning.
    """

    def __init__(self, folder: Path | None, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.values: dict[str, float] = {}
        self.kinds: dict[str, str] = {}  # of each value
        self._file: FileIO | None = None
        dropped = 0
        for path in sorted(folder.glob("*.jsonl")) if folder is not None and folder.is_dir() else []:
            for line in _lines(path):
                entry = _parse(line)
                if entry is None:
                    dropped += 1
                elif entry[0] not in self.values or (entry[2] == kind != self.kinds[entry[0]]):  # its own kind first
                    self.values[entry[0]], self.kinds[entry[0]] = entry[1:]
        if dropped:
            logger.warning("%d damaged lines in %s were dropped; their coalitions are evaluated again", dropped, folder)

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


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        logger.warning("%s: cannot be read (%s); its coalitions are evaluated again", path, error.strerror)
        return []


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
