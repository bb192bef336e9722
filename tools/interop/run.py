"""Whether the released llm-compressor prunes to a budget of svnup by the recipe that `svnup-results recipe` writes.

    python -m tools.interop.run --python PYTHON      # of an environment with llm-compressor; `make interop` makes one

Three budgets of the built-in model: of blocks, in whole weights of every row of a matrix, by Wanda and by SparseGPT, so that
both tools must leave the same number of zeros in each linear layer; and of linear layers, as measured scores give them, where
llm-compressor leaves out what is less than a weight of a row. Exits with 1 where a number of zeros is another one.
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
from svnup.reports.recipe import recipe
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


def compared(folder: Path, job: str, overrides: list[str], target: float, lm: LanguageModel, python: Path) -> int:
    """Prune by both tools, say how far they agree, and return in how many linear layers the number of zeros is a wrong one."""
    results = folder / job.replace(" ", "_")
    options = [
        f"sparsity={target!r}",
        f"dataset.n_seq={N_SEQ}",
        f"dataset.seq_len={SEQ_LEN}",
        "evaluation=none",
        "save_model=true",
    ]
    command = [sys.executable, "-m", "svnup", *overrides, *options, f"results_dir={results}", f"cache_dir={folder / 'cache'}"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (row,) = load(results)
    (folder / "recipe.yaml").write_text(recipe(row), encoding="utf-8")
    theirs_at = folder / "theirs.npz"
    prune = [python, Path(__file__).with_name("prune.py"), BUILT_IN_FOLDER, "recipe.yaml", "tokens.npy", theirs_at]
    subprocess.run(list(map(str, prune)), cwd=folder, check=True, capture_output=True)
    theirs = np.load(theirs_at)
    (model,) = results.glob("runs/*/model")
    pruned = LanguageModel.load(str(model), dtype="float32", device="cpu")
    assert row.profile is not None
    whole, wrong, same, zeros = row.profile.linears is None, 0, 0, 0
    for index in range(pruned.n_blocks):
        for name, linear in pruned.linears(index).items():
            ours, other = (matrix(linear) == 0).numpy(), theirs[f"{pruned.blocks_path}.{index}.{name}"]
            shares = row.profile.linears
            sparsity = row.profile.sparsity[index] if shares is None else shares[index][name].sparsity
            asked = ours.sum() if whole else len(other) * math.floor(ours.shape[1] * sparsity)
            if other.sum() != asked or abs(int(other.sum()) - int(ours.sum())) > (0 if whole else len(other)):
                wrong += 1
                print(f"{job}: block {index}, {name}: {other.sum()} zeros, {asked} by the recipe, {ours.sum()} by svnup")
            same, zeros = same + int((ours & other).sum()), zeros + int(other.sum())
    count = sum(len(pruned.linears(index)) for index in range(pruned.n_blocks))
    print(
        f"{job}: {count - wrong} of {count} linear layers have the zeros of the recipe; {100 * same / zeros:.2f} % are svnup's",
        flush=True,
    )
    return wrong


if __name__ == "__main__":
    sys.exit(main())
