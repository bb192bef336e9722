"""From a composed configuration to a checked Job: every mistake surfaces here, before a weight is loaded, cheapest first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import socket
import threading
import typing
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import MISSING as MISSING_DEFAULT
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from svnup import NUMBERS_VERSION
from svnup.allocation import Allocator, Chooser, FromFile, Ratios, ScoreBudget, Tuned, name_of
from svnup.construction import blame, check_node, construct, did_you_mean, refuse_outside, type_complaint
from svnup.data import NAMED, TokenSource
from svnup.evaluation import Evaluation
from svnup.files import at_home, default_cache_dir
from svnup.model import Model
from svnup.naming import code_from_outside, named
from svnup.provenance import redact_code
from svnup.scoring import GameOptions, Scorer, ShapleyScorer
from svnup.search import ShapleyRounds
from svnup.splitting import Split
from svnup.tracking import Tracker
from svnup.types import Granularity, Ints, Offload, SaveFormat, SelectionLoss, method_name, moving_numbers, parse_pattern

if TYPE_CHECKING:
    from svnup.language_model import LanguageModel
    from svnup.pruning import Pruner

Gate = Literal["error", "warn", "off"]
Texts = dict[tuple[TokenSource, str], TokenSource]

CONF = next(p for p in (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf") if p.is_dir())


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


def _shared(source: TokenSource, known: Texts, key: str) -> TokenSource:
    """The same source of an earlier job, if its text is still the same, for the tokens that it has already read."""
    with blame(key):
        return known.setdefault((source, "" if source.from_hub else source.fingerprint()), source)


class KeepSecrets(Callback):
    """Takes secrets out of the configuration that Hydra writes down before the first job of a sweep."""

    sweeps: ClassVar[set[Path]] = set()

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        with contextlib.suppress(OmegaConfBaseException):  # there is no such folder, which the sweep is about to say
            self.sweeps.add(Path(str(config.hydra.sweep.dir)))

    @classmethod
    def redact(cls) -> None:
        for file in (folder / "multirun.yaml" for folder in cls.sweeps):
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


@dataclass(frozen=True)
class Job:
    """One experiment, with every part built and checked; `config` is the resolved configuration and `key` its hash."""

    model: Model
    dataset: TokenSource
    scorer: Scorer | None
    allocator: Allocator
    selection: TokenSource | None
    split: Split
    pruner: Pruner
    evaluation: Evaluation
    tracker: Tracker
    sparsity: float
    pattern: str
    seed: int
    protocol_gate: Gate
    selection_loss: SelectionLoss
    results_dir: str
    cache_dir: str
    datasets_dir: str | None
    force: bool
    dry_run: bool
    offload: Offload
    save_model: bool
    save_format: SaveFormat
    save_masks: bool
    config: dict[str, Any]
    key: str

    @property
    def name(self) -> str:
        """Readable, for people: model, pruner, allocator, sparsity."""
        pattern = "" if self.pattern == "unstructured" else f" {self.pattern}"
        pruner = method_name(self.config["pruner"])
        return f"{self.model.name} {pruner} {name_of(self.config['allocator'])} {self.sparsity:g}{pattern}"

    @property
    def shapley(self) -> ShapleyScorer | None:
        """The scorer where it plays a game, which alone has shards and a text of its own."""
        return self.scorer if isinstance(self.scorer, ShapleyScorer) else None

    def sources(self) -> dict[str, TokenSource]:
        """Every text that the job reads, by the key under which it was configured."""
        return _texts(self.dataset if self.calibrates else None, self.shapley, self.allocator, self.selection, self.evaluation)

    def fingerprints(self) -> dict[str, str]:
        """What the inputs are by content, without loading them: a finished job with other inputs runs again."""
        prints = {"weights": self.model.fingerprint()} | {k: s.fingerprint() for k, s in self.sources().items()}
        path = self.config["allocator"].get("path")
        if path is not None:
            prints["allocator.path"] = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
        return prints | self.evaluation.fingerprints() | code_from_outside(_counting(self.config))

    def texts(self) -> dict[str, dict[str, Any]]:
        """What was read of each text, by the key of its source, for the record: after `check_texts`, which reads them."""
        read = {key: source.tokens(self.model.tokenizer) for key, source in self.sources().items()}
        return {
            key: {"tokens_sha256": hashlib.sha256(ids.tobytes()).hexdigest()[:16], "n_seq": len(ids), "seq_len": ids.shape[1]}
            for key, ids in read.items()
        }

    def scorer_seconds(self) -> float:
        """Time that Shapley values will take, measured on one block of the model's shape with random weights."""
        assert self.shapley is not None
        probe = self.model.one_block()
        return self.shapley.seconds(probe, self.model.n_blocks())

    @property
    def granularity(self) -> Granularity:
        """What has a budget of its own."""
        return typing.cast(Granularity, self.config["allocator"].get("granularity", "block"))

    @property
    def game_prunes(self) -> bool:
        return self.shapley is not None and self.shapley.game.absence == "prune"

    @property
    def calibrates(self) -> bool:
        """Whether anything reads the calibration text."""
        scorer_reads = self.scorer is not None and self.scorer.needs_inputs
        return self.pruner.needs_inputs or self.split.needs_inputs or scorer_reads

    def tokens(self) -> Ints:
        """The calibration tokens; none where neither pruner nor scorer reads any."""
        if not self.calibrates:
            return np.zeros((0, self.dataset.seq_len), dtype=np.int64)
        return self.dataset.tokens(self.model.tokenizer)

    @cached_property
    def skeleton(self) -> LanguageModel:
        """The model without weights, which has the shapes that they will have."""
        with blame("model"):
            return self.model.skeleton()

    def load(self, scratch: Path | None = None) -> LanguageModel:
        """The model, with its blocks where they wait; raises ValueError with the key at fault."""
        with blame("model", ("offload",)):
            return self.model.load(self.offload, scratch)

    def check_texts(self) -> None:
        """Read every text and task, before any weight is loaded; raises ValueError with the key at fault."""
        with blame("model"):
            tokenizer = self.model.tokenizer
        known = self.skeleton.n_embeddings
        for key, source in self.sources().items():
            with blame(key):
                highest = int(source.tokens(tokenizer).max())
            if highest >= known:
                raise ValueError(
                    f"model={self.model.name}: its tokenizer gives token {highest} in the text of {key}, the model has {known} "
                    "embeddings; use the tokenizer that the model was trained with"
                )
        with blame("evaluation"):
            self.evaluation.check(self.skeleton, tokenizer)

    def check_shapes(self) -> LanguageModel:
        """Check pattern, budget and lengths against the real shapes of the model; returns the skeleton that has them."""
        from svnup.language_model import matrix
        from svnup.pruning import check_profile

        lm = self.skeleton
        self._check_lengths(lm)
        group = parse_pattern(self.pattern)
        linears = [(i, name, m) for i in range(lm.n_blocks) for name, m in lm.linears(i).items()]
        if not linears:
            raise ValueError(f"model={self.model.name}: its blocks have no linears to prune; choose another model")
        for index, name, linear in linears if group else []:
            if (width := matrix(linear).shape[1]) % group[1]:  # type: ignore[index]
                raise ValueError(_does_not_divide(self.pattern, f"the {width} inputs of block {index}, {name}"))
        if self.scorer is None and not isinstance(self.allocator, Chooser):
            with blame("allocator"):
                check_profile(lm, self.allocator.allocate(None, lm.block_params, self.sparsity, self.pattern))
        if getattr(self.scorer, "granularity", "block") == "sublayer":
            key = "shapley.game.players" if self.shapley is not None else "allocator.granularity"
            try:
                for index in range(lm.n_blocks):
                    lm.sublayers(index)
            except ValueError as error:
                raise ValueError(str(error).replace("players=", f"{key}=")) from None
        return lm

    def _check_lengths(self, lm: LanguageModel) -> None:
        longest = lm.max_positions
        for name, source in self.sources().items():
            given = f"{name.partition('.datasets')[0]}.seq_len={source.seq_len}"
            if longest is not None and source.seq_len > longest:
                raise ValueError(
                    f"{given}: the model has {longest} positions; choose at most that, for all texts by model.seq_len={longest}"
                )
            if longest is None and (reason := lm.why_too_long(source.seq_len)) is not None:
                raise ValueError(
                    f"{given}: too long for the model ({reason}); choose a shorter one, for all texts by model.seq_len=..."
                )


