"""What is done in a stretch of a job, and what a machine does of that in a second: rates that are given, or measured here."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any

from svnup.keys import did_you_mean

HERE = "here"
SOLVING = 0.35  # of the rate of products, which factorisations and triangular systems reach: their steps wait for each other
HASHERS = 8  # threads that hash a model: hashlib and copies release the interpreter lock
MEASURED_FOR = 0.12  # seconds, of each rate
Clock = Callable[[], float]


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
        uploaded: bytes of weights that come to a GPU while it computes, and are copied into pinned memory first.
        sent: bytes of weights that come to a GPU while it computes, from pinned memory.
        stalls: operations that a GPU launches while it has nothing else to do: the host has waited for what was before.
        chained: seconds of kernels whose steps wait for each other, whatever the device's rates.
    """

    products: Mapping[str, float] = field(default_factory=dict)
    solved: float = 0.0
    moved: float = 0.0
    copied: float = 0.0
    read: float = 0.0
    calls: float = 0.0
    uploaded: float = 0.0
    sent: float = 0.0
    stalls: float = 0.0
    chained: float = 0.0

    @property
    def flop(self) -> float:
        """Operations of matrix products, factorisations and systems."""
        return sum(self.products.values()) + self.solved

    @property
    def n_bytes(self) -> float:
        """Bytes that are moved, wherever."""
        return self.moved + self.copied + self.read + self.uploaded + self.sent

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
        upload: bytes/s at which weights in the host's memory come to the device by way of pinned memory; null: as `transfer`.
        read: bytes/s at which weights are read from disk, or hashed.
        call: seconds to launch an operation.
        memory: bytes that the device holds.
        host_memory: bytes that the host of a GPU holds.
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
    upload: float | None = None
    read: float | None = None
    call: float | None = None
    memory: float | None = None
    host_memory: float | None = None
    process: float | None = None
    least: float = 0.35
    most: float = 0.75
    source: str = ""
    verified: bool = False

    def seconds(self, work: Work) -> tuple[float, float]:
        """The least and the most seconds that a work takes, by the share of the rates that is reached.

        Nothing is taken to overlap but what goes on while a GPU computes: the launches of its operations, and the way of the
        next weights to it.
        """
        computed = sum(flop / self.rate(dtype) for dtype, flop in work.products.items())
        computed += work.solved / (self.rate("float32") * SOLVING) if work.solved else 0.0
        computed += sum(n / rate for n, rate in ((work.moved, self.bandwidth), (work.copied, self.transfer)) if n and rate)
        called, stalled = work.calls * (self.call or 0.0), work.stalls * (self.call or 0.0)
        read, upload = work.read / self.read if self.read else 0.0, self.upload or self.transfer
        coming = sum(n / rate for n, rate in ((work.uploaded, upload), (work.sent, self.transfer)) if n and rate)

        def at(share: float) -> float:
            waited = max(computed, coming) / share
            return (max(waited, called) if self.device == "cuda" else waited + called) + stalled + work.chained + read / share

        return at(self.most), at(self.least)

    def rate(self, dtype: str) -> float:
        """Operations/s of matrix products in a dtype: in float32's where that of another is not known."""
        found = getattr(self, dtype, None) or self.float32
        assert found is not None, "a machine has a rate in float32"
        return found

    def filled(self, device: str, dtype: str, clock: Clock = time.perf_counter) -> Machine:
        """This machine with what is null measured here, on a device, for a model of this dtype: within a second.

        Args:
            clock: seconds by which rates are measured; those of the processor (`time.process_time`) say for one thread what
                it reaches where others use the machine, too.
        """
        from svnup.memory import resident

        meter = Meter(device, clock)
        measures: dict[str, Callable[[], float | None]] = {
            "float32": lambda: meter.products("float32"),
            dtype: lambda: meter.products(dtype),
            "bandwidth": meter.bandwidth,
            "transfer": meter.transfer,
            "upload": meter.upload,
            "read": meter.hashing,
            "call": meter.call,
            "memory": meter.memory,
            "host_memory": meter.host_memory,
            "process": lambda: float(resident()),
        }
        found = {name: measure() for name, measure in measures.items() if getattr(self, name, None) is None}
        return replace(self, device=device, **found)  # type: ignore[arg-type]


RATES = tuple(one.name for one in fields(Machine) if one.default is None and one.name != "device")


