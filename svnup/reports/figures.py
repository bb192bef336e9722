"""Figures of a run; matplotlib is imported only to draw one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from svnup.files import replacing
from svnup.results.row import Profile, ResultRow, Scores, Tuning

UNITS = {
    "neg_nll": "nats per token",
    "neg_ppl": "perplexity",
    "recip_ppl": "share of the dense 1 / perplexity",
    "kl": "nats per token of KL divergence",
    "accuracy": "share of right answers",
}


def names(row: ResultRow) -> list[str]:
    """The names of the figures that `figures` draws of a run."""
    scores, tuning = _scored(row), ["tuning"] if row.tuning else []
    return [*scores, *tuning, *(["profile"] if (scores or tuning) and row.profile else [])]


def _scored(row: ResultRow) -> list[str]:
    """Which of its scores a run has drawn: those of blocks, or of attention and MLP."""
    n = len(row.profile.sparsity) if row.profile else 0
    given = {name: s for name in ("shapley", "scores") if n and (s := getattr(row, name))}
    return [name for name, scores in given.items() if len(scores.values) in (n, 2 * n) and not scores.blocks]


def figures(row: ResultRow, folder: Path) -> dict[str, Path]:
    """Draw the figures of a run: `shapley.png` or `scores.png`, `tuning.png` and `profile.png`, as far as it has them.

    Args:
        row: the result.
        folder: where to write them.

    Returns:
        Paths by name.
    """
    drawn: dict[str, Path] = {}
    n_blocks = len(row.profile.sparsity) if row.profile else 0
    if row.shapley and "shapley" in _scored(row):
        unit, title = UNITS[row.config["shapley"]["game"]["payoff"]], f"What each layer contributes\n{row.shapley.method}"
        drawn["shapley"] = _bars(row.shapley, n_blocks, "Shapley value", unit, title, folder / "shapley.png")
    if row.scores and "scores" in _scored(row):
        unit, title = f"higher: {row.scores.higher_is}", f"How each layer scores\n{row.scores.method}"
        drawn["scores"] = _bars(row.scores, n_blocks, "score", unit, title, folder / "scores.png")
    if row.tuning:
        comparable = row.tuning.best is None or bool(row.tuning.best)
        drawn["tuning"] = _curve(row.tuning, comparable, folder / "tuning.png")
    if drawn and row.profile:
        drawn["profile"] = _profile(row.profile, folder / "profile.png")
    return drawn


def _axes(n: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.24 * n + 2), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("layer (transformer block, counted from 0)")
    axes.set_xticks(range(0, n, 1 if n <= 20 else 2 if n <= 40 else 5))
    axes.set_xlim(-0.7, n - 0.3)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    return figure, axes


def _bars(scores: Scores, n_blocks: int, name: str, unit: str, title: str, path: Path) -> Path:
    values, stderr = scores.values, scores.stderr
    per_block = len(values) // n_blocks
    figure, axes = _axes(n_blocks)
    for i in range(per_block):  # a block, or its attention and its MLP side by side
        axes.bar(
            [block + (i - (per_block - 1) / 2) * 0.8 / per_block for block in range(n_blocks)],
            values[i::per_block],
            width=0.8 / per_block,
            yerr=stderr[i::per_block] if stderr else None,
            color=("#3b6ea5", "#9dbbd8")[i],
            label=("attention", "MLP")[i],
            capsize=3,
            error_kw={"elinewidth": 1},
        )
    if per_block > 1:
        axes.legend(fontsize=8)
    positive = [v for v in values if v > 0]
    if positive and max(positive) > 8 * sorted(values)[len(values) // 2] > 0:
        # The first block is often worth tens of others, which a linear axis would not show.
        axes.set_yscale("symlog", linthresh=min(positive))
        axes.set_ylabel(f"{name}\n({unit}, log scale)")
    else:
        axes.set_ylabel(f"{name}\n({unit})")
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_title(title, fontsize=9)
    return _save(figure, path)


def _curve(tuning: Tuning, comparable: bool, path: Path) -> Path:
    """Plot the finite loss of each candidate on the whole selection text; mark the least if all have the same budget."""
    curve = [point for point in tuning.curve if point.n_seq is None]
    finite = [(i, point.loss) for i, point in enumerate(curve) if point.loss is not None]
    figure, axes = _axes(len(curve))
    axes.plot(*zip(*finite, strict=True), marker="o", color="#3b6ea5")
    if comparable:
        axes.plot(*min(finite, key=lambda point: point[1]), marker="o", markersize=11, fillstyle="none", color="#c1666b")
    named = range(0, len(curve), 1 + len(curve) // 20)
    axes.set_xticks(named, [curve[i].label for i in named], rotation=30, ha="right", fontsize=8)
    axes.set_xlabel("")
    axes.set_ylabel("loss on selection text\n(nats per token)" if tuning.of_losses else "misalignment\non calibration text")
    axes.set_title("What was tried", fontsize=9)
    return _save(figure, path)


def _profile(profile: Profile, path: Path) -> Path:
    sparsity = profile.sparsity
    figure, axes = _axes(len(sparsity))
    axes.bar(range(len(sparsity)), [100 * s for s in sparsity], color="#c1666b")
    axes.axhline(100 * profile.target, color="0.2", linestyle="--", linewidth=1, label=f"target {100 * profile.target:g} %")
    axes.set_ylim(0, 100)
    axes.set_ylabel("sparsity (% zeros)")
    axes.set_title("Pruning budget per layer", fontsize=9)
    axes.legend(loc="upper right", fontsize=8)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    return path
