"""How the cost of whole jobs grows with blocks, width, tokens and window, beside what the plan says of them.

Each job runs in a process of its own and says seconds and peak of each stage. The rates of the machine are measured in the
same process, before the first stage and after each one, by the same clock: the processor's where a job has one thread, since
others may use the machine meanwhile. Jobs by two threads go by the clock on the wall and need an idle machine. The plan is made
for these rates. A job that was measured is not run again: every one is a line of scale.jsonl when it is there; scale.md is
written anew at the end.

    python -m experiments.benchmarks.scale                          # the small shapes: some eight minutes on one core
    python -m experiments.benchmarks.scale --only smollm2           # SmolLM2-135M of `make smollm2`, or of --smollm2 FOLDER
    python -m experiments.benchmarks.scale --only llama_1b          # a Llama of 1.3B random weights that stays on disk
    python -m experiments.benchmarks.scale --only draw              # the table and the figure, from what was measured
    python -m experiments.benchmarks.scale --only tiny --output /tmp/scale.md       # in seconds: does it still run?
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

from experiments.benchmarks.offload import llama, write_checkpoint
from experiments.study import table
from svnup.machines import Machine
from svnup.units import scaled

if TYPE_CHECKING:
    from svnup.config import Texts

ROOT = Path(__file__).resolve().parents[2]
DOCS = ["dataset=docs", "dataset@selection=docs", "dataset@shapley.game.data=docs", "evaluation.datasets=[docs]"]
SMALL = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
WIDE = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16}
NARROW = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
LLAMA_1B = {"num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16}
VARIABLES = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Case:
    """A job: its overrides but for the model, and the model's shape; `checkpoint`: it is read from a folder."""

    name: str
    shape: dict[str, int]
    overrides: list[str]
    checkpoint: bool = False
    dtype: str = "float32"
    threads: int = 1

    def model(self, folder: str | None = None) -> list[str]:
        """The overrides that choose the model, in a folder where it is read from one."""
        if self.checkpoint:
            of = [f"model.pretrained_model_name_or_path={folder}"]
            return ["model=pretrained", *of, f"model.dtype={self.dtype}", "model.device=cpu"]
        return ["model=random", *(f"model.{k}={v}" for k, v in self.shape.items()), f"model.dtype={self.dtype}"]


def _small(name: str, shape: dict[str, int] | None = None, *overrides: str) -> Case:
    texts = ["dataset.n_seq=8", "selection.n_seq=8", "shapley.game.data.n_seq=1", "evaluation.n_seq=8", "model.seq_len=256"]
    usual = ["pruner=sparsegpt", "shapley.window=3", *texts]
    return Case(name, SMALL | (shape or {}), [*DOCS, *usual, *overrides])


