"""From a composed configuration to a checked Job: every mistake surfaces here, before a weight is loaded, cheapest first."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import json
import os
import re
import socket
import threading
import types
import typing
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.utils import get_object
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from svnup import NUMBERS_VERSION
from svnup.allocation import Allocator, Chooser, FromFile, Ratios, ScoreBudget, Tuned, name_of
from svnup.data import TokenSource
from svnup.evaluation import Evaluation
from svnup.model import Pretrained, Random
from svnup.provenance import redact_code
from svnup.scoring import GameOptions, Scorer, ShapleyScorer
from svnup.search import ShapleyRounds
from svnup.splitting import Split
from svnup.tracking import NoTracker, WandbTracker
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
    force: bool = False
    dry_run: bool = False
    offload: str = "none"
    save_model: bool = False
    save_format: str = "dense"
    save_masks: bool = False


def _shared(source: TokenSource, known: Texts) -> TokenSource:
    """The same source of an earlier job, if its text is still the same, for the tokens that it has already read."""
    return known.setdefault((source, "" if source.from_hub else source.fingerprint()), source)


class KeepSecrets(Callback):
    """Takes secrets out of the configuration that Hydra writes down before the first job of a sweep."""

    sweeps: ClassVar[set[Path]] = set()

    def on_multirun_start(self, config: Any, **_: Any) -> None:
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


def _groups() -> str:
    """The groups and their options, a line each, without the files that options share."""
    folders = [p for p in sorted(CONF.iterdir()) if p.is_dir() and p.name not in ("hydra", "local")]
    return "\n".join(f"{p.name}: {', '.join(sorted(f.stem for f in p.glob('[!_]*.yaml')))}" for p in folders)


@dataclass(frozen=True)
class Job:
    """One experiment, with every part built and checked; `config` is the resolved configuration and `key` its hash."""

    model: Pretrained | Random
    dataset: TokenSource
    scorer: Scorer | None
    allocator: Allocator
    selection: TokenSource | None
    split: Split
    pruner: Pruner
    evaluation: Evaluation
    tracker: NoTracker | WandbTracker
    sparsity: float
    pattern: str
    seed: int
    protocol_gate: Gate
    selection_loss: SelectionLoss
    results_dir: str
    cache_dir: str
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
        return prints | self.evaluation.fingerprints()

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

    def check_texts(self) -> None:
        """Read every text and task, before any weight is loaded; raises ValueError with the key at fault."""
        with _blame("model"):
            tokenizer = self.model.tokenizer
        for key, source in self.sources().items():
            with _blame(key):
                source.tokens(tokenizer)
        with _blame("evaluation"):
            self.evaluation.check()

    def check_shapes(self) -> LanguageModel:
        """Check pattern and budget against the real shapes of the model; returns the skeleton without weights that has them."""
        from svnup.language_model import matrix
        from svnup.pruning import check_profile

        with _blame("model"):
            lm = self.model.skeleton()
        group = parse_pattern(self.pattern)
        linears = [(i, name, m) for i in range(lm.n_blocks) for name, m in lm.linears(i).items()]
        if not linears:
            raise ValueError(f"model={self.model.name}: its blocks have no linears to prune; choose another model")
        for index, name, linear in linears if group else []:
            if (width := matrix(linear).shape[1]) % group[1]:  # type: ignore[index]
                raise ValueError(_does_not_divide(self.pattern, f"the {width} inputs of block {index}, {name}"))
        if self.scorer is None and not isinstance(self.allocator, Chooser):
            with _blame("allocator"):
                check_profile(lm, self.allocator.allocate(None, lm.block_params, self.sparsity, self.pattern))
        if self.shapley is not None and self.shapley.game.players == "sublayer":
            with _blame("shapley.game"):
                for index in range(lm.n_blocks):
                    lm.sublayers(index)
        return lm


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
    return texts | {f"evaluation.datasets.{i}": s for i, s in enumerate(evaluation.sources())}


def build(cfg: Any, known: Texts | None = None) -> Job:
    """Build and check a job from a composed configuration; raises ValueError with the key, the value and the way out.

    `known` holds the token sources of earlier jobs of this process: one that is asked for again need not tokenize again.
    """
    known = {} if known is None else known
    with _blame_omegaconf():
        config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)  # type: ignore[assignment]
    _refuse_unknown(config)
    _check_scalars(config)
    _refuse_missing(config)
    model = construct(config["model"], "model")
    dataset = construct(config["dataset"], "dataset")
    dataset = _shared(dataset, known)
    scorer = _scorer(config["allocator"].get("scorer"), known)
    shapley = scorer if isinstance(scorer, ShapleyScorer) else None
    given = {k: v for k, v in config["shapley"].items() if k not in ("game", "shard") and v != "???"}
    _arguments(given, "shapley")  # a misspelt key is one where the group is not used, too
    allocator = _allocator({k: v for k, v in config["allocator"].items() if k != "scorer"})
    chooses = isinstance(allocator, Chooser)
    key = config_key(config, chooses)
    selection: TokenSource = construct(config["selection"], "selection")
    split: Split = construct(config["split"], "split")
    if config["allocator"].get("granularity", "block") != "block":
        _check_finer(config, shapley, split)
    if isinstance(allocator, ShapleyRounds):
        _check_rounds(shapley)
    if scorer is None and isinstance(getattr(allocator, "allocator", allocator), (ScoreBudget, Ratios)):
        raise ValueError("allocator.scorer=null: this allocator needs scores; leave its scorer as its yaml has it")
    evaluation: Evaluation = _evaluation(config["evaluation"], known)
    with _blame("evaluation"):
        online = evaluation.from_hub
    tracker = construct(config["tracker"], "tracker")
    with _blame("tracker", ("tracker",)):
        tracker.check()
    texts = _texts(dataset, shapley, allocator, _shared(selection, known) if chooses else None, evaluation)
    _check_roles(texts)
    if online or model.from_hub or any(source.from_hub for source in texts.values()):
        _go_offline_if_unreachable()
    with _blame("model"):
        n_blocks = model.n_blocks()
    with _blame("allocator", ("sparsity", "pattern")):
        allocator.check(n_blocks, config["sparsity"], config["pattern"])
    group = parse_pattern(config["pattern"])
    if isinstance(allocator, FromFile) and allocator.divided and not split.uniform:
        raise ValueError(
            f"split={_option(config, 'split')}: {allocator.path} divides blocks among their linears; use split=uniform"
        )
    if group is not None and not split.uniform:
        raise ValueError(f"pattern={config['pattern']}: the linears of a block share its N; add split=uniform")
    with _blame("model", ("offload",)):
        model.check_offload(config["offload"])
    if group is not None and any(width % group[1] for width in model.widths()):
        raise ValueError(_does_not_divide(config["pattern"], f"the widths {model.widths()} of the model"))
    if shapley is not None:
        with _blame("shapley", ("shapley",)):
            shapley.check(n_blocks)
    _refuse_mixed_roles(texts)
    for name, source in texts.items():
        if source.seq_len > (model.max_positions() or source.seq_len):
            longest = model.max_positions()
            raise ValueError(
                f"{name.partition('.datasets')[0]}.seq_len={source.seq_len}: the model has {longest} positions; choose at most "
                f"that, for all texts by model.seq_len={longest}"
            )
    pruner = construct(config["pruner"], "pruner")  # the first that imports torch
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
    with _blame("model"):
        model.check_device()
    scalars = {k: config[k] for k in Schema.__annotations__ if not isinstance(config[k], dict)}
    scalars["cache_dir"] = config["cache_dir"] or str(default_cache_dir())
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


def stored(config: dict[str, Any], **changes: Any) -> Any:
    """The configuration that lies in a result, to build its job anew, with changes at its top.

    Keys that svnup did not have when the result was made are as by default.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        usual = compose("config", overrides=["~local"] if (CONF / "local" / "default.yaml").is_file() else [])
    defaults = typing.cast(dict[str, Any], OmegaConf.to_container(usual, resolve=False))
    return OmegaConf.create({k: v for k, v in defaults.items() if k not in config} | config | changes)


