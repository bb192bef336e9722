"""A plan in words: counts, then a table of stages in units that people read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from svnup.config.checks import check_pruner
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
    lines = [f"  {name:30} {value:>16,}" for name, value in plan.counts.items()]
    lines.append(f"  {'weights':30} {scaled(plan.weights, 'B'):>16}")
    if plan.processes > 1:
        lines.append(f"  of {plan.processes} processes; the work of one of them, at most:")
    if plan.walk is not None:
        lines.append(f"  coalitions are walked {plan.walk}")
    lines += [f"  {_machine(job, plan.machine)}", ""]
    on_gpu = plan.machine.device == "cuda"
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
    memory = plan.machine.memory
    if memory is None:
        return None
    usable = memory - min(OF_CUDA, memory / 20)
    if plan.peak <= usable or job.config["model"].get("device_map"):
        return None
    plans = ((offload, JobCounts(job, plan.machine, offload).plan()) for offload in _offloads(job))
    fitting = ((offload, other) for offload, other in plans if other.peak <= usable)
    found = next(fitting, None)
    spread = "device_map" in job.config["model"]
    way = (
        f"{math.ceil(plan.peak / usable)} of them with model.device_map=auto" if spread else "shorter texts, or a smaller model"
    )
    if found is not None:
        offload, other = found
        way = f"offload={offload}, which takes {scaled(other.peak, 'B')} there and {scaled(other.host_peak, 'B')} on the host"
    return (
        f"hardware={job.hardware}: the job takes {scaled(plan.peak, 'B')} of the {scaled(memory, 'B')} that the device holds, "
        f"{scaled(memory - usable, 'B')} of which CUDA needs; "
        f"use {way}"
    )


def _offloads(job: Job) -> list[Offload]:
    """The places for blocks that are left to try, which go with the job."""
    out: list[Offload] = []
    for offload in get_args(Offload)[get_args(Offload).index(job.offload) + 1 :]:
        try:
            job.model.check_offload(offload)
            check_pruner(job.config | {"offload": offload}, job, job.pruner)
        except ValueError:
            continue
        out.append(offload)
    return out


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
