"""A plan in words: counts, then a table of stages in units that people read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, get_args

from svnup.config import elsewhere
from svnup.machines import HERE, Machine, Work
from svnup.plan.stages import JobCounts, Plan
from svnup.plan.sweep import SweepPlan
from svnup.types import Offload
from svnup.units import duration, scaled

if TYPE_CHECKING:
    from svnup.config import Job

OF_CUDA = 1e9  # bytes of a device that its context and libraries take, at most a twentieth


def told(job: Job, plan: Plan) -> list[str]:
    """The lines of a job's plan."""
    on_gpu = plan.machine.device == "cuda"
    lines = [f"  {name:30} {value:>16,}" for name, value in plan.counts.items()]
    lines.append(f"  {'weights':30} {scaled(plan.weights, 'B'):>16}")
    if plan.processes > 1:
        lines.append(f"  of {plan.processes} processes; the work of one of them, at most:")
    if plan.walk is not None:
        lines.append(f"  coalitions are walked {plan.walk}")
    if job.not_compared is not None:
        lines.append(f"  {job.not_compared}; the budget is not compared with the uniform one")
    lines.append(f"  {_machine(job, plan.machine)}")
    if on_gpu and job.config["model"].get("device_map") and (count := n_devices(plan)) is not None:
        lines.append(f"  over {count} such GPUs by device_map; peaks are the sum of all, and times those of one")
    lines.append("")
    head = ("stage", "operations", "bytes moved", *(("peak, device", "peak, host") if on_gpu else ("peak",)), "time")
    rows = []
    for stage in plan.stages:
        peaks = [scaled(stage.device, "B"), *([scaled(stage.host, "B")] if on_gpu else [])]
        rows.append([stage.name, *_amounts(stage.work), *peaks, _span(plan.machine.seconds(stage.work))])
        if len(stage.steps) > 1:
            blank = [""] * len(peaks)
            for name, work in stage.steps.items():
                rows.append([f"  {name}", *_amounts(work), *blank, _span(plan.machine.seconds(work))])
    lines += [f"  {line}" for line in _columns([list(head), *rows])]
    where = scaled(plan.peak, "B") + (f" on the device, {scaled(plan.host_peak, 'B')} on its host" if on_gpu else "")
    each = ", of each process" * (plan.processes > 1)
    lines += ["", f"  memory at the peak, about: {where}{each}", f"  time, about: {_span(plan.seconds())}"]
    return lines + ([f"  not counted: {', '.join(plan.not_counted)}"] if plan.not_counted else [])


def told_of_sweep(plan: SweepPlan) -> list[str]:
    """The lines of a sweep's plan below its jobs."""
    lines = []
    for part in plan.shared:
        counts = ", ".join(f"{count:,} {name}" for name, count in part.counts.items())
        lines.append(f"  {part.what} of {part.n_jobs} job{'s' * (part.n_jobs > 1)}: {counts}, {scaled(part.work.flop, 'FLOP')}")
    lines.append(f"  operations: {scaled(plan.work.flop, 'FLOP')}, bytes moved: {scaled(plan.work.n_bytes, 'B')}")
    host = f", {scaled(plan.host_peak, 'B')} on its host" if plan.host_peak else ""
    lines.append(f"  memory at the peak of the largest job, about: {scaled(plan.peak, 'B')}{host}")
    if plan.largest is not None:
        job, made = plan.largest
        lines.append(f"  {_machine(job, made.machine)}")
    lines.append(f"  time of all jobs, one after the other, about: {_span(plan.seconds)}")
    return lines


def too_small(job: Job, plan: Plan) -> str | None:
    """That a machine's memory is less than the plan's peak, and what would fit; None where it fits or is not known."""
    lacking = _lacking(plan, spread=bool(job.config["model"].get("device_map")))
    return f"hardware={job.hardware}: {lacking}; {_what_fits(job, plan)}" if lacking is not None else None


