"""Every pruner against every other, layer by layer and on a whole model: how often each is better, and by how much.

Layers: the linears of the built-in model, with the inputs that they read in the dense model, and random matrices whose inputs
are correlated and differ in scale, or are badly conditioned besides. A layer is pruned on calibration inputs and judged by
||X (W - W')^T||^2 / ||X W^T||^2 on other inputs (of the selection text; for random layers drawn from the same distribution).
Model: uniform budgets, perplexity on the selection text. Writes results/tables/pruners.md.

    python -m experiments.pruners.run [--layers 100] [--n-seq 32] [--seeds 3] [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from experiments.study import built_in, parse, parser, publish, text
from svnup.allocation import Budget
from svnup.config import CONF
from svnup.evaluation import perplexity
from svnup.model.language_model import LanguageModel, matrix
from svnup.pruning.walk import Inputs, Pruner, temporarily_pruned
from svnup.results.provenance import hardware

SETTINGS = {"70 %": ("unstructured", 0.7), "2:4": ("2:4", 0.5)}
ON_MODEL = {"50 %": ("unstructured", 0.5), "70 %": ("unstructured", 0.7), "2:4": ("2:4", 0.5), "4:8": ("4:8", 0.5)}
ON_MODEL |= {"mixed:8, 70 %": ("mixed:8", 0.7)}
Layer = tuple[Tensor, Tensor, Tensor]  # weight, calibration inputs, other inputs


@dataclass(frozen=True)
class Sizes:
    """How much is pruned, on how much text; the defaults made the committed table."""

    pruners: tuple[str, ...] | None = None  # None: all
    n_blocks: int | None = None
    n_layers: int = 100
    n_seq: int = 32
    n_selection: int = 48
    n_seeds: int = 3
    seq_len: int = 256


QUICK = Sizes(
    pruners=("magnitude", "sparsegpt", "wanda"), n_blocks=1, n_layers=2, n_seq=2, n_selection=2, n_seeds=2, seq_len=32
)


def pruners(pattern: str, names: tuple[str, ...] | None = None) -> dict[str, Pruner]:
    """Every pruner of conf/pruner that prunes, or those of these names, as configured there."""
    made = {}
    for file in sorted((CONF / "pruner").glob("[!_]*.yaml")):
        if names is not None and file.stem not in names:
            continue
        pruner = instantiate(OmegaConf.merge(OmegaConf.load(file), {"pattern": pattern}))
        if pruner.prunes:
            made[file.stem] = pruner
    return made


@dataclass(frozen=True)
class Keep:
    """Keeps the inputs themselves."""

    pattern: str = "unstructured"
    needs_inputs: ClassVar[bool] = True
    prunes: ClassVar[bool] = False
    seen: list[Tensor] = field(default_factory=list)

    def new_stats(self, weight: Tensor) -> list[Tensor]:
        return []

    def observe(self, stats: list[Tensor], x: Tensor) -> None:
        stats.append(x)

    def prune(self, weight: Tensor, stats: Any, sparsity: float) -> Tensor:
        return weight


@torch.inference_mode()
def real_layers(lm: LanguageModel, sizes: Sizes) -> Iterator[Layer]:
    texts = [text("calibration", sizes.n_seq, sizes.seq_len), text("selection", sizes.n_seq, sizes.seq_len)]
    for visit in lm.walk(np.concatenate(texts)):
        inputs = Inputs(visit.linears, Keep())
        inputs.collect(visit, advance=True)
        for name, linear in visit.linears.items():
            calibration, other = torch.cat(inputs.stats(name)).chunk(2)
            yield matrix(linear), calibration, other


def random_layers(n_layers: int, badly: bool) -> Iterator[Layer]:
    for seed in range(n_layers):
        g = torch.Generator().manual_seed(seed)
        d_out, d_in, rank = 96, 128, 32
        mix = torch.randn(d_in, d_in, generator=g) / d_in**0.5 + torch.eye(d_in)
        if badly:  # a hundred times more in a few directions than in the others, and scales over four decades
            mix = torch.randn(d_in, rank, generator=g) @ torch.randn(rank, d_in, generator=g) / rank + 0.01 * mix
        scales = torch.exp((3 if badly else 1) * torch.randn(d_in, generator=g))
        x = [torch.randn(1024, d_in, generator=g) @ mix * scales for _ in range(2)]
        yield torch.randn(d_out, d_in, generator=g), *x


def errors(layers: Iterator[Layer], made: dict[str, Pruner], sparsity: float) -> dict[str, list[float]]:
    """Error of every layer on the other inputs, by pruner."""
    found: dict[str, list[float]] = {name: [] for name in made}
    for weight, calibration, other in layers:
        outputs = (other @ weight.T).square().sum()
        for name, pruner in made.items():
            stats = pruner.new_stats(weight)
            pruner.observe(stats, calibration)
            change = weight - pruner.prune(weight, stats, sparsity)
            found[name].append(float((other @ change.T).square().sum() / outputs))
    return found


def against_each_other(title: str, found: dict[str, list[float]]) -> list[str]:
    names, n = list(found), len(next(iter(found.values())))
    against_wanda = {x: np.exp(np.mean(np.log(np.array(found[x]) / np.array(found["wanda"])))) for x in names}
    lines = [f"### {title}: {n} layers", "", "| better than | " + " | ".join(names) + " | error / Wanda's |"]
    lines.append("| --- " * (len(names) + 2) + "|")
    for x in sorted(names, key=lambda x: against_wanda[x]):
        wins = [f"{100 * np.mean(np.array(found[x]) < np.array(found[y])):.0f} %" if x != y else "" for y in names]
        lines.append(f"| {x} | " + " | ".join(wins) + f" | {against_wanda[x]:.3f} |")
    return [*lines, ""]


def on_model(lm: LanguageModel, sizes: Sizes) -> list[str]:
    selection = text("selection", sizes.n_selection, sizes.seq_len)
    calibration = [text("calibration", sizes.n_seq, sizes.seq_len, seed) for seed in range(sizes.n_seeds)]
    lines = ["| pruner | " + " | ".join(ON_MODEL) + " |", "| --- " * (len(ON_MODEL) + 1) + "|"]
    for name in pruners("unstructured", sizes.pruners):
        cells = []
        for pattern, sparsity in ON_MODEL.values():
            pruner, profile = pruners(pattern)[name], Budget(lm.block_params, sparsity, pattern).uniform()
            found = []
            for tokens in calibration if pruner.needs_inputs else calibration[:1]:
                with temporarily_pruned(lm, profile, pruner, tokens):
                    found.append(perplexity(lm, selection))
            cells.append(f"{np.mean(found):.2f}" + (f" ± {np.std(found, ddof=1):.2f}" if len(found) > 1 else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--layers", type=int, metavar="N", help="random layers of each kind (100)")
    made.add_argument("--n-seq", type=int, metavar="N", help="calibration sequences of 256 tokens (32)")
    made.add_argument("--seeds", type=int, metavar="N", help="calibration seeds on the whole model (3)")
    options = parse(made, argv)
    given = {"n_layers": options.layers, "n_seq": options.n_seq, "n_seeds": options.seeds}
    sizes = replace(QUICK if options.quick else Sizes(), **{name: n for name, n in given.items() if n is not None})
    lm = built_in(sizes.n_blocks)
    machine = hardware()
    lines = [
        "# Pruners against each other",
        "",
        f"Made by `make study NAME=pruners`. {machine.cpu}, {machine.cores} cores, torch {torch.__version__}, float32; "
        f"{sizes.n_seq} x {sizes.seq_len} calibration tokens.",
        "",
        "## Layer by layer",
        "",
        "In how many of the layers the pruner of the line has the smaller error on inputs that it has not seen, and its error "
        "as a share of Wanda's (geometric mean).",
        "",
    ]
    for title, (pattern, sparsity) in SETTINGS.items():
        kinds = {
            f"Built-in model, {title}": real_layers(lm, sizes),
            f"Random, {title}": random_layers(sizes.n_layers, badly=False),
            f"Random and badly conditioned, {title}": random_layers(sizes.n_layers, badly=True),
        }
        for kind, layers in kinds.items():
            lines += against_each_other(kind, errors(layers, pruners(pattern, sizes.pruners), sparsity))
            print(kind, flush=True)
    lines += [
        "## On the whole model",
        "",
        f"Perplexity on {sizes.n_selection} x {sizes.seq_len} tokens of the selection text, uniform budgets, "
        f"mean ± standard deviation over {sizes.n_seeds} calibration seeds.",
        "",
        *on_model(lm, sizes),
    ]
    publish(options, "pruners", lines)


if __name__ == "__main__":
    main()
