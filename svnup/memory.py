"""Peak memory and time of a process and its stages."""

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


def release_free_memory() -> None:
    """Return free memory to the system: glibc keeps the pages of freed tensors."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def synchronize() -> None:
    """Wait for the CUDA devices that this process uses, so that time is measured where it is spent."""
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(index):  # to wait for another one would take memory on it
                torch.cuda.synchronize(index)


def reset_peak() -> None:
    """Reset the peak memory of CUDA devices and, on Linux, of this process."""
    if torch.cuda.is_initialized():  # before, nothing is allocated, and there are no statistics to reset
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    with contextlib.suppress(OSError):
        RESET.write_text("5")


def resident() -> int:
    """Resident bytes of this process; 0 if the system does not say."""
    return _status("VmRSS") or 0


def installed() -> int | None:
    """Bytes of memory of this machine; None where the system does not say."""
    known = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in known else None


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a GPU, with those that torch keeps for later; None on a CPU, where they are not asked for."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


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
    """Time and peak memory of each stage of a job; called with its name at the end of a stage.

    Attributes:
        done: for each stage `seconds`, and `peak_memory_bytes` since the job started.
    """

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
    """Bytes in a line of the process's status; None if the system has none."""
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text()) if STATUS.is_file() else None
    return int(found[1]) * 1024 if found else None