def config_key(config: dict[str, Any], chooses: bool) -> str:
    """Hash of a resolved configuration without what cannot change a number, and of the version of the numbers.

    `chooses`: the selection text and the loss on it count.
    """
    kept = moving_numbers(config)
    scorer = kept["allocator"].get("scorer")
    if scorer:
        kept["allocator"] = kept["allocator"] | {"scorer": {k: v for k, v in scorer.items() if k != "shard"}}
    if chooses:
        kept["selection"] = config["selection"]
    if chooses and config["selection_loss"] != "nll":  # as it was before there was a choice
        kept["selection_loss"] = config["selection_loss"]
    text = json.dumps([NUMBERS_VERSION, kept], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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


def default_cache_dir() -> Path:
    """The user's cache folder for svnup (XDG)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svnup"


# -- building one node


def construct(node: dict[str, Any], key: str) -> Any:
    """Build the object that a `_target_` node describes, nested nodes first; every argument is checked by name and type."""
    cls, arguments = _arguments(node, key)
    parameters = inspect.signature(cls).parameters
    lacking = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if lacking:
        raise ValueError(f"{key}.{lacking[0]}: {node['_target_']} needs it; add {key}.{lacking[0]}=...")
    with _blame(key):
        return cls(**arguments)


def _arguments(node: dict[str, Any], key: str) -> tuple[Any, dict[str, Any]]:
    """The class of a node and its checked arguments, nested nodes built."""
    if not isinstance(node, dict):
        raise ValueError(f"{key}={node}: must be a node with a _target_; choose an option of a group, as in dataset@{key}=...")
    target = node.get("_target_")
    if target is None:
        raise ValueError(f"{key}: has no _target_; choose an option of the group: {key}=...")
    try:
        cls = get_object(target)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"{key}._target_={target}: cannot be imported ({error}); check the spelling") from None
    parameters = inspect.signature(cls).parameters
    hints = typing.get_type_hints(cls.__init__)
    arguments = {}
    for name, value in node.items():
        if name == "_target_":
            continue
        if name not in parameters:
            raise ValueError(f"{key}.{name}={value}: {target} has no such option{did_you_mean(name, list(parameters))}")
        if isinstance(value, dict) and "_target_" in value:
            value = construct(value, f"{key}.{name}")
        elif name in hints and (complaint := _type_complaint(value, hints[name])):
            raise ValueError(f"{key}.{name}={value}: {complaint}")
        arguments[name] = value
    return cls, arguments


def _type_complaint(value: Any, hint: Any) -> str | None:
    """Why a plain value does not suit an annotation, or None; annotations of other kinds are left to the constructor."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return None
        return f"choose one of {', '.join(map(str, args))}{did_you_mean(str(value), [str(a) for a in args])}"
    if origin in (typing.Union, types.UnionType):
        complaints = [_type_complaint(value, a) for a in args]
        return None if None in complaints else next(c for c in complaints if c)
    if hint is type(None):
        return None if value is None else "must be null"
    needs_node = inspect.isabstract(hint) or getattr(hint, "_is_protocol", False)
    if needs_node and (value is None or isinstance(value, (str, int, float, list, dict))):
        return "must be a node with a _target_; choose an option of a group, as in dataset@shapley.game.data=docs"
    kinds: dict[Any, tuple[tuple[type, ...], str]] = {
        int: ((int,), "must be a whole number"),
        float: ((int, float), "must be a number"),
        bool: ((bool,), "must be true or false"),
        str: ((str,), "must be text"),
    }
    if hint in kinds:
        accepted, text = kinds[hint]
        wrong = not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool)
        return text if wrong else None
    if origin is list and not isinstance(value, list):
        return "must be a list, such as [a,b]"
    return None


