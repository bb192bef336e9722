"""What is done in a stretch of a job, and what a machine does of that in a second: rates that are given, or measured here."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from svnup.keys import did_you_mean
from svnup.memory import resident, synchronize

HERE = "here"
SOLVING = 0.25  # of the rate of products, which factorisations and triangular systems reach: their steps wait for each other
MEASURED_FOR = 0.12  # seconds, of each rate


@dataclass(frozen=True)
class Work:
    """What is done in a stretch of a job; works are added, and multiplied by a number of times.

    Args:
        products: operations of matrix products by their dtype, two for each multiplication with its addition.
        solved: operations of factorisations and of triangular systems, in float32.
        moved: bytes that operations read and write in the device's memory.
        copied: bytes that pass between the memories of host and device.
        read: bytes of weights and states that are read from disk, written there, or hashed.
        calls: operations that are launched one after the other.
    """

    products: Mapping[str, float] = field(default_factory=dict)
    solved: float = 0.0
    moved: float = 0.0
    copied: float = 0.0
    read: float = 0.0
    calls: float = 0.0

    @property
    def flop(self) -> float:
        """Operations of matrix products, factorisations and systems."""
        return sum(self.products.values()) + self.solved

    @property
    def n_bytes(self) -> float:
        """Bytes that are moved, wherever."""
        return self.moved + self.copied + self.read

    def __add__(self, other: Work) -> Work:
        products = Counter(self.products)
        products.update(other.products)  # which adds, and keeps what is not positive
        return Work(products, *(getattr(self, name) + getattr(other, name) for name in _PLAIN))

    def __mul__(self, times: float) -> Work:
        products = {dtype: flop * times for dtype, flop in self.products.items()}
        return Work(products, *(getattr(self, name) * times for name in _PLAIN))


_PLAIN = tuple(one.name for one in fields(Work) if one.name != "products")


@dataclass
class Machine:
    """Rates of one device and of its host; null is not known, and measured where the machine is this one.

    Args:
        device: cuda or cpu; null: that of the job.
        float32: operations/s of dense matrix products in float32 proper.
        tf32: the same where float32 products may be rounded to tf32.
        bfloat16: the same in bfloat16.
        float16: the same in float16.
        bandwidth: bytes/s of the device's memory.
        transfer: bytes/s between the memories of host and device, one way.
        read: bytes/s at which weights are read from disk, or hashed.
        call: seconds to launch an operation.
        memory: bytes that the device holds.
        process: bytes of the host that a process takes before it loads a model.
        least: share of these rates that a job reaches at worst.
        most: and at best.
        source: of the rates.
        verified: whether jobs of this project were measured on such a machine.
    """

    device: str | None = None
    float32: float | None = None
    tf32: float | None = None
    bfloat16: float | None = None
    float16: float | None = None
    bandwidth: float | None = None
    transfer: float | None = None
    read: float | None = None
    call: float | None = None
    memory: float | None = None
    process: float | None = None
    least: float = 0.35
    most: float = 0.75
    source: str = ""
    verified: bool = False

    def seconds(self, work: Work) -> tuple[float, float]:
        """The least and the most seconds that a work takes, by the share of the rates that is reached.

        Nothing is taken to overlap but the launches of a GPU's operations, which go on while it computes.
        """
        computed = sum(flop / self.rate(dtype) for dtype, flop in work.products.items())
        computed += work.solved / (self.rate("float32") * SOLVING) if work.solved else 0.0
        computed += sum(n / rate for n, rate in ((work.moved, self.bandwidth), (work.copied, self.transfer)) if n and rate)
        called, read = work.calls * (self.call or 0.0), work.read / self.read if self.read else 0.0

        def at(share: float) -> float:
            waited = computed / share
            return (max(waited, called) if self.device == "cuda" else waited + called) + read / share

        return at(self.most), at(self.least)

    def rate(self, dtype: str) -> float:
        """Operations/s of matrix products in a dtype: in float32's where that of another is not known."""
        found = getattr(self, dtype, None) or self.float32
        assert found is not None, "a machine has a rate in float32"
        return found

    def filled(self, device: str, dtype: str) -> Machine:
        """This machine with what is null measured here, on a device, for a model of this dtype: within a second."""
        measures: dict[str, Callable[[], float | None]] = {
            "float32": lambda: product_rate(device, "float32"),
            dtype: lambda: product_rate(device, dtype),
            "bandwidth": lambda: _bandwidth(device),
            "transfer": lambda: _transfer(device),
            "read": _hash_rate,
            "call": lambda: _call(device),
            "memory": lambda: _memory(device),
            "process": lambda: float(resident()),
        }
        found = {name: measure() for name, measure in measures.items() if getattr(self, name, None) is None}
        return replace(self, device=device, **found)  # type: ignore[arg-type]


