"""From a composed configuration to a checked Job: every mistake surfaces here, before a weight is loaded, cheapest first."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import typing
import urllib.parse
import urllib.request
from dataclasses import MISSING as MISSING_DEFAULT
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from svnup.allocation import Allocator, Budget
from svnup.allocation.maps import Tuned
from svnup.allocation.splits import Split
from svnup.config.checks import (
    check_finer,
    check_groups,
    check_memory,
    check_roles,
    check_rounds,
    check_scalars,
    check_values,
    omegaconf_error_context,
    option_of,
    refuse_missing,
    refuse_mixed_roles,
    refuse_removed,
    refuse_unknown,
)
from svnup.config.construction import check_node, construct, error_context, refuse_outside, type_complaint
from svnup.config.job import Job, config_key, texts_of
from svnup.config.schema import CONF, GROUPS, Schema
from svnup.data import NAMED, TokenSource
from svnup.evaluation.protocol import Evaluation
from svnup.files import at_home, default_cache_dir
from svnup.keys import did_you_mean
from svnup.model.source import Model
from svnup.pattern import Pattern
from svnup.results.tracker import Tracker
from svnup.scoring import Scorer
from svnup.scoring.shapley import GameOptions, ShapleyScorer

if TYPE_CHECKING:
    from svnup.pruning.walk import Pruner

Texts = dict[tuple[TokenSource, str], TokenSource]


def _shared(source: TokenSource, known: Texts, key: str) -> TokenSource:
    """The same source of an earlier job, if its text is still the same, for the tokens that it has already read."""
    with error_context(key):
        return known.setdefault((source, "" if source.from_hub else source.fingerprint()), source)


def build(cfg: Any, known: Texts | None = None) -> Job:
    """Build and check a job from a composed configuration; raises ValueError with the key, the value and the fix.

    `known` holds the token sources of earlier jobs of this process: one that is asked for again need not tokenize again.
    """
    known = {} if known is None else known
    with omegaconf_error_context():
        config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)  # type: ignore[assignment]
    check_values(config)
    refuse_unknown(config)
    refuse_removed(config)
    check_groups(config)
    check_scalars(config)
    config["evaluation"] = _with_named_texts(config)
    refuse_missing(config)
    model: Model = construct(config["model"], "model", "model")
    dataset: TokenSource = construct(config["dataset"], "dataset", "text")
    dataset = _shared(dataset, known, "dataset")
    scorer = _scorer(config["allocator"].get("scorer"), known)
    shapley = scorer if isinstance(scorer, ShapleyScorer) else None
    given = {k: v for k, v in config["shapley"].items() if k not in ("game", "shard") and v != "???"}
    check_node(given, "shapley", "estimator")  # a misspelt key is one where the group is not used, too
    not_compared = _leave_out_comparison(config)
    allocator = _allocator(config["allocator"])
    with error_context("allocator"):
        needs = allocator.needs
    selection: TokenSource = construct(config["selection"], "selection", "text")
    split: Split = construct(config["split"], "split", "split")
    if config["allocator"].get("granularity", "block") != "block":
        check_finer(config, scorer, split)
    if needs.n_games is not None:
        check_rounds(shapley)
    if scorer is None and needs.scores:
        raise ValueError("allocator.scorer=null: this allocator needs scores; leave its scorer as its yaml has it")
    evaluation: Evaluation = _evaluation(config["evaluation"], known)
    with error_context("evaluation"):
        online = evaluation.from_hub
    tracker: Tracker = construct(config["tracker"], "tracker", "tracker")
    with error_context("tracker", ("tracker",)):
        tracker.check()
    texts = texts_of(
        dataset, shapley, allocator, _shared(selection, known, "selection") if needs.selection else None, evaluation
    )
    check_roles(texts)
    if online or model.from_hub or any(source.from_hub for source in texts.values()):
        _go_offline_if_unreachable()
    with error_context("model"):
        n_blocks = model.n_blocks()
    with error_context("allocator", ("sparsity", "pattern")):
        allocator.check(Budget.of_equal(n_blocks, config["sparsity"], config["pattern"]))
    if not needs.whole_blocks and not split.uniform:
        raise ValueError(
            f"split={option_of(config, 'split')}: the profile divides blocks among their linear layers; use split=uniform"
        )
    if Pattern.parse(config["pattern"]).group is not None and not split.uniform:
        raise ValueError(f"pattern={config['pattern']}: the linear layers of a block share its N; add split=uniform")
    with error_context("model", ("offload",)):
        model.check_offload(config["offload"])
    if shapley is not None:
        with error_context("shapley", ("shapley",)):
            shapley.check(n_blocks)
    refuse_mixed_roles(texts)
    pruner: Pruner = construct(config["pruner"], "pruner", "pruner")  # the first that imports torch
    if needs.once and not pruner.prunes:  # every budget leaves the same model
        config["allocator"]["compare_uniform"] = "off"
        allocator = _allocator(config["allocator"])
        needs, _ = allocator.needs, texts.pop("selection")
    if shapley is not None and shapley.game.absence == "prune":
        stand_in = shapley.game.pruner
        if stand_in is None or not stand_in.prunes or config["sparsity"] == 0:
            raise ValueError(
                f"shapley.game.absence=prune: absent blocks would not be pruned (pruner {stand_in}, "
                f"sparsity={config['sparsity']:g}); choose another pruner: +pruner@shapley.game.pruner=wanda, or absence=skip"
            )
    if config["offload"] != "none" and evaluation.needs_whole_model:
        raise ValueError(
            f"offload={config['offload']}: lm-eval needs the whole model in memory; use offload=none, or evaluation=ppl"
        )
    check_memory(config, pruner, split, shapley, needs.selection)
    with error_context("model"):
        model.check_device()
    scalars = {k: config[k] for k in Schema.__annotations__ if not isinstance(config[k], dict)}
    folders = {"results_dir": config["results_dir"], "cache_dir": config["cache_dir"] or default_cache_dir()}
    scalars |= {key: str(at_home(key, folder)) for key, folder in folders.items()}
    return Job(
        model=model,
        dataset=dataset,
        scorer=scorer,
        allocator=allocator,
        selection=texts.get("selection"),
        split=split,
        pruner=pruner,
        evaluation=evaluation,
        tracker=tracker,
        config=config,
        key=config_key(config, needs.selection),
        not_compared=not_compared,
        **scalars,
    )


def stored(config: dict[str, Any], trust: bool = False, **changes: Any) -> Any:
    """The configuration that lies in a result, to build its job anew, with changes at its top.

    Keys that svnup did not have when the result was made are as by default. Whoever wrote the result chose its values, so it
    names no code from outside svnup unless `trust` says that it may, and nothing in it is interpolated: it is stored resolved.
    Raises ValueError with the key and the value.
    """
    config = config | changes
    if not trust:
        refuse_outside(config)
    _refuse_interpolations(config)
    config["evaluation"] = _with_nodes_of_lists(config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        usual = compose("config", overrides=["~local"] if (CONF / "local" / "default.yaml").is_file() else [])
    with omegaconf_error_context():
        for group in set(GROUPS) & set(config):
            usual[group] = None  # which is replaced as a whole, not merged with
        return OmegaConf.merge(usual, config)


def _refuse_interpolations(node: Any, key: str = "") -> None:
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        where = f"{key}.{name}".lstrip(".")
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"{where}={value}: a result holds values, no interpolations; write the value")
        _refuse_interpolations(value, where)


def _with_nodes_of_lists(config: dict[str, Any]) -> Any:
    """The evaluation of a result, with nodes for the data sets of earlier versions: [docs,{text_file: {path: my.txt}}]."""
    node = config.get("evaluation")
    if not isinstance(node, dict) or not isinstance(node.get("datasets"), list):
        return node
    entries = [entry if isinstance(entry, dict) else {entry: {}} for entry in node["datasets"]]
    if any(name not in NAMED for entry in entries for name in entry):
        return node
    pairs = [(name, options or {}) for entry in entries for name, options in entry.items()]
    return node | {"datasets": {name: _named_text(name, config, **options) for name, options in pairs}}


def _go_offline_if_unreachable() -> None:
    """Without a network the hub's client retries for half a minute; ask for its host first, before the client is imported.

    Behind a proxy names need not resolve here, so nothing is concluded.
    """
    if "HF_HUB_OFFLINE" in os.environ or urllib.request.getproxies():
        return
    found: list[bool] = []
    host = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    asked = threading.Thread(target=_resolves, args=(host, found), daemon=True)
    asked.start()
    asked.join(timeout=3)
    if not found:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def _resolves(host: str | None, found: list[bool]) -> None:
    with contextlib.suppress(OSError):
        found.append(bool(socket.getaddrinfo(host, 443)))


# -- parts that are more than one node


def _allocator(node: dict[str, Any]) -> Allocator:
    """An allocator, to be tuned where its option is `auto`."""
    node = {k: v for k, v in node.items() if k != "scorer"}
    tuned = [k for k, v in node.items() if v == "auto"]
    allocator: Any = construct({k: v for k, v in node.items() if k not in tuned}, "allocator", "allocator")
    if not tuned:
        return typing.cast(Allocator, allocator)
    knob = getattr(allocator, "tuned_option", None)
    if tuned != [knob]:
        raise ValueError(f"allocator.{tuned[0]}=auto: cannot be tuned{f', only {knob} can' if knob else ''}; give a value")
    return Tuned(allocator)


def _leave_out_comparison(config: dict[str, Any]) -> str | None:
    """Turn `allocator.compare_uniform` off where the uniform budget is tried anyway, or cannot be; returns why it cannot."""
    node, reason = config["allocator"], None
    if node.get("compare_uniform") != "trial":
        return None
    if config["offload"] != "none":
        reason = f"offload={config['offload']}: weights pruned in advance and the dense ones need both in memory"
    if reason is not None or "auto" in node.values():
        config["allocator"] = node | {"compare_uniform": "off"}
    return reason


def _scorer(node: Any, known: Texts) -> Scorer | None:
    """Block scores by their `_target_`, or, where the node has a game, Shapley values."""
    if node is None:
        return None
    if not isinstance(node, dict):
        raise ValueError(
            f"allocator.scorer={node}: must be a node with a _target_, or null; leave it as the allocator's yaml has it"
        )
    if "game" not in node:
        return typing.cast(Scorer, construct(node, "allocator.scorer", "scorer"))
    estimator = {k: v for k, v in node.items() if k not in ("game", "shard")}
    if not isinstance(node["game"], dict):
        raise ValueError(f"shapley.game={node['game']}: must be a node with a _target_; leave it as its yaml has it")
    options = dict(node["game"])
    if options.get("absence") != "prune":  # whose pruner is not used then, and need not be imported
        options.pop("pruner", None)
    game: GameOptions = construct(options, "shapley.game", "game")
    game = replace(game, data=_shared(game.data, known, "shapley.game.data"))
    if complaint := type_complaint(node.get("shard"), str | None):
        raise ValueError(f"shapley.shard={node['shard']}: {complaint}")
    with error_context("shapley"):
        return ShapleyScorer(construct(estimator, "shapley", "estimator"), game, node.get("shard"))


def _evaluation(node: dict[str, Any], known: Texts) -> Any:
    """The evaluation, with the texts of earlier jobs where they are the same."""
    if not isinstance(node.get("datasets"), dict):
        return construct(node, "evaluation", "evaluation")
    sources = {name: construct(entry, f"evaluation.datasets.{name}", "text") for name, entry in node["datasets"].items()}
    shared = {name: _shared(source, known, f"evaluation.datasets.{name}") for name, source in sources.items()}
    return construct(node | {"datasets": shared}, "evaluation", "evaluation")


def _with_named_texts(config: dict[str, Any]) -> dict[str, Any]:
    """The evaluation's node with a node for every data set that it names in a word: those of a list, or `model.test_text`.

    Raises ValueError where a word names none.
    """
    node = config["evaluation"]
    if "datasets" not in node or isinstance(node["datasets"], dict):
        return typing.cast(dict[str, Any], node)
    given = node["datasets"]
    key = f"evaluation.datasets={given}" if given is not None else f"model.test_text={config['model'].get('test_text')}"
    names = [config["model"].get("test_text")] if given is None else given
    own = "text of your own: dataset@evaluation.datasets.test=text_file evaluation.datasets.test.path=my.txt"
    if not isinstance(names, list):
        raise ValueError(f"{key}: must be a list of names, such as [docs] or [wikitext2,c4]; {own}")
    choice = [name for name, source in NAMED.items() if source.complete]
    for name in names:
        if name not in choice:
            raise ValueError(f"{key}: choose among {', '.join(choice)}{did_you_mean(str(name), choice)}; {own}")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{key}: two numbers would be called {twice}/ppl; name it once")
    out: dict[str, Any] = node | {"datasets": {name: _named_text(name, config) for name in names}}
    return out


def _named_text(name: str, config: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The node of a data set of svnup, as its yaml in conf/dataset makes it for an evaluation."""
    evaluation, source = config["evaluation"], NAMED[name]
    fixed = {k: evaluation[k] for k in ("n_seq", "seq_len", "skip", "role") if k in evaluation} | {"seed": 0}
    usual = {f.name: f.default for f in fields(source) if f.default is not MISSING_DEFAULT}
    places = {"datasets_dir": config.get("datasets_dir")} if "datasets_dir" in usual else {}
    return {"_target_": f"{source.__module__}.{source.__qualname__}"} | usual | fixed | places | options