def _texts(
    dataset: TokenSource | None,
    shapley: ShapleyScorer | None,
    allocator: Allocator,
    selection: TokenSource | None,
    evaluation: Evaluation,
) -> dict[str, TokenSource]:
    texts = {"dataset": dataset} if dataset is not None else {}
    if shapley is not None:
        texts["shapley.game.data"] = shapley.game.data
    if (payoff := getattr(allocator, "data", None)) is not None:
        texts["allocator.data"] = payoff
    texts |= {"selection": selection} if selection is not None else {}
    return texts | {f"evaluation.{option}": source for option, source in evaluation.sources().items()}


def build(cfg: Any, known: Texts | None = None) -> Job:
    """Build and check a job from a composed configuration; raises ValueError with the key, the value and the way out.

    `known` holds the token sources of earlier jobs of this process: one that is asked for again need not tokenize again.
    """
    known = {} if known is None else known
    with _blame_omegaconf():
        config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)  # type: ignore[assignment]
    _refuse_unknown(config)
    _refuse_removed(config)
    _check_groups(config)
    _check_values(config)
    _check_scalars(config)
    config["evaluation"] = _with_named_texts(config)
    _refuse_missing(config)
    model: Model = construct(config["model"], "model", "model")
    dataset: TokenSource = construct(config["dataset"], "dataset", "text")
    dataset = _shared(dataset, known, "dataset")
    scorer = _scorer(config["allocator"].get("scorer"), known)
    shapley = scorer if isinstance(scorer, ShapleyScorer) else None
    given = {k: v for k, v in config["shapley"].items() if k not in ("game", "shard") and v != "???"}
    check_node(given, "shapley", "estimator")  # a misspelt key is one where the group is not used, too
    allocator = _allocator({k: v for k, v in config["allocator"].items() if k != "scorer"})
    chooses = isinstance(allocator, Chooser)
    key = config_key(config, chooses)
    selection: TokenSource = construct(config["selection"], "selection", "text")
    split: Split = construct(config["split"], "split", "split")
    if config["allocator"].get("granularity", "block") != "block":
        _check_finer(config, scorer, split)
    if isinstance(allocator, ShapleyRounds):
        _check_rounds(shapley)
    if scorer is None and isinstance(getattr(allocator, "allocator", allocator), (ScoreBudget, Ratios)):
        raise ValueError("allocator.scorer=null: this allocator needs scores; leave its scorer as its yaml has it")
    evaluation: Evaluation = _evaluation(config["evaluation"], known)
    with blame("evaluation"):
        online = evaluation.from_hub
    tracker: Tracker = construct(config["tracker"], "tracker", "tracker")
    with blame("tracker", ("tracker",)):
        tracker.check()
    texts = _texts(dataset, shapley, allocator, _shared(selection, known, "selection") if chooses else None, evaluation)
    _check_roles(texts)
    if online or model.from_hub or any(source.from_hub for source in texts.values()):
        _go_offline_if_unreachable()
    with blame("model"):
        n_blocks = model.n_blocks()
    with blame("allocator", ("sparsity", "pattern")):
        allocator.check(n_blocks, config["sparsity"], config["pattern"])
    group = parse_pattern(config["pattern"])
    if isinstance(allocator, FromFile) and allocator.divided and not split.uniform:
        raise ValueError(
            f"split={_option(config, 'split')}: {allocator.path} divides blocks among their linears; use split=uniform"
        )
    if group is not None and not split.uniform:
        raise ValueError(f"pattern={config['pattern']}: the linears of a block share its N; add split=uniform")
    with blame("model", ("offload",)):
        model.check_offload(config["offload"])
    if shapley is not None:
        with blame("shapley", ("shapley",)):
            shapley.check(n_blocks)
    _refuse_mixed_roles(texts)
    pruner: Pruner = construct(config["pruner"], "pruner", "pruner")  # the first that imports torch
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
    _check_memory(config, pruner, split, shapley, chooses)
    with blame("model"):
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
        key=key,
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
    with _blame_omegaconf():
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


