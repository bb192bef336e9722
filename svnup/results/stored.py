"""Values that lie in JSON files: frozen dataclasses, checked as they are read and written again as they were.

A key with a default may lack in a file, and a file may have keys that are not named here: earlier and later versions are read.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, Required, Self

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
LARGEST = sys.float_info.max  # a whole number beyond it is none that Python makes a float of


@dataclass(frozen=True)
class Stored:
    """A JSON object, each key a field.

    Args:
        more: what a file has besides, by keys that this version does not know.
        keys: those of the file, in its order; None for a value that was made here, which has all of them.
    """

    more: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    keys: tuple[str, ...] | None = field(default=None, kw_only=True, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Nested JSON values, as in the file that was read; a field that it lacks is written once it has been given a value."""
        cls: Any = type(self)
        known = _fields(cls)
        missing = [name for name, of in known.items() if self.keys is None or getattr(self, name) != _default(of)]
        names = dict.fromkeys([*(self.keys or ()), *missing, *self.more])
        return {name: self.more[name] if name in self.more else _plain_json(getattr(self, name)) for name in names}

    @classmethod
    def from_dict(cls, data: Any, key: str = "") -> Self:
        """Read parsed JSON; `key` is its own in the file.

        Raises:
            ValueError: it is not of this type; the message begins with the key at fault.
        """
        if not isinstance(data, dict):
            raise ValueError(f"{key}: must be an object".removeprefix(": "))
        this: Any = cls
        known, hints = _fields(this), _hints(this)
        _check_there(data, [name for name, of in known.items() if _is_needed(of)], key)
        values = {name: read(hints[name], value, _inside(key, name)) for name, value in data.items() if name in known}
        return cls(**values, more={name: value for name, value in data.items() if name not in known}, keys=tuple(data))


def read(hint: Any, value: Any, key: str) -> Any:
    """A value of parsed JSON as one of a type: lists as tuples, objects as `Stored` or mappings.

    Args:
        hint: the type. `Annotated[dict, T]` is an object that stays as it is, if it is one of the TypedDict T.
        value: of the JSON.
        key: its dotted key in the file.

    Raises:
        ValueError: it is of another type; the message begins with the key.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Annotated, Required):
        return read(args[-1], value, key)
    if origin in (typing.Union, types.UnionType):
        return _read_either(args, value, key)
    if isinstance(hint, type) and issubclass(hint, Stored):
        return hint.from_dict(value, key)
    if typing.is_typeddict(hint):
        return _read_typed(hint, value, key)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{key}: must be a list")
        return tuple(read(args[0], entry, _inside(key, i)) for i, entry in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{key}: must be an object")
        return {name: read(args[1], entry, _inside(key, name)) for name, entry in value.items()}
    if wrong := _wrong(hint, value):
        raise ValueError(f"{key}: must be {wrong}")
    return value


def plain(node: Any) -> Any:
    """Parsed JSON with every control character as it is written, `\\x1b`, so that no untrusted text drives a terminal.

    The difference to a commit stays as it is, which is never printed.
    """
    if isinstance(node, dict):
        return {plain(name): value if name == "diff" else plain(value) for name, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", node) if isinstance(node, str) else node


def _read_either(hints: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and types.NoneType in hints:
        return None
    told: list[str] = []
    for hint in hints:
        try:
            return read(hint, value, key)
        except ValueError as error:
            told.append(str(error))
    raise ValueError(max(told, key=len))  # of the type that fits the farthest


def _read_typed(hint: Any, value: Any, key: str) -> Any:
    """An object that is one of a TypedDict, as it is."""
    if not isinstance(value, dict):
        raise ValueError(f"{key}: must be an object")
    hints = _hints(hint)
    _check_there(value, [name for name, of in hints.items() if typing.get_origin(of) is Required], key)
    for name in hints.keys() & value.keys():
        read(hints[name], value[name], _inside(key, name))
    return value


def _wrong(hint: Any, value: Any) -> str | None:
    """What a plain value must be, None where it is."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return None if value in choices else f"one of {', '.join(choices)}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    if hint is float:
        return None if is_number else "a number"
    if hint is int:
        return None if is_number and isinstance(value, int) else "a whole number"
    return None if type(value) is hint else "null" if hint is types.NoneType else {str: "text", bool: "true or false"}[hint]


def _check_there(data: Mapping[str, Any], needed: list[str], key: str) -> None:
    if lacking := [name for name in needed if name not in data]:
        raise ValueError(f"{key}: lacks {', '.join(lacking)}".removeprefix(": "))


def _inside(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _plain_json(value: Any) -> Any:
    if isinstance(value, Stored):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {name: _plain_json(entry) for name, entry in value.items()}
    return [_plain_json(entry) for entry in value] if isinstance(value, list | tuple) else value


@cache
def _fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    own = [each.name for each in dataclasses.fields(Stored)]
    return {each.name: each for each in dataclasses.fields(cls) if each.name not in own}


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _is_needed(of: dataclasses.Field[Any]) -> bool:
    return of.default is dataclasses.MISSING and of.default_factory is dataclasses.MISSING


def _default(of: dataclasses.Field[Any]) -> Any:
    return of.default_factory() if of.default_factory is not dataclasses.MISSING else of.default
