"""Checkpoints on disk, read and written a few tensors at a time: Hugging Face safetensors, and the bitmask format.

The bitmask format stores what pruning left: for each pruned matrix its kept values and one packed bit per weight.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svnup.claims import claimed
from svnup.files import naming, remove, replacing, sealed, take_place, unfinished, unsealed

INDEX = "model.safetensors.index.json"
NOT_SAFETENSORS = "no safetensors checkpoint; save the model once more with safe_serialization, or use offload=none"
BITMASK = "svnup_bitmask.json"
BITMASK_VERSION = 1
CRC = "svnup_crc32"  # in a file's metadata: the checksum of each of its tensors
POINTER = b"version https://git-lfs"  # how what git-lfs leaves in place of a file begins
POINTS_ELSEWHERE = "is what git-lfs leaves in place of a file; get the file with git lfs pull"
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of a number
Tensors = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a checkpoint that is read when its numbers are asked for, by `[...]`, as transformers' loader does.

    `outline` is a tensor of its shape and dtype without memory.
    """

    checkpoint: Checkpoint
    name: str
    outline: Tensor

    def __getitem__(self, index: Any) -> Tensor:
        return self.checkpoint.read([self.name])[self.name][index]

    @property
    def dtype(self) -> torch.dtype:
        return self.outline.dtype

    def is_floating_point(self) -> bool:
        return self.outline.is_floating_point()


