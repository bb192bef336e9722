"""Whether the released llm-compressor prunes to a budget of svnup by the recipe that `svnup-results recipe` writes.

    python -m tools.interop.run --python PYTHON      # of an environment with llm-compressor; `make interop` makes one

Three budgets of the built-in model: of blocks, in whole weights of every row of a matrix, by Wanda and by SparseGPT, so that
both tools leave the same number of zeros in each linear layer (SparseGPT there zeroes one weight more in every 128 columns, and
any of equal scores, as its released code does); and of linear layers, as scores give them, where llm-compressor leaves out what
is less than a weight of a row. Exits with 1 where a number of zeros is another one.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from experiments.study import built_in, text
from svnup.files import sealed
from svnup.language_model import LanguageModel
from svnup.model.linears import matrix
from svnup.model.source import BUILT_IN_FOLDER
from svnup.naming import pruner_name
from svnup.reports.recipe import recipe
from svnup.results.row import ResultRow
from svnup.results.store import load
from svnup.types import SparsityProfile

PARTS = 64  # divides the inputs of every matrix of the built-in model
N_SEQ, SEQ_LEN = 16, 128
JOBS = {
    "blocks, Wanda": ["pruner=wanda", "allocator=from_file", "allocator.path=whole.json"],
    "blocks, SparseGPT": ["pruner=sparsegpt", "allocator=from_file", "allocator.path=whole.json"],
    "linear layers, Wanda": ["pruner=wanda", "allocator=uniform", "split=outliers"],
}


def whole_weights(lm: LanguageModel) -> SparsityProfile:
    """A budget of 60 % in steps of 1/64, the more the later a block is."""
    steps = np.round(PARTS * np.linspace(0.5, 0.7, lm.n_blocks))
    sparsity = steps / PARTS
    return SparsityProfile(sparsity, lm.block_params, float(np.average(sparsity, weights=lm.block_params)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="the interpreter of an environment with llm-compressor")
    python = parser.parse_args(argv).python.absolute()
    lm = built_in()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        profile = whole_weights(lm)
        (folder / "whole.json").write_text(json.dumps(sealed(profile.to_dict())), encoding="utf-8")
        np.save(folder / "tokens.npy", text("calibration", N_SEQ, SEQ_LEN))
        for job, overrides in JOBS.items():
            wrong += compared(folder, job, overrides, profile.target, lm, python)
    return int(wrong > 0)


def run(command: list[str], folder: Path) -> None:
    """Run a command in a folder; where it fails, say what it said."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        done.check_returncode()


def compared(folder: Path, job: str, overrides: list[str], target: float, lm: LanguageModel, python: Path) -> int:
    """Prune by both tools, say how far they agree, and return in how many linear layers the number of zeros is a wrong one."""
    results = folder / "".join(filter(str.isalpha, job))
    options = [
        f"sparsity={target!r}",
        f"dataset.n_seq={N_SEQ}",
        f"dataset.seq_len={SEQ_LEN}",
        "evaluation=none",
        "save_model=true",
    ]
    command = [sys.executable, "-m", "svnup", *overrides, *options, f"results_dir={results}", f"cache_dir={folder / 'cache'}"]
    run(command, folder)
    (row,) = load(results)
    (folder / "recipe.yaml").write_text(recipe(row), encoding="utf-8")
    theirs_at = folder / "theirs.npz"
    prune = [python, Path(__file__).with_name("prune.py"), BUILT_IN_FOLDER, "recipe.yaml", "tokens.npy", theirs_at]
    run(list(map(str, prune)), folder)
    theirs = np.load(theirs_at)
    (model,) = results.glob("runs/*/model")
    pruned = LanguageModel.load(str(model), dtype="float32", device="cpu")
    count, wrong, same, zeros = 0, 0, 0, 0
    for index in range(pruned.n_blocks):
        for name, linear in pruned.linears(index).items():
            ours, other = (matrix(linear) == 0).numpy(), theirs[f"{pruned.blocks_path}.{index}.{name}"]
            least, most = asked(row, index, name, ours.shape)
            if not least <= other.sum() <= most or abs(int(other.sum()) - int(ours.sum())) > max(len(ours), most - least):
                wrong += 1
                print(
                    f"{job}: block {index}, {name}: {other.sum()} zeros, {least} to {most} by the recipe, {ours.sum()} by svnup"
                )
            count, same, zeros = count + 1, same + int((ours & other).sum()), zeros + int(other.sum())
    print(
        f"{job}: {count - wrong} of {count} linear layers have the recipe's zeros, {100 * same / zeros:.2f} % of them svnup's"
    )
    return wrong


def asked(row: ResultRow, index: int, name: str, shape: tuple[int, int]) -> tuple[int, int]:
    """The least and the largest number of zeros by llm-compressor's rules: of Wanda so many a row; of SparseGPT so many of the
    128 columns that it prunes together, one more, and those of equal scores, for which another one is allowed."""
    assert row.profile is not None
    linears, (d_out, d_in) = row.profile.linears, shape
    sparsity = row.profile.sparsity[index] if linears is None else linears[index][name].sparsity
    if pruner_name(row.config) == "wanda":
        return (d_out * math.floor(d_in * sparsity),) * 2
    parts = [min(128, d_in - start) for start in range(0, d_in, 128)]
    least = sum(math.floor(d_out * part * sparsity) for part in parts)
    return least, least + 2 * len(parts)


if __name__ == "__main__":
    sys.exit(main())
