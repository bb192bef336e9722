"""How the cost of whole jobs grows with blocks, width, tokens and window, beside what the plan says of them.

Each job runs in a process of its own, on one thread, and says seconds and peak of each stage. The rates of the machine are
measured in the same process, before the first stage and after each one, by the processor's clock, as its seconds are: others
may use the machine meanwhile. The plan is then made for these rates. A job that was measured is not run again: every one is a
line of scale.jsonl when it is there, and scale.md is written anew.

    python -m experiments.benchmarks.scale                          # the small shapes: some eight minutes on one core
    python -m experiments.benchmarks.scale --only smollm2           # SmolLM2-135M of `make smollm2`, or of --smollm2 FOLDER
    python -m experiments.benchmarks.scale --only llama_1b          # a Llama of 1.3B random weights that stays on disk
    python -m experiments.benchmarks.scale --only draw              # the table and the figure, from what was measured
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from experiments.benchmarks.offload import llama, write_checkpoint
from experiments.study import table
from svnup.machines import Machine

ROOT = Path(__file__).resolve().parents[2]
DOCS = ["dataset=docs", "dataset@selection=docs", "dataset@shapley.game.data=docs", "evaluation.datasets=[docs]"]
SMALL = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
WIDE = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16}
NARROW = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
LLAMA_1B = {"num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16}
VARIABLES = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Case:
    """A job: its overrides but for the model, and the model's shape; `checkpoint`: it is read from a folder."""

    name: str
    shape: dict[str, int]
    overrides: list[str]
    checkpoint: bool = False
    dtype: str = "float32"

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


