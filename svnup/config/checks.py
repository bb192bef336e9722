"""Checks of a configuration that no single constructor can make."""

from __future__ import annotations

import contextlib
import math
import re
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from omegaconf.errors import OmegaConfBaseException

from svnup import distributed
from svnup.allocation import Budget
from svnup.allocation.maps import Compare
from svnup.config.construction import error_context, type_complaint
from svnup.config.job import Components, Gate
from svnup.config.messages import explain
from svnup.config.schema import GROUPS, Schema
from svnup.data import TokenSource
from svnup.files import at_home
from svnup.keys import did_you_mean
from svnup.machines import Machine
from svnup.naming import recovery_name
from svnup.pattern import Pattern
from svnup.scoring.shapley import ShapleyScorer
from svnup.types import Offload, SaveFormat, SelectionLoss

if TYPE_CHECKING:
    from svnup.pruning.walk import Pruner, Recovery


def check_plain(config: dict[str, Any]) -> None:
    """Check what needs no part of the job: names of keys, plain values, and that a group has a node."""
    check_values(config)
    refuse_unknown(config)
    refuse_removed(config)
    check_groups(config)
    check_scalars(config)
    check_rates(config["machines"])


def check_roles(texts: dict[str, TokenSource]) -> None:
    """Test text is for reported numbers only, and payoff text chooses nothing."""
    for name, role, what in (
        ("dataset", "calibration", "calibrates pruners"),
        ("shapley.game.data", "payoff", "pays coalitions"),
        ("allocator.data", "payoff", "pays coalitions"),
        ("allocator.scorer.data", "payoff", "pays coalitions"),
        ("selection", "selection", "chooses"),
    ):
        if name in texts and texts[name].role != role:
            raise ValueError(f"{name}.role={texts[name].role}: this text {what}; use {name}.role={role}")


def refuse_mixed_roles(texts: dict[str, TokenSource]) -> None:
    """One text in two roles; sources of the hub divide theirs by role themselves."""
    seen: dict[str, tuple[str, str]] = {}
    for name, source in texts.items():
        if source.from_hub:
            continue
        other, role = seen.setdefault(source.fingerprint(), (name, source.role))
        if role != source.role:
            raise ValueError(
                f"{name}: the {source.role} text is also the {role} text of {other}; give another file to each role"
            )


def refuse_unknown(config: dict[str, Any]) -> None:
    """Keys that were added with + at the top, where the schema is no longer asked."""
    for name in set(config) - set(Schema.__annotations__):
        raise ValueError(f"{name}={config[name]}: there is no such key{did_you_mean(name, Schema.__annotations__)}")


def refuse_removed(config: dict[str, Any]) -> None:
    """Keys that were taken away with ~ at the top."""
    if gone := next((name for name in Schema.__annotations__ if name not in config), None):
        raise ValueError(f"~{gone}: a job needs it; leave out ~{gone}, or give a value: {gone}=...")


def check_values(node: Any, key: str = "") -> None:
    """Refuse keys that are no text, numbers that are not finite, and paths of unknown users, wherever they stand."""
    if isinstance(node, (dict, list)):
        if odd := [name for name in node if not isinstance(name, str)] if isinstance(node, dict) else []:
            raise ValueError(f"{key}.{odd[0]}".lstrip(".") + ": a key must be a word; take it out")
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            check_values(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, float) and not math.isfinite(node):
        raise ValueError(f"{key}={node}: must be a finite number; choose one")
    elif isinstance(node, str) and node.startswith("~") and re.search(r"(path|dir)$", key):
        at_home(key, node)


def check_groups(config: dict[str, Any]) -> None:
    """Words where a group's node belongs; a text may be one of several groups and is told so by `construct`."""
    for name in GROUPS:
        if not isinstance(config[name], dict) and name != "selection":
            raise ValueError(f"{name}={config[name]}: must be a node with a _target_; choose an option of it: {name}=...")


def check_rates(machines: dict[str, Any]) -> None:
    """Types of what is given of machines; which rates there are, and their range, `svnup.machines.named` checks."""
    hints = typing.get_type_hints(Machine)
    for name, node in machines.items():
        for key, value in node.items() if isinstance(node, dict) else ():
            if key in hints and (complaint := type_complaint(value, hints[key])):
                raise ValueError(f"machines.{name}.{key}={value}: {complaint}")


