"""What svnup does on a GPU, in at most nine minutes: the first run on a machine that has one for a short while.

In this order: the tests marked gpu; the Triton kernel of SparseGPT's column blocks against the torch one; the rates of the
device, by which a plan's seconds can be judged; then Llamas with random weights in bfloat16, drawn on the device. Of LLaMA-7B's
and 13B's shapes: perplexity, Shapley values by windows of 3, values at the margin, Wanda and SparseGPT. Of 8 blocks of a 70B
shape, which are kept in the CPU's memory and brought one by one: the same but for values at the margin, and passes beside those
of blocks that stay on the device. What time is left goes to values of the 7B shape by windows of 5.

Each stage says its seconds and the peak of the device's memory. It takes as much text as the time allows; what the usual amount
costs is calculated from that, and marked so. A stage that no longer fits the time is skipped, one that fails says why, and the
next goes on.

Every result is written when it is there: a line of gpu.jsonl, and gpu.md anew. Needs no network and no installation: any
Python with torch, transformers, rich and, for the tests, pytest will do.

    python -m experiments.benchmarks.gpu [--output results/benchmarks]
    python -m experiments.benchmarks.gpu --device cpu --shape tiny --output /tmp/gpu     # all of it in seconds, on a CPU
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from svnup.language_model import LanguageModel
    from svnup.pruning.walk import Pruner

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 540  # seconds, of the whole script
CLOSING = 5  # seconds before the limit at which nothing may run any more
SPARSITY = 0.5
GROUPS = {"unstructured": None, "2:4": (2, 4)}
WINDOW, COMMON_WINDOW = 3, 5
N_VALUES = (16, 8, 4)  # sequences of the values by the usual windows: the most for which there is time
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
N_CALIBRATION, N_TEST, N_PAYOFF = 128, 166, 16  # the usual: sequences of C4; windows of WikiText2 with LLaMA's tokenizer


@dataclass(frozen=True)
class Shape:
    """A Llama, and how many sequences of `seq_len` tokens each stage reads: the most of these for which there is time.

    Args:
        model: options of its transformers config.
        seq_len: tokens of a sequence.
        n_test: windows of perplexity.
        n_calibration: sequences that are tried, the most first.
        n_payoff: sequences of the payoff text.
        offload: keep the blocks in the CPU's memory.
        seconds: that Wanda, SparseGPT and the values may take.
        of_block: seconds that Wanda and SparseGPT take to select and update the weights of a block: measured of 7B on an H100
            (results/benchmarks/gpu.md), and guessed from that by the operations of the others.
    """

    model: dict[str, int]
    seq_len: int = 2048
    n_test: int = 16
    n_calibration: tuple[int, ...] = (128, 64, 32, 16)
    n_payoff: int = 4
    offload: bool = False
    seconds: tuple[float, float, float] = (60.0, 120.0, 60.0)
    of_block: tuple[float, float] = (0.1, 0.5)


def llama(width: int, inner: int, n_blocks: int, heads: int, **more: int) -> dict[str, int]:
    """Options of a Llama's config."""
    shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": n_blocks, "num_attention_heads": heads}
    return shape | {"vocab_size": 32000} | more


def tiny(offload: bool = False) -> Shape:
    """A model for a try on a CPU."""
    model = llama(64, 96, 6, 4, vocab_size=256)
    return Shape(model, seq_len=32, n_test=8, n_calibration=(16,), offload=offload, of_block=(0.0, 0.0))


