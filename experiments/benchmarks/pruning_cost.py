"""What pruning costs: each stage against its floor, and svnup's selections against the published ones, side by side in one run.

The published ways are those of the SparseGPT and Wanda repositories: SparseGPT's loop updates the rest of the block after
every column, and masks come from sorting all scores. The floor of a stage is its operations (a multiplication and an addition
are two) over the rate of the product X W^T, measured in turn with it; - where what it does is not arithmetic.

    python -m experiments.benchmarks.pruning_cost [--repeats 3] [--output results/benchmarks/pruning_cost.md]
    python -m experiments.benchmarks.pruning_cost --device cuda --shapes 4096x4096,11008x4096
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from svnup.allocation import Budget
from svnup.data import Docs
from svnup.language_model import LanguageModel
from svnup.memory import synchronize
from svnup.model.source import Pretrained
from svnup.pruning.column_block import can_build_kernels
from svnup.pruning.magnitude import Magnitude
from svnup.pruning.sparsegpt import Hessian, SparseGPT, cholesky_of_inverse
from svnup.pruning.walk import Pruner, temporarily_pruned
from svnup.pruning.wanda import Wanda
from svnup.results.provenance import hardware

SPARSITY = 0.5


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    synchronize()
    start = time.perf_counter()
    out = work()
    synchronize()
    return time.perf_counter() - start, out


# -- the published ways


def published_sparsegpt(weight: Tensor, u: Tensor, group: tuple[int, int] | None, block_size: int = 128) -> Tensor:
    """github.com/IST-DASLab/sparsegpt, `fasterprune` after the factorisation, less its one weight too many per block."""
    w = weight.clone()
    for start in range(0, w.shape[1], block_size):
        end = min(start + block_size, w.shape[1])
        block, kept, errors = w[:, start:end].clone(), torch.zeros_like(w[:, start:end]), torch.zeros_like(w[:, start:end])
        factor = u[start:end, start:end]
        mask = torch.zeros_like(block, dtype=torch.bool)
        if group is None:
            scores = block**2 / factor.diagonal().reshape(1, -1) ** 2
            mask = scores <= torch.sort(scores.flatten())[0][int(scores.numel() * SPARSITY) - 1]
        for i in range(end - start):
            column, d = block[:, i], factor[i, i]
            if group is not None and i % group[1] == 0:
                scores = block[:, i : i + group[1]] ** 2 / factor.diagonal()[i : i + group[1]].reshape(1, -1) ** 2
                mask.scatter_(1, i + torch.topk(scores, group[0], dim=1, largest=False)[1], True)
            q = column.clone()
            q[mask[:, i]] = 0
            kept[:, i] = q
            error = (column - q) / d
            block[:, i:] -= error.unsqueeze(1).matmul(factor[i, i:].unsqueeze(0))
            errors[:, i] = error
        w[:, start:end] = kept
        w[:, end:] -= errors.matmul(u[start:end, end:])
    return w


def published_factor(h: Tensor) -> Tensor:
    out: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return out


def published_wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """github.com/locuslab/wanda, `prune_wanda`."""
    scores = weight.abs() * norms
    order = torch.sort(scores, dim=-1, stable=True)[1]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return weight.masked_fill(mask.scatter_(1, order[:, : int(scores.shape[1] * SPARSITY)], True), 0)


def published_wanda_groups(weight: Tensor, norms: Tensor, n: int, m: int) -> Tensor:
    scores = weight.abs() * norms
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for i in range(0, scores.shape[1], m):
        mask.scatter_(1, i + torch.topk(scores[:, i : i + m], n, dim=1, largest=False)[1], True)
    return weight.masked_fill(mask, 0)


def published_magnitude(weight: Tensor) -> Tensor:
    scores = weight.abs()
    return weight.masked_fill(scores <= torch.sort(scores.flatten())[0][int(scores.numel() * SPARSITY) - 1], 0)


# -- one linear


def one_linear(d_out: int, d_in: int, n_tokens: int, device: str, repeats: int) -> tuple[list[str], float]:
    """Lines of the table, and the rate of the product in operations a second."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, d_in, generator=g).to(device)
    mix = torch.randn(d_in, d_in, generator=g).to(device) / d_in**0.5 + torch.eye(d_in, device=device)
    scales = torch.randn(d_in, generator=g).exp().to(device)
    x = (torch.randn(n_tokens, d_in, generator=g).to(device) @ mix) * scales
    norms, hessian = Wanda().new_stats(weight), Hessian.empty(weight)
    Wanda().observe(norms, x)
    hessian.add(x)
    h, u, dead = hessian.damped(SparseGPT().damp, cholesky_of_inverse)
    lengths = norms.squares.sqrt()
    # stage: (operations, ours, the published way)
    update = d_out * d_in**2
    stages: dict[str, tuple[float | None, Callable[[], Any], Callable[[], Any] | None]] = {
        "product X W^T": (2 * n_tokens * d_in * d_out, lambda: x @ weight.T, None),
        "SparseGPT: statistics": (n_tokens * d_in**2, lambda: Hessian.empty(weight).add(x), lambda: x.T @ x),
        "SparseGPT: factorisation": (2 / 3 * d_in**3, lambda: cholesky_of_inverse(h), lambda: published_factor(h)),
        "SparseGPT: selection and update": (
            update,
            lambda: SparseGPT().prune_with_factor(weight, u, dead, SPARSITY),
            lambda: published_sparsegpt(weight, u, None),
        ),
        "SparseGPT 2:4: selection and update": (
            update,
            lambda: SparseGPT("2:4").prune_with_factor(weight, u, dead, SPARSITY),
            lambda: published_sparsegpt(weight, u, (2, 4)),
        ),
        "Wanda: statistics": (None, lambda: Wanda().observe(Wanda().new_stats(weight), x), lambda: x.norm(dim=0)),
        "Wanda: selection": (
            None,
            lambda: Wanda().prune(weight, norms, SPARSITY),
            lambda: published_wanda(weight, lengths),
        ),
        "Wanda 2:4: selection": (
            None,
            lambda: Wanda("2:4").prune(weight, norms, SPARSITY),
            lambda: published_wanda_groups(weight, lengths, 2, 4),
        ),
        "magnitude: selection": (
            None,
            lambda: Magnitude().prune(weight, None, SPARSITY),
            lambda: published_magnitude(weight),
        ),
    }
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    results: dict[tuple[str, str], Any] = {}
    for repeat in range(repeats + 1):  # the first round warms up: pages, threads, a kernel that is compiled
        for stage, (_, ours, published) in stages.items():
            for way, work in (("ours", ours), ("published", published)):
                if work is not None:
                    taken, results[stage, way] = timed(work)
                    seconds[stage, way] += [taken] if repeat else []
    rate = 2 * n_tokens * d_in * d_out / statistics.median(seconds["product X W^T", "ours"])
    lines = [
        f"{d_out} x {d_in}, {n_tokens} tokens; the product runs at {rate / 1e9:.0f} GFLOP/s.",
        "",
        "| stage | seconds | over floor | published, seconds | times ours | largest difference | masks differ at |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stage, (operations, _, published) in stages.items():
        taken = statistics.median(seconds[stage, "ours"])
        line = f"| {stage} | {taken:.4f} | {f'{taken * rate / operations:.2f}' if operations else '-'} |"
        if published is None:
            lines.append(line + " - | - | - | - |")
            continue
        theirs = statistics.median(seconds[stage, "published"])
        line += f" {theirs:.4f} | {theirs / taken:.1f} |"
        a, b = results[stage, "ours"], results[stage, "published"]
        if "selection" in stage:
            line += f" {float((a - b).abs().max()):.1e} | {int(((a == 0) != (b == 0)).sum())} |"
        else:
            line += f" {float((a - b).abs().max()):.1e} | - |" if "factor" in stage else " - | - |"
        lines.append(line)
    return lines, rate


# -- a whole model


class Timed:
    """A pruner that reads inputs and prunes, whose calls are timed; `widths` has d_in of each distinct input."""

    needs_inputs: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    def __init__(self, pruner: Pruner) -> None:
        self._pruner, self.pattern = pruner, pruner.pattern
        self.seconds: dict[str, float] = defaultdict(float)
        self.widths: list[int] = []

    def new_stats(self, weight: Tensor) -> Any:
        self.widths.append(weight.shape[1])
        return self._pruner.new_stats(weight)

    def operations(self, lm: LanguageModel, n_tokens: int) -> float:
        """Of two passes through the blocks (the last one once), of the Hessians and of their factors, each made once."""
        params = lm.block_params
        passes = 2 * n_tokens * (2 * params.sum() - params[-1])
        return float(passes + isinstance(self._pruner, SparseGPT) * sum(n_tokens * d**2 + 2 / 3 * d**3 for d in self.widths))

    def observe(self, stats: Any, x: Tensor) -> None:
        taken, _ = timed(lambda: self._pruner.observe(stats, x))
        self.seconds["statistics"] += taken

    def prune(self, weight: Tensor, stats: Any, sparsity: float) -> Tensor:
        plain = Hessian.damped

        def damped(hessian: Hessian, *args: Any) -> Any:
            taken, out = timed(lambda: plain(hessian, *args))
            self.seconds["factorisation"] += taken
            return out

        try:
            Hessian.damped = damped  # type: ignore[method-assign, assignment]
            pruned: Tensor
            taken, pruned = timed(lambda: self._pruner.prune(weight, stats, sparsity))
        finally:
            Hessian.damped = plain  # type: ignore[method-assign]
        self.seconds["prune"] += taken
        return pruned


@torch.inference_mode()
def bare_forwards(lm: LanguageModel, tokens: Any) -> float:
    """Seconds of one pass of every block over all tokens, without hooks."""
    batches = list(lm.micro_batches(tokens))

    def work() -> None:
        for batch in batches:
            for index in range(lm.n_blocks):
                batch.hidden = lm.run_block(index, batch).hidden

    return timed(work)[0]


def whole_model(lm: LanguageModel, pruners: dict[str, Pruner], tokens: Any, repeats: int, rate: float) -> list[str]:
    stages: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in pruners}
    for repeat in range(repeats + 1):
        for name, pruner in pruners.items():
            watched, bare = Timed(pruner), bare_forwards(lm, tokens)
            profile = Budget(lm.block_params, SPARSITY, pruner.pattern).uniform()
            with temporarily_pruned(lm, profile, watched, tokens) as report:
                whole, parts = report.seconds, watched.seconds
            row = {
                "forward passes with the dense block": whole["inputs"] - parts["statistics"],
                "statistics": parts["statistics"],
                "factorisation": parts["factorisation"],
                "selection and update": parts["prune"] - parts["factorisation"],
                "errors and checks": whole["prune"] - parts["prune"],
                "forward passes with the pruned block": whole["rerun"],
                "total": whole["total"],
                "forward passes and statistics": whole["inputs"] + whole["rerun"],
                "two bare passes through all blocks": 2 * bare,
                "floor: operations of both passes, Hessians and factors at the rate above": watched.operations(lm, tokens.size)
                / rate,
            }
            for stage, seconds in row.items():
                stages[name][stage] += [seconds] if repeat else []
    lines = ["| stage | " + " | ".join(f"{name}, seconds | share" for name in pruners) + " |"]
    lines.append("| --- |" + " --- | --- |" * len(pruners))
    for stage in next(iter(stages.values())):
        cells = []
        for rows in stages.values():
            shares = [part / total for part, total in zip(rows[stage], rows["total"], strict=True)]
            cells.append(f"{statistics.median(rows[stage]):.2f} | {100 * statistics.median(shares):.0f} %")
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", default="2048x2048", help="d_out x d_in of the linears, separated by commas")
    parser.add_argument("--n-tokens", type=int, default=8192, help="calibration tokens of the linears")
    parser.add_argument("--n-seq", type=int, default=128, help="calibration sequences of the model")
    parser.add_argument("--seq-len", type=int, default=256, help="their tokens")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    machine = hardware()
    device = torch.cuda.get_device_name() if options.device != "cpu" else f"{machine.cpu}, {machine.cores} cores"
    kernel = options.device != "cpu" and can_build_kernels()
    lines = [
        "# Cost of pruning",
        "",
        f"Made by `make benchmarks`: median of {options.repeats} after a warm-up, ways taking turns. {device}, "
        f"{machine.threads} threads, torch {torch.__version__}, float32, columns settled by "
        f"{'Triton' if kernel else 'torch'}. Sparsity {SPARSITY}.",
    ]
    for shape in options.shapes.split(","):
        d_out, d_in = map(int, shape.split("x"))
        with torch.inference_mode():
            table, rate = one_linear(d_out, d_in, options.n_tokens, options.device, options.repeats)
        lines += ["", f"## A linear of {shape}", "", *table]
    lm = Pretrained(pretrained_model_name_or_path="svnup/tiny", dtype="float32", device=options.device).load()
    tokens = Docs(n_seq=options.n_seq, seq_len=options.seq_len, role="calibration").tokens(lm.tokenizer)
    pruners: dict[str, Pruner] = {"Wanda": Wanda(), "SparseGPT": SparseGPT()}
    lines += ["", f"## The built-in model, 12 blocks, {options.n_seq} x {options.seq_len} tokens", ""]
    lines += whole_model(lm, pruners, tokens, options.repeats, rate)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
