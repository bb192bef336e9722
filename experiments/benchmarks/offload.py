"""Memory and time of a job whose model stays on disk, against the same job in memory: `offload=disk` and `offload=none`.

A Llama checkpoint with random weights is written block by block (nothing here ever holds it), then the same `svnup` job prunes
and evaluates it both ways, each in a process of its own. The peak is that of the process, with Python and torch; the plan's is
what `dry_run=true` says. The perplexities must be the same number.

    python -m experiments.benchmarks.offload [--blocks 48] [--pruner sparsegpt] [--output results/benchmarks/offload.md]
    python -m experiments.benchmarks.offload --blocks 3 --width 64      # in seconds: does it still run?
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from svnup.model.checkpoint import Tensors, write_dense
from svnup.model.language_model import LanguageModel, make_config
from svnup.model.source import BUILT_IN_FOLDER
from svnup.results.provenance import hardware

HEADS = 16
JOB = ["dataset.n_seq=8", "evaluation.n_seq=8", "dataset=docs", "evaluation.datasets=[docs]", "allocator=uniform"]
JOB += ["dataset@shapley.game.data=docs", "model.seq_len=256", "save_model=true"]


def llama(n_blocks: int, width: int, dtype: str = "float32", **shape: int) -> Any:
    """The config of a Llama of this shape, with the built-in tokenizer's vocabulary where no other is given."""
    usual = {"intermediate_size": width * 11 // 4, "num_attention_heads": HEADS, "vocab_size": 2048}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = make_config("llama", num_hidden_layers=n_blocks, hidden_size=width, dtype=dtype, **ends, **(usual | shape))
    config.architectures = ["LlamaForCausalLM"]
    return config


def write_checkpoint(folder: Path, config: Any) -> None:
    """A checkpoint of a config with random weights in its dtype, written block by block."""
    lm = LanguageModel.skeleton(config)
    generator = torch.Generator().manual_seed(0)

    def parts() -> Iterator[Tensors]:
        for part in lm.state_dict_by_block():
            yield {
                name: torch.randn(p.shape, generator=generator, dtype=config.dtype) * 0.02
                if p.dim() > 1
                else torch.ones(p.shape, dtype=config.dtype)
                for name, p in part.items()
            }

    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    write_dense(folder, parts())
    for file in BUILT_IN_FOLDER.glob("tokenizer*"):
        shutil.copy2(file, folder / file.name)


def run(*args: str) -> str:
    done = subprocess.run([sys.executable, "-m", "svnup", *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def planned(output: str) -> float:
    """The peak in bytes by what `dry_run=true` printed."""
    found = re.search(r"memory at the peak, about: ([\d.]+) ([MGT])B", output)
    if found is None:
        raise SystemExit(f"no peak in the plan:\n{output}")
    return float(found[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[found[2]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--width", type=int, default=1024, help="of the hidden states, a multiple of 64")
    parser.add_argument("--pruner", default="sparsegpt")
    parser.add_argument("--folder", type=Path, help="on the disk to use, with room for four times the checkpoint")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    lines, values = [], set()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        here = Path(place)
        write_checkpoint(here / "model", llama(options.blocks, options.width))
        size = sum(f.stat().st_size for f in (here / "model").glob("*.safetensors"))
        job = ["model=pretrained", f"model.pretrained_model_name_or_path={here / 'model'}", f"pruner={options.pruner}", *JOB]
        for offload in ("disk", "none"):
            args = [*job, f"offload={offload}", f"results_dir={here / offload}", f"cache_dir={here / offload}"]
            plan = planned(run(*args, "dry_run=true"))
            run(*args)
            row = json.loads(next((here / offload).glob("runs/*/result.json")).read_text(encoding="utf-8"))
            values.add(row["metrics"]["docs/ppl"]["value"])
            peak, pruning = row["peak_memory_bytes"], row["pruning"]["seconds"]["total"]
            cells = [f"{x / 1e9:.2f}" for x in (size, plan, peak)] + [
                f"{100 * peak / size:.0f} %",
                f"{pruning:.0f}",
                f"{row['seconds']:.0f}",
            ]
            lines.append(f"| {offload} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    if len(values) != 1:
        raise SystemExit(f"the perplexities differ: {values}")
    machine = hardware()
    text = [
        "# A model that stays on disk",
        "",
        f"Made by `python -m experiments.benchmarks.offload --blocks {options.blocks} --width {options.width} --pruner "
        f"{options.pruner}`. "
        f"{machine.cpu}, {machine.cores} cores, torch {torch.__version__}, float32. A Llama of {options.blocks} blocks "
        f"of width {options.width}, pruned at 70 % on 8 x 256 tokens, evaluated dense and pruned, and saved; both ways give "
        "the same perplexity.",
        "",
        "| offload | checkpoint, GB | peak by the plan, GB | peak, GB | of the checkpoint | pruning, s | job, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *lines,
    ]
    if options.output:
        options.output.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