SHAPES = {
    "real": {
        "7B": Shape(llama(4096, 11008, 32, 32)),
        "13B": Shape(
            llama(5120, 13824, 40, 40),
            n_test=8,
            n_calibration=(32, 16, 8),
            n_payoff=2,
            seconds=(30.0, 70.0, 50.0),
            of_block=(0.2, 0.8),
        ),
        "70B": Shape(
            llama(8192, 28672, 8, 64, num_key_value_heads=8),
            n_test=8,
            n_calibration=(16, 8),
            n_payoff=2,
            offload=True,
            seconds=(30.0, 90.0, 30.0),
            of_block=(0.5, 3.5),
        ),
    },
    "tiny": {"7B": tiny(), "13B": tiny(), "70B": tiny(offload=True)},
}
ROWS = {"real": (4096, 11008), "tiny": (64,)}  # of the blocks of columns that the kernels settle
N_MARGINS, BY = 8, 0.05  # sequences of calibration and of payoff for values at the margin; how far its profiles are off
REPEATS = {"real": 20, "tiny": 2}
PASSES = (2.0, 6.0)  # time of reading the calibration text for Wanda and SparseGPT, in forward passes, as measured of 7B
LAST = "values"  # of the 7B shape by the usual windows, in what time is left
# A process each, and its seconds.
PARTS = {"machine": 60, "tests": 70, "kernel": 45, "rates": 30, "7B": 200, "13B": 130, "70B": 170, LAST: LIMIT}
# Of the 7B shape on one H100: what, the stage, the name of its seconds there, and the aim in seconds.
AIMS = (
    ("values by windows of 5, 16 sequences", "7B Shapley values, windows of 5, 16 sequences", "values, s", 360),
    (f"Wanda, {N_CALIBRATION} sequences", "7B Wanda", f"{N_CALIBRATION} sequences (calculated), s", 60),
    (f"SparseGPT, {N_CALIBRATION} sequences", "7B SparseGPT", f"{N_CALIBRATION} sequences (calculated), s", 150),
    (f"perplexity, {N_TEST} windows", "7B perplexity", f"{N_TEST} windows (calculated), s", 20),
)


# -- results: one line each, written at once


@dataclass
class Results:
    """The lines of one run in `folder`/gpu.jsonl, after those of earlier runs, and gpu.md about this run."""

    folder: Path
    run: str
    device: str

    def add(self, stage: str, status: str, **found: Any) -> None:
        """Write down how a stage stands: started, done, failed, skipped or out of time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"run": self.run, "stage": stage, "status": status, **found})
        with (self.folder / "gpu.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        if status != "started":
            print(f"{stage}: {status} {found}", flush=True)
        partial = self.folder / "gpu.md.partial"
        partial.write_text(rendered(self.folder / "gpu.jsonl"), encoding="utf-8")
        partial.replace(self.folder / "gpu.md")

    def lines(self) -> dict[str, dict[str, Any]]:
        """The last line of each stage of this run, in the order in which they began."""
        return lines_of(self.folder / "gpu.jsonl", self.run)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage and take its peak of memory; what the block puts into the mapping is written with them.

        What it raises is a result too: the stage failed, and the next one goes on.
        """
        import torch

        from svnup.memory import peak_memory, reset_peak, synchronize

        self.add(name, "started")
        found: dict[str, Any] = {}
        gc.collect()
        torch.cuda.empty_cache()
        synchronize()
        reset_peak()
        start = time.perf_counter()
        try:
            yield found
            synchronize()
        except Exception as error:
            traceback.print_exc()
            found.setdefault("seconds", time.perf_counter() - start)
            self.add(name, "failed", **found, why=f"{type(error).__name__}: {error}"[:500])
            return
        found.setdefault("seconds", time.perf_counter() - start)
        self.add(name, "done", peak_memory_bytes=peak_memory(torch.device(self.device)), **found)


