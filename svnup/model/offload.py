"""Where blocks and calibration states are while they are not computed with: one block at a time is on the device."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from svnup.files import set_aside
from svnup.memory import release_free_memory
from svnup.model.checkpoint import Tensors, read_metadata, read_tensors, save_tensors
from svnup.progress import stage

logger = logging.getLogger(__name__)
ALIGNMENT = 256  # bytes, of a parameter in its block's memory, as in torch's own


class BlockStore(Protocol):
    """Holds the blocks of a model; `states` is the folder where walks park hidden states, None for the CPU's memory."""

    states: Path | None

    def load_block(self, index: int) -> None:
        """Put a block on the device, in place of the one that is there."""
        ...

    def store_block(self, index: int, key: str, note: str) -> None:
        """The block on the device has new weights, which must outlast its stay; `note` says what was done, `key` by what."""
        ...

    def restore_block(self, index: int, key: str) -> str | None:
        """The note of a block that an interrupted process stored under the same key, whose weights are loaded; else None."""
        ...


class Incoming:
    """Weights of blocks on their way to the device; to a GPU those of the next block come while the current one computes.

    A thread reads them, copies them to pinned memory unless they lie there, and sends them on a stream of its own. The next
    block is the one above where the last step went up, as gradients do, else the one below. On a CPU nothing comes ahead: it
    would take memory and computing time from the current block.

    Args:
        read: gives the weights of a block by name, in the CPU's memory.
        device: where they go.
        n_blocks: of the model; behind the last block the first one is next.
    """

    def __init__(self, read: Callable[[int], Tensors], device: torch.device, n_blocks: int) -> None:
        self._read, self._device, self._n_blocks = read, device, n_blocks
        self._stream = torch.cuda.Stream(device) if getattr(device, "type", None) == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "svnup-incoming")
        self._ahead: tuple[int, Future[tuple[Tensors, torch.cuda.Event]]] | None = None
        self._last = -1

    def take(self, index: int) -> Tensors:
        """The weights of a block, on the device; to a GPU the next block begins to come."""
        if self._stream is None:
            return {name: value.to(self._device) for name, value in self._read(index).items()}
        coming = self._ahead[1] if self._ahead is not None and self._ahead[0] == index else self._begin(index)
        weights, sent = coming.result()
        following = (index - 1 if index == self._last - 1 else index + 1) % self._n_blocks
        self._last = index
        self._ahead = (following, self._begin(following)) if following != index else None
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(sent)
        for value in weights.values():
            value.record_stream(computing)  # or its memory could be given away while the block still computes
        return weights

    def _begin(self, index: int) -> Future[tuple[Tensors, torch.cuda.Event]]:
        return self._thread.submit(self._send, index)

    def drop(self, index: int) -> None:
        """Forget that a block comes ahead, since its weights have changed."""
        if self._ahead is not None and self._ahead[0] == index:
            self._ahead = None

    def _send(self, index: int) -> tuple[Tensors, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            sent = {n: value.pin_memory().to(self._device, non_blocking=True) for n, value in self._read(index).items()}
            event = torch.cuda.Event()
            event.record()
        return sent, event


class HostBlockStore:
    """Blocks live in the CPU's memory, and one at a time is copied to the device; for a GPU that memory is pinned."""

    states: Path | None = None

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self._blocks = blocks
        if getattr(device, "type", None) == "cuda":
            _pin(blocks, device, self)
        self._here: int | None = None
        self._homes: list[Tensors] = [{name: p.data for name, p in block.named_parameters()} for block in blocks]
        self._incoming = Incoming(self._homes.__getitem__, device, len(blocks))

    def load_block(self, index: int) -> None:
        if index == self._here:
            return
        self._leave()
        weights = self._incoming.take(index)
        self._here = index
        for name, p in self._blocks[index].named_parameters():
            p.data = weights[name]

    def _leave(self) -> None:
        if self._here is not None:
            for name, p in self._blocks[self._here].named_parameters():
                p.data = self._homes[self._here][name]
        self._here = None

    def store_block(self, index: int, key: str, note: str) -> None:
        self.load_block(index)
        for name, p in self._blocks[index].named_parameters():
            self._homes[index][name].copy_(p.data)

    def restore_block(self, index: int, key: str) -> str | None:
        return None


def _pin(blocks: nn.ModuleList, device: torch.device, owner: object) -> None:
    """Move the parameters of blocks to memory that a GPU reads by itself, as long as `owner` lives.

    Copied into pinned memory by the host each time, weights come at less than half of what the bus carries. A block has one
    piece of plain memory that is registered: torch's own pinned memory comes in powers of two, and tensors may be parts of a
    mapped file, which is not there to be locked. Where the system locks no more memory, the other blocks stay as they are.
    """
    runtime, pinned = torch.cuda.cudart(), list[Tensor]()
    weakref.finalize(owner, _unpin, pinned, device).atexit = False  # the process frees them by itself
    with stage("pinning blocks", len(blocks), "blocks") as advance:
        for index, block in enumerate(blocks):
            parameters = list(block.parameters())
            if not parameters:
                advance(1)
                continue
            sizes = [-(-p.nbytes // ALIGNMENT) * ALIGNMENT for p in parameters]
            memory = torch.empty(sum(sizes), dtype=torch.uint8)
            if error := int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)):
                with contextlib.suppress(RuntimeError):  # the next launch reports that error and forgets it
                    torch.zeros(1, device=device)
                logger.warning(
                    "offload=cpu: blocks from %d on are not pinned (CUDA error %d) and come more slowly", index, error
                )
                return
            pinned.append(memory)
            for p, piece in zip(parameters, memory.split(sizes), strict=True):
                p.data = piece[: p.nbytes].view(p.dtype).view(p.shape).copy_(p.data)
            advance(1)


def _unpin(pinned: list[Tensor], device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a block may be on its way
    for memory in pinned:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


class DiskBlockStore:
    """Blocks live in a checkpoint, and what becomes of them in files of the folder `scratch`: for models larger than memory.

    `read` gives the parameters of a block by name, as the checkpoint has them. The files outlast the process, so that an
    interrupted pruning goes on where it was, if the model has the same `identity`; without a folder they go with the object.
    Raises ValueError where another process uses the folder.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        read: Callable[[int], Tensors],
        device: torch.device,
        scratch: Path | None,
        identity: str,
    ) -> None:
        self._blocks, self._read, self._device = blocks, read, device
        self._incoming = Incoming(self._weights, device, len(blocks))
        self._temporary = tempfile.TemporaryDirectory(prefix="svnup-") if scratch is None else None
        self._scratch = scratch if scratch is not None else Path(self._temporary.name)  # type: ignore[union-attr]
        self._identity = identity
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self._scratch)
        self.states: Path | None = self._scratch / "states"
        shutil.rmtree(self.states, ignore_errors=True)  # of a process that was killed
        self.states.mkdir()
        self._here: int | None = None
        self._changed: set[int] = set()

    def load_block(self, index: int) -> None:
        if index != self._here:
            self._leave()  # before the next one is read: on a CPU there is memory for one
            self._put(index, self._incoming.take(index))

    def store_block(self, index: int, key: str, note: str) -> None:
        self.load_block(index)
        weights = {name: p.data.cpu() for name, p in self._blocks[index].named_parameters()}
        save_tensors(weights, self._path(index), {"key": self._full(key), "note": note})
        self._changed.add(index)

    def restore_block(self, index: int, key: str) -> str | None:
        path = self._path(index)
        try:
            metadata = read_metadata(path) if path.is_file() else {}
            if metadata.get("key") != self._full(key):
                return None
            weights = read_tensors(path)
        except ValueError as error:
            logger.warning("%s; it is set aside as %s, and its block is pruned again", error, set_aside(path).name)
            return None
        self._leave()
        self._incoming.drop(index)
        self._put(index, weights)
        self._changed.add(index)
        return metadata["note"]

    def _weights(self, index: int) -> Tensors:
        return read_tensors(self._path(index)) if index in self._changed else self._read(index)

    def _full(self, key: str) -> str:
        return f"{self._identity} {key}"

    def _path(self, index: int) -> Path:
        return self._scratch / f"block-{index:05d}.safetensors"

    def _leave(self) -> None:
        if self._here is not None:
            empty(self._blocks[self._here])
            release_free_memory()
        self._here = None

    def _put(self, index: int, weights: Tensors) -> None:
        fill(self._blocks[index], weights, self._device)
        self._here = index


def _locked(folder: Path) -> FileLock:
    """A lock that no other process can have until this one is let go, or its process ends."""
    lock = FileLock(folder / "lock", is_singleton=True, thread_local=False)  # one process may have several shelves there
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"offload=disk: another process works in {folder}; wait for it, or use another results_dir") from None
    return lock


def fill(module: nn.Module, weights: Tensors, device: torch.device) -> None:
    """Give a module's empty parameters their values, in the dtype that they have, on a device.

    Raises ValueError where a value has another shape.
    """
    for name, value in weights.items():
        owner, leaf = _owner(module, name)
        place = owner._parameters[leaf]
        assert place is not None
        if value.shape != place.shape:
            raise ValueError(f"{name} has shape {list(value.shape)} in the checkpoint, and {list(place.shape)} in the model")
        owner._parameters[leaf] = nn.Parameter(value.to(device, place.dtype), requires_grad=False)


def empty(module: nn.Module) -> None:
    """Take a module's parameters out of memory; shapes and dtypes stay."""
    for name, p in list(module.named_parameters()):
        owner, leaf = _owner(module, name)
        owner._parameters[leaf] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