def named(hardware: str, machines: Mapping[str, Any]) -> Machine:
    """The machine of a name in a configured table of rates; raises ValueError where there is none, or a rate cannot be."""
    if hardware == HERE and not machines:
        return Machine()
    if hardware not in machines:
        hint = did_you_mean(hardware, machines)
        raise ValueError(
            f"hardware={hardware}: choose {', '.join(machines)}{hint}; or describe it: "
            f"'+machines.{hardware}={{device: cuda, float32: 40e12, bandwidth: 1e12, memory: 48e9}}'"
        )
    node, where = machines[hardware], f"machines.{hardware}"
    known = {one.name for one in fields(Machine)}
    if not isinstance(node, Mapping):
        raise ValueError(f"{where}={node}: is no machine; describe it: {where}={{device: cuda, float32: 40e12}}")
    if odd := sorted(set(node) - known):
        raise ValueError(f"{where}.{odd[0]}: is no rate of a machine{did_you_mean(odd[0], known)}; take it out")
    machine = Machine(**node)
    if hardware == HERE and machine.device is not None:
        raise ValueError(f"{where}.device={machine.device}: is that of the job; leave it out, and choose model.device")
    for name in (*RATES, "least", "most"):
        value = getattr(machine, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and value > 0) and not (value is None and name in RATES):
            raise ValueError(f"{where}.{name}={value}: must be a positive number; give a rate, or null where it is not known")
    if not 0 < machine.least <= machine.most <= 1:
        raise ValueError(f"{where}.least={machine.least:g}: choose shares of the rates with 0 < least <= most <= 1")
    if hardware != HERE and machine.device not in ("cpu", "cuda"):
        raise ValueError(f"{where}.device={machine.device or 'null'}: choose cuda or cpu, such as +{where}.device=cuda")
    if hardware != HERE and machine.float32 is None:
        raise ValueError(f"{where}.float32=null: times need this rate; give it, such as +{where}.float32=40e12")
    return machine


@dataclass(frozen=True)
class Meter:
    """Measures the rates of a device of this machine, each the median of as many calls as fit its time."""

    device: str
    clock: Clock = time.perf_counter

    def products(self, dtype: str) -> float:
        """Operations/s of matrix products in a dtype, of 2,048 inputs by a matrix of 512 x 1,024; larger ones on a GPU."""
        import torch

        rows, d_in, d_out = (2048, 512, 1024) if self.device == "cpu" else (8192, 4096, 4096)
        kind = getattr(torch, dtype)
        x, w = torch.ones(rows, d_in, dtype=kind, device=self.device), torch.ones(d_out, d_in, dtype=kind, device=self.device)
        return 2.0 * rows * d_in * d_out / self._seconds(lambda: torch.nn.functional.linear(x, w))

    def bandwidth(self) -> float:
        """Bytes/s of elementwise operations on activations, as between the matrix products of a block."""
        import torch

        x = torch.ones(*((2048, 1024) if self.device == "cpu" else (8192, 4096)), device=self.device)
        return 5 * 4 * x.numel() / self._seconds(lambda: torch.nn.functional.silu(x) * x)

    def transfer(self) -> float | None:
        """Bytes/s from the device's memory to pinned memory of the host; None where they are one."""
        import torch

        if self.device == "cpu":
            return None
        there, here = torch.ones(2**26, device=self.device), torch.empty(2**26, pin_memory=True)
        return there.nbytes / self._seconds(lambda: here.copy_(there))

    def upload(self) -> float | None:
        """Bytes/s of weights that are copied into pinned memory and sent from there; None where the device is the host."""
        import torch

        if self.device == "cpu":
            return None
        here = torch.ones(2**26)
        return 4 * here.numel() / self._seconds(lambda: here.pin_memory().to(self.device, non_blocking=True))

    def hashing(self) -> float:
        """Bytes/s that are hashed, by as many threads as hash a model; weights that lie in memory are not read faster."""
        data = bytes(2**20)
        with ThreadPoolExecutor(HASHERS) as pool:
            hashed = self._seconds(lambda: [*pool.map(lambda _: hashlib.sha256(data).digest(), range(HASHERS))])
        return HASHERS * len(data) / hashed

    def call(self) -> float:
        """Seconds to launch an operation, with as much again for the Python around it."""
        import torch

        x = torch.ones(8, device=self.device)

        def many() -> None:
            for _ in range(100):
                torch.add(x, 1)

        return 2 * self._seconds(many) / 100

    def memory(self) -> float | None:
        """Bytes that a GPU holds; on a CPU those of this machine."""
        import torch

        from svnup.memory import installed

        return installed() if self.device == "cpu" else float(torch.cuda.get_device_properties(self.device).total_memory)

    def host_memory(self) -> float | None:
        """Bytes of this machine, where the device is a GPU."""
        from svnup.memory import installed

        return None if self.device == "cpu" else installed()

    def _seconds(self, work: Callable[[], Any]) -> float:
        from svnup.memory import synchronize

        taken: list[float] = []
        until = time.perf_counter() + MEASURED_FOR
        work()
        synchronize()
        while not taken or time.perf_counter() < until:
            start = self.clock()
            work()
            synchronize()
            taken.append(self.clock() - start)
        settled = taken[len(taken) // 2 :]  # a GPU that was idle takes a while to reach its clock
        return max(statistics.median(settled), 1e-9)
