"""The typed top of the configuration, and what Hydra has to know of svnup."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.config_store import ConfigStore
from hydra.experimental.callback import Callback
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from svnup.files import at_home
from svnup.secrets import redact_code

if TYPE_CHECKING:
    pass

CONF = next(p / "conf" for p in Path(__file__).parents[1:3] if (p / "conf").is_dir())


@dataclass
class Schema:
    """The typed top of the configuration; the groups below it are checked against their constructors."""

    dataset: Any = MISSING
    shapley: Any = MISSING
    selection: Any = MISSING
    model: Any = MISSING
    allocator: Any = MISSING
    split: Any = MISSING
    pruner: Any = MISSING
    evaluation: Any = MISSING
    tracker: Any = MISSING
    sparsity: float = 0.7
    pattern: str = "unstructured"
    seed: int = 0
    protocol_gate: str = "error"
    selection_loss: str = "nll"
    compare_uniform: str = "trial"
    results_dir: str = "results"
    cache_dir: str | None = None
    datasets_dir: str | None = None
    force: bool = False
    dry_run: bool = False
    offload: str = "none"
    save_model: bool = False
    save_format: str = "dense"
    save_masks: bool = False


GROUPS = tuple(name for name, hint in Schema.__annotations__.items() if hint == "Any")


class KeepSecrets(Callback):
    """Takes secrets out of the configuration that Hydra writes down before the first job of a sweep."""

    sweeps: ClassVar[set[Path]] = set()

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        with contextlib.suppress(OmegaConfBaseException):  # there is no such folder, which the sweep is about to say
            self.sweeps.add(Path(str(config.hydra.sweep.dir)))

    @classmethod
    def redact(cls) -> None:
        for file in (folder / "multirun.yaml" for folder in cls.sweeps):
            with contextlib.suppress(OSError):  # a folder that could not be made, which has been said
                if file.is_file() and (text := redact_code(whole := file.read_text(encoding="utf-8"))) != whole:
                    file.write_text(text, encoding="utf-8")


def register() -> None:
    """Make the schema, and what the help text lists, known to Hydra."""
    ConfigStore.instance().store(name="schema", node=Schema)
    OmegaConf.register_new_resolver("svnup_groups", _groups, replace=True)
    OmegaConf.register_new_resolver("svnup_home", lambda folder: str(at_home("results_dir", folder)), replace=True)
    OmegaConf.register_new_resolver("svnup_text", _of_text, replace=True)


def _groups() -> str:
    """The groups and their options, a line each, without the files that options share."""
    folders = [p for p in sorted(CONF.iterdir()) if p.is_dir() and p.name not in ("hydra", "local")]
    return "\n".join(f"{p.name}: {', '.join(sorted(f.stem for f in p.glob('[!_]*.yaml')))}" for p in folders)


def _of_text(option: str, usual: Any, *, _root_: Any, _parent_: Any) -> Any:
    """An option of a data set by where its yaml is used: in an evaluation as that has it, elsewhere as usual."""
    if not _parent_._get_full_key("").startswith("evaluation.datasets."):
        return usual
    return 0 if option == "seed" else _root_.evaluation[option]