def check_scalars(config: dict[str, Any]) -> None:
    for name, hint in typing.get_type_hints(Schema).items():
        if name not in GROUPS and (complaint := type_complaint(config[name], hint)):
            raise ValueError(f"{name}={config[name]}: {complaint}")
    for name in ("results_dir", "cache_dir"):
        if config[name] == "":
            raise ValueError(f"{name}='': is empty; name a folder, or leave out {name}=")
    folder = config["datasets_dir"]
    if folder is not None and not at_home("datasets_dir", folder).is_dir():
        raise ValueError(f"datasets_dir={folder}: there is no such folder; name one with data sets in it, such as allenai/c4")
    sparsity = config["sparsity"]
    if not 0 <= sparsity < 1:
        hint = f"; did you mean sparsity={sparsity / 100:g}?" if 1 < sparsity < 100 else ""
        raise ValueError(f"sparsity={sparsity:g}: must be a fraction of zeros in [0, 1){hint}")
    Pattern.parse(config["pattern"])
    closed = {"protocol_gate": Gate, "offload": Offload, "save_format": SaveFormat, "selection_loss": SelectionLoss}
    closed["compare_uniform"] = Compare
    for name, options in closed.items():
        choices = typing.get_args(options)
        if config[name] not in choices:
            hint = did_you_mean(str(config[name]), choices)
            raise ValueError(f"{name}={config[name]}: choose {', '.join(choices[:-1])} or {choices[-1]}{hint}")
    if config["save_format"] != "dense" and not config["save_model"]:
        raise ValueError(f"save_format={config['save_format']}: no model would be saved; add save_model=true")


def check_components(config: dict[str, Any], components: Components) -> None:
    """Refuse components that do not go together, whatever the model and the pruner."""
    needs, allocator = components.allocator.needs, config["allocator"]
    if allocator.get("granularity", "block") != "block":
        _check_finer(config, components)
    if needs.n_games is not None:
        _check_rounds(components.shapley)
    if (shard := config["shapley"].get("shard")) is not None and components.shapley is None:
        raise ValueError(f"shapley.shard={shard}: this allocator has no game whose coalitions could be divided; take it out")
    if components.scorer is None and needs.scores:
        raise ValueError("allocator.scorer=null: this allocator needs scores; leave its scorer as its yaml has it")
    with error_context("tracker", ("tracker",)):
        components.tracker.check()
    check_roles(components.sources())


def _check_finer(config: dict[str, Any], components: Components) -> None:
    """Refuse budgets finer than blocks without their scores, or divided as those of blocks."""
    granularity = config["allocator"]["granularity"]
    of_parts = getattr(components.scorer, "granularity", "block") == granularity or not components.allocator.needs.as_fine
    if components.scorer is not None and not of_parts:
        of_game = components.shapley is not None
        what = "shapley.game.players=sublayer" if of_game else "allocator=shapley shapley.game.players=sublayer"
        raise ValueError(
            f"allocator.granularity={granularity}: the scores are those of blocks; add {what}, or use granularity=block"
        )
    if not components.split.uniform:
        raise ValueError(
            f"split={_option_of(config, 'split')}: divides budgets of blocks, not finer ones; use split=uniform, or "
            "allocator.granularity=block"
        )


def _check_rounds(shapley: ShapleyScorer | None) -> None:
    """Refuse rounds whose values would not be Shapley values in a pruned model."""
    if shapley is None:
        raise ValueError("allocator.scorer: rounds need Shapley values; leave its scorer as its yaml has it")
    if getattr(shapley.estimator, "gated", False):
        raise ValueError("shapley=gates: there are no gates in a pruned model's game; use shapley=sliding_window")