CASES = [
    _small("8 blocks of width 512"),
    _small("4 blocks", {"num_hidden_layers": 4}),
    _small("16 blocks", {"num_hidden_layers": 16}),
    _small("24 blocks", {"num_hidden_layers": 24}),
    _small("width 256", NARROW),
    _small("width 1024", WIDE),
    _small("4 x the tokens", None, "dataset.n_seq=32", "shapley.game.data.n_seq=4", "evaluation.n_seq=32"),
    _small("sequences of 1024", None, "model.seq_len=1024", "dataset.n_seq=2", "evaluation.n_seq=2", "selection.n_seq=2"),
    _small("window of 5", None, "shapley.window=5"),
    _small("Wanda", None, "pruner=wanda"),
]
_OF_SMOLLM2 = ["shapley.game.data.n_seq=1", "dataset.n_seq=32", "evaluation.n_seq=8", "compare_uniform=off"]
_OF_1B = ["shapley.game.data.n_seq=2", "dataset.n_seq=16", "evaluation.n_seq=16", "offload=disk"]
_BOTH = ["model.seq_len=512", "shapley.window=3"]
PRUNERS = {"Wanda": ["pruner=wanda"], "SparseGPT": ["pruner=sparsegpt", "allocator=uniform"]}  # values are measured once
TARGETS = {
    "shapes": CASES,
    "smollm2": [
        Case(f"SmolLM2-135M, {name}", {}, [*DOCS, *_BOTH, *_OF_SMOLLM2, *pruner], checkpoint=True)
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

    torch.set_num_threads(1)
    places = [f"results_dir={place}", f"cache_dir={place}"]
    job = config.build(config.composed(*case.overrides, *case.model(folder), *places))
    job.check_shapes()
    job.check_texts()
    rates = [_rates(case.dtype)]
    took: dict[str, dict[str, Any]] = {}

    class Sampled(Stages):
        """Stages with the processor's seconds, and the machine's rates between them."""

        def __init__(self) -> None:
            super().__init__()
            self._cpu = time.process_time()

        def __call__(self, name: str, device: torch.device) -> None:
            cpu = time.process_time() - self._cpu
            super().__call__(name, device)
            rates.append(_rates(case.dtype))
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


def _rates(dtype: str) -> dict[str, float]:
    found = Machine().filled("cpu", dtype, clock=time.process_time)
    return {k: v for k, v in asdict(found).items() if k in ("float32", "bfloat16", "bandwidth", "read", "call") and v}


def _mean(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Means of rates before and after a stage: of what a unit of work takes, which is what adds up."""
    return {name: 2 / (1 / before[name] + 1 / after[name]) for name in before}


# -- what the plan says of it


@dataclass(frozen=True)
class Compared:
    """A stage as measured and as planned; seconds are the processor's, of one thread, but for those of the `wall` clock.

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


def compared(line: dict[str, Any], folder: str | None) -> tuple[list[Compared], float]:
    """The stages of a measured job beside its plan at the rates that were measured with each, and the planned peak in bytes.

    Args:
        line: of scale.jsonl.
        folder: of the checkpoint, or of an outline of it, where the job reads one.
    """
    from svnup import config
    from svnup.plan import plan

    case = next(case for cases in TARGETS.values() for case in cases if case.name == line["case"])
    job = config.build(config.composed(*line["overrides"], *case.model(folder), "dry_run=true"))
    shares = replace(usual(), device="cpu", process=line["process_bytes"])
    planned, out = plan(job, replace(shares, **next(iter(line["stages"].values()))["rates"])), []
    for stage in planned.stages:
        took = line["stages"][stage.name]
        machine = replace(shares, **took["rates"])
        floor = sum(flop / machine.rate(dtype) for dtype, flop in stage.work.products.items())
        out.append(Compared(stage.name, took["cpu_seconds"], *machine.seconds(stage.work), floor, took["seconds"]))
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
    for file in BUILT_IN_FOLDER.glob("tokenizer*"):
        shutil.copy2(file, folder / file.name)
    return str(folder)


# -- all of it


def measure(case: Case, folder: str | None, results: Path) -> None:
    """Run a job in a process of its own, and add its line to the results."""
    with tempfile.TemporaryDirectory(dir=results) as place:
        command = [sys.executable, "-m", "experiments.benchmarks.scale", "--child", case.name, "--place", place]
        env = os.environ | VARIABLES
        subprocess.run([*command, *(["--folder", folder] if folder else [])], cwd=ROOT, env=env, check=True)
        line = {"case": case.name, "overrides": case.overrides, **json.loads((Path(place) / "took.json").read_text("utf-8"))}
    with (results / "scale.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def lines_of(results: Path) -> dict[str, dict[str, Any]]:
    """What was measured, by the name of the case: the last line of each."""
    file = results / "scale.jsonl"
    found = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []
    return {line["case"]: line for line in found}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*TARGETS, "draw"], default="shapes")
    parser.add_argument("--case", help="one job of these alone")
    parser.add_argument("--smollm2", metavar="FOLDER", help="of the checkpoint of SmolLM2")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "benchmarks")
    for name in ("--child", "--folder", "--place"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        case = next(case for cases in TARGETS.values() for case in cases if case.name == options.child)
        place = Path(options.place)
        took = run_one(case, options.folder, place / "run")
        (place / "took.json").write_text(json.dumps(took), encoding="utf-8")
        return
    options.results.mkdir(parents=True, exist_ok=True)
    cases = [case for case in TARGETS.get(options.only, []) if options.case in (None, case.name)]
    todo = [case for case in cases if options.again or case.name not in lines_of(options.results)]
    with tempfile.TemporaryDirectory(dir=options.results) as place:
        folder = options.smollm2
        if any(case.checkpoint for case in todo) and folder is None:
            folder = _checkpoint(options.only, Path(place) / "model")
        for case in todo:
            print(case.name, flush=True)
            measure(case, folder if case.checkpoint else None, options.results)
            write(options.results)
        write(options.results)


def _checkpoint(target: str, folder: Path) -> str:
    if target == "smollm2":
        return "svnup/smollm2_135m_instruct_q4"
    (case, *_) = TARGETS[target]
    shape = {k: v for k, v in case.shape.items() if k not in ("num_hidden_layers", "hidden_size")}
    write_checkpoint(folder, llama(case.shape["num_hidden_layers"], case.shape["hidden_size"], case.dtype, **shape))
    return str(folder)


def write(results: Path) -> None:
    """The table of what was measured beside its plan."""
    rows, hardware = [], None
    with tempfile.TemporaryDirectory() as place:
        for number, (name, line) in enumerate(lines_of(results).items()):
            hardware = line["hardware"] | line["versions"]
            folder = outline_of(line["config"], Path(place) / str(number)) if line["config"] else None
            stages, planned = compared(line, folder)
            peak = max(took["peak_memory_bytes"] for took in line["stages"].values())
            of_peak = [f"{peak / 1e9:.2f}", f"{planned / 1e9:.2f}", f"{planned / peak:.2f}"]
            rate = sum(took["rates"]["float32"] for took in line["stages"].values()) / len(line["stages"])
            for one in [*stages, _summed(stages)]:
                last = one.stage == "all"
                cells = [f"{one.wall:.1f}", f"{one.seconds:.1f}", f"{one.low:.1f} to {one.high:.1f}"]
                cells += [f"{one.planned / one.seconds:.2f}", f"{one.seconds / one.floor:.2f}" if one.floor else "-"]
                own = [*of_peak, f"{rate / 1e9:.0f}"] if last else [""] * 4
                rows.append([name if one is stages[0] else "", one.stage, *cells, *own])
    if hardware is None:
        return
    head = ["job", "stage", "seconds", "of the processor", "planned", "planned / taken", "over floor"]
    head += ["peak, GB", "planned, GB", "planned / peak", "GFLOP/s"]
    text = [
        "# How the cost of whole jobs grows",
        "",
        f"Made by `python -m experiments.benchmarks.scale`. {hardware['cpu']}, one thread, torch {hardware['torch']}. Seconds "
        "by the clock, and those of the processor, with which the plan is compared: at the rates measured in the same process "
        "before and after each stage (the mean rate of float32 products is in the last column). Planned / taken: the middle of "
        "the planned range. Over floor: seconds of the processor over those of matrix products alone at the measured rate. "
        "Peak: of the process, with Python and torch.",
        "",
        *table(head, rows, "ll" + "r" * (len(head) - 2)),
    ]
    (results / "scale.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def _summed(stages: list[Compared]) -> Compared:
    sums = (sum(getattr(one, name) for one in stages) for name in ("seconds", "low", "high", "floor", "wall"))
    return Compared("all", *sums)


if __name__ == "__main__":
    main()