def _allocator(node: dict[str, Any]) -> Allocator:
    """An allocator, to be tuned where its knob is `auto`."""
    tuned = [k for k, v in node.items() if v == "auto"]
    allocator: Any = construct({k: v for k, v in node.items() if k not in tuned}, "allocator")
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
        scorer = construct(node, "allocator.scorer")
        if not hasattr(scorer, "score"):
            raise ValueError(f"allocator.scorer._target_={node['_target_']}: gives no scores; choose a class of svnup.scoring")
        return typing.cast(Scorer, scorer)
    estimator = {k: v for k, v in node.items() if k not in ("game", "shard")}
    options = dict(node["game"])
    if options.get("absence") != "prune":  # whose pruner is not used then, and need not be imported
        options["pruner"] = None
    game: GameOptions = construct(options, "shapley.game")
    game = replace(game, data=_shared(game.data, known))
    with _blame("shapley"):
        return ShapleyScorer(construct(estimator, "shapley"), game, node.get("shard"))


def _evaluation(node: dict[str, Any], known: Texts) -> Any:
    """Data sets are named as in conf/dataset; each is built for the role, seq_len and n_seq of the evaluation."""
    if "datasets" not in node:
        return construct(node, "evaluation")
    if not isinstance(node["datasets"], list):
        raise ValueError(f"evaluation.datasets={node['datasets']}: must be a list, such as [docs] or [wikitext2,c4]")
    sources = []
    for i, entry in enumerate(node["datasets"]):
        if isinstance(entry, dict) and len(entry) != 1:
            raise ValueError(
                f"evaluation.datasets.{i}={entry}: one data set an entry, such as [docs,{{text_file: {{path: x.txt}}}}]"
            )
        name, options = next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})
        file = CONF / "dataset" / f"{name}.yaml"
        if not file.is_file():
            names = sorted(p.stem for p in file.parent.glob("*.yaml"))
            raise ValueError(f"evaluation.datasets={name}: choose among {', '.join(names)}{did_you_mean(str(name), names)}")
        plain = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file)))
        fixed = {k: node[k] for k in ("seq_len", "n_seq", "role")} | {"seed": 0}
        merged = plain | fixed | (options or {})
        _refuse_missing(merged, f"evaluation.datasets.{i}.{name}.")
        source = construct(merged, f"evaluation.datasets.{i}")
        sources.append(_shared(source, known))
    return construct(node | {"datasets": sources}, "evaluation")


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