def runs_of(file: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The runs of a file by their names, the one whose line is last first: of each stage its last line, in the order in which
    they began."""
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        line = json.loads(text)
        runs = {line["run"]: runs.pop(line["run"], {})} | runs
        runs[line["run"]][line["stage"]] = line
    return runs


def lines_of(file: Path, run: str) -> dict[str, dict[str, Any]]:
    """The last line of each stage of a run, in the order in which they began."""
    return runs_of(file).get(run, {})


def aims(lines: dict[str, dict[str, Any]]) -> list[tuple[str, float, int, str]]:
    """What is aimed at with the 7B shape on an H100: what, its seconds, the aim in seconds, and from which text they are."""
    out = []
    for what, stage, key, aim in AIMS:
        line, how = lines.get(stage, {}), "measured"
        if stage.endswith(f"windows of {COMMON_WINDOW}, {N_PAYOFF} sequences") and line.get("status") != "done":
            key = f"windows of {COMMON_WINDOW}, {N_PAYOFF} sequences (calculated), s"
            found = [name for name in lines if name.startswith("7B Shapley values") and key in lines[name]]
            line, how = (lines[found[-1]], f"calculated from {found[-1].partition(', ')[2]}") if found else ({}, "")
        for text, usual in (("windows", N_TEST), ("sequences", N_CALIBRATION)):
            if key.startswith(f"{usual} {text}") and line.get(text) != usual:
                how = f"calculated from {line.get(text)} {text}"
        if line.get("status") == "done":
            out.append((what, float(line[key]), aim, how))
    return out


def summary(lines: dict[str, dict[str, Any]]) -> list[str]:
    """The aims and what was reached, and which models were not tried; nothing for shapes that are not real."""
    if lines.get("machine", {}).get("shape") != "real":
        return []
    text = ["", "| of 7B | seconds | aim on an H100, s | |", "| --- | ---: | ---: | --- |"]
    text += [f"| {what} | {seconds:.1f} | {aim} | {how} |" for what, seconds, aim, how in aims(lines)]
    done = {name.partition(" ")[0] for name, line in lines.items() if line["status"] == "done"}
    if left := [size for size in SHAPES["real"] if size not in done]:
        text += ["", f"Not tried in this run: {', '.join(left)}."]
    return text if aims(lines) else text[3:]


def rendered(file: Path) -> str:
    """The page about the runs of a file, the newest first."""
    return "\n\n".join(["# svnup on a GPU", *("\n".join(_of_run(lines)) for lines in runs_of(file).values())]) + "\n"


def _of_run(lines: dict[str, dict[str, Any]]) -> list[str]:
    machine = lines.get("machine", {})
    text = [
        f"## {machine.get('device')}",
        "",
        f"Made by `make bench-gpu` (shape {machine.get('shape')}). torch {machine.get('torch')}, transformers "
        f"{machine.get('transformers')}, triton {machine.get('triton')}. {machine.get('model')} Peak: bytes that "
        "tensors take on the device at most; on a CPU, memory of the process.",
        *summary(lines),
        "",
        "| stage | | seconds | peak, GB | what it says |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for name, line in lines.items():
        if name != "machine":
            found = {k: v for k, v in line.items() if k not in ("run", "stage", "status", "seconds", "peak_memory_bytes")}
            seconds, peak = line.get("seconds"), line.get("peak_memory_bytes")
            cells = [
                name,
                "not finished" if line["status"] == "started" else line["status"],
                "" if seconds is None else _short(seconds),
                "" if peak is None else f"{peak / 1e9:.2f}",
                "; ".join(f"{k} {_short(v)}" for k, v in found.items()).replace("|", "/").replace("\n", " "),
            ]
            text.append("| " + " | ".join(cells) + " |")
    return text


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -- the tests


def tests(results: Results, options: argparse.Namespace) -> None:
    """Run the tests marked gpu, as long as the time allows; what they said by then is counted either way.

    Without the fixtures of the other tests, which need all of svnup's packages.
    """
    results.folder.mkdir(parents=True, exist_ok=True)
    log = results.folder / "gpu_tests.log"
    command = [sys.executable, "-m", "pytest", "--noconftest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    results.add("tests", "started")
    start, over = time.perf_counter(), False
    with log.open("w", encoding="utf-8") as file:
        try:
            limit = max(1.0, options.until - time.time())
            subprocess.run([*command, "tests/test_gpu.py"], cwd=ROOT, stdout=file, stderr=file, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            over = True
    text = log.read_text(encoding="utf-8", errors="replace")
    outcomes = re.findall(r"^tests/\S+.* (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE)
    counts = {outcome.lower(): outcomes.count(outcome) for outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failed = re.findall(r"^(?:FAILED|ERROR) tests/test_gpu\.py::(\S+)", text, re.MULTILINE)
    why = {"failures": failed} if failed else {} if any(counts.values()) else {"why": text.strip().splitlines()[-1:]}
    bad = counts["failed"] + counts["error"] or not any(counts.values())
    status = "out of time" if over else "failed" if bad else "done"
    results.add("tests", status, seconds=time.perf_counter() - start, **counts, **why)


# -- the column kernel


def kernel(results: Results, options: argparse.Namespace) -> None:
    """Blocks of 128 columns settled by Triton and by torch, the k-th score of rows by sorting and by selection, X^T X in
    float32 and in tf32: seconds of each, and where they differ."""
    import torch

    from svnup.pruning.column_block import can_build_kernels, prune_columns_torch
    from svnup.pruning.masks import _kth

    device, repeats = torch.device(options.device), REPEATS[options.shape]
    torch.zeros(1, device=device)
    with torch.inference_mode():
        for rows in ROWS[options.shape]:
            for pattern, group in GROUPS.items():
                with results.stage(f"columns {rows} x 128, {pattern}") as found:
                    block, factor, mask, scale = a_block(rows, 128, group is None, device)
                    torch_seconds, by_torch = timed(prune_columns_torch, (block, factor, mask, group, scale), repeats)
                    found |= {"seconds": torch_seconds, "by": "torch"}
                    if device.type != "cuda" or not can_build_kernels():
                        found["triton"] = "not here"
                        continue
                    from svnup.pruning.column_block_triton import prune_columns_triton

                    start = time.perf_counter()
                    prune_columns_triton(block, factor, mask, group, scale)
                    torch.cuda.synchronize()
                    found["compiled in, s"] = time.perf_counter() - start
                    seconds, by_triton = timed(prune_columns_triton, (block, factor, mask, group, scale), repeats)
                    found |= {"seconds": seconds, "by": "triton", "torch, s": torch_seconds}
                    found["torch / triton"] = torch_seconds / seconds
                    found |= compared(by_triton, by_torch)
            with results.stage(f"k-th score of {rows} rows of {rows}") as found:
                scores, k = torch.rand(rows, rows, generator=torch.Generator(device).manual_seed(0), device=device), rows // 2
                counts = torch.full((rows,), k, device=device)
                seconds, by_sort = timed(_kth, (scores, counts), repeats)
                selected, (by_selection, _) = timed(partial(scores.kthvalue, dim=1, keepdim=True), (k,), repeats)
                found |= {"seconds": seconds, "by": "sort" if device.type != "cpu" else "numpy", "kthvalue, s": selected}
                found |= {"seconds / kthvalue": seconds / selected, "equal": torch.equal(by_sort, by_selection)}
            with results.stage(f"X^T X of {rows} inputs in bfloat16") as found:
                x = torch.randn(SHAPES[options.shape]["7B"].seq_len, rows, device=device).bfloat16()
                found["seconds"], exact = timed(gram, (x,), repeats)
                torch.set_float32_matmul_precision("high")  # tf32 holds every bfloat16 number
                try:
                    found["tf32, s"], other = timed(gram, (x,), repeats)
                finally:
                    torch.set_float32_matmul_precision("highest")
                found["seconds / tf32"] = found["seconds"] / found["tf32, s"]
                found["largest difference"] = float((other - exact).abs().max() / exact.diagonal().mean())


def gram(x: Tensor) -> Tensor:
    """The statistics of SparseGPT, upper triangle."""
    from svnup.pruning.sparsegpt import Hessian

    stats = Hessian.empty(x[:1])
    stats.add(x)
    return stats.xtx.triu()


def a_block(rows: int, columns: int, masked: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Weights (rows, columns), the factor of a Hessian of correlated inputs, a mask where one is wanted, and the scale."""
    import torch

    g = torch.Generator().manual_seed(0)
    x = torch.randn(8 * columns, columns, generator=g)
    h = (x + 0.5 * x.roll(1, dims=1)).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(h.T @ h / len(h)), upper=True).float().to(device)
    mask = (torch.rand(rows, columns, generator=g) < SPARSITY).to(device) if masked else None
    return torch.randn(rows, columns, generator=g).to(device), factor, mask, factor.diagonal().clone()