def config_key(config: dict[str, Any], chooses: bool) -> str:
    """Hash of a resolved configuration without what cannot change a number, and of the version of the numbers.

    `chooses`: the selection text and the loss on it count.
    """
    kept = _counting(config)
    if chooses:
        kept["selection"] = moving_numbers(config | {"dataset": config["selection"]})["dataset"]
    if chooses and config["selection_loss"] != "nll":  # as it was before there was a choice
        kept["selection_loss"] = config["selection_loss"]
    text = json.dumps([NUMBERS_VERSION, named(kept)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _counting(config: dict[str, Any]) -> dict[str, Any]:
    """What can change a number of a job that chooses nothing."""
    kept = moving_numbers(config)
    if scorer := kept["allocator"].get("scorer"):
        kept["allocator"] = kept["allocator"] | {"scorer": {k: v for k, v in scorer.items() if k != "shard"}}
    return kept


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
    """An allocator, to be tuned where its knob is `auto`."""
    tuned = [k for k, v in node.items() if v == "auto"]
    allocator: Any = construct({k: v for k, v in node.items() if k not in tuned}, "allocator", "allocator")
    if not tuned:
        return typing.cast(Allocator, allocator)
    knob = getattr(allocator, "knob", None)
    if tuned != [knob]:
        raise ValueError(f"allocator.{tuned[0]}=auto: cannot be tuned{f', only {knob} can' if knob else ''}; give a value")
    return Tuned(allocator)


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
    with blame("shapley"):
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
    return node | {"datasets": {name: _named_text(name, config) for name in names}}


def _named_text(name: str, config: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The node of a data set of svnup, as its yaml in conf/dataset makes it for an evaluation."""
    evaluation, source = config["evaluation"], NAMED[name]
    fixed = {k: evaluation[k] for k in ("n_seq", "seq_len", "skip", "role") if k in evaluation} | {"seed": 0}
    usual = {f.name: f.default for f in fields(source) if f.default is not MISSING_DEFAULT}
    places = {"datasets_dir": config.get("datasets_dir")} if "datasets_dir" in usual else {}
    return {"_target_": f"{source.__module__}.{source.__qualname__}"} | usual | fixed | places | options


def _check_roles(texts: dict[str, TokenSource]) -> None:
    """Test text is for reported numbers only, and what the game plays on chooses nothing."""
    for name, role, what in (
        ("dataset", "calibration", "calibrates pruners"),
        ("shapley.game.data", "payoff", "pays coalitions"),
        ("allocator.data", "payoff", "pays coalitions"),
        ("selection", "selection", "chooses"),
    ):
        if name in texts and texts[name].role != role:
            raise ValueError(f"{name}.role={texts[name].role}: this text {what}; use {name}.role={role}")


def _refuse_mixed_roles(texts: dict[str, TokenSource]) -> None:
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


def _does_not_divide(pattern: str, what: str) -> str:
    return f"pattern={pattern}: its M does not divide {what}; choose an M that does, or pattern=unstructured"


def _refuse_unknown(config: dict[str, Any]) -> None:
    """Keys that were added with + at the top, where the schema is no longer asked."""
    for name in set(config) - set(Schema.__annotations__):
        raise ValueError(f"{name}={config[name]}: there is no such key{did_you_mean(name, list(Schema.__annotations__))}")


def _refuse_removed(config: dict[str, Any]) -> None:
    """Keys that were taken away with ~ at the top."""
    if gone := next((name for name in Schema.__annotations__ if name not in config), None):
        raise ValueError(f"~{gone}: a job needs it; leave out ~{gone}, or give a value: {gone}=...")


def _check_values(node: Any, key: str = "") -> None:
    """Refuse numbers that are not finite, and paths of unknown users, wherever they stand."""
    if isinstance(node, (dict, list)):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            _check_values(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, float) and not math.isfinite(node):
        raise ValueError(f"{key}={node}: must be a finite number; choose one")
    elif isinstance(node, str) and node.startswith("~") and re.search(r"(path|dir)$", key):
        at_home(key, node)


def _check_groups(config: dict[str, Any]) -> None:
    """Words where a group's node belongs; a text may be one of several groups and is told so by `construct`."""
    for name in GROUPS:
        if not isinstance(config[name], dict) and name != "selection":
            raise ValueError(f"{name}={config[name]}: must be a node with a _target_; choose an option of it: {name}=...")


def _check_scalars(config: dict[str, Any]) -> None:
    for name, hint in typing.get_type_hints(Schema).items():
        if name not in GROUPS and (complaint := type_complaint(config[name], hint)):
            raise ValueError(f"{name}={config[name]}: {complaint}")
    for name in ("results_dir", "cache_dir"):
        if config[name] == "":
            raise ValueError(f"{name}='': is empty; name a folder, or leave out {name}=")
    folder = config["datasets_dir"]
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise ValueError(f"datasets_dir={folder}: there is no such folder; name one with data sets in it, such as allenai/c4")
    sparsity = config["sparsity"]
    if not 0 <= sparsity < 1:
        hint = f"; did you mean sparsity={sparsity / 100:g}?" if 1 < sparsity < 100 else ""
        raise ValueError(f"sparsity={sparsity:g}: must be a fraction of zeros in [0, 1){hint}")
    parse_pattern(config["pattern"])
    closed = {"protocol_gate": Gate, "offload": Offload, "save_format": SaveFormat, "selection_loss": SelectionLoss}
    for name, options in closed.items():
        choices = typing.get_args(options)
        if config[name] not in choices:
            hint = did_you_mean(str(config[name]), list(choices))
            raise ValueError(f"{name}={config[name]}: choose {', '.join(choices[:-1])} or {choices[-1]}{hint}")
    if config["save_format"] != "dense" and not config["save_model"]:
        raise ValueError(f"save_format={config['save_format']}: no model would be saved; add save_model=true")


def _check_finer(config: dict[str, Any], scorer: Scorer | None, split: Split) -> None:
    """Refuse budgets finer than blocks without their scores, or divided as those of blocks."""
    scored = config["allocator"].get("scorer") is not None
    if scored and getattr(scorer, "granularity", "block") != "sublayer":
        of_game = isinstance(scorer, ShapleyScorer)
        what = "shapley.game.players=sublayer" if of_game else "allocator=shapley shapley.game.players=sublayer"
        raise ValueError(
            f"allocator.granularity=sublayer: the scores are those of blocks; add {what}, or use granularity=block"
        )
    if not split.uniform:
        raise ValueError(f"split={_option(config, 'split')}: divides the budgets of blocks, not finer ones; use split=uniform")


def _check_rounds(shapley: ShapleyScorer | None) -> None:
    """Refuse rounds whose values would not be Shapley values in a pruned model."""
    if shapley is None:
        raise ValueError("allocator.scorer: rounds need Shapley values; leave its scorer as its yaml has it")
    if getattr(shapley.estimator, "gated", False):
        raise ValueError("shapley=gates: there are no gates in a pruned model's game; use shapley=sliding_window")


def _check_memory(config: dict[str, Any], pruner: Pruner, split: Split, shapley: ShapleyScorer | None, chooses: bool) -> None:
    """Refuse what needs two versions of the weights in memory where the model is not even once in it."""
    if split.needs_errors and not pruner.needs_inputs:
        raise ValueError(
            f"split={_option(config, 'split')}: needs the errors of a pruner that reads inputs; choose another pruner, or "
            "split=shapley"
        )
    if config["offload"] == "none":
        return
    if chooses:
        raise ValueError(
            f"offload={config['offload']}: allocator options that are auto, and allocators that try many profiles, prune many "
            "times; give a value, or choose another allocator"
        )
    if split.trial:
        raise ValueError(f"offload={config['offload']}: split={_option(config, 'split')} prunes twice; use split=uniform")
    if shapley is not None and shapley.game.absence == "prune":
        raise ValueError(f"offload={config['offload']}: shapley.game.absence=prune keeps all weights twice; use absence=skip")


def _option(config: dict[str, Any], group: str) -> str:
    return str(config[group]["_target_"]).rpartition(".")[2].lower().removesuffix(group)


def _refuse_missing(node: Any, prefix: str = "") -> None:
    """Mandatory values, `???` in yaml, that nobody gave."""
    for name, value in node.items():
        if value == "???":
            raise ValueError(f"{prefix}{name}: has no value yet; add {prefix}{name}=...")
        if isinstance(value, dict) and not (prefix == "" and name == "shapley"):  # judged where an allocator uses it
            _refuse_missing(value, "shapley." if name == "scorer" and "game" in value else f"{prefix}{name}.")


# -- messages


@contextlib.contextmanager
def _blame_omegaconf() -> Iterator[None]:
    try:
        yield
    except OmegaConfBaseException as error:
        raise ValueError(explain(error, [])) from error


def explain(error: Exception, overrides: list[str]) -> str:
    """A composition error as one line: the key, what was given, and what to do."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, option = str(error.missing_cfg_file).partition("/")  # which may itself be a path
        if group == "hydra":
            group, _, option = str(error.missing_cfg_file).rpartition("/")
        if group == "model" and (Path(option).is_dir() or "/" in option):
            way = f"model=pretrained model.pretrained_model_name_or_path={option}"
            return f"model={option}: no option of the group; a folder or a hub model is {way}"
        options = [o for o in error.options or [] if not o.startswith("_")]
        if options:
            return f"{group}={option}: choose among {', '.join(options)}{did_you_mean(option, options)}"
    if str(error).startswith("Error merging override") and error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    text = " ".join(str(error).split())
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if unknown and "@" in unknown[1]:
        given = next((o for o in overrides if o.lstrip("+~").startswith(f"{unknown[1]}=")), unknown[1])
        return f"{given}: no group stands there; put a + before it, +{given}, if that node can take it"
    if unknown:
        full = re.search(r"full_key: (\S+)", text)
        key = unknown[1] if "." in unknown[1] or not full else full[1]
        given = next((o for o in overrides if o.lstrip("+~").startswith(f"{key}=")), key)
        if key in GROUPS:
            return f"{given}: a group, no value; choose an option of it by name, {key}=..., and its own by {key}.<name>=..."
        if named := re.match(r"evaluation\.datasets\.(\w+)\.", key):
            plus = "" if named[1] == "test" else "+"
            return f"{given}: no data set is called {named[1]}; add {plus}dataset@evaluation.datasets.{named[1]}=text_file"
        return f"{given}: there is no such key{_nearest_key(key, _known_keys(overrides)) or '; svnup --cfg job shows all'}"
    value = re.search(r"Value '([^']*)' (.*?) full_key: (\S+)", text)
    if value:
        return f"{value[3]}={value[1]}: {value[2]}; give a value of the right type"
    kind = re.search(r"(field '\w+' is not Optional|Cannot convert '\w+' to \w+).*? full_key: (\S+)", text)
    if kind:
        given = next((o for o in overrides if o.lstrip("+~").startswith(f"{kind[2]}=")), kind[2])
        return f"{given}: {kind[1].replace(f'field {kind[2]!r}', 'it')}; give a plain value"
    if twice := re.search(r"Cannot merge (?:Dict|List)Config with (?:Dict|List)Config full_key: (\S+)", text):
        return f"{twice[1]}: is given as a list and by names; give it in one way"
    if "Config group override must be a string" in text:
        given = next((o for o in overrides if o.endswith("=null")), "a group")
        options = sorted(p.stem for p in (CONF / given.partition("=")[0]).glob("[!_]*.yaml"))
        return f"{given}: a group needs an option; choose among {', '.join(options)}"
    if isinstance(error, OverrideParseException):
        way = "put quotes around the value" if "=" in error.override else "write key=value"
        return f"{error.override}: not in Hydra's syntax ({error.__cause__ or text}); {way}"
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None and not overrides:
        return " ".join(str(error.__cause__).split())
    return text


def _nearest_key(key: str, known: list[str]) -> str:
    """A hint at the key that was meant: of the same node where that exists, since there only the last word is wrong."""
    parent, _, last = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
    if not siblings:
        return did_you_mean(key, known)
    return did_you_mean(last, siblings).replace("did you mean ", f"did you mean {parent}." if parent else "did you mean ")


def defaults() -> dict[str, Any]:
    """The resolved configuration of a job without any override."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typing.cast(dict[str, Any], OmegaConf.to_container(compose("config"), resolve=True))


def _known_keys(overrides: list[str]) -> list[str]:
    """Every key of the configuration with the given choices of groups, as far as it composes."""
    groups = {p.name for p in CONF.iterdir() if p.is_dir()}
    choices = [o for o in overrides if o.partition("=")[0] in groups]
    for chosen in (choices, []):
        with contextlib.suppress(Exception), initialize_config_dir(str(CONF), version_base="1.3"):
            plain = typing.cast(dict[str, Any], OmegaConf.to_container(compose("config", overrides=chosen), resolve=False))
            return [*groups, *_flatten(plain)]
    return sorted(groups)


def _flatten(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
