"""The budget of a run as a recipe of llm-compressor, which prunes each block by its own sparsity, too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from svnup.naming import method_name
from svnup.results.row import ResultRow

BLOCKS = r"re:.*\.(layers|h|blocks)\.\d+$"
OPTIONS: dict[str, tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {  # by the names of our pruners
    "wanda": ("WandaPruningModifier", lambda _: {}),
    "sparsegpt": (
        "SparseGPTModifier",
        lambda pruner: {"block_size": pruner["block_size"], "dampening_frac": pruner["damp"]},
    ),
}


def recipe(row: ResultRow, blocks: str = BLOCKS) -> str:
    """The YAML by which llm-compressor (0.14) prunes to the budget of a run with the same pruner.

    One modifier has a list of targets and a sparsity for each module that they match, in the order of the model. Of each row
    of a matrix llm-compressor prunes floor(sparsity * d_in) weights, so that an unstructured budget may be off by less than a
    weight a row; N:M is the same.

    Args:
        row: a finished run.
        blocks: what matches the names of the model's blocks and no others, in llm-compressor's way; unused where linear layers
            have budgets of their own.

    Raises:
        ValueError: the run has no budget, or it is of stacked experts, or llm-compressor has no such pruner or pattern.
    """
    profile = row.profile
    if profile is None:
        raise ValueError(f"{row.config_key}: {row.status}, without a budget; choose a finished run")
    pruner = row.config["pruner"]
    if (name := method_name(pruner)) not in OPTIONS:
        raise ValueError(f"pruner={name}: llm-compressor has none of that kind; choose a run of {' or '.join(OPTIONS)}")
    pattern = profile.pattern or "unstructured"
    if pattern.startswith("mixed"):
        raise ValueError(f"pattern={pattern}: a recipe has one pattern for all blocks; choose a run with another")
    modifier, options = OPTIONS[name]
    if profile.linears is None:
        targets, sparsity = [blocks], list(profile.sparsity)
    else:
        shares = [(i, linear, share) for i, linears in enumerate(profile.linears) for linear, share in linears.items()]
        if stacked := next((linear for _, linear, _ in shares if re.search(r"\bexperts\.\d+", linear)), None):
            raise ValueError(
                f"{stacked}: a recipe names modules, and experts may be none; choose a run with a budget of blocks"
            )
        targets = [rf"re:.*\.{i}\.{re.escape(linear)}$" for i, linear, _ in shares]
        sparsity = [share.sparsity for _, _, share in shares]
    lines = [
        f"# The budget of the run {row.config_key} of svnup: {100 * profile.target:g} % in all, pruner {name}.",
        "pruning_stage:",
        "  pruning_modifiers:",
        f"    {modifier}:",
        f"      mask_structure: {json.dumps('0:0' if pattern == 'unstructured' else pattern)}",
        *(f"      {key}: {json.dumps(value)}" for key, value in options(pruner).items()),
        *("      targets:", *(f"      - {json.dumps(target)}" for target in targets)),
        *("      sparsity:", *(f"      - {json.dumps(value)}" for value in sparsity)),
    ]
    return "\n".join(lines) + "\n"