def timed(work: Callable[..., Any], args: tuple[Any, ...], repeats: int) -> tuple[float, Any]:
    """The median seconds of a call, after one that warms up, and what it returns."""
    from svnup.memory import synchronize

    out, seconds = work(*args), []
    synchronize()
    for _ in range(repeats):
        start = time.perf_counter()
        out = work(*args)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), out


def compared(ours: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Where two settled blocks differ: rows whose masks do, and of the others the largest difference of weights and errors.

    Raises ValueError where that is more than rounding.
    """
    other = ((ours[0] == 0) != (reference[0] == 0)).any(1)
    pairs = [((a - b).abs().masked_fill(other[:, None], 0).max(), b.abs().max()) for a, b in zip(ours, reference, strict=True)]
    found = {"rows of other masks": int(other.sum()), "largest difference": max(float(off / size) for off, size in pairs)}
    if not found["largest difference"] < 1e-4 or other.sum() > len(other) // 100:
        raise ValueError(f"the kernels disagree: {found}")
    return found


# -- the rates of the device


def rates(results: Results, options: argparse.Namespace) -> None:
    """Matrix products, copies on the device, and copies to it: what a plan's seconds are calculated from."""
    import torch

    from svnup.machines import Meter

    device, side = torch.device(options.device), 8192 if options.shape == "real" else 256
    torch.zeros(1, device=device)  # starts the device
    with torch.inference_mode():
        for dtype in ("bfloat16", "float16", "float32"):
            with results.stage(f"products of {dtype}") as found:  # as a plan measures them
                found["TFLOP/s"] = Meter(options.device).products(dtype) / 1e12
        meter = Meter(options.device)
        with results.stage("launches") as found:
            found["microseconds each"] = meter.call() * 1e6
        with results.stage("hashing") as found:
            found["GB/s"] = meter.hashing() / 1e9
        ways = {
            "copies from the device into pinned memory": meter.transfer,
            "weights by way of pinned memory": meter.upload,
        }
        for name, measure in ways.items() if device.type == "cuda" else ():
            with results.stage(name) as found:
                found["GB/s"] = (measure() or 0.0) / 1e9
        with results.stage("copies on the device") as found:
            here = torch.empty(side**2 * 4, device=device)
            seconds, _ = timed(torch.Tensor.clone, (here,), REPEATS[options.shape])
            found |= {"seconds": seconds, "GB/s": 2 * here.nbytes / seconds / 1e9}  # read and written
        with results.stage("copies to the device") as found:  # from pinned memory
            there = torch.empty(side**2 * 4, pin_memory=device.type == "cuda")
            seconds, _ = timed(lambda: here.copy_(there, non_blocking=True), (), REPEATS[options.shape])
            found |= {"seconds": seconds, "GB/s": here.nbytes / seconds / 1e9}


# -- a model


def model(results: Results, options: argparse.Namespace) -> None:
    """Perplexity, pruning and Shapley values of a random Llama; `unit` is the time of one block on one sequence.

    How much text still fits goes by that, and by guesses of what a block costs beside.
    """
    import numpy as np
    import torch

    from svnup.allocation import Budget
    from svnup.allocation.margins import marginal_values
    from svnup.game import LayerGame
    from svnup.memory import reset_peak, synchronize
    from svnup.model.language_model import LanguageModel, make_config
    from svnup.pruning import prune_model
    from svnup.pruning.advance import PrunedInAdvance
    from svnup.pruning.sparsegpt import SparseGPT
    from svnup.pruning.wanda import Wanda
    from svnup.shapley import block_forwards
    from svnup.shapley.sliding_window import SlidingWindow

    size = "7B" if options.part == LAST else options.part
    shape = SHAPES[options.shape][size]
    rng = np.random.default_rng(0)

    def text(n_seq: int) -> Any:
        return rng.integers(0, shape.model["vocab_size"], (n_seq, shape.seq_len))

    def build(offload: bool = shape.offload) -> LanguageModel:
        """The same weights every time, drawn on the device, where that takes no time."""
        config = make_config("llama", **shape.model, max_position_embeddings=shape.seq_len, pad_token_id=None)
        with torch.device(options.device):
            lm = LanguageModel.random(config, None, seed=0, dtype="bfloat16", device=options.device)
        if offload:
            lm.blocks.to("cpu")
            lm._move(torch.device(options.device), "cpu")
        torch.cuda.empty_cache()
        reset_peak()  # which drawing them on the device is no part of
        return lm

    def wanted(stage: str) -> bool:
        return re.search(options.stages, stage) is not None

    def fits(stage: str, seconds: float, most: float) -> bool:
        """Whether a stage is asked for, and takes no more than `most` seconds, nor what is left."""
        if not wanted(stage):
            return False
        left = min(options.until - time.time(), most)
        if seconds > left:
            results.add(f"{size} {stage}", "skipped", why=f"takes about {seconds:.0f} s, and {left:.0f} s are left")
        return bool(seconds <= left)

    def in_time(counts: tuple[int, ...], seconds: Callable[[int], float], most: float) -> int:
        """The first of some numbers of sequences for which there is time; the last where there is none for any."""
        left = min(options.until - time.time(), most)
        return next((n for n in counts if seconds(n) <= left), counts[-1])

    torch.zeros(1, device=options.device)  # starts the device, so that the first stage need not
    lm: LanguageModel | None = None
    with results.stage(f"{size} model" + ", drawn anew" * (options.part == LAST)) as found:
        lm = build()
        found |= {"parameters": sum(p.numel() for p in lm.model.parameters()), "blocks": lm.n_blocks, **_described(shape)}
    if lm is None:
        return
    n_blocks, params = lm.n_blocks, lm.block_params

    plans = {w: SlidingWindow(w).plan(n_blocks) for w in (WINDOW, COMMON_WINDOW) if w <= n_blocks}
    forwards = {w: block_forwards(plan) for w, plan in plans.items()}
    before = results.lines().get(f"{size} perplexity", {})  # of an earlier call of this run
    unit = float(before.get("seconds", 0.0)) / shape.n_test / n_blocks  # where it stays unknown, nothing is skipped for it

    def played(window: int, counts: tuple[int, ...], most: float) -> None:
        """Play a game, on the most sequences for which there is time, if there is any."""
        nonlocal lm

        def expected(n_seq: int) -> float:
            hashed = 10.0 if options.shape == "real" else 0.0
            return 1.3 * unit * n_seq * float(forwards[window]) + hashed

        n_seq = in_time(counts, expected, most)
        name = f"Shapley values, windows of {window}, {n_seq} sequences"
        if not fits(name, expected(n_seq), most):
            return
        with results.stage(f"{size} {name}") as found:
            lm = lm or build()
            start = time.perf_counter()
            game = LayerGame(lm, text(n_seq))
            found["hash of the weights, s"] = time.perf_counter() - start
            values = SlidingWindow(window).estimate(game)
            found["seconds"] = time.perf_counter() - start
            found |= {"sequences": n_seq, "evaluations": game.n_evaluations, "block-forwards": game.n_block_forwards}
            found |= {"values, s": values.cost.seconds, "largest": float(values.values.max())}
            found["least"] = float(values.values.min())
            for w in plans.keys() - ({window} if n_seq == N_PAYOFF else set()):
                ratio = forwards[w] * N_PAYOFF / forwards[window] / n_seq
                found[f"windows of {w}, {N_PAYOFF} sequences (calculated), s"] = values.cost.seconds * ratio

    if options.part == LAST:
        if COMMON_WINDOW in forwards:
            played(COMMON_WINDOW, N_VALUES, LIMIT)
        return

    def margins() -> None:
        """One round of values at the margin, between two profiles by Wanda."""
        nonlocal lm
        name = f"values at the margin, {N_MARGINS} sequences"
        if not fits(name, 1.3 * n_blocks * (6 * N_MARGINS * unit + 3 * shape.of_block[0]), shape.seconds[2]):
            return
        with results.stage(f"{size} {name}") as found:
            lm = lm or build()
            start = time.perf_counter()
            advance = PrunedInAdvance(lm, Wanda(), text(N_MARGINS))
            synchronize()
            found["statistics, s"] = time.perf_counter() - start
            present, absent = (partial(advance.block, profile=Budget(params, SPARSITY + by).uniform()) for by in (-BY, BY))
            values = marginal_values(lm, present, absent, text(N_MARGINS))
            found["values, s"] = time.perf_counter() - start - found["statistics, s"]
            found |= {"sequences": N_MARGINS, "of linear layers": len(values)}
            found |= {"largest": max(values.values()), "least": min(values.values())}

    ways = {"perplexity": shape.offload} | ({"perplexity, blocks on the device": False} if shape.offload else {})
    for name, offload in ways.items():
        if not wanted(name):
            continue
        with results.stage(f"{size} {name}") as found:
            if offload != shape.offload:
                lm = None  # before the other is drawn
            lm = lm or build(offload)
            tokens = text(shape.n_test)
            lm.nll(tokens)  # libraries start, kernels are chosen
            start = time.perf_counter()
            losses = lm.nll(tokens)
            found["seconds"] = seconds = time.perf_counter() - start
            unit = max(unit, seconds / shape.n_test / n_blocks)
            found |= {"windows": shape.n_test, "perplexity": math.exp(losses.mean())}
            found["TFLOP/s"] = 2 * multiplied_parameters(lm) * tokens.size / seconds / 1e12
            found[f"{N_TEST} windows (calculated), s"] = seconds * N_TEST / shape.n_test
    if shape.offload:
        lm = None

    played(WINDOW, (shape.n_payoff,), shape.seconds[2])
    if not shape.offload:  # weights in advance are of models on the device
        margins()

    pruners: dict[str, Pruner] = {"Wanda": Wanda(), "SparseGPT": SparseGPT()}
    guesses = zip(shape.seconds, PASSES, shape.of_block, strict=False)
    for (name, pruner), (most, passes, of_block) in zip(pruners.items(), guesses, strict=True):

        def expected(n_seq: int, passes: float = passes, of_block: float = of_block) -> float:
            return 1.3 * (passes * unit * n_blocks * n_seq + of_block * n_blocks)

        n_seq = in_time(shape.n_calibration, expected, most)
        if not fits(name, expected(n_seq), most):
            continue
        with results.stage(f"{size} {name}") as found:
            lm = lm or build()
            report = prune_model(lm, Budget(params, SPARSITY).uniform(), pruner, text(n_seq))
            reading, pruning = report.seconds["inputs"] + report.seconds["rerun"], report.seconds["prune"]
            found |= {"seconds": report.seconds["total"], "sequences": n_seq, "sparsity": report.sparsity}
            found |= {"fallbacks": sum(linear.fallback is not None for linear in report.per_linear)}
            found |= {"reads text in, s": reading, "selects and updates in, s": pruning}
            found[f"{N_CALIBRATION} sequences (calculated), s"] = reading * N_CALIBRATION / n_seq + pruning
            more = (N_CALIBRATION - n_seq) * shape.seq_len * shape.model["hidden_size"]  # of hidden states
            found[f"{N_CALIBRATION} sequences (calculated), GB more"] = more * torch.bfloat16.itemsize / 1e9
        lm = None  # its weights are gone: the next stage draws them anew


def _described(shape: Shape) -> dict[str, Any]:
    """What a page says of a model."""
    where = "in the CPU's memory" if shape.offload else "on the device"
    return {"width": shape.model["hidden_size"], "tokens of a sequence": shape.seq_len, "blocks are": where}


def multiplied_parameters(lm: LanguageModel) -> int:
    """Parameters that a token is multiplied with: all but the embeddings, which are looked up."""
    return int(sum(p.numel() for p in lm.model.parameters()) - lm.model.get_input_embeddings().weight.numel())


# -- all of it


def machine(results: Results, options: argparse.Namespace) -> None:
    """Write down where this is. Ends the run where the device is missing."""
    import torch

    cuda = options.device != "cpu"
    if cuda and not torch.cuda.is_available():
        sys.stderr.write(f"--device {options.device}: no CUDA device here; --device cpu --shape tiny tries it all on a CPU\n")
        sys.exit(2)
    results.add(
        "machine",
        "done",
        device=torch.cuda.get_device_name() if cuda else "CPU",
        memory_bytes=torch.cuda.get_device_properties(0).total_memory if cuda else None,
        shape=options.shape,
        model=f"Random Llamas in bfloat16, pruned to {100 * SPARSITY:.0f} %.",
        **{package: _version(package) for package in ("torch", "transformers", "triton")},
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu")
    parser.add_argument("--shape", choices=SHAPES, default="real", help="of models: real, or tiny")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks", metavar="DIR")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="of the whole script")
    parser.add_argument("--parts", type=lambda names: names.split(","), default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--stages", default="", metavar="REGEX", help="of a model: only those whose names it is found in")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # of a process that main started
    parser.add_argument("--run", help="a name; what another call of that name has measured stands on the same page")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    run = options.run or datetime.now(UTC).isoformat(timespec="microseconds")
    results = Results(options.output.resolve(), run, options.device)
    if options.part:
        {"machine": machine, "tests": tests, "kernel": kernel, "rates": rates}.get(options.part, model)(results, options)
        return 0
    end = time.time() + options.seconds - CLOSING
    for part in options.parts:
        limit = PARTS.get(part)
        if limit is None:
            parser.error(f"--parts {part}: choose among {', '.join(PARTS)}")
        until = min(end, time.time() + limit)
        if until <= time.time():
            results.add(part, "skipped", why="no time is left")
            continue
        command = [sys.executable, "-m", "experiments.benchmarks.gpu", "--part", part, "--run", run, "--until", str(until)]
        command += ["--output", str(results.folder), "--device", options.device, "--shape", options.shape]
        command += ["--stages", options.stages]
        try:  # the tests end by themselves, since they have a process of their own
            timeout = until - time.time() + CLOSING / 2 * (part == "tests")
            code = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, timeout=timeout, check=False).returncode
        except subprocess.TimeoutExpired:
            close(results, part, "out of time")
            continue
        if code == 2 and part == "machine":
            return 2
        if code:
            close(results, part, "failed", why=f"exit code {code}")
    return 0 if all(line["status"] == "done" for line in results.lines().values()) else 1


def close(results: Results, part: str, status: str, **found: Any) -> None:
    """Say how a process ended that did not get to the end of its part: of the stage in which that was."""
    begun = [name for name, line in results.lines().items() if line["status"] == "started"]
    for name in begun or [part]:
        results.add(name, status, **found)


if __name__ == "__main__":
    sys.exit(main())