def check_model(config: dict[str, Any], components: Components) -> None:
    """Refuse a budget, its division, an offload or a game that does not go with the model, by its configuration alone."""
    with error_context("model"):
        n_blocks = components.model.n_blocks()
    with error_context("allocator", ("sparsity", "pattern")):
        components.allocator.check(Budget.of_equal(n_blocks, config["sparsity"], config["pattern"]))
    if not components.allocator.needs.whole_blocks and not components.split.uniform:
        raise ValueError(
            f"split={_option_of(config, 'split')}: the profile divides blocks among their linear layers; use split=uniform"
        )
    if Pattern.parse(config["pattern"]).group is not None and not components.split.uniform:
        raise ValueError(f"pattern={config['pattern']}: the linear layers of a block share its N; add split=uniform")
    with error_context("model", ("offload",)):
        components.model.check_offload(config["offload"])
    if components.shapley is not None:
        with error_context("allocator.scorer", ("shapley",)):
            components.shapley.check(n_blocks)


def check_processes(config: dict[str, Any]) -> None:
    """Refuse what several processes of one job cannot have."""
    model, n = config["model"], distributed.n_started()
    device, spread = model.get("device", "auto"), model.get("device_map")
    if n == 1:
        return
    if config["offload"] == "disk":
        raise ValueError(f"offload=disk: keeps the blocks of one process, not of {n}; use offload=cpu or none, or one process")
    if spread is not None:
        raise ValueError(
            f"model.device_map={spread}: spreads one model over all GPUs, of which each of {n} processes has one; use "
            "model.device_map=null, or one process"
        )
    if ":" in device:
        raise ValueError(f"model.device={device}: each of {n} processes has a GPU of its own; use model.device=cuda or auto")


def check_pruner(config: dict[str, Any], components: Components, pruner: Pruner) -> None:
    """Refuse a pruner that does not go with the other components, and what needs more memory than an offloaded model has."""
    shapley, split, offload = components.shapley, components.split, config["offload"]
    if shapley is not None and shapley.game.absence == "prune":
        stand_in = shapley.game.pruner
        if stand_in is None or not stand_in.prunes or config["sparsity"] == 0:
            raise ValueError(
                f"shapley.game.absence=prune: absent blocks would not be pruned (pruner {stand_in}, "
                f"sparsity={config['sparsity']:g}); choose another pruner: +pruner@shapley.game.pruner=wanda, or absence=skip"
            )
    if offload != "none" and components.evaluation.needs_whole_model:
        raise ValueError(f"offload={offload}: lm-eval needs the whole model in memory; use offload=none, or evaluation=ppl")
    if split.needs_errors and not pruner.needs_inputs:
        raise ValueError(
            f"split={_option_of(config, 'split')}: needs the errors of a pruner that reads inputs; choose another pruner, or "
            "split=shapley"
        )
    if offload == "none":
        return
    if components.selection is not None or components.allocator.needs.calibration:
        raise ValueError(
            f"offload={offload}: allocator options that are auto, and allocators that try many profiles, prune many "
            "times; give a value, or choose another allocator"
        )
    if split.trial:
        raise ValueError(f"offload={offload}: split={_option_of(config, 'split')} prunes twice; use split=uniform")
    if shapley is not None and shapley.game.absence == "prune":
        raise ValueError(f"offload={offload}: shapley.game.absence=prune keeps all weights twice; use absence=skip")


def check_recovery(config: dict[str, Any], pruner: Pruner, recovery: Recovery) -> None:
    """Refuse the recovery of a model that nothing is pruned of."""
    if recovery.n_passes and not pruner.prunes:
        raise ValueError(
            f"recovery={recovery_name(config)}: a model of which nothing is pruned has nothing to recover; "
            "add recovery=none, or choose a pruner"
        )


def _option_of(config: dict[str, Any], group: str) -> str:
    return str(config[group]["_target_"]).rpartition(".")[2].lower().removesuffix(group)


def refuse_missing(node: Any, prefix: str = "") -> None:
    """Raise ValueError for mandatory values, `???` in yaml, that are not given."""
    for name, value in node.items():
        if value == "???":
            raise ValueError(f"{prefix}{name}: has no value yet; add {prefix}{name}=...")
        if isinstance(value, dict) and prefix + name != "shapley":  # judged where an allocator uses it
            refuse_missing(value, f"{prefix}{name}.")


# -- messages


@contextlib.contextmanager
def omegaconf_error_context() -> Iterator[None]:
    try:
        yield
    except OmegaConfBaseException as error:
        raise ValueError(explain(error, [])) from error
