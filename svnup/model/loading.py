"""Load models with transformers and account for every tensor, as a whole or block by block.

Renaming, conversion, dequantization and tying of weights are left to transformers: its loader is asked what it would load
(`Loader.check`), loads all (`Loader.load`), or loads all but the blocks and these one at a time (`Loader.without_blocks`).
A checkpoint that lacks a tensor of the model, or has one that the model would drop, is refused, where transformers fills in
random numbers or ignores the tensor, and warns.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    __version__,
    modeling_gguf_pytorch_utils,
)
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from svnup.files import means_folder
from svnup.model.checkpoint import (
    INDEX,
    NOT_SAFETENSORS,
    POINTS_ELSEWHERE,
    Checkpoint,
    StoredTensor,
    Tensors,
    files_of_index,
    is_bitmask,
    is_pointer,
)
from svnup.model.source import NO_FOLDER

logger = logging.getLogger(__name__)
KEY = "pretrained_model_name_or_path"
COMPANIONS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")
WRITTEN_IN_JSON = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX}
INDEXES = (INDEX, "pytorch_model.bin.index.json")
SHOWN = 3  # names in a message
LONGEST_REASON = 300  # characters
FIX = f"copy its files again, or, where they are whole, try another version of transformers than {__version__}"


@contextlib.contextmanager
def one_line_errors(name: str, what: str, gguf_file: str | None = None) -> Iterator[None]:
    """Context that turns what a library raises on a checkpoint into a ValueError of one line.

    The message names the damaged file if it can be found. Running out of memory is no fault of the checkpoint and is passed on.

    Args:
        name: the checkpoint folder or the name on the Hub.
        what: what fails, as "cannot be loaded".
        gguf_file: the GGUF file that is read instead, if any.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, _Outlined):
        raise
    except Exception as error:
        given = _option(name, gguf_file)
        if isinstance(error, ValueError) and str(error).startswith((f"{given}: ", "offload=")):  # a message of ours
            raise
        if means_folder(name) and not Path(name).exists():
            raise ValueError(f"{KEY}={name}: {NO_FOLDER}") from error
        if gguf_file is None and (damage := _damage(Path(name))) is not None:
            raise ValueError(f"{given}: {damage}") from error
        reason = " ".join(f"{error}".split()) or "no reason given"
        if not isinstance(error, (ValueError, OSError, ImportError)):
            reason = f"{type(error).__name__}: {reason}"
        reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
        told = isinstance(error, ImportError) or "; " in reason or not Path(name).exists()
        raise ValueError(f"{given}: {what}: {reason}{'' if told else f'; {FIX}'}") from error


def _option(name: str, gguf_file: str | None) -> str:
    return f"{KEY}={name}" if gguf_file is None else f"gguf_file={gguf_file}"


def _damage(folder: Path) -> str | None:
    """What is wrong with a file of a checkpoint folder, as far as that shows without reading all of it; None if nothing."""
    files = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    for path in files:
        if is_pointer(path):
            return f"{path.name} {POINTS_ELSEWHERE}"
    try:
        for path in files:
            if path.name in WRITTEN_IN_JSON:
                json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be read as JSON ({error}); copy it again"
    try:
        Checkpoint.of_files([p for p in files if p.suffix == ".safetensors"])
        named = Checkpoint(folder).files() if (folder / INDEX).is_file() else []
    except ValueError as error:
        return str(error).removeprefix(f"{folder}/")
    if absent := [file for file in named if not (folder / file).is_file()]:
        return f"{absent[0]} is named in {INDEX} and not there; copy the checkpoint again"
    return None


def read_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, gguf_file: str | None = None
) -> Any:
    """The transformers config of a checkpoint folder, a Hub model or a GGUF file; raises ValueError if it cannot be read."""
    options = {"revision": revision, "trust_remote_code": trust_remote_code} | ({"gguf_file": gguf_file} if gguf_file else {})
    with one_line_errors(name, "has no readable config", gguf_file):
        config = AutoConfig.from_pretrained(name, **options)
        if not isinstance(config.dtype, torch.dtype | None):
            raise ValueError(f"dtype={config.dtype}: is not a dtype")
    return config


