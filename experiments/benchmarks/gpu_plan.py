"""What the plan says of the jobs that `gpu.py` measured on a GPU, beside what they took.

    python -m experiments.benchmarks.gpu_plan    # writes results/benchmarks/gpu_plan.md, in a minute, without a GPU

The plan of a GPU is that of its `hardware=...`, whose rates come from the same run where conf/machines.yaml says no other
source. Planned: the middle of its range. Jobs with offloaded blocks are left out: both runs were made before their hidden
states waited in pinned memory.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.benchmarks.gpu import SHAPES, SPARSITY, Shape, runs_of
from experiments.study import table
from svnup.machines import Work

if TYPE_CHECKING:
    from svnup.config import Texts

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "results" / "benchmarks" / "gpu.jsonl"
TEXTS = ["dataset=docs", "dataset@selection=docs", "dataset@shapley.game.data=docs", "evaluation.datasets=[docs]"]
PRUNERS = {"Wanda": "wanda", "SparseGPT": "sparsegpt"}
HARDWARE = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}  # of conf/machines.yaml, by the device's name
MARGINS = ("statistics in advance", "weights in advance", "values at the margin")  # steps of the plan


@dataclass(frozen=True)
class Measured:
    """A stage of gpu.py and where the plan has it.

    Args:
        name: of the stage, as in gpu.jsonl.
        size: of the model, such as 7B.
        stage: of the plan.
        seconds: the key of its seconds; the plan's weights are not hashed in them.
        overrides: of the job that does the same.
        steps: of the plan's stage; none: all but the hash of the weights, which has a line of its own.
        peak: whether its peak is that of the plan's stage.
    """

    name: str
    size: str
    stage: str
    seconds: str
    overrides: tuple[str, ...]
    steps: tuple[str, ...] = ()
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


def measured_gpus() -> dict[str, dict[str, dict[str, Any]]]:
    """The newest run of each GPU whose rates conf/machines.yaml has, by its name there, of those that have a plan."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for lines in runs_of(MEASURED).values():
        hardware = HARDWARE.get(lines.get("machine", {}).get("device", ""))
        if hardware is not None and jobs(lines):
            found.setdefault(hardware, lines)
    return found


def jobs(lines: dict[str, dict[str, Any]]) -> list[Measured]:
    """The stages with a plan among the last lines of a run."""
    out = []
    for name, line in lines.items():
        size, _, what = name.partition(" ")
        if line["status"] != "done" or size not in SHAPES["real"] or what == "model" or SHAPES["real"][size].offload:
            continue
        if what == "perplexity":
            own: tuple[str, ...] = ("allocator=uniform", f"evaluation.n_seq={line['windows']}")
            out.append(Measured(name, size, "evaluation", "seconds", own))
        elif what.startswith("Shapley values, windows of "):
            window = int(what.removeprefix("Shapley values, windows of ").partition(",")[0])
            own = ("allocator=shapley", f"shapley.window={window}", f"shapley.game.data.n_seq={line['sequences']}")
            out.append(Measured(name, size, "scores", "values, s", own))
        elif what.startswith("values at the margin"):
            of = ("allocator=shapley_margins", "allocator.granularity=linear", "allocator.rounds=1", "pruner=wanda")
            own = (*of, *(f"{text}.n_seq={line['sequences']}" for text in ("allocator", "dataset", "shapley.game.data")))
            out.append(Measured(name, size, "allocation", "seconds", own, MARGINS, peak=False))  # without trials
        elif what in PRUNERS:
            own = ("allocator=uniform", f"pruner={PRUNERS[what]}", f"dataset.n_seq={line['sequences']}")
            out.append(Measured(name, size, "pruning", "seconds", own))
    return out


def overrides_of(shape: Shape) -> list[str]:
    """The model of a shape, as a job names it."""
    model = [f"model.{key}={value}" for key, value in shape.model.items()]
    usual = ["model=random", "model.dtype=bfloat16", "model.device=cuda", f"model.seq_len={shape.seq_len}"]
    return [*usual, *model, f"model.max_position_embeddings={shape.seq_len}"]


def compared(measured: Measured, line: dict[str, Any], texts: Texts, hardware: str) -> Compared:
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
    model = overrides_of(SHAPES["real"][measured.size])
    text = [*TEXTS, *small, *measured.overrides, f"sparsity={SPARSITY}", "compare_uniform=off"]
    made = plan(config.build(config.composed(*model, *text, f"hardware={hardware}", "dry_run=true"), texts))
    (stage,) = (one for one in made.stages if one.name == measured.stage)
    wanted = measured.steps or stage.steps.keys() - {"weights hashed"}
    steps = [step for name, step in stage.steps.items() if name in wanted]
    seconds = made.machine.seconds(sum(steps, Work()))
    return Compared(
        measured.name,
        line[measured.seconds],
        *seconds,
        line["peak_memory_bytes"] if measured.peak else None,
        stage.device,
    )


def write(output: Path) -> None:
    """The tables of what was measured beside its plan, one a GPU."""
    texts: dict[Any, Any] = {}
    text = [
        "# The plan beside what was measured on a GPU",
        "",
        "Made by `python -m experiments.benchmarks.gpu_plan` of [gpu.jsonl](gpu.jsonl). Planned / taken: the middle of the "
        "planned range. No peak of values at the margin, whose stage of the plan has trials as well. Left out: offloaded "
        "blocks, which were measured before their hidden states waited in pinned memory.",
    ]
    for hardware, lines in measured_gpus().items():
        machine, rows = lines["machine"], []
        for measured in jobs(lines):
            one = compared(measured, lines[measured.name], texts, hardware)
            cells = [one.name, f"{one.seconds:.2f}", f"{one.low:.1f} to {one.high:.1f}", f"{one.planned / one.seconds:.2f}"]
            peak = ["-", "-", "-"]
            if one.peak is not None:
                peak = [f"{one.peak / 1e9:.2f}", f"{one.planned_peak / 1e9:.2f}", f"{one.planned_peak / one.peak:.2f}"]
            rows.append([*cells, *peak])
        head = ["stage", "seconds", "planned", "planned / taken", "peak, GB", "planned, GB", "planned / peak"]
        title = f"## {machine['device']}, `hardware={hardware}`"
        text += ["", title, "", f"torch {machine['torch']}.", "", *table(head, rows, "l" + "r" * (len(head) - 1))]
    output.write_text("\n".join(text) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks" / "gpu_plan.md")
    write(parser.parse_args(argv).output)


if __name__ == "__main__":
    main()