BASE = "8 blocks of width 512"
CASES = [
    _small(BASE),
    _small("4 blocks", {"num_hidden_layers": 4}),
    _small("16 blocks", {"num_hidden_layers": 16}),
    _small("24 blocks", {"num_hidden_layers": 24}),
    _small("width 256", NARROW),
    _small("width 1024", WIDE),
    _small("4 x the tokens", None, "dataset.n_seq=32", "shapley.game.data.n_seq=4", "evaluation.n_seq=32"),
    _small("sequences of 1024", None, "model.seq_len=1024", "dataset.n_seq=2", "evaluation.n_seq=2", "selection.n_seq=2"),
    _small("window of 5", None, "shapley.window=5"),
    _small("Wanda", None, "pruner=wanda"),
    _small("values at the margin", None, "allocator=shapley_margins", "allocator.granularity=block"),
]
# What grows, in the figure: the first case with one thing changed, and the cases that were measured so.
GROWTH = {
    "blocks": (range(4, 81, 4), {4: "4 blocks", 8: BASE, 16: "16 blocks", 24: "24 blocks"}),
    "width": ((256, 512, 1024, 2048, 4096, 8192), {256: "width 256", 512: BASE, 1024: "width 1024"}),
    "times the tokens": ((1, 2, 4, 8, 16), {1: BASE, 4: "4 x the tokens"}),
    "window": (range(1, 8), {3: BASE, 5: "window of 5"}),
}
_OF_SMOLLM2 = ["shapley.game.data.n_seq=1", "dataset.n_seq=32", "evaluation.n_seq=8", "compare_uniform=off"]
_OF_1B = ["shapley.game.data.n_seq=2", "dataset.n_seq=16", "evaluation.n_seq=16", "offload=disk"]
_BOTH = ["model.seq_len=512", "shapley.window=3"]
PRUNERS = {  # values are measured once; those of random weights may have no logarithm
    "Wanda": ["pruner=wanda", "allocator.scale=rank"],
    "SparseGPT": ["pruner=sparsegpt", "allocator=uniform"],
}
TINY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 2048}
_OF_TINY = ["model.seq_len=32", "evaluation.n_seq=2", "dataset.n_seq=2", "shapley.game.data.n_seq=1", "shapley.window=2"]
TARGETS = {
    "shapes": CASES,
    "tiny": [Case("tiny", TINY, [*DOCS, *_OF_TINY, *PRUNERS["Wanda"], "compare_uniform=off"], checkpoint=True)],
    "smollm2": [
        Case(f"SmolLM2-135M, {name}{by}", {}, [*DOCS, *_BOTH, *_OF_SMOLLM2, *pruner], checkpoint=True, threads=threads)
        for threads, by in {1: "", 2: ", two threads"}.items()
        for name, pruner in PRUNERS.items()
    ],
    "llama_1b": [
        Case(
            f"Llama of 1.3B on disk, {name}",
            LLAMA_1B | {"vocab_size": 32000},
            [*DOCS, *_BOTH, *_OF_1B, *pruner],
            checkpoint=True,
            dtype="bfloat16",
        )
        for name, pruner in PRUNERS.items()
    ],
}


# -- one job, in a process of its own


def run_one(case: Case, folder: str | None, place: Path) -> dict[str, Any]:
    """Run a job under `place`; returns what it took."""
    import torch

    from svnup import config, pipeline
    from svnup.memory import Stages, resident
    from svnup.results.provenance import Asked, hardware, provenance
    from svnup.results.row import ResultRow

    torch.set_num_threads(case.threads)
    places = [f"results_dir={place}", f"cache_dir={place}"]
    job = config.build(config.composed(*case.overrides, *case.model(folder), *places))
    job.check_shapes()
    job.check_texts()
    rates = [_rates(case)]
    took: dict[str, dict[str, Any]] = {}

    class Sampled(Stages):
        """Stages with the processor's seconds, and the machine's rates between them."""

        def __init__(self) -> None:
            super().__init__()
            self._cpu = time.process_time()

        def __call__(self, name: str, device: torch.device) -> None:
            cpu = time.process_time() - self._cpu
            super().__call__(name, device)
            rates.append(_rates(case))
            took[name] = {**self.done[name], "cpu_seconds": cpu, "rates": _mean(rates[-2], rates[-1])}
            self._last, self._cpu = time.perf_counter(), time.process_time()

    process = resident()
    blank = ResultRow("running", job.key, job.config, provenance(Asked(), job.config), {})
    place.mkdir(parents=True, exist_ok=True)
    with mock.patch.object(pipeline, "Stages", Sampled):
        row = pipeline.run(job, place, blank)
    assert row.pruning is not None
    return {
        "stages": took,
        "process_bytes": process,
        "pruning_seconds": row.pruning.to_dict()["seconds"],
        "config": json.loads(job.skeleton.model.config.to_json_string()) if case.checkpoint else None,
        "hardware": hardware().to_dict(),
        "versions": {"torch": torch.__version__},
    }


def _rates(case: Case) -> dict[str, float]:
    clock = time.process_time if case.threads == 1 else time.perf_counter
    found = Machine().filled("cpu", case.dtype, clock=clock)
    return {k: v for k, v in asdict(found).items() if k in ("float32", "bfloat16", "bandwidth", "read", "call") and v}


