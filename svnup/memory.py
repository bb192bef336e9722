"""How much memory something took at its peak, and how long it took."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def give_back() -> None:
    """Return free pages to the system: glibc keeps those of freed tensors, and takes new ones beside them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def synchronize() -> None:
    """Wait until CUDA devices have done what they were asked for: a clock read earlier books it on whoever waits next."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Forget earlier peaks of this process and its CUDA devices; the process's own only Linux can forget."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)
    with contextlib.suppress(OSError):
        RESET.write_text("5")


def resident() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not say."""
    return _status("VmRSS") or 0


def peak_memory(device: torch.device) -> int:
    """Peak bytes since `reset_peak`: allocated on all CUDA devices; on a CPU resident in the process, with its libraries;
    0 where the system does not say."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    if (peak := _status("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stages:
    """Seconds of each stage of a job, and the peak of its memory until the stage ended: called at the end of each, by name."""

    def __init__(self) -> None:
        reset_peak()
        self._start = self._last = time.perf_counter()
        self.done: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str, device: torch.device) -> None:
        synchronize()
        now = time.perf_counter()
        self.done[name] = {"seconds": now - self._last, "peak_memory_bytes": peak_memory(device)}
        self._last = now

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


def _status(name: str) -> int | None:
    """Bytes by a line of the process's status; None where the system has none."""
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text()) if STATUS.is_file() else None
    return int(found[1]) * 1024 if found else None
