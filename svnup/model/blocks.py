"""How a model calls its blocks, observed on a short forward, so that each block can be run by itself in the same way."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

Call = tuple[tuple[Any, ...], dict[str, Any]]
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


class StopForward(Exception):
    """Raised by a hook to end a forward early."""


@dataclass(frozen=True)
class Form:
    """How a module returns hidden states: as a tensor, or as the first tensor of a container."""

    spec: TreeSpec
    place: int

    @classmethod
    def of(cls, out: Any) -> Form:
        leaves, spec = tree_flatten(out)
        return cls(spec, _place(leaves))

    def around(self, hidden: Tensor) -> Any:
        """Hidden states in this form; the other entries of a container are None."""
        empty: list[Any] = [None] * self.spec.num_leaves
        empty[self.place] = hidden
        return tree_unflatten(empty, self.spec)


def hidden_of(out: Any) -> Tensor:
    """The hidden states in the output of a module; raises ValueError if it has no tensor."""
    if isinstance(out, Tensor):
        return out
    leaves = tree_flatten(out)[0]
    found: Tensor = leaves[_place(leaves)]
    return found


def with_hidden(out: Any, hidden: Tensor) -> Any:
    """A copy of a module's output with other hidden states."""
    leaves, spec = tree_flatten(out)
    leaves[_place(leaves)] = hidden
    return tree_unflatten(leaves, spec)


def _place(leaves: list[Any]) -> int:
    place = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
    if place is None:
        raise ValueError(f"no hidden states among what a module returns ({[type(leaf).__name__ for leaf in leaves]})")
    return place


def split_call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Split the arguments of a block into its hidden states, which are the first, and the others."""
    if args:
        return args[0], (args[1:], dict(kwargs))
    first = next(name for name in inspect.signature(type(block).forward).parameters if name != "self")
    others = dict(kwargs)
    return others.pop(first), ((), others)


def containers(calls: list[Call]) -> list[Any]:
    """The mutable containers among the arguments of blocks, each once, in the order of the calls."""
    values = [v for args, kwargs in calls for v in (*args, *kwargs.values())]
    return list({id(v): v for v in values if isinstance(v, MutableMapping | MutableSequence)}.values())


def refill(container: Any, content: Any) -> None:
    """Replace the content of a container by that of another."""
    if isinstance(container, MutableMapping):
        container.clear()
        container.update(content)
    else:
        container[:] = content


@dataclass
class Observed:
    """What a forward of a model does with its blocks; tensors are copies in the CPU's memory.

    Attributes:
        order: indices of the blocks as they ran.
        entered: hidden states before each block.
        left: hidden states after each block.
        calls: the other arguments of each block.
        forms: how blocks and their modules return hidden states.
        writes: for each block that changed mutable containers among its arguments, their numbers.
        logits: of the forward.
    """

    order: list[int] = field(default_factory=list)
    entered: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    forms: dict[nn.Module, Form] = field(default_factory=dict)
    writes: dict[int, set[int]] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def written(self) -> list[int]:
        """The numbers of the containers that any block changes."""
        return sorted(set().union(*self.writes.values()))


@torch.no_grad()
def observe(blocks: nn.ModuleList, forward: Callable[[], Tensor]) -> Observed:
    """Observe the blocks of a model during `forward`, which runs the model and returns its logits."""
    seen, given = Observed(), list[Call]()
    before: list[Any] = []

    def enters(index: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, kwargs: Any) -> None:
            hidden, call = split_call(block, args, kwargs)
            given.append(call)
            before[:] = [copy.copy(c) for c in containers(given)]
            seen.order.append(index)
            seen.entered.append(_kept(hidden))
            seen.calls.append(tree_map(_kept, call))

        return hook

    def leaves(index: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, out: Any) -> None:
            seen.left.append(_kept(hidden_of(out)))
            pairs = enumerate(zip(before, containers(given), strict=True))
            if changed := {i for i, (old, new) in pairs if not _same_content(old, new)}:
                seen.writes[index] = changed

        return hook

    def note(module: nn.Module, args: Any, out: Any) -> None:
        with contextlib.suppress(ValueError):  # a module that returns no tensor is never replaced
            seen.forms[module] = Form.of(out)

    hooks = [m.register_forward_hook(note) for block in blocks for m in (block, *block.children())]
    for index, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(enters(index), with_kwargs=True))
        hooks.append(block.register_forward_hook(leaves(index)))
    try:
        seen.logits = _kept(forward())
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _kept(x: Any) -> Any:
    return x.detach().clone().cpu() if isinstance(x, Tensor) else x


def _same_content(old: Any, new: Any) -> bool:
    if isinstance(old, MutableMapping):
        return list(old) == list(new) and all(old[key] is new[key] for key in old)
    return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))


def differing(call: Call, other: Call, state: list[Any]) -> str | None:
    """The name of an argument that differs between two calls of a block, containers of `state` aside; None if all agree."""
    (args, kwargs), (others, named) = call, other
    left = dict(enumerate(args)) | kwargs
    right = dict(enumerate(others)) | named
    for name in left.keys() | right.keys():
        if any(right.get(name) is container for container in state):
            continue
        (a, shape), (b, other_shape) = tree_flatten(left.get(name)), tree_flatten(right.get(name))
        if shape != other_shape or not all(map(_alike, a, b)):
            return str(name)
    return None


def _alike(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return nearly_equal(x, y)
    return type(x) is type(y) and (not isinstance(x, PLAIN) or bool(x == y))


def nearly_equal(x: Tensor, y: Tensor, ulps: float = 8) -> bool:
    """Whether two tensors agree up to `ulps` roundings of their largest value."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    x, y = x.cpu(), y.cpu()
    if not x.is_floating_point() or torch.equal(x, y):
        return torch.equal(x, y)
    largest = x.double().nan_to_num(0, 0, 0).abs().max()
    return torch.allclose(x.double(), y.double(), rtol=0, atol=float(ulps * torch.finfo(x.dtype).eps * largest), equal_nan=True)


@contextlib.contextmanager
def replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Context in which modules have another forward; the former one, such as accelerate's, is restored in any case."""
    before: dict[nn.Module, Any] = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