def _mean(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Means of rates before and after a stage: of what a unit of work takes, which is what adds up."""
    return {name: 2 / (1 / before[name] + 1 / after[name]) for name in before}


# -- what the plan says of it


def rates_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of the rates that were measured with all stages of some jobs: a single one is of an eighth of a second."""
    took = [stage["rates"] for line in lines for stage in line["stages"].values()]
    return {name: statistics.median(one[name] for one in took) for name in took[0]}


@dataclass(frozen=True)
class Compared:
    """A stage as measured and as planned; seconds are the processor's where a job has one thread, but for those of the `wall`
    clock.

    `floor`: of matrix products alone at the measured rate.
    """

    stage: str
    seconds: float
    low: float
    high: float
    floor: float
    wall: float

    @property
    def planned(self) -> float:
        """The middle of the planned range."""
        return math.sqrt(self.low * self.high)


def usual() -> Machine:
    """The machine `here` of conf/machines.yaml: its shares of the rates."""
    from svnup import config
    from svnup.machines import HERE

    return Machine(**config.composed().machines[HERE])


def compared(line: dict[str, Any], folder: str | None, texts: Texts) -> tuple[list[Compared], float]:
    """The stages of a measured job beside its plan at the rates that were measured with it, and the planned peak in bytes.

    Args:
        line: of scale.jsonl.
        folder: of the checkpoint, or of an outline of it, where the job reads one.
        texts: what jobs before this one have read.
    """
    from svnup import config
    from svnup.plan import plan

    case = next(case for cases in TARGETS.values() for case in cases if case.name == line["case"])
    job = config.build(config.composed(*line["overrides"], *case.model(folder), "dry_run=true"), texts)
    shares = replace(usual(), device="cpu", process=line["process_bytes"])
    machine = replace(shares, **rates_of([line]))
    planned, out = plan(job, machine), []
    for stage in planned.stages:
        took = line["stages"][stage.name]
        floor = sum(flop / machine.rate(dtype) for dtype, flop in stage.work.products.items())
        seconds = took["cpu_seconds" if line["hardware"]["threads"] == 1 else "seconds"]
        out.append(Compared(stage.name, seconds, *machine.seconds(stage.work), floor, took["seconds"]))
    return out, planned.peak


def outline_of(config: dict[str, Any], folder: Path) -> str:
    """A checkpoint of a config that has names and shapes of its tensors, as a plan needs, and a hole in place of numbers."""
    import shutil
    import struct

    from svnup.language_model import LanguageModel
    from svnup.model.language_model import make_config
    from svnup.model.source import BUILT_IN_FOLDER

    own = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}
    made = make_config(config["model_type"], **own)
    lm = LanguageModel.skeleton(made)
    header, end = dict[str, Any](), 0
    for part in lm.state_dict_by_block():
        for name, p in part.items():
            begin, end = end, end + 2 * p.numel()
            header[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    made.save_pretrained(folder)
    for tokenizer in BUILT_IN_FOLDER.glob("tokenizer*"):
        shutil.copy2(tokenizer, folder / tokenizer.name)
    return str(folder)


# -- all of it


def measure(case: Case, folder: str | None, known: Path) -> None:
    """Run a job in a process of its own, and add its line to what is known."""
    with tempfile.TemporaryDirectory(dir=known.parent) as place:
        command = [sys.executable, "-m", "experiments.benchmarks.scale", "--child", case.name, "--place", place]
        env = os.environ | VARIABLES | {"OMP_NUM_THREADS": str(case.threads)}
        subprocess.run([*command, *(["--folder", folder] if folder else [])], cwd=ROOT, env=env, check=True)
        line = {"case": case.name, "overrides": case.overrides, **json.loads((Path(place) / "took.json").read_text("utf-8"))}
    with known.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def lines_of(known: Path) -> dict[str, dict[str, Any]]:
    """What was measured, by the name of the case: the last line of each."""
    found = [json.loads(line) for line in known.read_text("utf-8").splitlines()] if known.is_file() else []
    return {line["case"]: line for line in found}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*TARGETS, "draw"], default="shapes")
    parser.add_argument("--case", help="one job of these alone")
    parser.add_argument("--smollm2", metavar="FOLDER", help="of the checkpoint of SmolLM2")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks" / "scale.md", help="beside scale.jsonl")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "scale.png")
    for name in ("--child", "--folder", "--place"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        case = next(case for cases in TARGETS.values() for case in cases if case.name == options.child)
        place = Path(options.place)
        took = run_one(case, options.folder, place / "run")
        (place / "took.json").write_text(json.dumps(took), encoding="utf-8")
        return
    known = options.output.with_suffix(".jsonl")
    known.parent.mkdir(parents=True, exist_ok=True)
    cases = [case for case in TARGETS.get(options.only, []) if options.case in (None, case.name)]
    todo = [case for case in cases if options.again or case.name not in lines_of(known)]
    with tempfile.TemporaryDirectory(dir=known.parent) as place:
        folder = options.smollm2
        if any(case.checkpoint for case in todo) and folder is None:
            folder = _checkpoint(options.only, Path(place) / "model")
        for case in todo:
            print(case.name, flush=True)
            measure(case, folder if case.checkpoint else None, known)
        write(options.output, options.figure)


def _checkpoint(target: str, folder: Path) -> str:
    if target == "smollm2":
        return "svnup/smollm2_135m_instruct_q4"
    (case, *_) = TARGETS[target]
    shape = {k: v for k, v in case.shape.items() if k not in ("num_hidden_layers", "hidden_size")}
    write_checkpoint(folder, llama(case.shape["num_hidden_layers"], case.shape["hidden_size"], case.dtype, **shape))
    return str(folder)


def write(output: Path, figure: Path) -> None:
    """The table of what was measured beside its plan."""
    rows, machines, texts = [], dict[str, list[str]](), cast("Texts", {})
    with tempfile.TemporaryDirectory() as place:
        for number, (name, line) in enumerate(lines_of(output.with_suffix(".jsonl")).items()):
            threads = {1: "one thread", 2: "two threads"}[line["hardware"]["threads"]]
            machines.setdefault(f"{line['hardware']['cpu']}, {threads}, torch {line['versions']['torch']}", []).append(name)
            folder = outline_of(line["config"], Path(place) / str(number)) if line["config"] else None
            stages, planned = compared(line, folder, texts)
            peak = max(took["peak_memory_bytes"] for took in line["stages"].values())
            of_peak = [f"{peak / 1e9:.2f}", f"{planned / 1e9:.2f}", f"{planned / peak:.2f}"]
            rate = rates_of([line])["float32"]
            for one in [*stages, _summed(stages)]:
                last = one.stage == "all"
                cells = [f"{one.wall:.1f}", f"{one.seconds:.1f}", f"{one.low:.1f} to {one.high:.1f}"]
                cells += [f"{one.planned / one.seconds:.2f}", f"{one.seconds / one.floor:.2f}" if one.floor else "-"]
                own = [*of_peak, f"{rate / 1e9:.0f}"] if last else [""] * 4
                rows.append([name if one is stages[0] else "", one.stage, *cells, *own])
    if not machines:
        return
    usual_machine, *others = machines
    on = ". ".join([usual_machine, *(f"{'; '.join(machines[other])}: {other}" for other in others)])
    head = ["job", "stage", "seconds", "compared", "planned", "planned / taken", "over floor"]
    head += ["peak, GB", "planned, GB", "planned / peak", "GFLOP/s"]
    text = [
        "# How the cost of whole jobs grows",
        "",
        f"Made by `python -m experiments.benchmarks.scale`. {on}. Seconds "
        "by the clock, and those with which the plan is compared: of the processor where a job has one thread, by the clock "
        "where it has two. The plan is at the median of the rates measured in the same process before the first stage and "
        "after each (of float32 products: the last column). Planned / taken: the middle of the planned range. Over floor: "
        "these seconds over those of matrix products alone at the measured rate. Peak: of the process, with Python and torch.",
        "",
        *table(head, rows, "ll" + "r" * (len(head) - 2)),
    ]
    if {case.name for case in CASES} <= set(lines_of(output.with_suffix(".jsonl"))):
        text += ["", "## From 4 to 80 blocks, and so on", ""]
        text += ["![seconds of stages by blocks, width, tokens and window](../../docs/figures/scale.png)", ""]
        text += [
            "The first job with one thing changed, planned at the median of the rates above; points in the figure: measured.",
            "",
        ]
        text += draw(lines_of(output.with_suffix(".jsonl")), figure)
    output.write_text("\n".join(text) + "\n", encoding="utf-8")


def grown(what: str, size: int) -> Case:
    """The first case with one thing of another size."""
    if what == "blocks":
        return _small("", {"num_hidden_layers": size})
    if what == "width":
        return _small("", {"hidden_size": size, "intermediate_size": size * 11 // 4, "num_attention_heads": size // 64})
    if what == "window":
        return _small("", None, f"shapley.window={size}")
    texts = {"dataset": 8, "shapley.game.data": 1, "evaluation": 8, "selection": 8}
    return _small("", None, *(f"{text}.n_seq={n * size}" for text, n in texts.items()))


def draw(lines: dict[str, dict[str, Any]], place: Path) -> list[str]:
    """The figure of how stages grow, planned at the median of the measured rates, with what was measured; and its table."""
    from matplotlib.figure import Figure

    from svnup import config
    from svnup.plan import plan

    small = [line for line in lines.values() if not line["config"]]
    machine = replace(usual(), device="cpu", process=0.0, **rates_of(small))
    texts: Texts = {}
    drawing = Figure(figsize=(13, 3.6), layout="constrained")
    rows: list[list[str]] = []
    for axes, (what, (sizes, measured)) in zip(drawing.subplots(1, len(GROWTH), sharey=True), GROWTH.items(), strict=True):
        plans = {}
        for size in sizes:
            case = grown(what, size)
            plans[size] = plan(config.build(config.composed(*case.overrides, *case.model(), "dry_run=true"), texts), machine)
        for colour, stage in enumerate(("scores", "pruning", "evaluation")):
            spans = [made.seconds(stage) for made in plans.values()]
            axes.plot(list(sizes), [math.sqrt(low * high) for low, high in spans], color=f"C{colour}", label=stage)
            axes.fill_between(list(sizes), *zip(*spans, strict=True), color=f"C{colour}", alpha=0.2, linewidth=0)
            dots = [(size, lines[name]["stages"][stage]["cpu_seconds"]) for size, name in measured.items() if name in lines]
            axes.plot(*zip(*dots, strict=True), "o", color=f"C{colour}")
        axes.set(yscale="log", xlabel=what)
        if not isinstance(sizes, range):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.grid(color="0.9")
        for size in [*sizes][::3]:
            seconds = [plans[size].seconds(stage) for stage in ("scores", "pruning", "evaluation")]
            cells = [f"{low:.3g} to {high:.3g}" for low, high in seconds]
            rows.append([f"{what}: {size}", scaled(plans[size].work.flop, "FLOP"), *cells])
    drawing.axes[0].set_ylabel("seconds of one thread")
    drawing.axes[0].legend(fontsize=8)
    place.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(place, dpi=110, metadata={"Software": None})
    return table(["what grows", "operations", "scores, s", "pruning, s", "evaluation, s"], rows, "lrrrr")


def _summed(stages: list[Compared]) -> Compared:
    sums = (sum(getattr(one, name) for one in stages) for name in ("seconds", "low", "high", "floor", "wall"))
    return Compared("all", *sums)


if __name__ == "__main__":
    main()
