"""The linear layers of a block, those of experts among them, and the tokens that enter these.

transformers stacks the matrices of a block's experts in one parameter, (n_experts, d_out, d_in) or transposed, and multiplies
them in one of several ways. Here each matrix is a linear layer of its own. What enters it is seen where torch multiplies,
whichever way the model takes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

GATE = re.compile(r"(.*_)?(gate|router)")  # beside experts: what routes tokens to them, or weighs shared ones
OF_EXPERT = re.compile(r"(.*\bexperts\.\d+)\..+")  # of an expert that is a module of its own
PRODUCTS = {  # the two factors among the arguments of torch's products
    "aten::mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::bmm": (0, 1),
    "aten::baddbmm": (1, 2),
    "aten::matmul": (0, 1),
    "aten::_grouped_mm": (0, 1),
    "transformers::grouped_mm_fallback": (0, 1),
}
See = Callable[[str, Tensor], None]


@dataclass(frozen=True, eq=False)
class ExpertLinear:
    """One expert's matrix in a parameter that stacks those of all experts, as a linear layer.

    Args:
        module: the module that has the parameter.
        leaf: the parameter's name in the module.
        parameter: its name in the block.
        expert: the name of the expert in the block, such as mlp.experts.3.
        place: the matrix's place in the stack.
        transposed: whether matrices are stored as (d_in, d_out).
    """

    module: nn.Module
    leaf: str
    parameter: str
    expert: str
    place: int
    transposed: bool

    @property
    def stack(self) -> Tensor:
        """The parameter, (n_experts, d_out, d_in) or (n_experts, d_in, d_out)."""
        parameter = self.module._parameters[self.leaf]
        assert parameter is not None
        return parameter

    @property
    def weight(self) -> Tensor:
        """The matrix, as a view of the parameter."""
        return self.stack[self.place]


if TYPE_CHECKING:  # mypy does not read transformers
    Linear = nn.Linear | ExpertLinear
    LINEAR_MODULES = (nn.Linear,)
else:
    LINEAR_MODULES = (nn.Linear, Conv1D)
    Linear = nn.Linear | Conv1D | ExpertLinear


def matrix(linear: Linear) -> Tensor:
    """The weight of a linear layer as a view (d_out, d_in); GPT-2's Conv1D and some experts store the transpose."""
    return linear.weight.T if is_transposed(linear) else linear.weight


def is_transposed(linear: Linear) -> bool:
    """Whether a linear layer stores its weight as (d_in, d_out)."""
    return linear.transposed if isinstance(linear, ExpertLinear) else isinstance(linear, Conv1D)


def linears_of(block: nn.Module) -> dict[str, Linear]:
    """The linear layers of a block by name: modules, and the matrices of experts; without what routes tokens to experts."""
    gates = [
        f"{prefix}{child}."
        for prefix, module in ((f"{name}." if name else "", module) for name, module in block.named_modules())
        if any(_holds_experts(child, m) for child, m in module.named_children())
        for child, _ in module.named_children()
        if GATE.fullmatch(child)
    ]
    out: dict[str, Linear] = {}
    for name, module in block.named_modules():
        if f"{name}.".startswith(tuple(gates)):
            continue
        if isinstance(module, LINEAR_MODULES):
            out[name] = module
        elif _has_stacks(module):
            out |= _experts_of(name, module)
    return out


def _holds_experts(name: str, module: nn.Module) -> bool:
    return _has_stacks(module) or name == "experts"


def _has_stacks(module: nn.Module) -> bool:
    """Whether a module stacks the matrices of experts, by transformers' names for such classes."""
    return "Experts" in type(module).__name__ and bool(_stacks(module))


def _stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    return {leaf: p for leaf, p in module.named_parameters(recurse=False) if p.dim() == 3}


def _experts_of(name: str, module: nn.Module) -> dict[str, Linear]:
    stacks = _stacks(module)
    transposed = _transposed(module, list(stacks.values()))
    out: dict[str, Linear] = {}
    for place in range(max(len(p) for p in stacks.values())):
        for leaf, p in stacks.items():
            if place >= len(p):
                continue
            if leaf == "weight":  # the module is one linear layer of each expert
                linear, expert = f"{name}.{place}", f"{name.rpartition('.')[0]}.{place}"
            else:
                linear, expert = f"{name}.{place}.{leaf}", f"{name}.{place}"
            out[linear] = ExpertLinear(module, leaf, f"{name}.{leaf}", expert, place, transposed)
    return out


def _transposed(module: nn.Module, stacks: list[nn.Parameter]) -> bool:
    """Whether a module stores its matrices as (d_in, d_out): as its class says, or else so that experts return what they read.

    Where the shapes leave it open it is not; `watched` raises where a product is another one than this says.
    """
    told = getattr(module, "is_transposed", None)
    if told is not None or len(stacks) < 2:
        return bool(told)
    first, last = stacks[0].shape, stacks[-1].shape
    return first[2] != last[1] and first[1] == last[2]