def named(hardware: str, machines: Mapping[str, Mapping[str, Any]]) -> Machine:
    """The machine of a name in a table of rates; raises ValueError where there is none, or a rate cannot be."""
    if hardware not in machines:
        known = ", ".join(machines)
        raise ValueError(
            f"hardware={hardware}: choose {known}{did_you_mean(hardware, machines)}; or give +machines.NAME.float32=..."
        )
    machine = Machine(**machines[hardware])
    where = f"machines.{hardware}"
    for name in RATES:
        value = getattr(machine, name)
        if value is not None and not value > 0:
            raise ValueError(f"{where}.{name}={value:g}: must be positive; give a rate, or null where it is not known")
    if not 0 < machine.least <= machine.most <= 1:
        raise ValueError(f"{where}.least={machine.least:g}: choose shares of the rates with 0 < least <= most <= 1")
    if hardware != HERE and (machine.float32 is None or machine.device not in ("cpu", "cuda")):
        raise ValueError(f"{where}: has no device or no rate in float32; give {where}.device=cuda and {where}.float32=...")
    return machine


RATES = (*("float32", "tf32", "bfloat16", "float16", "bandwidth", "transfer", "read", "call", "memory", "process"),)


# -- measured here


def product_rate(device: str, dtype: str) -> float:
    """Operations/s of matrix products on a device in a dtype, (2048, 1024) by (1024, 1024), four times as wide on a GPU."""
    import torch

    rows, width = (2048, 1024) if device == "cpu" else (8192, 4096)
    kind = getattr(torch, dtype)
    a, b = torch.ones(rows, width, dtype=kind, device=device), torch.ones(width, width, dtype=kind, device=device)
    return 2.0 * rows * width * width / _seconds(lambda: a @ b)


def _bandwidth(device: str) -> float:
    """Bytes/s of elementwise operations on activations, as between the matrix products of a block."""
    import torch

    a = torch.ones(*((2048, 1024) if device == "cpu" else (8192, 4096)), device=device)
    return 5 * 4 * a.numel() / _seconds(lambda: torch.nn.functional.silu(a) * a)


def _transfer(device: str) -> float | None:
    import torch

    if device == "cpu":
        return None
    there = torch.ones(2**26, device=device)
    return 4 * there.numel() / _seconds(there.cpu)


def _hash_rate() -> float:
    data = bytes(2**23)
    return len(data) / _seconds(lambda: hashlib.sha256(data).digest())


def _call(device: str) -> float:
    import torch

    a = torch.ones(8, device=device)

    def many() -> None:
        for _ in range(100):
            torch.add(a, 1)

    return 2 * _seconds(many) / 100  # as much again for the Python around it


def _memory(device: str) -> float | None:
    import torch

    return None if device == "cpu" else float(torch.cuda.get_device_properties(device).total_memory)


def _seconds(work: Callable[[], Any]) -> float:
    """Seconds that a call takes, the least of as many as fit the time."""
    work()
    synchronize()
    best, until = float("inf"), time.perf_counter() + MEASURED_FOR
    while best == float("inf") or time.perf_counter() < until:
        start = time.perf_counter()
        work()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best
