"""From a composed configuration to a checked Job: every mistake surfaces here, before a weight is loaded, cheapest first."""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from svnup.config.checks import (
    check_components,
    check_model,
    check_plain,
    check_processes,
    check_pruner,
    check_recovery,
    omegaconf_error_context,
    refuse_missing,
    refuse_mixed_roles,
)
from svnup.config.components import Texts, allocator_of, components_of, named_text, with_named_texts
from svnup.config.construction import construct, error_context, refuse_outside
from svnup.config.job import Job, config_key
from svnup.config.messages import copies, named_at_home
from svnup.config.schema import CONF, GROUPS, Schema, composed
from svnup.data import NAMED
from svnup.files import at_home, default_cache_dir
from svnup.machines import HERE, named

if TYPE_CHECKING:
    from svnup.pruning.walk import Pruner, Recovery
    from svnup.types import Offload


def build(cfg: Any, known: Texts | None = None) -> Job:
    """Build and check a job from a composed configuration; raises ValueError with the key, the value and the fix.

    `known` holds the texts of earlier jobs of this process: one that is asked for again need not tokenize again.
    """
    with omegaconf_error_context():
        config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)  # type: ignore[assignment]
        written: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    config.setdefault("machines", {})  # which the stored configuration of a run does without
    check_plain(config)
    with named_at_home(copies(written)):
        return _built(config, {} if known is None else known)


def _built(config: dict[str, Any], known: Texts) -> Job:
    """The job of a configuration whose plain values are checked; it completes the configuration in place."""
    config["evaluation"] = with_named_texts(config)
    refuse_missing(config)
    machine = named(config["hardware"], config.pop("machines"))  # of rates that a result need not have
    not_compared = _leave_out_comparison(config)
    components = components_of(config, known)
    check_components(config, components)
    if components.from_hub:
        _go_offline_if_unreachable()
    check_model(config, components)
    check_processes(config)
    refuse_mixed_roles(components.sources())
    pruner: Pruner = construct(config["pruner"], "pruner", "pruner")  # the first that imports torch
    if components.allocator.needs.once and not pruner.prunes:  # every budget leaves the same model
        config["allocator"]["compare_uniform"] = "off"
        components = replace(components, allocator=allocator_of(config["allocator"]), selection=None)
    check_pruner(config, components, pruner)
    recovery: Recovery = construct(config["recovery"], "recovery", "recovery")
    check_recovery(config, pruner, recovery)
    if not (config["dry_run"] and config["hardware"] != HERE):  # a plan for another machine needs no device here
        with error_context("model"), _or_named(config):
            components.model.check_device()
    scalars = {k: config[k] for k in Schema.__annotations__ if k in config and not isinstance(config[k], dict)}
    folders = {"results_dir": config["results_dir"], "cache_dir": config["cache_dir"] or default_cache_dir()}
    scalars |= {key: str(at_home(key, folder)) for key, folder in folders.items()}
    scalars |= {"key": config_key(config, chooses=components.selection is not None), "not_compared": not_compared}
    return Job(**vars(components), pruner=pruner, recovery=recovery, config=config, machine=machine, **scalars)


@contextlib.contextmanager
def _or_named(config: dict[str, Any]) -> Iterator[None]:
    """A plan of a job for a device that is not here can be made by the rates of a machine that has it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; or name the machine that has it: hardware=h100" if config["dry_run"] else error) from error


def _leave_out_comparison(config: dict[str, Any]) -> str | None:
    """Turn `allocator.compare_uniform` off where the uniform budget is tried anyway, or cannot be; returns why it cannot."""
    node, reason = config["allocator"], None
    if node.get("compare_uniform") != "trial":
        return None
    if config["offload"] != "none":
        reason = f"offload={config['offload']}: weights pruned in advance and the dense ones need both in memory"
    if reason is not None or "auto" in node.values():
        config["allocator"] = node | {"compare_uniform": "off"}
    return reason


def elsewhere(job: Job, offload: Offload) -> Job:
    """The same job with its blocks in another place; raises ValueError where it cannot have them there."""
    config = copy.deepcopy(job.config) | {"offload": offload, "machines": {job.hardware: vars(job.machine)}}
    return _built(config, {})


def stored(config: dict[str, Any], trust: bool = False, **changes: Any) -> Any:
    """The configuration that lies in a result, to build its job anew, with changes at its top.

    Keys that svnup did not have when the result was made are as by default. Whoever wrote the result chose its values, so it
    names no code from outside svnup unless `trust` says that it may, and nothing in it is interpolated: it is stored resolved.
    Raises ValueError with the key and the value.
    """
    config = config | changes
    if not trust:
        refuse_outside(config)
    _refuse_interpolations(config)
    config["evaluation"] = _with_nodes_of_lists(config)
    usual = composed(*(["~local"] if (CONF / "local" / "default.yaml").is_file() else []))
    with omegaconf_error_context():
        for group in set(GROUPS) & set(config):
            usual[group] = None  # which is replaced as a whole, not merged with
        return OmegaConf.merge(usual, config)


def _refuse_interpolations(node: Any, key: str = "") -> None:
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        where = f"{key}.{name}".lstrip(".")
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"{where}={value}: a result holds values, no interpolations; write the value")
        _refuse_interpolations(value, where)


def _with_nodes_of_lists(config: dict[str, Any]) -> Any:
    """The evaluation of a result, with nodes for the data sets of earlier versions: [docs,{text_file: {path: my.txt}}]."""
    node = config.get("evaluation")
    if not isinstance(node, dict) or not isinstance(node.get("datasets"), list):
        return node
    entries = [entry if isinstance(entry, dict) else {entry: {}} for entry in node["datasets"]]
    if any(name not in NAMED for entry in entries for name in entry):
        return node
    pairs = [(name, options or {}) for entry in entries for name, options in entry.items()]
    return node | {"datasets": {name: named_text(name, config, **options) for name, options in pairs}}


def _go_offline_if_unreachable() -> None:
    """Without a network the hub's client retries for half a minute; ask for its host first, before the client is imported.

    Behind a proxy names need not resolve here, so nothing is concluded.
    """
    if "HF_HUB_OFFLINE" in os.environ or urllib.request.getproxies():
        return
    found: list[bool] = []
    host = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    asked = threading.Thread(target=_resolves, args=(host, found), daemon=True)
    asked.start()
    asked.join(timeout=3)
    if not found:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def _resolves(host: str | None, found: list[bool]) -> None:
    with contextlib.suppress(OSError):
        found.append(bool(socket.getaddrinfo(host, 443)))