class Checkpoint:
    """A checkpoint folder whose tensors are read by name, whatever their files: one safetensors file, shards, or bitmask.

    Raises ValueError where the folder has none of these, or a tensor is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._shapes: dict[str, list[int]] = {}  # of the matrices that are packed
        single, index = self.folder / "model.safetensors", self.folder / INDEX
        if is_bitmask(self.folder):
            version, files, shapes = _read_json(self.folder / BITMASK, "version", "files", "shapes")
            if version != BITMASK_VERSION:
                raise ValueError(f"{self.folder}: bitmask version {version}; this svnup reads {BITMASK_VERSION}")
            self._files = _inside(self.folder / BITMASK, files)
            self._shapes = self._shapes_of_packed(shapes)
        elif index.is_file():
            self._files = files_of_index(index)
        elif single.is_file():
            with _opened(single) as file:
                self._files = dict.fromkeys(file.keys(), single.name)
        else:
            raise ValueError(f"{self.folder}: {NOT_SAFETENSORS}")

    @classmethod
    def of_files(cls, files: Iterable[Path]) -> Self:
        """The checkpoint that safetensors files make together, whatever their names; they lie in one folder."""
        checkpoint = cls.__new__(cls)
        paths = list(files)
        checkpoint.folder, checkpoint._shapes, checkpoint._files = Path(*paths[:1]).parent, {}, {}
        for path in paths:
            with _opened(path) as file:
                checkpoint._files |= dict.fromkeys(file.keys(), path.name)
        return checkpoint

    def _shapes_of_packed(self, shapes: Any) -> dict[str, list[int]]:
        """Checked, so that none asks for memory that its bits, one a weight, do not account for."""
        damaged = f"{self.folder / BITMASK}: is damaged"
        if not isinstance(shapes, dict):
            raise ValueError(f"{damaged}: its shapes are no object; copy the checkpoint again")
        for name, shape in shapes.items():
            if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError(f"{damaged}: {name} has shape {shape}; copy the checkpoint again")
            if lacking := next((part for part in ("values", "bits") if f"{name}.{part}" not in self._files), None):
                raise ValueError(f"{damaged}: it names no file for {name}.{lacking}; copy the checkpoint again")
        return shapes

    def stored(self) -> dict[str, StoredTensor]:
        """Every tensor by its name, to be read one at a time."""
        out: dict[str, StoredTensor] = {}
        for names in self.by_file():
            with _opened(self.folder / self._files[self._key(names[0])]) as file:
                out |= {name: StoredTensor(self, name, self._outline(file, name)) for name in names}
        return out

    def names(self) -> list[str]:
        """Names of the tensors, as in the model's state dict."""
        packed = {f"{name}.{part}" for name in self._shapes for part in ("values", "bits")}
        return [name for name in self._files if name not in packed] + list(self._shapes)

    def files(self) -> list[str]:
        """Names of the files that hold the tensors, each once."""
        return sorted(set(self._files.values()))

    def identity(self) -> str:
        """Changes when a file is written anew; nothing is read for it."""
        files = [self.folder / name for name in self.files()]
        return f"{self.folder.resolve()} {[(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]}"

    def by_file(self) -> list[list[str]]:
        """Names of the tensors, those of one file together."""
        groups: dict[str, list[str]] = {}
        for name in self.names():
            groups.setdefault(self._files[self._key(name)], []).append(name)
        return list(groups.values())

    def read(self, names: Iterable[str]) -> Tensors:
        """The tensors of these names on the CPU, packed ones as the dense matrices that they were; each file is opened once."""
        groups: dict[str, list[str]] = {}
        for name in names:
            if self._key(name) not in self._files:
                raise ValueError(f"{self.folder}: the checkpoint has no tensor {name}")
            groups.setdefault(self._files[self._key(name)], []).append(name)
        out: Tensors = {}
        for file_name, wanted in groups.items():
            with _opened(self.folder / file_name) as file:
                for name in wanted:
                    out[name] = self._unpacked(file, name) if name in self._shapes else self._stored(file, name).clone()
        return out

    def _outline(self, file: Any, name: str) -> Tensor:
        try:
            kept = file.get_slice(self._key(name))
        except SafetensorError as error:
            raise ValueError(f"{self.folder}: cannot be read ({error}); copy the checkpoint again") from None
        shape = self._shapes.get(name, kept.get_shape())
        dtype = kept[:0].dtype if kept.get_shape() else kept[...].dtype
        return torch.empty(shape, dtype=dtype, device="meta")

    def _key(self, name: str) -> str:
        """Under which a tensor, or its kept values, is stored."""
        return f"{name}.values" if name in self._shapes else name

    def _stored(self, file: Any, name: str) -> Tensor:
        try:
            out: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.folder}: cannot be read ({error}); copy the checkpoint again") from None
        _check_sum(self.folder / self._files[name], file, name, out)
        return out

    def _unpacked(self, file: Any, name: str) -> Tensor:
        values, bits, shape = self._stored(file, f"{name}.values"), self._stored(file, f"{name}.bits"), self._shapes[name]
        if bits.dtype != torch.uint8 or bits.dim() != 1 or values.dim() != 1 or len(bits) != -(-math.prod(shape) // 8):
            raise ValueError(f"{self.folder}: {name} is damaged: its bits are not those of shape {shape}; copy it again")
        keep = unpack(bits, shape)
        if int(keep.sum()) != len(values):
            raise ValueError(f"{self.folder}: {name} is damaged: {int(keep.sum())} bits for {len(values)} values")
        return torch.zeros(shape, dtype=values.dtype).masked_scatter_(keep, values)


def files_of_index(index: Path) -> dict[str, str]:
    """The file of each tensor by a checkpoint's index; raises ValueError where one lies outside the index's folder."""
    return _inside(index, *_read_json(index, "weight_map"))


def _inside(index: Path, files: Any) -> dict[str, str]:
    """The checked names of files by those of tensors: a checkpoint is its folder, and names nothing outside."""
    if not isinstance(files, dict):
        raise ValueError(f"{index}: does not name the file of each tensor; copy the checkpoint again")
    for tensor, name in files.items():
        if (
            not isinstance(name, str)
            or not name
            or "\0" in name
            or Path(name).is_absolute()
            or ".." in re.split(r"[/\\]", name)
        ):
            raise ValueError(
                f"{index}: says that {tensor} is in {name!r}, which is no file of its folder; copy the checkpoint again"
            )
    return files


def is_pointer(path: Path) -> bool:
    """Whether git-lfs has left a pointer in place of the file."""
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def is_bitmask(folder: str | Path) -> bool:
    return (Path(folder) / BITMASK).is_file()


def pack(bits: Tensor) -> Tensor:
    """bool of any shape to uint8 (ceil(numel / 8),), the first bit highest."""
    return torch.from_numpy(np.packbits(bits.cpu().numpy().reshape(-1)))


def unpack(packed: Tensor, shape: Iterable[int]) -> Tensor:
    """The bool tensor of that shape which was packed."""
    size = tuple(shape)
    count = int(np.prod(size))
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool)).reshape(size)


