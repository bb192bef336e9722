"""What the plan says of the jobs that `gpu.py` measured on a GPU, beside what they took.

    python -m experiments.benchmarks.gpu_plan    # writes results/benchmarks/gpu_plan.md, in a minute, without a GPU

The plan is that of `hardware=h100`, whose rates come from the same run (conf/machines.yaml). Planned: the middle of its range.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.benchmarks.gpu import SHAPES, SPARSITY, Shape, lines_of
from experiments.study import table
from svnup.machines import Work

if TYPE_CHECKING:
    from svnup.config import Texts

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "results" / "benchmarks" / "gpu.jsonl"
TEXTS = ["dataset=docs", "dataset@selection=docs", "dataset@shapley.game.data=docs", "evaluation.datasets=[docs]"]
PRUNERS = {"Wanda": "wanda", "SparseGPT": "sparsegpt"}


@dataclass(frozen=True)
class Measured:
    """A stage of gpu.py and where the plan has it.

    Args:
        name: of the stage, as in gpu.jsonl.
        size: of the model, such as 7B.
        stage: of the plan.
        seconds: the key of its seconds; the plan's weights are not hashed in them.
        overrides: of the job that does the same.
        offload: whether the blocks are in the CPU's memory.
        peak: whether its peak is that of the job; not where the model was drawn on the device meanwhile.
    """

    name: str
    size: str
    stage: str
    seconds: str
    overrides: tuple[str, ...]
    offload: bool = False
    peak: bool = True


@dataclass(frozen=True)
class Compared:
    """A measured job beside its plan: seconds, and bytes at the peak of the device (None where that is not the job's)."""

    name: str
    seconds: float
    low: float
    high: float
    peak: float | None
    planned_peak: float

    @property
    def planned(self) -> float:
        """The middle of the planned range."""
        return math.sqrt(self.low * self.high)


def jobs(lines: dict[str, dict[str, Any]]) -> list[Measured]:
    """The stages with a plan among the last lines of a run."""
    out = []
    for name, line in lines.items():
        size, _, what = name.partition(" ")
        if line["status"] != "done" or size not in SHAPES["real"] or what == "model":
            continue
        offload = SHAPES["real"][size].offload and "on the device" not in what
        if what.startswith("perplexity"):
            own: tuple[str, ...] = ("allocator=uniform", f"evaluation.n_seq={line['windows']}")
            # Blocks on the device are drawn while those of the model before are still there.
            out.append(Measured(name, size, "evaluation", "seconds", own, offload, "on the device" not in what))
        elif what.startswith("Shapley values, windows of "):
            window = int(what.removeprefix("Shapley values, windows of ").partition(",")[0])
            own = ("allocator=shapley", f"shapley.window={window}", f"shapley.game.data.n_seq={line['sequences']}")
            out.append(Measured(name, size, "scores", "values, s", own, offload, not offload))
        elif what in PRUNERS:
            own = ("allocator=uniform", f"pruner={PRUNERS[what]}", f"dataset.n_seq={line['sequences']}")
            out.append(Measured(name, size, "pruning", "seconds", own, offload, not offload))
    return out


def overrides_of(shape: Shape, offload: bool) -> list[str]:
    """The model of a shape, as a job names it."""
    model = [f"model.{key}={value}" for key, value in shape.model.items()]
    usual = ["model=random", "model.dtype=bfloat16", "model.device=cuda", f"model.seq_len={shape.seq_len}"]
    return [*usual, *model, f"model.max_position_embeddings={shape.seq_len}", f"offload={'cpu' if offload else 'none'}"]


def compared(measured: Measured, line: dict[str, Any], texts: Texts, hardware: str = "h100") -> Compared:
    """A measured stage beside the plan of a job that does the same.

    Args:
        measured: the stage.
        line: of gpu.jsonl.
        texts: what jobs before this one have read.
        hardware: by whose rates.
    """
    from svnup import config
    from svnup.plan import plan

    small = ["dataset.n_seq=1", "evaluation.n_seq=1", "selection.n_seq=1", "shapley.game.data.n_seq=1"]
    model = overrides_of(SHAPES["real"][measured.size], measured.offload)
    text = [*TEXTS, *small, *measured.overrides, f"sparsity={SPARSITY}", "compare_uniform=off"]
    made = plan(config.build(config.composed(*model, *text, f"hardware={hardware}", "dry_run=true"), texts))
    (stage,) = (one for one in made.stages if one.name == measured.stage)
    # A game hashes the weights once, which has a line of its own.
    steps = [step for name, step in stage.steps.items() if name != "weights hashed"]
    seconds = made.machine.seconds(sum(steps, Work()))
    return Compared(
        measured.name,
        line[measured.seconds],
        *seconds,
        line["peak_memory_bytes"] if measured.peak else None,
        stage.device,
    )


def write(output: Path) -> None:
    """The table of what was measured beside its plan."""
    lines, texts = lines_of(MEASURED), dict[Any, Any]()
    rows = []
    for measured in jobs(lines):
        one = compared(measured, lines[measured.name], texts)
        cells = [one.name, f"{one.seconds:.2f}", f"{one.low:.1f} to {one.high:.1f}", f"{one.planned / one.seconds:.2f}"]
        peak = ["-", f"{one.planned_peak / 1e9:.2f}", "-"]
        if one.peak is not None:
            peak = [f"{one.peak / 1e9:.2f}", f"{one.planned_peak / 1e9:.2f}", f"{one.planned_peak / one.peak:.2f}"]
        rows.append([*cells, *peak])
    machine = lines["machine"]
    head = ["stage", "seconds", "planned", "planned / taken", "peak, GB", "planned, GB", "planned / peak"]
    text = [
        "# The plan beside what was measured on a GPU",
        "",
        f"Made by `python -m experiments.benchmarks.gpu_plan` of [gpu.jsonl](gpu.jsonl). {machine['device']}, torch "
        f"{machine['torch']}. The plan is that of `hardware=h100`; planned / taken: the middle of its range. No peak where the "
        "weights were drawn on the device during the stage, which no job does.",
        "",
        *table(head, rows, "l" + "r" * (len(head) - 1)),
    ]
    output.write_text("\n".join(text) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks" / "gpu_plan.md")
    write(parser.parse_args(argv).output)


if __name__ == "__main__":
    main()
