"""Names of components in keys of runs and caches, which stay the same when code moves.

A component of svnup has the name of its class (`component_name`). One from outside svnup has its module, class, version and the
hash of its code, so that results of older code are never taken for its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Callable
from functools import cache
from typing import Any

from svnup.outside import is_ours, outside_code

# Top-level keys of a configuration that cannot change a number (`shapley` counts where an allocator has it as its scorer,
# `selection` and `selection_loss` where the allocator reads selection text).
NOT_IN_KEY = (
    *("results_dir", "cache_dir", "force", "dry_run", "hardware", "save_model", "save_masks", "save_format", "offload"),
    *("tracker", "protocol_gate", "shapley", "selection", "selection_loss", "compare_uniform"),
)
NOT_IN_MODEL_KEY = ("device", "device_map", "trust_remote_code", "test_text", "test_tasks", "dense_ppl")
PLACES = ("datasets_dir",)  # keys of any node that name folders; the files in them are in the fingerprints

# Classes of svnup that have moved since results were stored, by their former import path. Keys of runs have the first name of a
# class, so that moving or renaming one takes only a line here.
MOVED = {
    f"svnup.{former}.{name}": f"svnup.{today}.{name}"
    for former, today, classes in (
        ("allocation", "allocation.maps", "Atp FromFile Ratios ScoreBudget Uniform"),
        ("config", "config.schema", "KeepSecrets"),
        ("evaluation", "evaluation.ppl", "Perplexity"),
        ("evaluation", "evaluation.protocol", "NoEvaluation"),
        ("evaluation", "evaluation.zero_shot", "Full ZeroShot"),
        ("model", "model.source", "Pretrained Random"),
        ("scoring", "scoring.published", "AlphaPruning BlockInfluence Dlp Owl"),
        ("scoring", "scoring.shapley", "GameOptions"),
        ("search", "allocation.curves", "Curves"),
        ("search", "allocation.rounds", "ShapleyMargins ShapleyRounds"),
        ("search", "allocation.search", "Search"),
        ("splitting", "allocation.splits", "ErrorSplit OutliersSplit ShapleySplit UniformSplit"),
        ("tracking", "reports.wandb", "WandbTracker"),
        ("tracking", "results.tracker", "NoTracker"),
    )
    for name in classes.split()
}
NO_RECOVERY = "svnup.pruning.nothing.NoRecovery"
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # of a run: the name of its folder


def moving_numbers(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that can change a number; `recovery` is left out where there is none."""
    kept = {k: v for k, v in config.items() if k not in NOT_IN_KEY}
    if recovery_name(config) is None:
        kept.pop("recovery", None)
    kept |= {"model": {k: v for k, v in config["model"].items() if k not in NOT_IN_MODEL_KEY}}
    return typing.cast(dict[str, Any], _without_places(kept))


def _without_places(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without_places(v) for k, v in node.items() if k not in PLACES}
    return [_without_places(v) for v in node] if isinstance(node, list) else node


def current_path(target: str) -> str:
    """The current import path of a class by the path that was stored (MOVED)."""
    for former, now in MOVED.items():
        if target == former or target.startswith(f"{former}."):
            return current_path(now + target[len(former) :])
    return target


def current(node: Any) -> Any:
    """A stored configuration with the current import path of every `_target_`, so that older ones compare with newer ones."""
    return _with_targets(node, current_path)


def component_name(target: str) -> str:
    """The stable name of a component by its `_target_`: the first name of its class (MOVED) in lower case."""
    now = current_path(target)
    first = next((former for former in MOVED if current_path(former) == now), now)
    return first.rpartition(".")[2].lower()


def method_name(node: dict[str, Any]) -> str:
    """The name of a method by its `_target_` node, with that of its base method: 'refit (wanda)'."""
    name = component_name(str(node["_target_"]))
    return f"{name} ({method_name(node['base'])})" if "base" in node else name


def recovery_name(config: dict[str, Any]) -> str | None:
    """The name of a configuration's recovery; None where it has none, as those of earlier versions."""
    node = config.get("recovery", {"_target_": NO_RECOVERY})
    return None if current_path(str(node["_target_"])) == NO_RECOVERY else method_name(node)


def pruner_name(config: dict[str, Any]) -> str:
    """The display name of a configuration's pruner, with its recovery: 'wanda + reconstruct'."""
    return " + ".join(filter(None, (method_name(config["pruner"]), recovery_name(config))))


def named(node: Any) -> Any:
    """A configuration with component names in place of every `_target_`."""
    return _with_targets(node, name_of_target)


def _with_targets(node: Any, of: Callable[[str], str]) -> Any:
    """A configuration with another text, by the one it has, in place of every `_target_`."""
    if isinstance(node, list):
        return [_with_targets(value, of) for value in node]
    if not isinstance(node, dict):
        return node
    return {k: of(v) if k == "_target_" and isinstance(v, str) else _with_targets(v, of) for k, v in node.items()}


def identity(component: Any) -> str:
    """The name and the options of a component as JSON."""
    return json.dumps(component, default=_parts, sort_keys=True)


def name_of_target(target: str) -> Any:
    """The name of a component of svnup, or a mapping of module, class, version and hash of one from outside.

    Raises:
        ValueError: the code of a component from outside is not found.
    """
    if is_ours(target):
        return component_name(target)
    module, _, name = target.rpartition(".")
    return {"module": module, "class": name} | code_of(target.partition(".")[0])


@cache
def code_of(package: str) -> dict[str, Any]:
    """Version and hash of a package from outside svnup."""
    found = outside_code({"_target_": f"{package}.x"})[package]
    return {key: found[key] for key in ("version", "sha256")}


def code_from_outside(node: Any, key: str = "") -> dict[str, str]:
    """Target, version and hash of every component from outside svnup, by its place in a configuration: `pruner code`."""
    found: dict[str, str] = {}
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        found |= code_from_outside(value, f"{key}.{name}".lstrip("."))
    target = node.get("_target_") if isinstance(node, dict) else None
    if isinstance(target, str) and not is_ours(target):
        code = code_of(target.partition(".")[0])
        found[f"{key} code"] = " ".join(filter(None, (target, code["version"], code["sha256"])))
    return found


def _parts(component: Any) -> Any:
    cls = type(component)
    if dataclasses.is_dataclass(component):
        names = [field.name for field in dataclasses.fields(component)]
    elif hasattr(component, "__dict__"):
        names = list(vars(component))
    else:
        return repr(component)
    return {"_target_": name_of_target(f"{cls.__module__}.{cls.__qualname__}")} | {k: getattr(component, k) for k in names}


def allocator_name(node: dict[str, Any]) -> str:
    """The display name of a configuration's allocator: the name of its scorer, or its own if it has none.

    It ends in `sublayers`, `experts` or `linears` if these have budgets of their own.
    """
    scorer, own = node.get("scorer"), method_name(node)
    name = method_name(scorer) if scorer and own != "marginsandinfluence" else own
    if scorer and "game" in scorer:
        control = "reversed" if node.get("reverse") else "random" if node.get("shuffle") is not None else "shapley"
        name = own if own.startswith("shapley") else control
    return name + {"sublayer": "sublayers", "expert": "experts", "linear": "linears"}.get(str(node.get("granularity")), "")
