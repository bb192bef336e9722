"""What machines, disks and people do to a sweep, again and again: nothing may be lost, and no number may change.

    python tests/chaos.py --kills 50 --faults 300 --seed 0

A sweep of small random models is killed (SIGKILL) and interrupted (SIGTERM, SIGINT) at random moments, runs on disks that fill
up and under limits of files, in several processes at once, and reads damaged files; several processes save one model.
Afterwards the sweep completes, bit-identical to one that was left alone, or a damaged file is refused in a line with its name.
The report counts what was injected, and tells what was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cli import FORK, HERE, RANDOM, SMALL_W2, Done, command, tokenized_once
from fuzz import nothing_written_outside
from test_damage import ANY
from transformers.utils.logging import disable_progress_bar

from svnup import pipeline
from svnup.model.checkpoint import in_place, read_tensors
from svnup.model.source import Random
from svnup.results.store import MASKS, RunFolder

SWEEP = ["-m", *SMALL_W2, "selection.n_seq=3", "allocator=uniform,shapley,curves", "pruner=wanda", *HERE]
SWEEP += ["save_model=true", "save_masks=true", "save_format=bitmask"]
ONE = [*SMALL_W2, "selection.n_seq=3", "pruner=wanda", *HERE]


class Report:
    """What was injected, by its kind, and what was lost by it."""

    def __init__(self) -> None:
        self.injected, self.ended, self.lost = Counter[str](), Counter[str](), list[str]()

    def check(self, good: bool, what: str) -> None:
        if not good:
            self.lost.append(what)
            print(f"lost: {what}", file=sys.__stderr__, flush=True)

    def __str__(self) -> str:
        lines = ["injected:", *(f"{n:8} {kind}" for kind, n in sorted(self.injected.items()))]
        lines += ["how it ended:", *(f"{n:8} {kind}" for kind, n in sorted(self.ended.items()))]
        return "\n".join([*lines, f"lost: {len(self.lost) or 'nothing'}", *self.lost])


# -- the work, and what it leaves


def state(results: Path) -> dict[str, Any]:
    """All that a sweep computes, of each run: its numbers, and the digests of model and masks."""
    found = {}
    for path in sorted(results.glob("runs/*/result.json")):
        row = json.loads(path.read_text())
        values = (row["shapley"] or {}).get("values")
        files = [*(p for folder in RunFolder(path.parent).models().values() for p in folder.iterdir()), path.parent / MASKS]
        digests = {str(p.relative_to(path.parent)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()}
        profile = (row["profile"] or {}).get("sparsity")
        found[path.parent.name] = (row["status"], row["metrics"], row["dense"], profile, values, digests)
    return found


def leftovers(results: Path) -> list[str]:
    """Files of processes that run no more."""
    odd = [p for p in results.rglob("*") if p.name == "unfinished" or (p.name.startswith(".") and p.name != ".gitignore")]
    return [str(p) for p in odd]


@functools.cache
def reference(*arguments: str) -> tuple[dict[str, Any], float]:
    """What a command leaves that is left alone, and the seconds it takes once everything is imported."""
    with tempfile.TemporaryDirectory(dir=".") as folder, contextlib.chdir(folder):
        for _ in range(2):
            shutil.rmtree("results", ignore_errors=True)
            shutil.rmtree("cache", ignore_errors=True)
            start = time.monotonic()
            done = command(*arguments)
            assert done.code == 0, done.err
        return state(Path("results")), time.monotonic() - start


def anew(*folders: str) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def completes(report: Report, what: str, *arguments: str, tidy: bool = True) -> None:
    """Let a command go on alone, and compare what it leaves with what it would have left without all that was before."""
    done = command(*arguments)
    report.check(done.code == 0, f"{what}: the next run ended with {done.code}: {done.err[-300:]}")
    expected, found = reference(*arguments)[0], state(Path("results"))
    report.check(found == expected, f"{what}: {differences(found, expected)}")
    if tidy:
        report.check(not leftovers(Path("results")), f"{what}: left behind {leftovers(Path('results'))}")


def differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    names = ("status", "metrics", "dense", "profile", "values", "files")
    wrong = [name for name in expected if name not in found]
    for run in expected.keys() & found.keys():
        wrong += [f"{run}/{name}" for name, a, b in zip(names, found[run], expected[run], strict=True) if a != b]
    return f"not as it was in {', '.join(wrong)}"


def process(run: Callable[[], Done], ended: Path) -> Any:
    """Start a command in a copy of this process; how it ended is in the file `ended`, if it came so far."""

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        done = run()
        ended.write_text(json.dumps([done.code, done.err]))
        os._exit(0)

    ended.unlink(missing_ok=True)
    copy = FORK.Process(target=work)
    copy.start()
    return copy


def outcome(ended: Path) -> tuple[int, str] | None:
    """Exit code and errors of a command in a copy of this process; None where it was killed."""
    with contextlib.suppress(OSError, ValueError):
        code, err = json.loads(ended.read_text())
        return code, err
    return None


# -- signals


def signals(n: int, draw: random.Random, report: Report, numbers: tuple[signal.Signals, ...]) -> None:
    """Send n of these signals to a sweep, at random moments, and let it go on until it is done, over and over."""
    ended, sweeps = Path("ended"), 0
    seconds = reference(*SWEEP)[1]
    anew("results", "cache")
    sent = 0
    while sent < n:
        number = draw.choice(numbers)
        copy = process(lambda: command(*SWEEP), ended)
        copy.join(draw.random() * seconds)
        if copy.is_alive():
            os.kill(copy.pid, number)
            sent += 1
            report.injected[number.name] += 1
            copy.join()
            if (end := outcome(ended)) is not None:  # else it met the process outside of the command
                report.ended[f"{number.name}: exit code {end[0]}"] += 1
                # Python prints what is raised while it clears an object away, and goes on; the command then ends by the signal.
                traceback = "Traceback" in end[1] and "Exception ignored in" not in end[1]
                good = end[0] in (0, 128 + number) and not traceback
                report.check(good, f"{number.name}: exit code {end[0]}, {end[1][-300:]}")
            continue
        sweeps += 1
        completes(report, f"a sweep after {sent} signals", *SWEEP)
        anew(*(("results", "cache") if draw.random() < 0.5 else ("results",)))
    completes(report, f"the sweep after {sent} signals", *SWEEP)
    report.ended["sweeps completed after signals, bit-identical"] += sweeps + 1


# -- disks


def limits(n: int, draw: random.Random, report: Report) -> None:
    """Run a sweep n times under a limit of the size of files, then without."""
    import resource

    for _ in range(n):
        anew("results", "cache")
        size = int(10 ** draw.uniform(2, 5.7))

        def limited(size: int = size) -> Done:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            try:
                return command(*SWEEP)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        met(report, "limit of files", process(limited, Path("ended")))
        completes(report, f"files of at most {size} bytes", *SWEEP)


def full_disks(n: int, draw: random.Random, report: Report) -> None:
    """Run a sweep n times where a disk is too small, then make room; only where this user may mount."""
    for _ in range(n):
        anew("results", "cache")
        size = int(10 ** draw.uniform(4.2, 6.3))
        Path("results").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "chaos", "results"]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            report.ended["no disk may be mounted here"] += 1
            return
        try:
            met(report, "full disk", process(lambda: command(*SWEEP), Path("ended")))
            subprocess.run(["mount", "-o", "remount,size=200m", "results"], check=True)
            completes(report, f"a disk of {size} bytes", *SWEEP)
        finally:
            subprocess.run(["umount", "results"], check=True)


def met(report: Report, kind: str, copy: Any) -> None:
    copy.join()
    report.injected[kind] += 1
    end = outcome(Path("ended"))
    report.check(end is not None, f"{kind}: the process died")
    if end is not None:
        report.ended[f"{kind}: exit code {end[0]}"] += 1
        report.check("Traceback" not in end[1], f"{kind}: {end[1][-400:]}")
        report.check(end[0] == 0 or "svnup: " in end[1], f"{kind}: exit code {end[0]} without a word")


# -- several processes


def together(n: int, processes: int, report: Report) -> None:
    """Run one sweep in several processes at once, n times: each job is computed by one of them."""
    run = pipeline.run
    log = Path("computed").absolute()

    def counted(job: Any, *rest: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{job.key}\n")
        return run(job, *rest)

    def work() -> Done:
        pipeline.run = counted
        return command(*SWEEP)

    for _ in range(n):
        anew("results", "cache")
        log.unlink(missing_ok=True)
        copies = [process(work, Path(f"ended-{i}")) for i in range(processes)]
        for copy in copies:
            copy.join()
        report.injected["processes with the same sweep"] += processes
        ends = [outcome(Path(f"ended-{i}")) for i in range(processes)]
        report.check(all(end is not None and end[0] == 0 for end in ends), f"several processes: {ends}")
        computed = Counter(log.read_text().split())
        jobs = len(reference(*SWEEP)[0])
        report.ended["jobs computed by one of several processes"] += sum(n == 1 for n in computed.values())
        report.check(len(computed) == jobs and set(computed.values()) == {1}, f"several processes computed {computed}")
        completes(report, "several processes", *SWEEP)


def savers(n: int, processes: int, report: Report) -> None:
    """Save one model n times, by several processes at once; it is whole all the time."""
    lm = Random(device="cpu", **{o.split(".")[1].split("=")[0]: int(o.split("=")[1]) for o in RANDOM[1:]}).load()  # type: ignore[arg-type]
    place = Path("saved").absolute()
    anew("saved")
    each = -(-n // processes)

    def work(number: int) -> None:
        for _ in range(each):
            in_place(place / "model", lambda folder: lm.model.save_pretrained(folder))
        os._exit(0)

    place.mkdir()
    disable_progress_bar()
    copies = [FORK.Process(target=work, args=(number,)) for number in range(processes)]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.join()
    report.injected["saves of one model"] += each * processes
    report.check([copy.exitcode for copy in copies] == [0] * processes, f"savers: {[copy.exitcode for copy in copies]}")
    report.check([p.name for p in place.iterdir()] == ["model"], f"savers left {sorted(p.name for p in place.iterdir())}")
    held = read_tensors(place / "model" / "model.safetensors")
    weights = lm.model.state_dict()
    report.check(all(torch.equal(t, weights[name]) for name, t in held.items()), "savers: the model is another one")


# -- damaged files


@dataclasses.dataclass(frozen=True)
class Reading:
    """A kind of file, and the command that reads it."""

    kind: str
    files: str  # where, as a pattern
    command: tuple[str, ...]
    again: bool = True  # what is damaged is measured again; else it may also be refused


STORED = [
    *("model=pretrained", "model.seq_len=32", "evaluation.n_seq=4", "dataset=docs", "dataset.n_seq=4"),
    *("dataset@evaluation.datasets.test=docs", "allocator=uniform", *HERE),
]
OFFLOADED = (*STORED, "model.pretrained_model_name_or_path=kept/dense", "pruner=wanda", "offload=disk")
READINGS = (
    Reading("dense numbers", "cache/dense/*.json", (*ONE, "allocator=uniform")),
    Reading("values of coalitions", "cache/games/*/*.jsonl", (*ONE, "allocator=shapley")),
    Reading("losses", "cache/losses/*/*.jsonl", (*ONE, "allocator=curves")),
    Reading("result", "results/runs/*/result.json", (*ONE, "allocator=uniform")),
    Reading("settled blocks", "results/runs/*/unfinished/offload/*.safetensors", OFFLOADED),
    Reading("profile", "kept/profile.json", (*ONE, "allocator=from_file", "allocator.path=kept/profile.json"), False),
    Reading(
        "bitmask checkpoint",
        "kept/model/*bitmask*",
        (*STORED, "model.pretrained_model_name_or_path=kept/model", "pruner=none"),
        False,
    ),
)


@contextlib.contextmanager
def prepared(reading: Reading) -> Iterator[list[Path]]:
    """The files of a kind, as a run has left them that is about to be repeated; gives them back whole each time."""
    anew("results", "cache", "kept")
    for name, form in (("model", "bitmask"), ("dense", "dense")):
        made = command(*ONE, "allocator=uniform", "save_model=true", f"save_format={form}")
        assert made.code == 0, made.err
        (run,) = Path("results/runs").iterdir()
        shutil.copytree(run / "model", Path("kept") / name)
        shutil.copy(run / "profile.json", "kept/profile.json")
        anew("results")
    if reading.command == OFFLOADED:
        stopped = process(lambda: _stopped_behind_pruning(reading.command), Path("ended"))
        stopped.join()
    else:
        done = command(*reading.command)
        assert done.code == 0, done.err
    if not reading.files.startswith("results"):
        anew("results")
    files = sorted(Path().glob(reading.files))
    assert files, f"{reading.kind}: no file {reading.files}; how the command ended: {outcome(Path('ended'))}"
    yield files


def _stopped_behind_pruning(arguments: tuple[str, ...]) -> Done:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    pipeline.prune_model, prune = (lambda *a: (prune(*a), stop())), pipeline.prune_model
    return command(*arguments)


def faults(n: int, draw: random.Random, report: Report, readings: tuple[Reading, ...] = READINGS) -> None:
    """Damage n files of each kind, in all the ways that files get damaged, and run what reads them."""
    for reading in readings if n else ():
        with prepared(reading) as files:
            shutil.rmtree("whole", ignore_errors=True)
            Path("whole").mkdir()
            for place in ("results", "cache", "kept"):
                if Path(place).exists():
                    shutil.copytree(place, Path("whole") / place, symlinks=True)
            expected = _numbers(reading)
            for i in range(n):
                anew("results", "cache", "kept")
                shutil.copytree("whole", ".", symlinks=True, dirs_exist_ok=True)
                file, damage = draw.choice(files), ANY[i % len(ANY)] if n >= len(ANY) else draw.choice(ANY)
                damage(file, draw)
                done = _in_another_process(reading.command)
                what = f"{reading.kind}: {damage.__name__} in {file}"
                report.injected[f"damaged file: {reading.kind}"] += 1
                report.check("Traceback" not in done.err, f"{what}: {done.err[-300:]}")
                if done.code == 0:
                    found = _found()
                    report.ended[f"{reading.kind}: the same numbers"] += found == expected
                    report.check(found == expected, f"{what}: another number in silence ({found} for {expected})")
                else:
                    report.ended[f"{reading.kind}: refused"] += 1
                    told = file.name in done.err or str(file.parent) in done.err
                    report.check(told and not reading.again, f"{what}: exit code {done.code}, {done.err[-300:]}")


def _in_another_process(arguments: tuple[str, ...]) -> Done:
    process(lambda: command(*arguments), Path("ended")).join()
    end = outcome(Path("ended"))
    return Done(end[0], "", end[1]) if end is not None else Done(-1, "", "the process died")


def _numbers(reading: Reading) -> Any:
    done = command(*reading.command)
    assert done.code == 0, done.err
    return _found()


def _found() -> Any:
    return [(row[1], row[2], row[3], row[4]) for row in state(Path("results")).values()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--interruptions", type=int, default=20)
    parser.add_argument("--faults", type=int, default=64, help="of each kind of file")
    parser.add_argument("--disks", type=int, default=20)
    parser.add_argument("--together", type=int, default=5, help="sweeps in four processes")
    parser.add_argument("--saves", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    report = Report()
    with nothing_written_outside(), tokenized_once():
        chaos(given, report)
    print(report)
    return int(bool(report.lost))


def chaos(given: argparse.Namespace, report: Report) -> None:
    draw = random.Random(given.seed)
    parts: list[tuple[str, Callable[[], None]]] = [
        ("faults", lambda: faults(given.faults, draw, report)),
        ("kills", lambda: signals(given.kills, draw, report, (signal.SIGKILL,))),
        ("interruptions", lambda: signals(given.interruptions, draw, report, (signal.SIGTERM, signal.SIGINT))),
        ("limits", lambda: limits(given.disks, draw, report)),
        ("disks", lambda: full_disks(given.disks, draw, report)),
        ("together", lambda: together(given.together, 4, report)),
        *([("savers", lambda: savers(given.saves, 6, report))] if given.saves else []),
    ]
    for name, part in parts:
        start = time.monotonic()
        part()
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.__stderr__, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
