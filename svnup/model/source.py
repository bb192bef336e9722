"""The model of a job: what is known before any weight is loaded, and how to load it. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from svnup.files import at_home, means_folder
from svnup.model import smollm2

if TYPE_CHECKING:
    from svnup.model.language_model import LanguageModel
    from svnup.model.loading import Loader
    from svnup.types import Offload

BUILT_IN = "svnup/tiny"
BUILT_IN_FOLDER = Path(__file__).parents[1] / "assets" / "tiny"
SHIPPED = {f"svnup/{name}": BUILT_IN_FOLDER.with_name(name) for name in ("tiny", "tiny_opt", "tiny_moe")}
FETCHED = {smollm2.NAME: smollm2.COMMAND}  # the command that installs a model in the user's cache
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
NO_FOLDER = "there is no such folder; give a checkpoint folder or a hub name (organisation/name)"
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def own_folder(name: str) -> Path | None:
    """The folder of a model that svnup ships or installs; None for other names."""
    return smollm2.checkpoint_folder() if name in FETCHED else SHIPPED.get(name)


def _check_known(dense_ppl: list[dict[str, Any]]) -> None:
    for row in dense_ppl:
        told = isinstance(row, dict) and row.keys() >= set(KNOWN)
        if not told or not all(type(row[key]) in (int, float) and row[key] > 0 for key in ("seq_len", "ppl")):
            raise ValueError(f"dense_ppl={row}: needs {', '.join(KNOWN)}, with a ppl above 0; or dense_ppl=[]")


def _check_device_name(device: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"device={device}: choose auto, cpu, cuda or cuda:<number>")


class Model(Protocol):
    """The model of a job; a frozen dataclass of its options.

    Only `load` reads weights. Checks and properties raise ValueError that names the option at fault. A model with dequantized
    weights has a method `dequantized_from() -> dict`, which says from what.
    """

    dense_ppl: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The name of the model in results."""
        ...

    @property
    def dtype(self) -> str:
        """As given: auto, or a name of torch."""
        ...

    @property
    def device(self) -> str:
        """As given: auto, or a name of torch."""
        ...

    @property
    def from_hub(self) -> bool:
        """Whether the model comes from the Hub."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        ...

    def n_blocks(self) -> int:
        """Number of blocks."""
        ...

    def check_offload(self, offload: Offload) -> None:
        """Raise ValueError if the blocks of this model cannot be offloaded to that place."""
        ...

    def check_device(self) -> None:
        """Raise ValueError if the device does not exist."""
        ...

    def fingerprint(self) -> str:
        """A text that identifies the weights, found without loading them."""
        ...

    def skeleton(self) -> LanguageModel:
        """The model on the meta device: shapes without weights."""
        ...

    def load(self, offload: Offload = "none", scratch: Path | None = None) -> LanguageModel:
        """Load the model; the arguments are those of `LanguageModel.load`."""
        ...


KNOWN = ("dataset", "seq_len", "ppl", "source")  # of a dense perplexity


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A checkpoint folder, a Hub model, or a model of svnup (`own_folder`); names as in transformers' `from_pretrained`.

    Args:
        gguf_file: a GGUF file of the folder or Hub model, which is dequantized and read in place of a checkpoint.
        seq_len: default sequence length in tokens.
        test_text: the data set whose perplexity is reported by default.
        test_tasks: the tasks whose accuracy is reported by default.
        dense_ppl: known perplexities of the dense model, each {dataset, seq_len, ppl, source}, with n_windows if the number of
            windows of that length is known.
    """

    pretrained_model_name_or_path: str
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    device_map: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    blocks_path: str | None = None
    gguf_file: str | None = None
    seq_len: int = 2048
    test_text: str = "wikitext2"
    test_tasks: str = "with_rte"
    dense_ppl: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_device_name(self.device)
        _check_known(self.dense_ppl)
        for package in ("gguf", "accelerate") if self.gguf_file is not None else ():
            if find_spec(package) is None:
                raise ValueError(f"gguf_file={self.gguf_file}: needs the package {package}; pip install 'svnup[gguf]'")
        if self.device_map is None:
            return
        if self.device_map not in DEVICE_MAPS:
            raise ValueError(f"device_map={self.device_map}: choose {', '.join(DEVICE_MAPS)}, or null for one device")
        if find_spec("accelerate") is None:
            raise ValueError(
                f"device_map={self.device_map}: needs accelerate; pip install 'svnup[device-map]', or device_map=null"
            )

    @property
    def name(self) -> str:
        return self.pretrained_model_name_or_path

    @property
    def from_hub(self) -> bool:
        return not self._is_local

    @property
    def _source(self) -> str:
        """The folder or name that transformers is given."""
        given = self.pretrained_model_name_or_path
        if (own := own_folder(given)) is not None:
            return str(own)
        return str(at_home("pretrained_model_name_or_path", given)) if self._is_local else given

    @property
    def _is_local(self) -> bool:
        """Whether the name is a folder, or can only mean one."""
        given = self.pretrained_model_name_or_path
        return own_folder(given) is not None or means_folder(given) or Path(given).exists()

    @cached_property
    def _config_file(self) -> Path:
        """The file that describes the model: its config.json, or the GGUF file."""
        given, name = f"pretrained_model_name_or_path={self.pretrained_model_name_or_path}", self.gguf_file or "config.json"
        if self._is_local:
            folder = Path(self._source)
            if folder.suffix == ".gguf" and folder.is_file():
                raise ValueError(f"{given}: is one file; give its folder, and gguf_file={folder.name}")
            command = FETCHED.get(self.pretrained_model_name_or_path)
            if command is not None and not (folder / "config.json").is_file():
                raise ValueError(f"{given}: not in {folder} yet; run {command}, which takes about two minutes")
            if not folder.is_dir():
                raise ValueError(f"{given}: {NO_FOLDER}")
            if not (folder / name).is_file():
                there = sorted(path.name for path in folder.glob("*.gguf"))
                if self.gguf_file is not None:
                    raise ValueError(f"gguf_file={name}: no such file in {folder}; it has {', '.join(there) or 'no GGUF file'}")
                way = f"add model.gguf_file={there[0]}" if there else "give a folder written by save_pretrained"
                raise ValueError(f"{given}: the folder has no config.json; {way}")
            return folder / name
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(given.partition("=")[2], name, revision=self.revision))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{given}: is not a local folder and could not be downloaded from the Hub ({type(error).__name__}: {reason}); "
                "check the name, go online (if gated, accept its licence and use hf auth login), or give a local folder"
            ) from None

    @cached_property
    def _config(self) -> dict[str, Any]:
        """The content of config.json, or the config of the GGUF file."""
        path = self._config_file
        if self.gguf_file is not None:
            out: dict[str, Any] = self._loader.config.to_dict()
            return out
        wrong = f"pretrained_model_name_or_path={self.pretrained_model_name_or_path}: its config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{wrong} cannot be read ({error}); check its permissions, or copy it again") from None
        except ValueError as error:
            from svnup.model.checkpoint import POINTS_ELSEWHERE, is_pointer

            what = POINTS_ELSEWHERE if is_pointer(path) else f"is not JSON ({error}); copy it again"
            raise ValueError(f"{wrong} {what}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{wrong} is not a JSON object; copy it again")
        return config

    def n_blocks(self) -> int:
        """Number of blocks of the language model by its configuration; raises ValueError if that does not say."""
        usual, config = "num_hidden_layers", self._config
        if type(config.get(usual)) is int and config[usual] > 0 and not any(key.endswith("_config") for key in config):
            return int(config[usual])  # the fast path: transformers, which knows all other names, takes seconds to import
        depth = getattr(self._loader.config.get_text_config(), usual, None)
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(
                f"pretrained_model_name_or_path={self.pretrained_model_name_or_path}: {usual}={depth} in config.json is "
                "not a number of blocks; copy it again, or give another model"
            )
        return depth

    def check_offload(self, offload: Offload) -> None:
        """Raise ValueError if the blocks of this model cannot be offloaded to that place."""
        if offload != "none" and self.device_map is not None:
            raise ValueError(
                f"device_map={self.device_map}: spreads the model itself; use device_map=null with offload={offload}"
            )
        if self.device_map is not None and self._is_local:
            from svnup.model.checkpoint import is_bitmask

            if is_bitmask(self._source):
                raise ValueError(
                    f"device_map={self.device_map}: a bitmask checkpoint is loaded to one device; use device_map=null, or "
                    "make a dense one with svnup-expand"
                )
        if offload == "disk" and self.gguf_file is not None:
            raise ValueError(f"offload=disk: gguf_file={self.gguf_file} is not read block by block; use offload=none or cpu")
        if offload == "disk" and self._is_local:
            from svnup.model.checkpoint import Checkpoint

            folder = self._config_file.parent
            try:
                Checkpoint(folder)
            except ValueError as error:
                reason = str(error).removeprefix(f"{folder}/").removeprefix(f"{folder}: ")
                raise ValueError(f"pretrained_model_name_or_path={self.pretrained_model_name_or_path}: {reason}") from error

    def check_device(self) -> None:
        """Raise ValueError if the device does not exist."""
        from svnup.model.language_model import pick_device

        pick_device(self.device)

    def fingerprint(self) -> str:
        """SHA-256 of a local checkpoint's files, or the commit of a Hub model."""
        if not self._is_local:
            return f"{self.pretrained_model_name_or_path}@{self._config_file.parent.name}"
        if self.gguf_file is not None:
            return self._gguf_sha256
        return self._folder_sha256

    @cached_property
    def _folder_sha256(self) -> str:
        total = hashlib.sha256()
        for path in sorted(self._config_file.parent.iterdir()):
            if path.suffix in (".safetensors", ".bin", ".json", ".model", ".txt") and path.is_file():
                total.update(path.name.encode())
                with path.open("rb") as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    @cached_property
    def _gguf_sha256(self) -> str:
        with self._config_file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def dequantized_from(self) -> dict[str, Any] | None:
        """What the weights were dequantized from; None if they are used as they are stored.

        Returns:
            For a GGUF file its name, SHA-256 and the number of tensors of each type; for another quantized checkpoint, or one
            that was dequantized before it was saved, what its config.json says.
        """
        if self.gguf_file is None:
            if (origin := self._config.get(smollm2.ORIGIN)) is not None:
                return dict(origin)
            stored = self._config.get("quantization_config")
            return {"quantization_config": stored} if stored else None
        from gguf import GGUFReader

        types = Counter(tensor.tensor_type.name for tensor in GGUFReader(self._config_file).tensors)
        return {"gguf_file": self.gguf_file, "sha256": self._gguf_sha256, "tensors": dict(types.most_common())}

    @cached_property
    def tokenizer(self) -> Any:
        return self._loader.tokenizer()

    @cached_property
    def _loader(self) -> Loader:
        from svnup.model.loading import Loader

        return Loader(
            source=self._source,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            device_map=self.device_map,
            gguf_file=self.gguf_file,
        )

    def skeleton(self) -> LanguageModel:
        """The model on the meta device; names and shapes of a local checkpoint's tensors are checked against it."""
        from svnup.model.language_model import LanguageModel

        lm = LanguageModel(self._loader.outline(), None, self.blocks_path)
        if self._is_local and self.gguf_file is None:
            self._loader.check()
        return lm

    def load(self, offload: Offload = "none", scratch: Path | None = None) -> LanguageModel:
        from svnup.model.language_model import LanguageModel

        places: dict[str, Any] = {"device": self.device, "blocks_path": self.blocks_path, "offload": offload}
        return LanguageModel.from_loader(self._loader, self.tokenizer, scratch=scratch, **places)


