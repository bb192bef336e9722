"""Errors of Hydra and OmegaConf as one line that names the key and the fix."""

from __future__ import annotations

import contextlib
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf

from svnup.config.construction import did_you_mean
from svnup.config.schema import CONF, GROUPS, register

if TYPE_CHECKING:
    pass

RAY = "pip install 'svnup[ray]' && pip install --no-deps hydra-ray-launcher"
LAUNCHERS = {  # of Hydra: what brings them
    "joblib": "pip install 'svnup[joblib]'",
    "ray": RAY,
    "ray_aws": RAY,
    "submitit_local": "pip install hydra-submitit-launcher",
    "submitit_slurm": "pip install hydra-submitit-launcher; or take hydra/launcher=slurm",
}


def explain(error: Exception, overrides: list[str]) -> str:
    """A composition error as one line: the key, what was given, and what to do."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, option = str(error.missing_cfg_file).partition("/")  # which may itself be a path
        if group == "hydra":
            group, _, option = str(error.missing_cfg_file).rpartition("/")
        if group == "hydra/launcher" and option in LAUNCHERS:
            return f"{group}={option}: that launcher is not installed; {LAUNCHERS[option]}"
        if group == "model" and (Path(option).is_dir() or "/" in option):
            way = f"model=pretrained model.pretrained_model_name_or_path={option}"
            return f"model={option}: no option of the group; a folder or a hub model is {way}"
        options = [o for o in error.options or [] if not o.startswith("_")]
        if options:
            return f"{group}={option}: choose among {', '.join(options)}{did_you_mean(option, options)}"
    if str(error).startswith("Error merging override") and error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    text = " ".join(str(error).split())
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if unknown and "@" in unknown[1]:
        given = next((o for o in overrides if o.lstrip("+~").startswith(f"{unknown[1]}=")), unknown[1])
        return f"{given}: no group stands there; put a + before it, +{given}, if that node can take it"
    if unknown:
        full = re.search(r"full_key: (\S+)", text)
        key = unknown[1] if "." in unknown[1] or not full else full[1]
        given = next((o for o in overrides if o.lstrip("+~").startswith(f"{key}=")), key)
        if key in GROUPS:
            return f"{given}: a group, no value; choose an option of it by name, {key}=..., and its own by {key}.<name>=..."
        if named := re.match(r"evaluation\.datasets\.(\w+)\.", key):
            plus = "" if named[1] == "test" else "+"
            return f"{given}: no data set is called {named[1]}; add {plus}dataset@evaluation.datasets.{named[1]}=text_file"
        return f"{given}: there is no such key{_nearest_key(key, _known_keys(overrides)) or '; svnup --cfg job shows all'}"
    value = re.search(r"Value '([^']*)' (.*?) full_key: (\S+)", text)
    if value:
        return f"{value[3]}={value[1]}: {value[2]}; give a value of the right type"
    kind = re.search(r"(field '\w+' is not Optional|Cannot convert '\w+' to \w+).*? full_key: (\S+)", text)
    if kind:
        given = next((o for o in overrides if o.lstrip("+~").startswith(f"{kind[2]}=")), kind[2])
        return f"{given}: {kind[1].replace(f'field {kind[2]!r}', 'it')}; give a plain value"
    if twice := re.search(r"Cannot merge (?:Dict|List)Config with (?:Dict|List)Config full_key: (\S+)", text):
        return f"{twice[1]}: is given as a list and by names; give it in one way"
    if "Config group override must be a string" in text:
        given = next((o for o in overrides if o.endswith("=null")), "a group")
        options = sorted(p.stem for p in (CONF / given.partition("=")[0]).glob("[!_]*.yaml"))
        return f"{given}: a group needs an option; choose among {', '.join(options)}"
    if isinstance(error, OverrideParseException):
        way = "put quotes around the value" if "=" in error.override else "write key=value"
        return f"{error.override}: not in Hydra's syntax ({error.__cause__ or text}); {way}"
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None and not overrides:
        return " ".join(str(error.__cause__).split())
    return text


def _nearest_key(key: str, known: list[str]) -> str:
    """A hint at the key that was meant: of the same node where that exists, since there only the last word is wrong."""
    parent, _, last = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
    if not siblings:
        return did_you_mean(key, known)
    return did_you_mean(last, siblings).replace("did you mean ", f"did you mean {parent}." if parent else "did you mean ")


def defaults() -> dict[str, Any]:
    """The resolved configuration of a job without any override."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typing.cast(dict[str, Any], OmegaConf.to_container(compose("config"), resolve=True))


def _known_keys(overrides: list[str]) -> list[str]:
    """Every key of the configuration with the given choices of groups, as far as it composes."""
    groups = {p.name for p in CONF.iterdir() if p.is_dir()}
    choices = [o for o in overrides if o.partition("=")[0] in groups]
    for chosen in (choices, []):
        with contextlib.suppress(Exception), initialize_config_dir(str(CONF), version_base="1.3"):
            plain = typing.cast(dict[str, Any], OmegaConf.to_container(compose("config", overrides=chosen), resolve=False))
            return [*groups, *_flatten(plain)]
    return sorted(groups)


def _flatten(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
