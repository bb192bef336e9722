"""The processes of one job, as torchrun starts them: each computes a share, and the first one tells and writes.

All of them run the same program on the same job. They meet where work is shared out: to add up statistics (`added`), to hear
what each has found (`gathered`), or what the first one has decided or made (`from_first`, `as_first`). A job of one process
meets no other, and imports nothing for it.

Torch's own package does it, and torchrun starts the processes: accelerate adds to that what training needs, and nothing here.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

Floats = NDArray[np.float64]
T = TypeVar("T")
NAMES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # of variables that torchrun sets beside WORLD_SIZE
PATIENCE = timedelta(days=30)  # the first process may wait for hours for another job; who dies is noticed otherwise
FAREWELL = 10.0  # seconds to hear why another process has ended
_store: ContextVar[Store | None] = ContextVar("store", default=None)
_alone: ContextVar[bool] = ContextVar("alone", default=False)


class Lost(Exception):
    """Another process of the job has ended."""


# -- who is here


def n_started() -> int:
    """How many processes torchrun has started for the job; 1 without it."""
    given = os.environ.get("WORLD_SIZE", "1")
    return int(given) if given.isdecimal() else 1


def n_processes() -> int:
    """How many processes share the work at hand: 1 before they have met, and while one works alone."""
    return n_started() if _store.get() is not None and not _alone.get() else 1


def rank() -> int:
    """The number of this process, from 0 on."""
    return int(os.environ["RANK"]) if _store.get() is not None else 0


def is_first() -> bool:
    """Whether this process is the one that tells and writes; also true of a process by itself."""
    return rank() == 0


def local_rank() -> int | None:
    """The number of this process on its machine, by which it has a GPU; None where the job has one process."""
    return int(os.environ.get("LOCAL_RANK", "0")) if n_started() > 1 else None


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """While the block runs, the processes that torchrun has started are together.

    Raises:
        ValueError: there are to be several, and what torchrun would have said of them is missing.
    """
    if n_started() == 1:
        yield
        return
    if missing := [name for name in NAMES if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: {', '.join(missing)} is not set; start several processes by torchrun "
            "--nproc-per-node N -m svnup ..., or unset WORLD_SIZE"
        )
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, number, count = next(iter(rendezvous("env://", timeout=PATIENCE)))
    store = PrefixStore("svnup", store)
    if torch.cuda.is_available():
        torch.cuda.set_device(min(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count() - 1))  # too many are refused later
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    token = _store.set(store)
    try:
        yield
    finally:
        _leave(store)
        _store.reset(token)


def _leave(store: Store) -> None:
    """The first process says that it has told how the job ended; the others wait for that, since torchrun ends all with one."""
    import torch.distributed as dist

    if ended() is None:
        dist.destroy_process_group()
    with contextlib.suppress(RuntimeError):
        if is_first():
            store.set("told", "")
        elif store.check(["ended"]):
            store.wait(["told"], timedelta(seconds=FAREWELL))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While the block runs, this process shares nothing: others do something else meanwhile."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


# -- what is shared


def share(n: int) -> slice:
    """The part of n things in a row that is this process's: as many as those of others, or one more for the first ones."""
    count, number = n_processes(), rank() if n_processes() > 1 else 0
    size, rest = divmod(n, count)
    start = number * size + min(number, rest)
    return slice(start, start + size + (number < rest))


def added(tensor: Tensor) -> Tensor:
    """A tensor as the sum over all processes, in place: the same bits in each of them."""
    if n_processes() > 1:
        import torch.distributed as dist

        with _meeting():
            dist.all_reduce(tensor)
    return tensor


def total(numbers: Floats) -> Floats:
    """Numbers as their sums over all processes."""
    out: Floats = np.sum(gathered(numbers), axis=0)
    return out


def gathered(value: T) -> list[T]:
    """What each process has, in their order."""
    if n_processes() == 1:
        return [value]
    import torch.distributed as dist

    out: list[Any] = [None] * n_processes()
    with _meeting():
        dist.all_gather_object(out, value)
    return out


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, alone, in each of them."""
    if n_processes() == 1:
        return make()
    import torch.distributed as dist

    box: list[Any] = [None]
    if is_first():
        with alone():
            box = [make()]
    with _meeting():
        dist.broadcast_object_list(box, src=0)
    made: T = box[0]
    return made


def as_first(tensor: Tensor) -> Tensor:
    """A tensor as the first process has it, in place."""
    if n_processes() > 1:
        import torch
        import torch.distributed as dist

        bits = tensor.contiguous().view(torch.uint8)
        with _meeting():
            dist.broadcast(bits, src=0)
        if not tensor.is_contiguous():
            tensor.copy_(bits.view(tensor.dtype))
    return tensor


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """Where another process is missed, wait for a while for what it said in the end, or for torchrun's signal."""
    try:
        yield
    except RuntimeError as error:
        until = time.monotonic() + FAREWELL
        while (told := ended()) is None and time.monotonic() < until:
            time.sleep(0.05)
        raise Lost("another process of this job has ended, and did not say why" if told is None else told[0]) from error


# -- how it ends


def end(message: str, code: int) -> tuple[str, int]:
    """How the job ends, in words and by its exit code: as the process that ended first has said, be it this one."""
    store = _store.get()
    if store is None:
        return message, code
    with contextlib.suppress(RuntimeError):
        store.compare_set("ended", "", json.dumps([message, code]))
    return ended() or (message, code)


def ended() -> tuple[str, int] | None:
    """What the process that ended first has said, and the exit code; None while all are well."""
    store = _store.get()
    with contextlib.suppress(RuntimeError):  # the store is gone, too
        if store is not None and store.check(["ended"]):
            message, code = json.loads(store.get("ended"))
            return str(message), int(code)
    return None