def read_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, gguf_file: str | None = None
) -> Any:
    """The tokenizer of a checkpoint folder, a Hub model or a GGUF file; raises ValueError if it cannot be read."""
    options = {"revision": revision, "trust_remote_code": trust_remote_code} | ({"gguf_file": gguf_file} if gguf_file else {})
    with one_line_errors(name, "has no readable tokenizer", gguf_file):
        return AutoTokenizer.from_pretrained(name, **options)


def auto_class(config: Any) -> Any:
    """The auto class of transformers that makes the whole model of a config, with a head that predicts the next token.

    For a vision-language model this is the class for images and text, whose language model is only a part of it.

    Raises:
        ValueError: no class of transformers predicts the next token with this config.
    """
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    remote = getattr(config, "auto_map", None) or {}
    part = getattr(causal, "config_class", None) not in (None, type(config))
    if (causal is not None and not part) or "AutoModelForCausalLM" in remote:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in remote:
        return AutoModelForImageTextToText
    if causal is not None:
        return AutoModelForCausalLM
    raise ValueError(
        f"model_type={config.model_type}: transformers has no model of this type that predicts the next token; choose a "
        "decoder, such as Llama"
    )


def outline(config: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """The modules of a model on the meta device: shapes without memory for weights."""
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Reads one checkpoint: a folder (dense or bitmask), a Hub model, or a GGUF file in one; names as in `from_pretrained`.

    Each method raises ValueError with a message of one line if the checkpoint cannot be read, or lacks tensors of the model.
    """

    source: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    attn_implementation: str | None = None
    device_map: str | None = None
    gguf_file: str | None = None

    @cached_property
    def config(self) -> Any:
        """The config from which the model is made; that of a quantized checkpoint asks for dequantization."""
        config = read_config(
            self.source, revision=self.revision, trust_remote_code=self.trust_remote_code, gguf_file=self.gguf_file
        )
        quantization = dequantized_from(config)
        if quantization is not None:
            method = quantization.get("quant_method", "an unnamed method")
            known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
            if known is None or "dequantize" not in inspect.signature(known).parameters:
                raise ValueError(
                    f"{KEY}={self.source}: its weights are quantized by {method}, which transformers cannot dequantize; "
                    "choose the checkpoint that was quantized"
                )
            quantization["dequantize"] = True
        return config

    def tokenizer(self) -> Any:
        """The tokenizer of the checkpoint."""
        return read_tokenizer(
            self.source, revision=self.revision, trust_remote_code=self.trust_remote_code, gguf_file=self.gguf_file
        )

    def companions(self) -> dict[str, bytes]:
        """The contents of a vision-language checkpoint's processor files, by file name."""
        found = {}
        for name in COMPANIONS if getattr(self.config, "vision_config", None) is not None else ():
            with one_line_errors(self.source, "cannot be loaded"):
                path = cached_file(self.source, name, revision=self.revision, _raise_exceptions_for_missing_entries=False)
            if path is not None:
                found[name] = Path(path).read_bytes()
        return found

    def outline(self) -> PreTrainedModel:
        """The modules of the model on the meta device: shapes without memory for weights."""
        with one_line_errors(self.source, "makes no model", self.gguf_file):
            return outline(self.config, self.trust_remote_code)

    def load(self) -> PreTrainedModel:
        """The whole model in the CPU's memory, or spread over devices by `device_map`."""
        tensors = Checkpoint(self.source).stored() if is_bitmask(self.source) else None
        with quiet_unless_terminal(), one_line_errors(self.source, "cannot be loaded", self.gguf_file):
            model, info = self._from_pretrained(tensors)
        self._refuse(info)
        self._warn_left_out(info)
        return model

    def check(self) -> None:
        """Check names and shapes of all tensors against the model; no weight is read."""
        self._refuse(self._outlined())

    def without_blocks(self, blocks_path: str) -> tuple[PreTrainedModel, Callable[[int], Tensors], str]:
        """Load the model except for the parameters of its blocks, which stay on the meta device.

        Returns:
            The model; a function that reads the parameters of a block by its index, as loading the whole would make them; and
            a text that changes when a file of the checkpoint is written anew.
        """
        if self.gguf_file is not None:
            raise ValueError(f"offload=disk: gguf_file={self.gguf_file} is not read block by block; use offload=none or cpu")
        self.check()
        left = _DeferredBlocks(blocks_path)
        tensors = Checkpoint(self.source).stored() if is_bitmask(self.source) else None
        with quiet_unless_terminal(), one_line_errors(self.source, "cannot be loaded", self.gguf_file), _loading(left.load):
            model, info = self._from_pretrained(tensors)
        self._refuse(info)
        self._warn_left_out(info)
        left.check(model)

        def read(index: int) -> Tensors:
            with one_line_errors(self.source, "cannot be loaded", self.gguf_file):
                return left.read(model, index)

        return model, read, left.identity

    def _outlined(self) -> dict[str, Any]:
        tensors = Checkpoint(self.source).stored() if is_bitmask(self.source) else None
        with quiet_unless_terminal(), one_line_errors(self.source, "cannot be loaded", self.gguf_file), _loading(_outline_only):
            try:
                replace(self, device_map=None)._from_pretrained(tensors)
            except _Outlined as done:
                return done.info
        raise AssertionError("transformers loaded weights without the step that was replaced")

    def _from_pretrained(self, tensors: dict[str, StoredTensor] | None) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model and the loading info of transformers; `tensors` are those of a format that it does not know (bitmask)."""
        options = {"dtype": self.dtype, "attn_implementation": self.attn_implementation, "device_map": self.device_map}
        options = {k: v for k, v in options.items() if v is not None}
        known: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        if self.gguf_file is not None:
            known |= {"gguf_file": self.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
        if tensors is None:
            for index in filter(Path.is_file, (Path(self.source) / name for name in INDEXES)):
                files_of_index(index)  # refuses paths out of the folder, which transformers would follow
            remote = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
            model, info = auto_class(self.config).from_pretrained(self.source, config=self.config, **remote, **known, **options)
        else:
            model, info = type(self.outline()).from_pretrained(None, config=self.config, state_dict=tensors, **known, **options)
            if (Path(self.source) / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(self.source)
        if dequantized_from(self.config) is not None:
            model._weight_conversions = None  # or saving would reverse them, and quantize
        return model, info

    def _refuse(self, info: dict[str, Any]) -> None:
        """Raise ValueError if the loading info says that the weights are not those of the model."""
        where = self._given
        if missing := info["missing_keys"]:
            raise ValueError(
                f"{where}: the checkpoint lacks {_some(missing)}, which the model needs; copy it again, or give the causal "
                "language model that config.json describes"
            )
        if mismatched := {name: (list(stored), list(shape)) for name, stored, shape in info["mismatched_keys"]}:
            name = min(mismatched)
            raise ValueError(
                f"{where}: {name} has shape {mismatched[name][0]} in the checkpoint, and {mismatched[name][1]} by config.json"
                f"{f', and so differ {len(mismatched) - 1} more' if len(mismatched) > 1 else ''}; take both from the same model"
            )
        if wrong := info["error_msgs"]:
            raise ValueError(f"{where}: cannot be loaded: {' '.join(str(wrong[0]).split())[:LONGEST_REASON]}")
        if not (unexpected := info["unexpected_keys"]):
            return
        model = self.outline()
        if dropped := {name for name in unexpected if _belongs(name, model)}:
            raise ValueError(
                f"{where}: the checkpoint has {_some(dropped)}, which the model that config.json describes does not have; "
                "take both from the same model"
            )

    def _warn_left_out(self, info: dict[str, Any]) -> None:
        if left := info["unexpected_keys"]:
            logger.warning(
                "%s: the checkpoint's %s does not belong to the language model and is left out", self._given, _some(left)
            )

    @property
    def _given(self) -> str:
        """The option that names the checkpoint, as `key=value`."""
        return _option(self.source, self.gguf_file)


def dequantized_from(config: Any) -> dict[str, Any] | None:
    """The quantization config of a checkpoint; None if it is not quantized."""
    return getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)


def _belongs(name: str, model: PreTrainedModel) -> bool:
    """Whether a stored tensor that the model does not have shows that its config is not that of the checkpoint.

    In the decoder and its head these are: one more item of a list of modules, such as a block; a tensor that a linear layer,
    norm or embedding does not have, such as a bias or a scale; and any weight inside a block. Heads for other tasks, masks
    that earlier versions stored and encoders of images or sound do not count.
    """
    modules, inside = dict(model.named_modules()), {id(m) for m in model.get_decoder().modules()}
    owner, missing = name.rpartition(".")[0], ""
    while owner and owner not in modules:
        owner, _, missing = owner.rpartition(".")
    place = modules[owner]
    if not owner or (id(place) not in inside and place is not model.get_output_embeddings()):
        return False
    if missing.isdigit() and isinstance(place, nn.ModuleList):
        return True
    whole = any(True for _ in place.parameters(recurse=False)) and not any(True for _ in place.children())
    return whole or (name.endswith(".weight") and any(part.isdigit() for part in owner.split(".")))


def _some(names: Any) -> str:
    """The first few names, and the number of the others."""
    first = sorted(names)[:SHOWN]
    return ", ".join(first) + (f" and {len(names) - len(first)} more tensors" if len(names) > len(first) else "")


# -- the step of transformers' loader that reads tensors into a model on the meta device, replaced


class _Outlined(Exception):
    """Ends loading once it is known what would be loaded."""

    def __init__(self, info: dict[str, Any]) -> None:
        super().__init__()
        self.info = info


@dataclass(frozen=True)
class _Shape:
    """Stands for a stored tensor: the parameters that transformers makes of it stay on the meta device."""

    tensor: Tensor

    def __getitem__(self, index: Any) -> _Shape:
        assert index is Ellipsis, "only whole tensors are loaded"
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensor.to(dtype=dtype or self.tensor.dtype)

    def is_floating_point(self) -> bool:
        return self.tensor.is_floating_point()


@contextlib.contextmanager
def _loading(step: Callable[..., Any]) -> Iterator[None]:
    """Context in which `from_pretrained` loads tensors by `step(own, model, tensors, files, load_config)`.

    `own` is the step of transformers that it replaces.
    """
    own = PreTrainedModel.__dict__["_load_pretrained_model"]

    def load(model: PreTrainedModel, tensors: Any, files: Any, load_config: Any, expected_keys: Any = None) -> Any:
        return step(own.__func__, model, tensors, files, load_config)

    PreTrainedModel._load_pretrained_model = staticmethod(load)
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = own


def _stored(tensors: dict[str, StoredTensor] | None, files: list[str] | None) -> dict[str, StoredTensor]:
    if tensors is not None:
        return tensors
    if not _are_safetensors(files):
        raise ValueError(NOT_SAFETENSORS)
    return Checkpoint.of_files([Path(file) for file in files or []]).stored()


def _are_safetensors(files: list[str] | None) -> bool:
    return bool(files) and all(str(file).endswith(".safetensors") for file in files or [])


def _outline_only(own: Any, model: PreTrainedModel, tensors: Any, files: Any, load_config: Any) -> Any:
    if tensors is None and not _are_safetensors(files):  # shapes of other formats are not known before they are read
        raise _Outlined({"missing_keys": (), "unexpected_keys": (), "mismatched_keys": (), "error_msgs": ()})
    shapes = {name: _Shape(tensor.outline) for name, tensor in _stored(tensors, files).items()}
    with _no_progress_bar():
        info, _ = convert_and_load_state_dict_in_model(model, shapes, load_config)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    if info.conversion_errors:  # perhaps only because shapes have no numbers: if not, loading itself raises
        info.missing_keys = set()
    raise _Outlined(info.to_dict())


@dataclass
class _DeferredBlocks:
    """The parameters of blocks, which loading skips and `read` loads later, one block at a time."""

    blocks_path: str
    config: Any = None
    tensors: dict[int, dict[str, StoredTensor]] = field(default_factory=dict)
    identity: str = ""

    def load(self, own: Any, model: PreTrainedModel, tensors: Any, files: Any, load_config: Any) -> Any:
        stored = _stored(tensors, files)
        self.identity = "; ".join({tensor.checkpoint: tensor.checkpoint.identity() for tensor in stored.values()}.values())
        self.config = replace(load_config, device_map=None)
        parameters = {name for name, _ in model.named_parameters()}
        now: dict[str, StoredTensor | _Shape] = {}
        places = _places(list(stored), model, load_config)
        for name, tensor in stored.items():
            place = places[name]
            index = place[len(self.blocks_path) + 1 :].partition(".")[0] if place.startswith(f"{self.blocks_path}.") else ""
            if place in parameters and index.isdigit():
                self.tensors.setdefault(int(index), {})[name] = tensor
                now[name] = _Shape(tensor.outline)
            else:
                now[name] = tensor
        return own(model, now, None, load_config)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if blocks cannot be loaded one by one."""
        tied = model.all_tied_weights_keys or {}
        shared = [n for pair in tied.items() for n in pair if n.startswith(f"{self.blocks_path}.")]
        if shared:
            raise ValueError(f"offload=disk: blocks share {_some(shared)}; use offload=none or cpu")

    def read(self, model: PreTrainedModel, index: int) -> Tensors:
        conversions = model._weight_conversions  # of the whole model, needed to save it
        with _no_progress_bar():
            convert_and_load_state_dict_in_model(model, self.tensors.get(index, {}), self.config)
        model._weight_conversions = conversions
        block = model.get_submodule(self.blocks_path)[index]
        parameters = {name: p.data for name, p in block.named_parameters()}
        if lacks := [name for name, p in parameters.items() if p.is_meta]:
            raise ValueError(f"block {index}: {_some(lacks)} cannot be loaded without other blocks; use offload=none or cpu")
        return parameters


def _places(names: list[str], model: PreTrainedModel, load_config: Any) -> dict[str, str]:
    """The name in the model of each stored tensor, or of the first of several that transformers makes of it."""
    mapping, state = (
        copy.deepcopy(load_config.weight_mapping or []),
        model.state_dict(),
    )  # stateful, so a copy, and the order of names matters
    renamings = [c for c in mapping if isinstance(c, WeightRenaming)]
    converters = [c for c in mapping if isinstance(c, WeightConverter)]
    places = {}
    for name in sorted(names, key=dot_natural_key):
        places[name], _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if places[name] not in state and name in state:
            places[name], _ = rename_source_key(name, [], [], model.base_model_prefix, state)
    return places


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """Context that keeps progress bars and multi-line reports of transformers out of logs."""
    if sys.stderr.isatty():
        yield
        return
    verbosity, bar = transformers_logging.get_verbosity(), modeling_gguf_pytorch_utils.tqdm
    transformers_logging.set_verbosity_error()
    modeling_gguf_pytorch_utils.tqdm = functools.partial(bar, disable=True)  # a bar that ignores the library's setting
    try:
        with _no_progress_bar():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        modeling_gguf_pytorch_utils.tqdm = bar
