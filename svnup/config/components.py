"""From a checked configuration to the components of a job: what stands in a node, and what takes more than one."""

from __future__ import annotations

import typing
from dataclasses import MISSING as MISSING_DEFAULT
from dataclasses import fields, replace
from typing import Any

from svnup.allocation import Allocator
from svnup.allocation.maps import Tuned
from svnup.config.construction import check_node, construct, error_context
from svnup.config.job import Components
from svnup.data import NAMED, TokenSource
from svnup.keys import did_you_mean
from svnup.scoring import Scorer
from svnup.scoring.shapley import ShapleyScorer

Texts = dict[tuple[TokenSource, str], TokenSource]  # by themselves and the fingerprint of their content

OF_GAMES = ("game", "shard")  # options of a node in `shapley` beside those of its estimator


def components_of(config: dict[str, Any], known: Texts) -> Components:
    """Every part but the pruner, whose import takes torch; `known` holds the texts of earlier jobs.

    Raises:
        ValueError: with the key at fault.
    """
    scorer = _scorer(config["allocator"].get("scorer"), known)
    unused = {k: v for k, v in config["shapley"].items() if k not in OF_GAMES and v != "???"}
    check_node(unused, "shapley", "estimator")  # a misspelt key is one where the group is not used, too
    allocator = allocator_of(config["allocator"])
    selection = construct(config["selection"], "selection", "text")
    with error_context("allocator"):
        chooses = allocator.needs.selection
    return Components(
        model=construct(config["model"], "model", "model"),
        dataset=_shared(construct(config["dataset"], "dataset", "text"), known, "dataset"),
        scorer=scorer,
        allocator=allocator,
        selection=_shared(selection, known, "selection") if chooses else None,
        split=construct(config["split"], "split", "split"),
        evaluation=_evaluation(config["evaluation"], known),
        tracker=construct(config["tracker"], "tracker", "tracker"),
    )


def _shared(source: TokenSource, known: Texts, key: str) -> TokenSource:
    """The same source of an earlier job, if its text is still the same, for the tokens that it has already read."""
    with error_context(key):
        return known.setdefault((source, "" if source.from_hub else source.fingerprint()), source)


def allocator_of(node: dict[str, Any]) -> Allocator:
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


def _scorer(node: Any, known: Texts) -> Scorer | None:
    """Scores of blocks by their node, or, where the node has a game, Shapley values of it by the node's estimator."""
    key = "allocator.scorer"
    if node is None:
        return None
    if not isinstance(node, dict):
        raise ValueError(f"{key}={node}: must be a node with a _target_, or null; leave it as the allocator's yaml has it")
    if "game" not in node:
        scorer = construct(node, key, "scorer")
        if (data := getattr(scorer, "data", None)) is not None:
            scorer = replace(scorer, data=_shared(data, known, f"{key}.data"))
        return typing.cast(Scorer, scorer)
    of_game = {k: v for k, v in node.items() if k in OF_GAMES}
    if isinstance(game := node["game"], dict) and game.get("absence") != "prune":  # its pruner need not be imported
        of_game["game"] = {k: v for k, v in game.items() if k != "pruner"}
    estimator = construct({k: v for k, v in node.items() if k not in of_game}, key, "estimator")
    target = f"{ShapleyScorer.__module__}.{ShapleyScorer.__qualname__}"
    of_blocks: ShapleyScorer = construct({"_target_": target, "estimator": estimator} | of_game, key, "scorer")
    data = _shared(of_blocks.game.data, known, f"{key}.game.data")
    return replace(of_blocks, game=replace(of_blocks.game, data=data))


def _evaluation(node: dict[str, Any], known: Texts) -> Any:
    """The evaluation, with the texts of earlier jobs where they are the same."""
    if not isinstance(node.get("datasets"), dict):
        return construct(node, "evaluation", "evaluation")
    sources = {name: construct(entry, f"evaluation.datasets.{name}", "text") for name, entry in node["datasets"].items()}
    shared = {name: _shared(source, known, f"evaluation.datasets.{name}") for name, source in sources.items()}
    return construct(node | {"datasets": shared}, "evaluation", "evaluation")


def with_named_texts(config: dict[str, Any]) -> dict[str, Any]:
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
    out: dict[str, Any] = node | {"datasets": {name: named_text(name, config) for name in names}}
    return out


def named_text(name: str, config: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The node of a data set of svnup, as its yaml in conf/dataset makes it for an evaluation."""
    evaluation, source = config["evaluation"], NAMED[name]
    fixed = {k: evaluation[k] for k in ("n_seq", "seq_len", "skip", "role") if k in evaluation} | {"seed": 0}
    usual = {f.name: f.default for f in fields(source) if f.default is not MISSING_DEFAULT}
    places = {"datasets_dir": config.get("datasets_dir")} if "datasets_dir" in usual else {}
    return {"_target_": f"{source.__module__}.{source.__qualname__}"} | usual | fixed | places | options
