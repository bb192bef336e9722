"""The typed top of the configuration, and what Hydra has to know of svnup."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.experimental.callback import Callback
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from svnup.files import at_home
from svnup.machines import HERE
from svnup.secrets import redact_code

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
    recovery: Any = MISSING
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
    hardware: str = HERE
    machines: dict[str, Any] = field(default_factory=dict)
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
    OmegaConf.register_new_resolver("svnup_groups", _listed, replace=True)
    OmegaConf.register_new_resolver("svnup_home", lambda folder: str(at_home("results_dir", folder)), replace=True)
    OmegaConf.register_new_resolver("svnup_text", _of_text, replace=True)


def composed(*overrides: str) -> DictConfig:
    """The configuration of a job as the command composes it, outside of the command.

    Raises:
        HydraException: an override is wrong.
    """
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg: DictConfig = compose("config", [*overrides])
    return cfg


def choices(*overrides: str) -> dict[str, list[str]]:
    """The options of each group, as Hydra finds them: those of the user's folders (`--config-dir`) among them while it runs.

    Files whose names begin with `_` hold what options share, and are none. `hydra.searchpath=...` among the overrides counts.
    """
    register()
    with contextlib.ExitStack() as hydra:
        if not GlobalHydra.instance().is_initialized():
            hydra.enter_context(initialize_config_dir(str(CONF), version_base="1.3"))
        loader = GlobalHydra.instance().config_loader()

        def found(group: str, kind: ObjectType) -> list[str]:
            return sorted(loader.get_group_options(group, kind, overrides=[*overrides]))

        groups = [name for name in found("", ObjectType.GROUP) if name not in ("hydra", "local")]
        return {group: [name for name in found(group, ObjectType.CONFIG) if not name.startswith("_")] for group in groups}


def _listed(*, _root_: Any) -> str:
    """The groups and their options, a line each."""
    return "\n".join(f"{group}: {', '.join(names)}" for group, names in choices(*_root_.hydra.overrides.hydra).items())


def _of_text(option: str, usual: Any, *, _root_: Any, _parent_: Any) -> Any:
    """An option of a data set by where its yaml is used: in an evaluation as that has it, elsewhere as usual."""
    if not _parent_._get_full_key("").startswith("evaluation.datasets."):
        return usual
    return 0 if option == "seed" else _root_.evaluation[option]