def _what_fits(job: Job, plan: Plan) -> str:
    on_gpu = plan.machine.device == "cuda"
    for offload, other, made in _elsewhere(job, plan.machine):
        if _lacking(made) is None:
            there = f" there and {scaled(made.host_peak, 'B')} on the host" if on_gpu else ""
            untried = ", without the trial against the uniform budget" * (other.not_compared != job.not_compared)
            return f"use offload={offload}, which takes {scaled(made.peak, 'B')}{there}{untried}"
    spreads = on_gpu and job.offload == "none" and "device_map" in job.config["model"]
    if spreads and (count := n_devices(plan)) is not None:
        return f"use {count} of them with model.device_map=auto"
    return "choose another pruner or allocator, less text, or a smaller model"


def n_devices(plan: Plan) -> int | None:
    """How many GPUs hold the weights of a plan together, and each what is computed; None where one cannot, or is not known."""
    left = _usable(plan.machine.memory or 0.0) - (plan.peak - plan.weights)
    return math.ceil(plan.weights / left) if left > 0 else None


def _usable(memory: float) -> float:
    """Bytes of a GPU that tensors may take."""
    return memory - min(OF_CUDA, memory / 20)


def _lacking(plan: Plan, spread: bool = False) -> str | None:
    """That a plan takes more memory than there is, where that is known; `spread`: its weights over any number of devices."""
    machine, on_gpu = plan.machine, plan.machine.device == "cuda"
    if machine.memory is not None:
        usable = _usable(machine.memory) if on_gpu else machine.memory
        if plan.peak > usable and not (spread and n_devices(plan)):
            stage = max(plan.stages, key=lambda one: one.device).name
            cuda = f" with {scaled(machine.memory - usable, 'B')} for CUDA" * on_gpu
            there = f"{scaled(machine.memory, 'B')} that the device holds{cuda}"
            return f"the stage {stage} takes {scaled(plan.peak, 'B')} of the {there}"
    if on_gpu and machine.host_memory is not None and plan.host_peak > machine.host_memory:
        return f"the job takes {scaled(plan.host_peak, 'B')} of the {scaled(machine.host_memory, 'B')} that the host holds"
    return None


def _elsewhere(job: Job, machine: Machine) -> Iterator[tuple[Offload, Job, Plan]]:
    """The places for blocks that are left to try and go with the job, with that job and its plan."""
    for offload in get_args(Offload)[get_args(Offload).index(job.offload) + 1 :]:
        with contextlib.suppress(ValueError):
            other = elsewhere(job, offload)
            yield offload, other, JobCounts(other, machine).plan()


def _machine(job: Job, machine: Machine) -> str:
    rates = {dtype: getattr(machine, dtype) for dtype in ("float32", "bfloat16", "float16")}
    products = ", ".join(f"{scaled(rate, 'FLOP/s')} {dtype}" for dtype, rate in rates.items() if rate)
    moved = f", memory {scaled(machine.bandwidth, 'B/s')}" if machine.bandwidth else ""
    known = "measured" if job.hardware == HERE else "verified" if machine.verified else "not verified by a measurement"
    share = f"{100 * machine.least:.0f} to {100 * machine.most:.0f} % of these rates"
    return f"on {job.hardware} ({known}): products {products}{moved}; times at {share}"


def _amounts(work: Work) -> list[str]:
    return [scaled(work.flop, "FLOP"), scaled(work.n_bytes, "B")]


def _span(seconds: tuple[float, float]) -> str:
    low, high = (duration(value) if value >= 1 else "1 s" for value in seconds)
    if seconds[1] < 1:
        return "under 1 s"
    if low.rpartition(" ")[2] == high.rpartition(" ")[2] and low.count(" ") == high.count(" ") == 1:
        low = low.partition(" ")[0]
    return high if low in (high, high.partition(" ")[0]) else f"{low} to {high}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of words in columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    first, *others = widths
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))]).rstrip()
        for row in rows
    ]
