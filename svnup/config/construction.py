"""What may stand where in a configuration, and how it is built: every `_target_` is of the kind that its place asks for."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from svnup.keys import did_you_mean
from svnup.naming import current_path
from svnup.outside import is_ours

# What a place asks for, by the protocol that its component follows or the class that it inherits from. A place inside a
# component asks by the annotation of that argument.
KINDS = {
    "model": "svnup.model.source.Model",
    "text": "svnup.data.TokenSource",
    "estimator": "svnup.shapley.Estimator",
    "game": "svnup.scoring.shapley.GameOptions",
    "scorer": "svnup.scoring.Scorer",
    "allocator": "svnup.allocation.Allocator",
    "split": "svnup.allocation.splits.Split",
    "pruner": "svnup.pruning.walk.Pruner",
    "recovery": "svnup.pruning.walk.Recovery",
    "evaluation": "svnup.evaluation.protocol.Evaluation",
    "tracker": "svnup.results.tracker.Tracker",
}


PLAIN = (types.NoneType, str, int, float, list, dict)
PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
AS_IN = "choose an option of a group, as in dataset@shapley.game.data=docs"


def construct(node: Any, key: str, kind: Any) -> Any:
    """Build the object that a `_target_` node describes, nested nodes first; every argument is checked by name and type.

    `key` is where the node stands, `kind` what is asked for there: a name in KINDS, or a class. Nothing is called that is no
    class of that kind, and no other place may hold a node. Raises ValueError with the key at fault.
    """
    cls, arguments = check_node(node, key, kind)
    parameters = inspect.signature(cls).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed := next((p.name for p in named if p.default is p.empty and p.name not in arguments), None):
        raise ValueError(f"{key}.{needed}: {node['_target_']} needs it; add {key}.{needed}=...")
    with error_context(key):
        built = cls(**arguments)
    missing = object()
    if lacking := [name for name in _members(_asked(kind)) if inspect.getattr_static(built, name, missing) is missing]:
        raise ValueError(_wrong_kind(key, node["_target_"], kind, lacking))
    return built


def check_node(node: Any, key: str, kind: Any) -> tuple[Any, dict[str, Any]]:
    """The class of a node and its checked arguments, nested nodes built."""
    if not isinstance(node, dict):
        raise ValueError(f"{key}={node}: must be a node with a _target_; choose an option of a group, as in dataset@{key}=...")
    target = node.get("_target_")
    if target is None:
        raise ValueError(f"{key}: has no _target_; choose an option of the group: {key}=...")
    cls = _class(target, key, kind)
    parameters, hints = inspect.signature(cls).parameters, _hints(cls)
    arguments = {}
    for name, value in node.items():
        if name == "_target_":
            continue
        if name not in parameters:
            raise ValueError(f"{key}.{name}={value}: {target} has no such option{did_you_mean(str(name), parameters)}")
        arguments[name] = _argument(value, f"{key}.{name}", hints.get(name, Any))
    return cls, arguments


def refuse_outside(config: Any, key: str = "") -> None:
    """Refuse a configuration that comes from a file of somebody else where it names code from outside svnup.

    That is a `_target_` wherever it stands, the code of a checkpoint, lm-eval tasks of one's own, whose yaml may call any, or
    an attention kernel of the hub, which is code.
    Raises ValueError with the key and the value.
    """
    if isinstance(config, list):
        for index, value in enumerate(config):
            refuse_outside(value, f"{key}.{index}")
        return
    if not isinstance(config, dict):
        return
    target = config.get("_target_")
    if target is not None and not (isinstance(target, str) and PATH.fullmatch(target) and is_ours(target)):
        raise _untrusted(f"{key}._target_".lstrip("."), target)
    for name, value in config.items():
        where = f"{key}.{name}".lstrip(".")
        kernel = name == "attn_implementation" and "/" in str(value)
        if kernel or (name in ("trust_remote_code", "include_path") and value):
            raise _untrusted(where, value)
        refuse_outside(value, where)


def _untrusted(key: str, value: Any) -> ValueError:
    return ValueError(
        f"{key}={value}: would run code from outside svnup, which a result can name as it likes; if you know that code and "
        "trust it, add --trust"
    )


def _class(target: Any, key: str, kind: Any) -> Any:
    """The class of a target, if it is of a kind; nothing but its module is imported for it, and nothing called."""
    given = f"{key}._target_={target}"
    if not isinstance(target, str) or not PATH.fullmatch(target):
        raise ValueError(f"{given}: no import path of a class; write package.module.Class")
    module, _, name = current_path(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs other people's code
        raise ValueError(f"{given}: cannot be imported ({type(error).__name__}: {error}); check the spelling") from error
    if not inspect.isclass(found) or (is_ours(target) and not is_ours(found.__module__)):
        raise ValueError(f"{given}: is no class of {module.partition('.')[0]}; name a class that follows {_path(kind)}")
    if inspect.isabstract(found) or vars(found).get("_is_protocol"):
        raise ValueError(f"{given}: only says what such a class has; name a class that follows {_path(kind)}")
    asked = _asked(kind)
    methods = [name for name, is_method in _members(asked).items() if is_method]
    lacking = [name for name in methods if not callable(getattr(found, name, None))]
    if lacking or not (getattr(asked, "_is_protocol", False) or issubclass(found, asked)):
        raise ValueError(_wrong_kind(key, target, kind, lacking))
    return found


def _wrong_kind(key: str, target: str, kind: Any, lacking: list[str]) -> str:
    lacks = f", for it has no {', '.join(lacking)}" if lacking else ""
    called = kind if isinstance(kind, str) else "such thing"
    return f"{key}._target_={target}: is no {called}{lacks}; choose a class that follows {_path(kind)}"


def _path(kind: Any) -> str:
    return KINDS[kind] if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _asked(kind: Any) -> Any:
    """The protocol or class of a kind, imported only where something is built that follows it."""
    if not isinstance(kind, str):
        return kind
    module, _, name = KINDS[kind].rpartition(".")
    return getattr(importlib.import_module(module), name)


def _members(asked: Any) -> dict[str, bool]:
    """The public members of a protocol, and whether each is a method; of a class none, since being a subclass says it all."""
    members: dict[str, bool] = {}
    for base in asked.__mro__ if getattr(asked, "_is_protocol", False) else ():
        if vars(base).get("_is_protocol"):
            members |= dict.fromkeys(vars(base).get("__annotations__", {}), False)
            members |= {name: inspect.isfunction(value) for name, value in vars(base).items()}
    return {name: is_method for name, is_method in members.items() if not name.startswith("_")}


def _hints(cls: Any) -> dict[str, Any]:
    """The annotations of a constructor; those of KINDS are understood where they are imported for type checking alone."""
    told = cls if dataclasses.is_dataclass(cls) else cls.__init__  # a dataclass: each base as its own module understands it
    try:
        return typing.get_type_hints(told, include_extras=True)
    except NameError:
        kinds = {path.rpartition(".")[2]: Annotated[Any, kind] for kind, path in KINDS.items()}
        with contextlib.suppress(NameError):
            return typing.get_type_hints(told, kinds | vars(sys.modules[cls.__module__]), include_extras=True)
        return {}


def _argument(value: Any, key: str, hint: Any) -> Any:
    """A checked argument: nodes where the annotation asks for a component, or a list or mapping of them, plain otherwise."""
    kind, of_entries = _component(hint), _component_of_entries(hint)
    if kind is not None and _is_node(value):
        return construct(value, key, kind)
    if of_entries is not None and not _is_node(value):
        if isinstance(value, dict):
            return {name: _entry(entry, f"{key}.{name}", of_entries) for name, entry in value.items()}
        if isinstance(value, list):
            return [_entry(entry, f"{key}.{index}", of_entries) for index, entry in enumerate(value)]
    _refuse_nodes(value, key)
    if complaint := type_complaint(value, hint):
        raise ValueError(f"{key}={value}: {complaint}")
    return value


def _entry(value: Any, key: str, kind: Any) -> Any:
    """An entry of a list or mapping of components; one that is built already stays as it is."""
    if _is_node(value) or (_needs_node(kind) and isinstance(value, PLAIN)):
        return construct(value, key, kind)
    return value


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _refuse_nodes(value: Any, key: str) -> None:
    """Raise ValueError where a plain value has a node in it, however deep."""
    if _is_node(value):
        raise ValueError(f"{key}._target_={value['_target_']}: nothing is built here; give a plain value")
    for name, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _refuse_nodes(entry, f"{key}.{name}")


def _component(hint: Any) -> Any:
    """What an annotation asks for where that is no plain value: a name in KINDS (`Annotated[Any, "pruner"]`) or a class."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return next(note for note in args[1:] if note in KINDS) if set(args[1:]) & set(KINDS) else _component(args[0])
    if origin in (typing.Union, types.UnionType):
        return next((found for arg in args if (found := _component(arg)) is not None), None)
    if not inspect.isclass(hint) or hint is Any or hint.__module__ in ("builtins", "types", "typing", "collections.abc"):
        return None
    path = f"{hint.__module__}.{hint.__qualname__}"
    return next((kind for kind, of in KINDS.items() if of == path), hint)