# Of a random model: sizes beyond those of any model are a slip of the pen, and some would be built for hours.
LARGEST = {
    "num_hidden_layers": 1000,
    "hidden_size": 2**17,
    "intermediate_size": 2**19,
    "num_attention_heads": 2**13,
    "max_position_embeddings": 2**24,
    "vocab_size": 2**22,
}


@dataclass(frozen=True, kw_only=True)
class Random:
    """A model of any Llama or OPT shape with random weights and the built-in tokenizer; names as in transformers' configs."""

    model_type: Literal["llama", "opt"] = "llama"
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    vocab_size: int = 2048
    max_position_embeddings: int = 2048
    seed: int = 0
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"
    seq_len: int = 128
    test_text: str = "docs"
    test_tasks: str = "cloze"
    dense_ppl: list[dict[str, Any]] = field(default_factory=list)
    from_hub: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_device_name(self.device)
        _check_known(self.dense_ppl)
        heads = self.num_key_value_heads
        for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"):
            if not 1 <= getattr(self, name) <= LARGEST[name]:
                raise ValueError(f"{name}={getattr(self, name)}: choose at least 1, and at most {LARGEST[name]:,}")
        if self.vocab_size > LARGEST["vocab_size"]:
            raise ValueError(f"vocab_size={self.vocab_size}: choose 2,048 to {LARGEST['vocab_size']:,}")
        if heads is not None and (heads < 1 or self.num_attention_heads % heads):
            raise ValueError(f"num_key_value_heads={heads}: must divide num_attention_heads={self.num_attention_heads}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size}: must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.vocab_size < 2048:
            raise ValueError(f"vocab_size={self.vocab_size}: the built-in tokenizer has 2048 tokens; choose 2048 or more")

    @property
    def name(self) -> str:
        return f"random_{self.model_type}_{self.num_hidden_layers}x{self.hidden_size}"

    def n_blocks(self) -> int:
        return self.num_hidden_layers

    def check_offload(self, offload: Offload) -> None:
        if offload == "disk":
            raise ValueError("offload=disk: random weights have no checkpoint on disk; use offload=cpu or none")

    def check_device(self) -> None:
        from svnup.model.language_model import pick_device

        pick_device(self.device)

    def fingerprint(self) -> str:
        return "determined by the configuration"

    def dequantized_from(self) -> None:
        return None

    @cached_property
    def tokenizer(self) -> Any:
        from svnup.model.loading import read_tokenizer

        return read_tokenizer(str(BUILT_IN_FOLDER))

    def _config(self) -> Any:
        from svnup.model.language_model import make_config

        shape = {
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        if self.model_type == "opt":
            own: dict[str, Any] = {
                "ffn_dim": self.intermediate_size,
                "word_embed_proj_dim": self.hidden_size,
                "pad_token_id": 1,
            }
        else:
            heads = self.num_key_value_heads or self.num_attention_heads
            own = {"intermediate_size": self.intermediate_size, "num_key_value_heads": heads}
        try:
            return make_config(self.model_type, **shape, **own)
        except Exception as error:  # transformers has its own checks, of many classes
            why = " ".join(str(error).split()).rpartition("ValueError: ")[2]
            raise ValueError(
                f"model.hidden_size={self.hidden_size}: transformers makes no {self.model_type} of this shape ({why}); "
                "change it or model.num_attention_heads"
            ) from None

    def skeleton(self) -> LanguageModel:
        from svnup.model.language_model import LanguageModel

        return LanguageModel.skeleton(self._config())

    def load(self, offload: Offload = "none", scratch: Path | None = None) -> LanguageModel:
        from svnup.model.language_model import LanguageModel

        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "offload": offload}
        return LanguageModel.random(self._config(), self.tokenizer, seed=self.seed, **options)
