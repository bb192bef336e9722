"""What components are called where something is looked up by them, in keys of runs and of caches: by names that last.

One of svnup has the name of its class (`svnup.types.component_name`); one from outside its module, its class, and the hash and
the version of its code, so that what older code measured is never taken for its own.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

from svnup.outside import of_ours, outside_code
from svnup.types import component_name


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