def expert_of(name: str, linear: Linear) -> str | None:
    """The name of the expert that a linear layer of a block belongs to; None if it belongs to none."""
    if isinstance(linear, ExpertLinear):
        return linear.expert
    found = OF_EXPERT.fullmatch(name)
    return found.group(1) if found is not None else None


def parameter_of(name: str, linear: Linear) -> str:
    """The name, in the block, of the parameter that holds the weights of a linear layer."""
    return linear.parameter if isinstance(linear, ExpertLinear) else f"{name}.weight"


def by_parameter(linears: Mapping[str, Linear], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by parameter, of weights by linear layer; matrices of experts that are not given are those of the model."""
    out: dict[str, Tensor] = {}
    for name, weight in weights.items():
        linear = linears[name]
        if isinstance(linear, ExpertLinear):
            if linear.parameter not in out:
                out[linear.parameter] = linear.stack.detach().clone()
            out[linear.parameter][linear.place] = weight
        else:
            out[f"{name}.weight"] = weight
    return out


def by_linear(linears: Mapping[str, Linear], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views by linear layer, of tensors by parameter."""
    out = {}
    for name, linear in linears.items():
        whole = tensors[parameter_of(name, linear)]
        out[name] = whole[linear.place] if isinstance(linear, ExpertLinear) else whole
    return out


@dataclass(frozen=True)
class _Stack:
    """A parameter that stacks matrices, and which linear layers those of interest are; of a module it is a stack of one."""

    data: Tensor
    transposed: bool
    whole: bool
    names: dict[int, str]

    def places(self, factor: Tensor) -> range | None:
        """The matrices of this stack that are the right factor of a product; None if it is none of them.

        Raises ValueError where a matrix has to be multiplied as a `whole`, and is multiplied in part or transposed.
        """
        size = self.data[0].numel()
        if factor.device != self.data.device or factor.dtype != self.data.dtype:
            return None
        offset = (factor.data_ptr() - self.data.data_ptr()) // self.data.element_size()
        if factor.is_meta or not 0 <= offset < self.data.numel():
            return None
        first = offset // size
        own = self.data[first] if self.transposed else self.data[first].T
        if offset % size or factor.shape[-2:] != own.shape or factor.stride()[-2:] != own.stride():
            if not self.whole:
                return None
            raise ValueError(
                f"{next(iter(self.names.values()), 'an expert')}: is multiplied otherwise than as a matrix "
                f"{'(d_in, d_out)' if self.transposed else '(d_out, d_in)'}; choose a model with other experts"
            )
        if factor.dim() == 2:
            return range(first, first + 1)
        step = factor.stride(0) // size
        return range(first, first + step * len(factor), step) if step else None


class _Watch(TorchDispatchMode):
    """Shows what enters the matrices of stacks, in every product that torch computes."""

    def __init__(self, stacks: list[_Stack], see: See) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stacks, self._see = stacks, see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name == "aten::einsum":  # made of products that are seen one by one
            with self:
                return func.decompose(*args, **kwargs)
        if name == "aten::linear":
            self._product(args[0], args[1].T, None)
        elif name in PRODUCTS:
            left, right = (args[place] for place in PRODUCTS[name])
            grouped = "grouped" in name
            self._product(left, right, (args[2] if len(args) > 2 else kwargs.get("offs")) if grouped else None)
            if right.dim() > 1 and (left.dim() == 2 or _is_one(left)):  # a weight may stand on the left
                self._product(right.mT, left.mT, None)
        return func(*args, **kwargs)

    def _product(self, x: Tensor, factor: Tensor, ends: Tensor | None) -> None:
        factor = factor[0] if _is_one(factor) else factor
        for stack in self._stacks:
            if (places := stack.places(factor)) is None:
                continue
            for place, rows in zip(places, _rows(x, factor, ends), strict=True):
                if place in stack.names and len(rows):
                    self._see(stack.names[place], rows)


def _is_one(factor: Tensor) -> bool:
    """Whether a factor is one matrix for all of a batch, to which torch expands it."""
    return factor.dim() == 3 and factor.stride(0) == 0


def _rows(x: Tensor, factor: Tensor, ends: Tensor | None) -> list[Tensor]:
    """What each matrix of the right factor reads, (tokens, d_in): groups of rows, or entries of a batch."""
    if factor.dim() == 2:
        return [x.reshape(-1, x.shape[-1])]
    if ends is not None:
        edges = [0, *ends.tolist()]
        return [x[start:end] for start, end in pairwise(edges)]
    x = x.expand(len(factor), *x.shape[-2:])
    return [rows[rows.any(dim=1)] for rows in x]  # a token that is not routed to an expert enters it as zeros


@contextmanager
def watched(linears: Mapping[str, Linear], see: See) -> Iterator[None]:
    """Context in which `see(name, rows)` is called with what enters the matrices of linear layers, (tokens, d_in).

    Args:
        linears: linear layers of a block, whose weights are on the device.
        see: is called for each product with each of them.

    Raises:
        ValueError: an expert's matrix is multiplied otherwise than its parameter's layout says.
    """
    stacks: dict[str, _Stack] = {}
    for name, linear in linears.items():
        if isinstance(linear, ExpertLinear):
            stack = stacks.setdefault(linear.parameter, _Stack(linear.stack.detach(), linear.transposed, True, {}))
            stack.names[linear.place] = name
        else:
            stacks[name] = _Stack(linear.weight.detach()[None], is_transposed(linear), False, {0: name})
    with _Watch(list(stacks.values()), see):
        yield


def _routes_in(arguments: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """Among the arguments of a call of experts the name of the expert of each route, and the names of the routes' weights."""
    routes = [k for k, v in arguments.items() if isinstance(v, Tensor) and v.dtype in (torch.int32, torch.int64)]
    if len(routes) != 1:
        return None, []
    shape = arguments[routes[0]].shape
    return routes[0], [k for k, v in arguments.items() if isinstance(v, Tensor) and v.shape == shape and k != routes[0]]


@contextmanager
def _called_through(hook: Callable[[nn.Module, Any, Any], Any], modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which each call of these modules passes through a hook, which may return other arguments."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def routed_to_all(linears: Mapping[str, Linear], see: See) -> Iterator[None]:
    """Context in which each run of their block shows what these linear layers would read if every token were routed to them.

    Experts that take no argument with the expert of each token are not shown. The block's own computation is as ever.

    Args: as for `watched`.
    """
    asked: dict[nn.Module, dict[int, dict[str, Linear]]] = {}
    for name, linear in linears.items():
        if isinstance(linear, ExpertLinear):
            asked.setdefault(linear.module, {}).setdefault(linear.place, {})[name] = linear

    def route(module: nn.Module, args: Any, kwargs: Any) -> None:
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        route, weights = _routes_in(call.arguments)
        if route is None:
            return
        index = call.arguments[route]
        for key in weights:
            call.arguments[key] = torch.ones_like(call.arguments[key][..., :1])
        for place, of_expert in asked[module].items():
            call.arguments[route] = torch.full_like(index[..., :1], place)
            with watched(of_expert, see):
                module.forward(*call.args, **call.kwargs)

    with _called_through(route, asked):
        yield


Reroute = Callable[[list[int], Tensor, Tensor], Tensor]


@contextmanager
def rerouted(block: nn.Module, experts: list[str], change: Reroute) -> Iterator[None]:
    """Context in which a run of a block weighs the routes of its tokens otherwise.

    `change(numbers, index, weights)` returns the new weights of the routes that enter a module of experts; `numbers` are those
    in `experts` of its experts, `index` (n_tokens, k) says which of its experts a route leads to (its number of experts: to
    none) and `weights` (n_tokens, k) with what weight.

    Args:
        block: the block.
        experts: the names of all of its experts, as `expert_of` gives them.
        change: makes the new weights of each route.

    Raises:
        NoRoutesError: experts are not called with the routes of each token and their weights.
    """
    numbers: dict[nn.Module, list[int]] = {}
    for number, expert in enumerate(experts):
        numbers.setdefault(block.get_submodule(expert.rpartition(".")[0]), []).append(number)
    for module in numbers:
        parameters = inspect.signature(module.forward).parameters.values()
        if len(parameters) < 3 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):  # hidden states, routes, weights
            raise NoRoutesError(module)
    called = set()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        route, weights = _routes_in(call.arguments)
        if route is None or len(weights) != 1:
            raise NoRoutesError(module)
        called.add(module)
        index = call.arguments[route]
        call.arguments[weights[0]] = change(numbers[module], index, call.arguments[weights[0]])
        return call.args, call.kwargs

    with _called_through(enter, numbers):
        yield
    if silent := [module for module in numbers if module not in called]:
        raise NoRoutesError(silent[0])


class NoRoutesError(ValueError):
    """Experts of a class take no routes with their weights, so that none can be left out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(
            f"{type(module).__name__}: its experts are not called with the expert of each route and its weight, so that none "
            "can be left out or counted; use allocator=shapley_margins allocator.granularity=expert"
        )


def without_experts(present: Tensor, spread: bool) -> Reroute:
    """For `rerouted`: how routes to absent experts are weighed, whose weight becomes zero.

    Args:
        present: which experts of the block are, bool (n_experts,).
        spread: a token's weight of absent experts goes to the present ones among those it is routed to, in proportion to their
            weights, so that the sum stays; where there are none, nothing comes out of its experts.
    """

    def change(numbers: list[int], index: Tensor, weights: Tensor) -> Tensor:
        own = present[numbers].to(index.device)
        real = index < len(own)  # others lead to no expert
        kept = own[index.clamp(max=len(own) - 1)] & real
        left = torch.where(kept, weights, 0)
        if spread:
            before = torch.where(real, weights, 0).sum(-1, keepdim=True, dtype=torch.float32)
            after = left.sum(-1, keepdim=True, dtype=torch.float32)
            left = torch.where(after != 0, left * (before / after), 0).to(weights.dtype)
        return torch.where(real, left, weights)

    return change