def _needs_node(kind: Any) -> bool:
    """Whether no plain value can stand for it."""
    return isinstance(kind, str) or inspect.isabstract(kind) or getattr(kind, "_is_protocol", False)


def _component_of_entries(hint: Any) -> Any:
    """The same of what a list or a mapping holds."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return next((found for arg in args if (found := _component_of_entries(arg)) is not None), None)
    return _component(args[-1]) if origin in (list, dict) and args else None


def type_complaint(value: Any, hint: Any) -> str | None:
    """Why a plain value does not suit an annotation, or None; annotations of other kinds are left to the constructor."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated and not _component(hint):
        return type_complaint(value, args[0])
    if origin is Literal:
        if value in args:
            return None
        return f"choose one of {', '.join(map(str, args))}{did_you_mean(str(value), [str(a) for a in args])}"
    if origin in (typing.Union, types.UnionType):
        complaints = [type_complaint(value, a) for a in args]
        return None if None in complaints else next(c for c in complaints if c)
    if hint is type(None):
        return None if value is None else "must be null"
    if (kind := _component(hint)) is not None and _needs_node(kind) and isinstance(value, PLAIN):
        return f"must be a node with a _target_; {AS_IN}"
    kinds: dict[Any, tuple[tuple[type, ...], str]] = {
        int: ((int,), "must be a whole number"),
        float: ((int, float), "must be a number"),
        bool: ((bool,), "must be true or false"),
        str: ((str,), "must be text"),
    }
    if hint in kinds:
        accepted, text = kinds[hint]
        wrong = not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool)
        return text if wrong else None
    if origin is list:
        if not isinstance(value, list):
            return "must be a list, such as [a,b]"
        for entry in value:
            if (complaint := type_complaint(entry, args[0])) is not None:
                return f"its entry {entry} {complaint}"
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            return "must be a node of keys and values, such as {key: 1}"
        for key, entry in value.items():
            if (complaint := type_complaint(entry, args[1])) is not None:
                return f"its value {key}={entry} {complaint}"
    return None


# -- messages


@contextlib.contextmanager
def error_context(key: str, whole: tuple[str, ...] = ()) -> Iterator[None]:
    """Put the node's key before a component's message that begins with one of its options, such as `window=13: ...`."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        option = re.match(r"(\w+)=", text)
        if option and option[1] not in whole:
            raise ValueError(f"{key}.{text}") from error
        raise