def _check_scalars(config: dict[str, Any]) -> None:
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


def _check_finer(config: dict[str, Any], shapley: ShapleyScorer | None, split: Split) -> None:
    """Refuse budgets finer than blocks without their scores, or divided as those of blocks."""
    scored = config["allocator"].get("scorer") is not None
    if scored and (shapley is None or shapley.game.players != "sublayer"):
        what = "allocator=shapley shapley.game.players=sublayer" if shapley is None else "shapley.game.players=sublayer"
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


def did_you_mean(given: str, options: list[str]) -> str:
    lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(given.lower(), lower, n=1, cutoff=0.6)
    return f"; did you mean {lower[close[0]]}?" if close else ""


@contextlib.contextmanager
def _blame(key: str, whole: tuple[str, ...] = ()) -> Iterator[None]:
    """Put the node's key before a component's message that begins with one of its options, such as `window=13: ...`."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        option = re.match(r"(\w+)=", text)
        if option and option[1] not in whole:
            raise ValueError(f"{key}.{text}") from error
        raise


@contextlib.contextmanager
def _blame_omegaconf() -> Iterator[None]:
    try:
        yield
    except OmegaConfBaseException as error:
        raise ValueError(explain(error, [])) from error


def explain(error: Exception, overrides: list[str]) -> str:
    """A composition error as one line: the key, what was given, and what to do."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = [o for o in error.options or [] if not o.startswith("_")]
        if options:
            return f"{group}={option}: choose among {', '.join(options)}{did_you_mean(option, options)}"
    if str(error).startswith("Error merging override") and error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    text = " ".join(str(error).split())
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if unknown:
        full = re.search(r"full_key: (\S+)", text)
        key = unknown[1] if "." in unknown[1] or not full else full[1]
        key = key.partition("@")[0] if "@" in key else key
        given = next((o for o in overrides if o.lstrip("+~").startswith(f"{key}=")), key)
        return f"{given}: there is no such key{_nearest_key(key, _known_keys(overrides)) or '; svnup --cfg job shows all'}"
    value = re.search(r"Value '([^']*)' (.*?) full_key: (\S+)", text)
    if value:
        return f"{value[3]}={value[1]}: {value[2]}; give a value of the right type"
    kind = re.search(r"(field '\w+' is not Optional|Cannot convert '\w+' to \w+).*? full_key: (\S+)", text)
    if kind:
        given = next((o for o in overrides if o.lstrip("+~").startswith(f"{kind[2]}=")), kind[2])
        return f"{given}: {kind[1].replace(f'field {kind[2]!r}', 'it')}; give a plain value"
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
