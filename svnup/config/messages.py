"""Errors of Hydra and OmegaConf as one line that names the key and the fix."""

from __future__ import annotations

import contextlib
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf

from svnup.config.schema import CONF, GROUPS, choices, composed
from svnup.keys import did_you_mean, walk

RAY = "pip install 'svnup[ray]' && pip install --no-deps hydra-ray-launcher"
LAUNCHERS = {  # of Hydra: what brings them
    "joblib": "pip install 'svnup[joblib]'",
    "ray": RAY,
    "ray_aws": RAY,
    "submitit_local": "pip install hydra-submitit-launcher",
    "submitit_slurm": "pip install hydra-submitit-launcher; or take hydra/launcher=slurm",
}


def check_choices(overrides: list[str]) -> None:
    """Raise ValueError for an override that gives a group anything but names of its options, which Hydra takes for granted."""
    parser = OverridesParser.create()
    for text in overrides:
        try:
            (override,) = parser.parse_overrides([text])
        except OverrideParseException:  # which Hydra tells
            continue
        if not (CONF / str(override.key_or_group)).is_dir():
            continue
        given = override.value()
        for one in given.list if isinstance(given, ChoiceSweep) else [given]:
            names = one if isinstance(one, list) else [one]
            if not all(isinstance(name, str | QuotedString | dict | None) for name in names):
                group = override.get_key_element()
                raise ValueError(f"{text}: a group takes an option by its name; choose {group.lstrip('+~')}=...")


def explain(error: Exception, overrides: list[str], folder: str | None = None) -> str:
    """A composition error as one line: the key, what was given, and what to do.

    Args:
        error: of Hydra or OmegaConf.
        overrides: of the command.
        folder: of the user's own yaml files (`--config-dir`).
    """
    quoted = str(Path(folder or ".").resolve()).replace("'", r"\'")
    own = [f"hydra.searchpath=['file://{quoted}']"] if folder is not None else []
    own = [o for o in overrides if o.startswith("hydra.searchpath=")] or own
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
        if having := _options_with(key, own):
            group, swept = key.partition(".")[0], "" if given.startswith("+") else f", or in a sweep over them write ++{given}"
            return f"{given}: {group}={','.join(having)} alone have that key; choose one of them{swept}"
        return f"{given}: there is no such key{_nearest_key(key, _known_keys(overrides, own)) or '; svnup --cfg job shows all'}"
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
        options = choices(*own).get(given.partition("=")[0], [])
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
    return typing.cast(dict[str, Any], OmegaConf.to_container(composed(), resolve=True))


def _known_keys(overrides: list[str], own: list[str]) -> list[str]:
    """Every key of the configuration and of the given options of groups, as far as it composes, the user's own among them."""
    groups = choices(*own)
    chosen = [o for o in overrides if o.partition("=")[0] in groups]
    for given in ((*own, *chosen), own, ()):
        with contextlib.suppress(Exception):
            plain = typing.cast(dict[str, Any], OmegaConf.to_container(composed(*given), resolve=False))
            return [*groups, *(key for key, _ in walk(plain))]
    return [*groups]


def _options_with(key: str, own: list[str]) -> list[str]:
    """The options of the key's group that have it."""
    group, _, inner = key.partition(".")
    found = []
    for option in choices(*own).get(group, []):
        with contextlib.suppress(Exception):  # an option that does not compose on its own
            node = OmegaConf.to_container(composed(*own, f"{group}={option}")[group], resolve=False)
            if inner in (name for name, _ in walk(typing.cast(dict[str, Any], node))):
                found.append(option)
    return found


# -- copies that a configuration makes of its own nodes

COPY = re.compile(r"\$\{(\w[\w.]*)\}")  # by its full key; those with a resolver compute


def copies(written: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The keys whose values are copies, as `scorer: ${shapley}` is: the key of what each copies.

    Args:
        written: the configuration with its interpolations.
        prefix: of all keys.
    """
    found: dict[str, str] = {}
    for name, value in written.items():
        if isinstance(value, dict):
            found |= copies(value, f"{prefix}{name}.")
        elif copy := COPY.fullmatch(str(value)):
            found[f"{prefix}{name}"] = copy[1]
    return found


@contextlib.contextmanager
def named_at_home(copied: dict[str, str]) -> Iterator[None]:
    """In errors name what is copied by the key where it is set: `shapley.window`, not `allocator.scorer.window`."""
    try:
        yield
    except ValueError as error:
        text, before = str(error), ""
        while text != before:  # what is copied may hold a copy itself
            before = text
            for key, home in copied.items():
                text = re.sub(rf"(?<![\w.@]){re.escape(key)}(?=[.=: ])", home, text)
        if text != str(error):
            raise ValueError(text) from error
        raise
