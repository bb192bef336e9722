"""The hash of a tensor, by which weights are recognised."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2**25  # bytes that come from a GPU at once
_own = threading.local()


def tensor_sha256(name: str, tensor: Tensor) -> bytes:
    """SHA-256 of a tensor with its name, dtype and shape; threads may call it at once."""
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    for chunk in chunks(tensor.detach()):
        digest.update(chunk.numpy().data)
    return digest.digest()


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor in the CPU's memory, one chunk after the other; each is valid until the next is asked for.

    Those of a GPU come by way of a pinned buffer of this thread: memory that is new and not pinned is many times slower.
    """
    if tensor.is_cuda and tensor.is_contiguous():
        yield from through(_buffer(), tensor)
    else:
        yield _bytes(tensor.cpu().contiguous())


def through(buffer: Tensor, tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a contiguous tensor, copied into a buffer chunk by chunk."""
    for chunk in _bytes(tensor).split(len(buffer)):
        yield buffer[: len(chunk)].copy_(chunk)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _buffer() -> Tensor:
    if not hasattr(_own, "buffer"):
        _own.buffer = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)
    buffer: Tensor = _own.buffer
    return buffer
