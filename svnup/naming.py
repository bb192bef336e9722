"""What components are called where something is looked up by them, in keys of runs and of caches: by names that last.

One of svnup has the name of its class (`component_name`); one from outside its module, its class, and the hash and the version
of its code, so that what older code measured is never taken for its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from functools import cache
from typing import Any

from svnup.outside import of_ours, outside_code

# Top of a configuration that cannot change a number (`shapley` counts where an allocator
# names it as its scorer, `selection` and `selection_loss` where it is tuned).
NOT_IN_KEY = (
    *("results_dir", "cache_dir", "force", "dry_run", "save_model", "save_masks", "save_format", "offload"),
    *("tracker", "protocol_gate", "shapley", "selection", "selection_loss", "compare_uniform"),
)
NOT_IN_MODEL_KEY = ("device", "device_map", "trust_remote_code", "test_text", "test_tasks", "dense_ppl")
PLACES = ("datasets_dir",)  # of any node: where its files lie, which by themselves are in the fingerprints

# Classes of svnup that have moved since results were stored: the former import path and today's. Keys of runs go by the name
# that a class had first, so a line here is all that a move or a better name takes.
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
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # of a run, which its folder and files are named by


def moving_numbers(config: dict[str, Any]) -> dict[str, Any]:
    """What of a resolved configuration can change a number."""
    kept = {k: v for k, v in config.items() if k not in NOT_IN_KEY}
    kept |= {"model": {k: v for k, v in config["model"].items() if k not in NOT_IN_MODEL_KEY}}
    return typing.cast(dict[str, Any], _without_places(kept))


def _without_places(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without_places(v) for k, v in node.items() if k not in PLACES}
    return [_without_places(v) for v in node] if isinstance(node, list) else node


def todays(target: str) -> str:
    """The import path today of what had this one when it was stored (MOVED)."""
    for former, now in MOVED.items():
        if target == former or target.startswith(f"{former}."):
            return todays(now + target[len(former) :])
    return target


def component_name(target: str) -> str:
    """The lasting name of a component by its `_target_`: its class in lower case, as it was called first (MOVED)."""
    now = todays(target)
    first = next((former for former in MOVED if todays(former) == now), now)
    return first.rpartition(".")[2].lower()


def method_name(node: dict[str, Any]) -> str:
    """The name of a method by its `_target_` node, with that of the method it builds on: 'refit (wanda)'."""
    name = component_name(str(node["_target_"]))
    return f"{name} ({method_name(node['base'])})" if "base" in node else name


def named(node: Any) -> Any:
    """A configuration with names in place of every `_target_`."""
    if isinstance(node, list):
        return [named(value) for value in node]
    if not isinstance(node, dict):
        return node
    return {k: name_of_target(v) if k == "_target_" and isinstance(v, str) else named(v) for k, v in node.items()}


def identity(component: Any) -> str:
    """The same of an object, with all that it was made of, as JSON."""
    return json.dumps(component, default=_parts, sort_keys=True)


def name_of_target(target: str) -> Any:
    """A name for a component of svnup, a mapping for one from outside.

    Raises ValueError where the code of one from outside is not found.
    """
    if of_ours(target):
        return component_name(target)
    module, _, name = target.rpartition(".")
    return {"module": module, "class": name} | code_of(target.partition(".")[0])


@cache
def code_of(package: str) -> dict[str, Any]:
    """Version and hash of a package from outside."""
    found = outside_code({"_target_": f"{package}.x"})[package]
    return {key: found[key] for key in ("version", "sha256")}


def code_from_outside(node: Any, key: str = "") -> dict[str, str]:
    """Target, version and hash of every component from outside in a configuration, by where it stands: `pruner code`."""
    found: dict[str, str] = {}
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        found |= code_from_outside(value, f"{key}.{name}".lstrip("."))
    target = node.get("_target_") if isinstance(node, dict) else None
    if isinstance(target, str) and not of_ours(target):
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
    """What people call the allocator of a configuration: by its scores where it has some, else by itself; with budgets of
    attention and MLP apart '...sublayers', of linear layers '...linears'."""
    scorer, own = node.get("scorer"), method_name(node)
    name = method_name(scorer) if scorer else own
    if scorer and "game" in scorer:
        control = "reversed" if node.get("reverse") else "random" if node.get("shuffle") is not None else "shapley"
        name = own if own.startswith("shapley") else control
    return name + {"sublayer": "sublayers", "linear": "linears"}.get(str(node.get("granularity")), "")