def write_dense(folder: Path, groups: Iterable[Tensors]) -> None:
    """Write a checkpoint that `from_pretrained` reads, a file for each part; the folder must be there."""
    files: dict[str, str] = {}
    size = 0
    for number, part in enumerate(groups, 1):
        file = f"model-{number:05d}.safetensors"
        save_tensors(part, folder / file)
        files |= dict.fromkeys(part, file)
        size += sum(t.numel() * t.element_size() for t in part.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": files})


def write_bitmask(folder: Path, groups: Iterable[Tensors], pruned: Collection[str]) -> None:
    """Write a bitmask checkpoint, a file for each part; the tensors named in `pruned` are packed, bit for bit restorable."""
    files: dict[str, str] = {}
    shapes = {}
    for number, part in enumerate(groups, 1):
        stored: Tensors = {}
        for name, tensor in part.items():
            if name not in pruned:
                stored[name] = tensor
                continue
            bits = tensor.detach().cpu().contiguous().view(BITS[tensor.element_size()])
            keep = bits != 0  # not of the number: a minus zero must come back as one
            values = torch.from_numpy(bits.numpy()[keep.numpy()]).view(tensor.dtype)  # numpy's way takes no memory beside
            stored |= {f"{name}.values": values, f"{name}.bits": pack(keep)}
            shapes[name] = list(tensor.shape)
        file = f"bitmask-{number:05d}.safetensors"
        save_tensors(stored, folder / file)
        files |= dict.fromkeys(stored, file)
    _write_json(folder / BITMASK, sealed({"version": BITMASK_VERSION, "files": files, "shapes": shapes}))


def expand(source: str | Path, target: str | Path) -> None:
    """Turn a bitmask checkpoint into a dense one that `from_pretrained` reads, with the same configuration and tokenizer.

    Raises ValueError where the source is none, or the target exists.
    """
    source, target = Path(source), Path(target)
    if not is_bitmask(source):
        raise ValueError(f"{source}: no {BITMASK} there; give a folder that save_format=bitmask wrote")
    checkpoint = Checkpoint(source)

    def fill(folder: Path) -> None:
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name != BITMASK:
                shutil.copy2(file, folder / file.name)
        write_dense(folder, (checkpoint.read(names) for names in checkpoint.by_file()))

    if target.exists():
        raise ValueError(f"{target}: exists already; name a new folder")
    in_place(target, fill)


def in_place(folder: Path, fill: Callable[[Path], object]) -> None:
    """Fill a folder that appears only when it is complete, in place of one that was there; one that fails leaves nothing.

    Of several processes that do so at once each waits for the one before it.
    """
    with claimed(folder.with_name(f".{folder.name}.lock")):
        for old in folder.parent.glob(f".{folder.name}.old.*") if not folder.exists() else ():
            old.rename(folder)  # of a process that was killed between two renames
        partial = unfinished(folder)
        remove(partial)
        try:
            partial.mkdir()
            with naming(folder):
                fill(partial)
            take_place(partial, folder)
        finally:
            remove(partial)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        if path.is_file() and is_pointer(path):
            raise ValueError(f"{path}: {POINTS_ELSEWHERE}") from None
        raise ValueError(f"{path}: cannot be read ({error}); copy the checkpoint again") from None


def save_tensors(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Atomically, so that a file that is there is a whole one; with a checksum of each tensor. The same tensors make the same
    bytes."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    sums = {name: _sum(tensor) for name, tensor in contiguous.items()}
    with replacing(path) as partial:
        save_file(contiguous, partial, metadata={"format": "pt", CRC: json.dumps(sums)} | (metadata or {}))
        _order_metadata(partial)


def _order_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order, which the library writes in another one each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same values in compact form"
        file.seek(8)
        file.write(text.ljust(size))


def read_tensors(path: Path) -> Tensors:
    """All tensors of one safetensors file, on the CPU; raises ValueError where one is not that of its checksum."""
    with _opened(path) as file:
        out = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        for name, tensor in out.items():
            _check_sum(path, file, name, tensor)
        return out


def _sum(tensor: Tensor) -> int:
    """The checksum of a tensor's bytes, shape and dtype."""
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode(), zlib.crc32(data))


def _check_sum(path: Path, file: Any, name: str, tensor: Tensor) -> None:
    """Raise ValueError where a tensor is not what was written; files of others, and of earlier versions, have no checksums."""
    told = (file.metadata() or {}).get(CRC)
    if told is None:
        return
    try:
        right = json.loads(told).get(name) == _sum(tensor)
    except (ValueError, AttributeError):
        right = False
    if not right:
        raise ValueError(f"{path}: {name} is damaged: it is not that of its checksum; copy the file again, or make it anew")


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors."""
    with _opened(path) as file:
        return file.metadata() or {}


def _read_json(path: Path, *keys: str) -> list[Any]:
    """The values of these keys."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); copy the checkpoint again") from None
    try:
        data = unsealed(data) if isinstance(data, dict) else data
        return [data[key] for key in keys]
    except ValueError as error:
        raise ValueError(f"{path}: is damaged: {error}; copy the checkpoint again") from None
    except (KeyError, TypeError):
        raise ValueError(f"{path}: lacks one of {', '.join(keys)}; copy the checkpoint again") from None


def _write_json(path: Path, data: dict[str, Any]) -> None:
    with naming(path):
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
