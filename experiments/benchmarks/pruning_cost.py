"""What pruning costs: each stage and whole jobs, beside the released code of SparseGPT and Wanda, side by side in one run.

The released ways do what the repositories of SparseGPT and Wanda do, step by step: statistics of one sequence at a time
and of each linear layer, SparseGPT's loop that updates the rest of the block after every column, masks by sorting all
scores, for N:M by topk. The floor of a stage is its operations (a multiplication and an addition are two) over the rate
of the product X W^T, measured in turn with it; - where what it does is not arithmetic. The floor of a whole job is the
forward passes that it needs, run plainly (through every block before it is pruned, and after but for the last), and its
statistics.

By one thread on a CPU, time is that of the process, which a busy machine stretches less than the clock.

    python -m experiments.benchmarks.pruning_cost [--repeats 3] [--output results/benchmarks/pruning_cost.md]
    python -m experiments.benchmarks.pruning_cost --device cuda --shapes 4096x4096,11008x4096 --widths 192
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from svnup.allocation import Budget
from svnup.data import Docs
from svnup.memory import synchronize
from svnup.model.language_model import BATCH_TOKENS, LanguageModel, make_config
from svnup.model.source import Pretrained
from svnup.pruning import walk
from svnup.pruning.column_block import can_build_kernels
from svnup.pruning.magnitude import Magnitude
from svnup.pruning.sparsegpt import Hessian, SparseGPT, cholesky_of_inverse
from svnup.pruning.walk import Pruner
from svnup.pruning.wanda import Wanda
from svnup.results.provenance import hardware

SPARSITY = 0.5
BUILT_IN = 192  # width of the built-in model


def sequence_length(width: int) -> int:
    """Tokens of a calibration sequence: those of the built-in model, and of the models of the field."""
    return 256 if width < 1024 else 2048


def now() -> float:
    """Seconds: of the process if it has one thread and no GPU."""
    synchronize()
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = now()
    out = work()
    return now() - start, out


# -- the released ways


def published_hessian(x: Tensor, seq_len: int) -> Tensor:
    """The mean of X^T X over sequences, updated by each, times two as there."""
    h = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    for n, sequence in enumerate(x.split(seq_len)):
        h *= n / (n + 1)
        scaled = math.sqrt(2 / (n + 1)) * sequence.t().float()
        h += scaled.matmul(scaled.t())
    return h


def published_norms(x: Tensor, seq_len: int) -> Tensor:
    """The mean of squared norms of inputs over sequences, updated by each."""
    squares = torch.zeros(x.shape[1], device=x.device)
    for n, sequence in enumerate(x.split(seq_len)):
        squares *= n / (n + 1)
        squares += torch.norm(sequence.t().float(), p=2, dim=1) ** 2 / (n + 1)
    return squares


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
    """What is left of `fasterprune` before its loop."""
    out: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return out


def published_wanda(weight: Tensor, squares: Tensor) -> Tensor:
    """github.com/locuslab/wanda, `prune_wanda`."""
    scores = weight.abs() * squares.reshape(1, -1).sqrt()
    mask, order = torch.zeros_like(scores) == 1, torch.sort(scores, dim=-1, stable=True)[1]
    mask.scatter_(1, order[:, : int(scores.shape[1] * SPARSITY)], True)
    pruned = weight.clone()
    pruned[mask] = 0
    return pruned


def published_wanda_groups(weight: Tensor, squares: Tensor, n: int, m: int) -> Tensor:
    scores = weight.abs() * squares.reshape(1, -1).sqrt()
    mask = torch.zeros_like(scores) == 1
    for i in range(0, scores.shape[1], m):
        mask.scatter_(1, i + torch.topk(scores[:, i : i + m].float(), n, dim=1, largest=False)[1], True)
    pruned = weight.clone()
    pruned[mask] = 0
    return pruned


def published_magnitude(weight: Tensor) -> Tensor:
    scores = weight.abs()
    return weight.masked_fill(scores <= torch.sort(scores.flatten())[0][int(scores.numel() * SPARSITY) - 1], 0)


# -- one linear


def one_linear(d_out: int, d_in: int, n_tokens: int, device: str, repeats: int) -> list[str]:
    """Lines of the table."""
    seq_len = sequence_length(d_in)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, d_in, generator=g).to(device)
    mix = torch.randn(d_in, d_in, generator=g).to(device) / d_in**0.5 + torch.eye(d_in, device=device)
    scales = torch.randn(d_in, generator=g).exp().to(device)
    x = (torch.randn(n_tokens, d_in, generator=g).to(device) @ mix) * scales
    norms, hessian = Wanda().new_stats(weight), Hessian.empty(weight)
    Wanda().observe(norms, x)
    hessian.add(x)

    def observed(stats: Any, pruner: Pruner) -> Any:
        for batch in x.split(max(seq_len, BATCH_TOKENS["cuda" if x.is_cuda else "cpu"])):
            pruner.observe(stats, batch)
        return stats

    u, dead = hessian.factored(SparseGPT().damp, cholesky_of_inverse)
    h, _ = hessian.damped(SparseGPT().damp, cholesky_of_inverse)
    # stage: (operations, ours, the published way)
    update = d_out * d_in**2
    stages: dict[str, tuple[float | None, Callable[[], Any], Callable[[], Any] | None]] = {
        "product X W^T": (2 * n_tokens * d_in * d_out, lambda: x @ weight.T, None),
        "SparseGPT: statistics": (
            n_tokens * d_in**2,
            lambda: observed(Hessian.empty(weight), SparseGPT()),
            lambda: published_hessian(x, seq_len),
        ),
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
        "Wanda: statistics": (None, lambda: observed(Wanda().new_stats(weight), Wanda()), lambda: published_norms(x, seq_len)),
        "Wanda: selection": (
            None,
            lambda: Wanda().prune(weight, norms, SPARSITY),
            lambda: published_wanda(weight, norms.squares),
        ),
        "Wanda 2:4: selection": (
            None,
            lambda: Wanda("2:4").prune(weight, norms, SPARSITY),
            lambda: published_wanda_groups(weight, norms.squares, 2, 4),
        ),
        "magnitude: selection": (
            None,
            lambda: Magnitude().prune(weight, None, SPARSITY),
            lambda: published_magnitude(weight),
        ),
    }
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    results: dict[tuple[str, str], Any] = {}
    repeats *= min(20, max(1, 2**22 // weight.numel()))  # what is short is measured more often
    for repeat in range(repeats + 1):  # the first round warms up: pages, threads, a kernel that is compiled
        for stage, (_, ours, published) in stages.items():
            for way, work in (("ours", ours), ("published", published)):
                if work is not None:
                    taken, results[stage, way] = timed(work)
                    seconds[stage, way] += [taken] if repeat else []
    rate = 2 * n_tokens * d_in * d_out / statistics.median(seconds["product X W^T", "ours"])
    lines = [
        f"{d_out} x {d_in}, {n_tokens} tokens in sequences of {seq_len}; the product runs at {rate / 1e9:.0f} GFLOP/s.",
        "",
        "| stage | seconds | over floor | released, seconds | times ours | largest difference | masks differ at |",
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
    return lines


# -- whole jobs


class Timed:
    """A pruner that reads inputs and prunes, whose calls are timed."""

    needs_inputs: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    def __init__(self, pruner: Pruner) -> None:
        self._pruner, self.pattern = pruner, pruner.pattern
        self.seconds: dict[str, float] = defaultdict(float)

    def new_stats(self, weight: Tensor) -> Any:
        return self._pruner.new_stats(weight)

    def observe(self, stats: Any, x: Tensor) -> None:
        self._add("statistics", lambda: self._pruner.observe(stats, x))

    def prune(self, weight: Tensor, stats: Any, sparsity: float) -> Tensor:
        plain, before = Hessian.factored, self.seconds["factorisation"]
        try:
            Hessian.factored = lambda *args: self._add("factorisation", lambda: plain(*args))  # type: ignore[method-assign]
            pruned: Tensor = self._add("selection and update", lambda: self._pruner.prune(weight, stats, sparsity))
        finally:
            Hessian.factored = plain  # type: ignore[method-assign]
        self.seconds["selection and update"] -= self.seconds["factorisation"] - before
        return pruned

    def _add(self, stage: str, work: Callable[[], Any]) -> Any:
        taken, out = timed(work)
        self.seconds[stage] += taken
        return out

    @contextmanager
    def timing_errors(self) -> Iterator[None]:
        plain = walk._error
        try:
            walk._error = lambda *args: self._add("reconstruction errors", lambda: plain(*args))
            yield
        finally:
            walk._error = plain


@torch.inference_mode()
def plain_passes(lm: LanguageModel, tokens: Any) -> float:
    """Seconds of the passes that pruning needs: through every block, and once more through all but the last."""
    batches, seconds = list(lm.micro_batches(tokens)), 0.0
    for index in range(lm.n_blocks):
        for again in range(2 if index + 1 < lm.n_blocks else 1):
            for batch in batches:
                taken, out = timed(partial(lm.run_block, index, batch))
                seconds += taken
                if again:
                    batch.hidden = out.hidden
    return seconds


def pruned_job(lm: LanguageModel, pruner: Pruner, tokens: Any) -> dict[str, float]:
    """Seconds by stage of pruning the model, which gets its weights back."""
    watched, profile = Timed(pruner), Budget(lm.block_params, SPARSITY, pruner.pattern).uniform()
    before = [p.clone() for index in range(lm.n_blocks) for p in lm.linear_parameters(index).values()]
    with watched.timing_errors():
        total, _ = timed(lambda: walk.prune_model(lm, profile, watched, tokens))
    restore(lm, before)
    return watched.seconds | {"total": total}


def restore(lm: LanguageModel, weights: list[Tensor]) -> None:
    parameters = (p for index in range(lm.n_blocks) for p in lm.linear_parameters(index).values())
    with torch.no_grad():
        for p, weight in zip(parameters, weights, strict=True):
            p.copy_(weight)


@torch.no_grad()
def published_job(lm: LanguageModel, sparsegpt: bool, tokens: Any) -> tuple[float, float]:
    """Seconds of pruning the model in the released way: sequence after sequence, statistics of each linear layer on its own.

    Returns:
        Those of all, and of the statistics.
    """
    spent = 0.0
    before = [p.clone() for index in range(lm.n_blocks) for p in lm.linear_parameters(index).values()]

    def job() -> None:
        batches = list(lm.micro_batches(tokens, batch_tokens=1))  # a sequence each
        for index in range(lm.n_blocks):
            layers = {name: m for name, m in lm.linears(index).items() if isinstance(m, torch.nn.Linear)}
            sums = {m: torch.zeros([m.in_features] * (2 if sparsegpt else 1), device=lm.device) for m in layers.values()}
            seen = dict.fromkeys(sums, 0)

            def add(m: Any, args: Any, out: Any, sums: Any = sums, seen: Any = seen) -> None:
                nonlocal spent
                start = now()
                x = args[0].data.reshape(-1, m.in_features).t()
                sums[m] *= seen[m] / (seen[m] + 1)
                seen[m] += 1
                if sparsegpt:
                    x = math.sqrt(2 / seen[m]) * x.float()
                    sums[m] += x.matmul(x.t())
                else:
                    sums[m] += torch.norm(x.float(), p=2, dim=1) ** 2 / seen[m]
                spent += now() - start

            hooks = [m.register_forward_hook(add) for m in sums]
            for batch in batches:
                lm.run_block(index, batch)
            for hook in hooks:
                hook.remove()
            for m, stat in sums.items():
                weight = m.weight.data
                if sparsegpt:
                    m.weight.data = published_sparsegpt(weight, published_damped_factor(stat), None)
                else:
                    m.weight.data = published_wanda(weight, stat)
            for batch in batches:
                batch.hidden = lm.run_block(index, batch).hidden

    seconds, _ = timed(job)
    restore(lm, before)
    return seconds, spent


def published_damped_factor(h: Tensor) -> Tensor:
    h.diagonal()[h.diagonal() == 0] = 1
    h.diagonal().add_(0.01 * h.diagonal().mean())
    return published_factor(h)


def model_of(width: int, device: str) -> LanguageModel:
    """The built-in model at its width; else two blocks of a Llama of that width with random weights."""
    if width == BUILT_IN:
        return Pretrained(pretrained_model_name_or_path="svnup/tiny", dtype="float32", device=device).load()
    shape = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_attention_heads": max(1, width // 64)}
    config = make_config(
        "llama", **shape, num_hidden_layers=2, vocab_size=2048, max_position_embeddings=2048, tie_word_embeddings=True
    )
    return LanguageModel.random(config, None, seed=0, device=device)


def tokens_of(lm: LanguageModel, width: int, n_tokens: int) -> Any:
    seq_len = sequence_length(width)
    n_seq = max(1, n_tokens // seq_len)
    if lm.tokenizer is not None:
        return Docs(n_seq=n_seq, seq_len=seq_len, role="calibration").tokens(lm.tokenizer)
    return torch.randint(lm.vocab_size, (n_seq, seq_len), generator=torch.Generator().manual_seed(0))


def whole_jobs(lm: LanguageModel, tokens: Any, repeats: int) -> list[str]:
    """Lines of the table, of Wanda and of SparseGPT."""
    pruners: dict[str, Pruner] = {"Wanda": Wanda(), "SparseGPT": SparseGPT()}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in pruners}
    for _ in range(repeats):
        for name, pruner in pruners.items():
            passes, ours = plain_passes(lm, tokens), pruned_job(lm, pruner, tokens)
            parts = ("statistics", "factorisation", "selection and update", "reconstruction errors")
            row = {part: ours.get(part, 0.0) for part in parts}
            row["forward passes and the rest"] = ours["total"] - sum(row.values())
            row["**whole job**"] = ours["total"]
            row["plain forward passes"] = passes
            row["floor: these and statistics"] = passes + ours["statistics"]
            row["released code, whole job"], row["released code, statistics"] = published_job(lm, name == "SparseGPT", tokens)
            rows[name].append(row)
    lines = ["| stage | " + " | ".join(f"{name}, seconds | of the job" for name in pruners) + " |"]
    lines.append("| --- |" + " --- | --- |" * len(pruners))
    for stage in rows["Wanda"][0]:
        cells = []
        for of in rows.values():
            share = statistics.median(row[stage] / row["**whole job**"] for row in of)
            cells.append(f"{statistics.median(row[stage] for row in of):.2f} | {share:.2f}")
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    cells = [
        f"**{statistics.median(row['**whole job**'] / row['floor: these and statistics'] for row in of):.2f}** | "
        for of in rows.values()
    ]
    return [*lines, "| whole job over floor | " + " | ".join(cells) + " |"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", default="192x192,1024x1024,2048x2048", help="d_out x d_in of linears, separated by commas")
    parser.add_argument("--n-tokens", type=int, default=8192, help="calibration tokens of the linears")
    parser.add_argument("--widths", default="192,1024,2048", help="of the models, separated by commas; 192 is the built-in one")
    parser.add_argument("--job-tokens", type=int, default=32768, help="calibration tokens of the models")
    parser.add_argument("--job-repeats", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    machine = hardware()
    device = torch.cuda.get_device_name() if options.device != "cpu" else f"{machine.cpu}, {machine.cores} cores"
    kernel = options.device != "cpu" and can_build_kernels()
    lines = [
        "# Cost of pruning",
        "",
        f"Made by `make benchmarks`: median of {options.repeats} after a warm-up (of more where it is short, of "
        f"{options.job_repeats} for whole jobs), ways taking turns. {device}, threads: {machine.threads}, "
        f"torch {torch.__version__}, float32, columns settled by "
        f"{'Triton' if kernel else 'torch'}. Sparsity {SPARSITY}.",
    ]

    def say(*more: str) -> None:
        print("\n".join(more), flush=True)
        lines.extend(more)
        if options.output is not None:  # as far as it has come
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")

    for shape in filter(None, options.shapes.split(",")):
        d_out, d_in = map(int, shape.split("x"))
        with torch.inference_mode():
            say("", f"## A linear of {shape}", "", *one_linear(d_out, d_in, options.n_tokens, options.device, options.repeats))
    for width in map(int, filter(None, options.widths.split(","))):
        lm = model_of(width, options.device)
        tokens = tokens_of(lm, width, options.job_tokens)
        kind = "The built-in model" if width == BUILT_IN else "Random weights"
        n_seq, seq_len = tokens.shape
        say("", f"## {kind}, {lm.n_blocks} blocks {width} wide, {n_seq} x {seq_len} tokens", "")
        say(*whole_jobs(lm, tokens, options.job_repeats))


if __name__ == "__main__":
    main()
