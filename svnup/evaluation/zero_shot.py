"""Zero-shot accuracy by lm-eval (lm-evaluation-harness)."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import itertools
import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from svnup import distributed
from svnup.data import folder_digest
from svnup.evaluation.ppl import Perplexity
from svnup.evaluation.protocol import Check, Evaluation, NoNumberError, measured_once, unchecked
from svnup.files import at_home
from svnup.keys import did_you_mean
from svnup.types import Metric, Metrics

if TYPE_CHECKING:
    from svnup.model.language_model import LanguageModel

logger = logging.getLogger(__name__)
OWN_TASKS = Path(__file__).parents[1] / "assets" / "tasks"
# Sets of tasks, each with the metric that tables show: accuracy, or accuracy with log-likelihoods normalised by length.
TASK_SETS = {
    "cloze": {"docs_cloze": "acc"},
    # Wanda (arXiv 2306.11695) and its successors; plain accuracy throughout: github.com/locuslab/wanda/issues/31
    "with_rte": dict.fromkeys(("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"), "acc"),
    # LLM-Pruner (arXiv 2305.11627) and its successors; which metric of which task: github.com/horseee/LLM-Pruner/issues/25
    "with_piqa": dict.fromkeys(("boolq", "piqa", "winogrande", "arc_easy"), "acc")
    | dict.fromkeys(("hellaswag", "arc_challenge", "openbookqa"), "acc_norm"),
}


# Families whose accuracies on these sets were published without a BOS token: Wanda and LLM-Pruner used versions of lm-eval 0.3,
# which encodes with add_special_tokens=False whatever the tokenizer's default is (its models/huggingface.py, tok_encode).
PUBLISHED_SETS, WITHOUT_BOS = ("with_rte", "with_piqa"), ("llama", "opt", "mistral")


NEEDS_BOS = "gemma"  # models that underperform without a BOS token, as lm-eval 0.4.0 to 0.4.9 says
ACCURACIES = ("acc", "acc_norm")
FEWSHOT_SEED = 1234  # lm-eval's own


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Evaluation):
    """Accuracies in percent on multiple-choice tasks of lm-eval, with the model in memory.

    Args:
        tasks: the name of a set (TASK_SETS), a list of lm-eval's task names, or a mapping of them to the metric that tables
            show: `acc` (as for a list) or `acc_norm`.
        num_fewshot: examples before each item.
        batch_size: requests at a time.
        limit: the most items of a task; None is all.
        include_path: a folder with tasks of your own in lm-eval's format.
        add_bos_token: true puts a BOS token before every request, false no special token; null does what the set was published
            with for the model's family (WITHOUT_BOS), or what the tokenizer does by default.
        datasets_dir: a folder with local copies of data sets.

    Raises:
        ValueError: lm-eval is not installed, or has no such task.
    """

    tasks: str | list[str] | dict[str, str]
    num_fewshot: int = 0
    batch_size: int = 8
    limit: int | None = None
    include_path: str | None = None
    add_bos_token: bool | None = None
    datasets_dir: str | None = None
    needs_whole_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str) and self.tasks not in TASK_SETS:
            raise ValueError(f"tasks={self.tasks}: choose a set, {', '.join(TASK_SETS)}, or list tasks, such as [boolq,piqa]")
        names = list(self.shown) if isinstance(self.tasks, str | list | dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"tasks={self.tasks}: list names of lm-eval's tasks, such as [boolq,piqa]")
        if wrong := next((f"{n}: {m}" for n, m in self.shown.items() if m not in ACCURACIES), None):
            raise ValueError(f"tasks={{{wrong}}}: choose acc or acc_norm")
        for name, least in (("num_fewshot", 0), ("batch_size", 1), ("limit", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: choose {least} or more")
        if self.include_path is not None and not at_home("include_path", self.include_path).is_dir():
            raise ValueError(f"include_path={self.include_path}: no such folder; give one with tasks in lm-eval's format")
        if find_spec("lm_eval") is None or find_spec("accelerate") is None:
            raise ValueError(f"tasks={self.tasks}: needs lm-eval; pip install 'svnup[zero_shot]', or evaluation=ppl")

    @property
    def shown(self) -> dict[str, str]:
        """The metric that tables show, by task."""
        if isinstance(self.tasks, str):
            return TASK_SETS[self.tasks]
        return dict(self.tasks) if isinstance(self.tasks, dict) else dict.fromkeys(self.tasks, "acc")

    @property
    def from_hub(self) -> bool:  # type: ignore[override]
        return any(path.parent != OWN_TASKS for path in self._files.values())

    def fingerprints(self) -> dict[str, str]:
        parts = [folder_digest(folder) for folder in sorted({path.parent for path in self._files.values()})]
        return {"evaluation.tasks": hashlib.sha256(json.dumps(parts).encode()).hexdigest()}

    def check(self, lm: LanguageModel, tokenizer: Any) -> None:
        start = tokenizer.bos_token_id
        if self.add_bos_token and start is None:
            raise ValueError("add_bos_token=true: the tokenizer has no BOS token; use false, or null for what it does itself")
        if start is None and tokenizer.eos_token_id is None:
            raise ValueError(
                f"tasks={self.tasks}: lm-eval puts a BOS or EOS token before an empty context, and the tokenizer has neither; "
                "name one in its tokenizer_config.json (bos_token), or use evaluation=ppl"
            )
        _ = self._loaded
        if max(tokenizer.get_vocab().values(), default=0) >= lm.n_embeddings:
            self._refuse_unknown_tokens(lm, tokenizer)

    def _refuse_unknown_tokens(self, lm: LanguageModel, tokenizer: Any) -> None:
        """Raise ValueError if a request has tokens without embeddings; the vocabulary may have such tokens."""
        special = {} if (bos := self._bos_option(lm)) is None else {"add_special_tokens": bos}
        for name, task in self._loaded.items():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            with _quietly():
                task.build_all_requests(limit=self.limit, rank=0, world_size=1)
            for request in task.instances:
                highest = max(tokenizer("".join(request.args), **special)["input_ids"], default=0)
                if highest >= lm.n_embeddings:
                    raise ValueError(
                        f"tasks={name}: the tokenizer gives token {highest}, the model has {lm.n_embeddings} embeddings; use "
                        "the tokenizer that the model was trained with"
                    )

    def run(self, lm: LanguageModel) -> Metrics:
        """Metrics `<task>/acc` and, if the task has it, `<task>/acc_norm`, each with its protocol.

        Several tasks have `zero_shot/mean`, the mean of the metrics that tables show. Where a log-likelihood is not finite, the
        accuracy is nan with its reason. Of several processes the first one does all of it.

        Raises:
            ValueError: the model is offloaded, or a choice alone is longer than its context.
        """
        return distributed.from_first(lambda: self._measured(lm))

    def _measured(self, lm: LanguageModel) -> Metrics:
        if lm.offloaded:
            raise ValueError("offload: lm-eval needs the whole model in memory; use offload=none, or evaluation=ppl")
        from lm_eval.evaluator import evaluate

        protocols, option = self._protocols_of(lm), self._bos_option(lm)
        model, metrics = _harness_model(lm, self.batch_size, option), Metrics()
        for name, task in self._loaded.items():
            model.task, model.n_truncated = name, 0
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            options = {"limit": self.limit, "bootstrap_iters": 0, "log_samples": False}
            values, reason = dict.fromkeys(task.aggregation(), math.nan), None
            try:
                with _quietly():
                    found = evaluate(lm=model, task_dict={"tasks": {name: task}}, **options)["results"][name]
                values = {key.partition(",")[0]: value for key, value in found.items()}
            except NoNumberError as error:
                reason = str(error)
            protocol = protocols[name] | {"n_truncated": model.n_truncated}
            for metric in (m for m in ACCURACIES if m in values):
                variance = values[metric] * (1 - values[metric]) / max(1, protocol["n_items"] - 1)
                metrics[f"{name}/{metric}"] = Metric(
                    100 * values[metric],
                    protocol | {"metric": metric},
                    reason,
                    stderr=100 * math.sqrt(variance) if reason is None else None,
                    secondary=metric != self.shown[name],
                )
        shown = [metrics[f"{name}/{metric}"] for name, metric in self.shown.items()]
        if len(shown) > 1:
            metrics["zero_shot/mean"] = _mean(shown)
        return metrics

    def dense(self, lm: LanguageModel, cache_dir: str | Path, check: Check = unchecked) -> Metrics:
        if self._bos_option(lm) is False and NEEDS_BOS in lm.model.config.get_text_config().model_type:
            logger.warning("evaluation.add_bos_token=false: this model is far worse without a BOS token; use true, or null")
        of = [self.shown, self._protocols_of(lm), version("lm_eval")]
        return measured_once(lm, of, cache_dir, lambda lm: ZeroShot.run(self, lm), check)

    def _bos_option(self, lm: LanguageModel) -> bool | None:
        """Whether each request of this model begins with a BOS token; None leaves it to the tokenizer."""
        if self.add_bos_token is None and self.tasks in PUBLISHED_SETS:
            return False if lm.model.config.get_text_config().model_type in WITHOUT_BOS else None
        return self.add_bos_token

    def _protocols_of(self, lm: LanguageModel) -> dict[str, dict[str, Any]]:
        """The protocol of each task on a model, except for what is only known after running it."""
        begins = self._bos_option(lm)
        if begins is None:  # the tokenizer decides
            begins = lm.tokenizer("a")["input_ids"] != lm.tokenizer("a", add_special_tokens=False)["input_ids"]
        return {name: protocol | {"add_bos_token": begins} for name, protocol in self._protocols.items()}

    @cached_property
    def _files(self) -> dict[str, Path]:
        """The yaml file of each task: below `include_path`, which takes precedence, of svnup, or of lm-eval."""
        known = _task_files(OWN_TASKS)
        if self.include_path is not None:
            known |= _task_files(at_home("include_path", self.include_path))
        if set(self.shown) - set(known):
            spec = find_spec("lm_eval.tasks")  # found, not imported
            folder = Path(str(spec and spec.origin)).parent
            known = _task_files(folder, self.shown) | known
        if set(self.shown) - set(known):
            known = _task_files(folder) | known
        for name in self.shown:
            if name not in known:
                hint = did_you_mean(name, known) or "; of a group, list the tasks; add include_path for your own"
                raise ValueError(f"tasks={name}: lm-eval has no such task{hint}")
        return {name: known[name] for name in self.shown}

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        """The loaded tasks of lm-eval by name, with their data sets."""
        with _quietly():
            return {name: self._load(name, path) for name, path in self._files.items()}

    def _load(self, name: str, path: Path) -> Any:
        from lm_eval.tasks import TaskManager

        try:
            task = TaskManager(include_defaults=False).load([self._spec(path)])["tasks"][name]
        except Exception as error:  # tasks are third-party code
            raise ValueError(
                f"tasks={name}: cannot be loaded ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}); its "
                "data set needs the hub, a filled datasets cache, or a local copy in a folder of that name below datasets_dir"
            ) from error
        has = task.aggregation() if task.OUTPUT_TYPE == "multiple_choice" else {}
        if self.shown[name] not in has:
            raise ValueError(
                f"tasks={name}: has no {self.shown[name]} ({task.OUTPUT_TYPE}: {', '.join(has) or 'not multiple choice'}); "
                "choose another metric or task"
            )
        task.set_config(key="num_fewshot", value=self.num_fewshot)
        return task

    def _spec(self, path: Path) -> Any:
        """A task as lm-eval loads it: its file, or its content with the path of a local copy of its data set.

        Without few-shot examples, a local copy needs only the split that is evaluated.
        """
        from lm_eval.tasks._yaml_loader import load_yaml

        if self.datasets_dir is None:
            return str(path)
        config = load_yaml(path, resolve_func=True)
        copy = at_home("datasets_dir", self.datasets_dir) / str(config.get("dataset_path"))
        if not config.get("dataset_path") or not copy.is_dir():
            return str(path)
        unused = ["training_split", "fewshot_split", *(["validation_split"] if config.get("test_split") else [])]
        splits = dict.fromkeys([] if self.num_fewshot else unused)
        return config | {"dataset_path": str(copy.absolute())} | splits

    @cached_property
    def _protocols(self) -> dict[str, dict[str, Any]]:
        """The protocol of each task, as far as it is known without the model."""
        return {name: self._protocol(name, task) for name, task in self._loaded.items()}

    def _protocol(self, name: str, task: Any) -> dict[str, Any]:
        docs = list(itertools.islice(task.task_docs, self.limit))
        asked = [[doc, task.doc_to_text(doc), task.doc_to_choice(doc), task.config.target_delimiter] for doc in docs]
        return {
            "dataset": name,
            "role": "test",
            "task_version": task.VERSION,
            "num_fewshot": self.num_fewshot,
            "fewshot_seed": FEWSHOT_SEED if self.num_fewshot else None,
            "items_sha256": hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:16],
            "n_items": len(docs),
            "limit": self.limit,
            "complete": self.limit is None,
            "batch_size": self.batch_size,
            "log_softmax": "float32",
            "unit": "%",
            "higher_is_better": True,
        }


@dataclass(frozen=True)
class Full(Perplexity, ZeroShot):
    """Perplexities and zero-shot accuracies."""

    def __post_init__(self) -> None:
        Perplexity.__post_init__(self)
        ZeroShot.__post_init__(self)

    def run(self, lm: LanguageModel) -> Metrics:
        return Metrics(Perplexity.run(self, lm) | ZeroShot.run(self, lm))

    def dense(self, lm: LanguageModel, cache_dir: str | Path, check: Check = unchecked) -> Metrics:
        return Metrics(Perplexity.dense(self, lm, cache_dir, check) | ZeroShot.dense(self, lm, cache_dir, check))


def _mean(metrics: list[Metric]) -> Metric:
    """The unweighted mean over tasks; its protocol has theirs, with what all have in common once."""
    protocols = [m.protocol for m in metrics]
    common = {k: v for k, v in protocols[0].items() if all(p[k] == v for p in protocols)}
    apart = {p["dataset"]: {k: v for k, v in p.items() if k not in common} for p in protocols}
    stderr = math.sqrt(sum((m.stderr or 0.0) ** 2 for m in metrics)) / len(metrics)
    value = sum(m.value for m in metrics) / len(metrics)
    reason = next((m.reason for m in metrics if m.reason is not None), None)
    protocol = common | {"dataset": "zero_shot", "mean": "over tasks", "tasks": apart}
    return Metric(value, protocol, reason, stderr=stderr if reason is None else None)


def _task_files(folder: Path, tasks: Iterable[str] = ("",)) -> dict[str, Path]:
    """The yaml files of tasks in a folder, by the name in their `task:` line.

    lm-eval's own index would parse all of its 14,000 files.

    Args:
        folder: the folder to search.
        tasks: only read files with one of these names in their path.
    """
    line = re.compile(r"""^["']?task["']?:[ \t]*["']?([^\s"'#\[]+)""", re.MULTILINE)
    found: dict[str, Path] = {}
    named = [path for path in folder.glob("**/*.yaml") if any(task in str(path.relative_to(folder)) for task in tasks)]
    for path in sorted(named):
        if match := line.search(path.read_text(encoding="utf-8")):
            found.setdefault(match[1], path)
    return found


def _harness_model(lm: LanguageModel, batch_size: int, add_bos_token: bool | None) -> Any:
    """The model in memory as a model of lm-eval; `add_bos_token` None leaves special tokens to the tokenizer."""
    import torch
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):
        """Counts requests that are truncated to the model's context, and raises NoNumberError for nan or infinite answers."""

        task, n_truncated = "", 0

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            if add_special_tokens is not None or not self.add_bos_token:
                out: list[int] = super().tok_encode(string, add_special_tokens=add_special_tokens, **kwargs)
                return out
            ids = super().tok_encode(string, add_special_tokens=False, **kwargs)  # so that tokenizers that add none work too
            start = self.tokenizer.bos_token_id
            return ids if ids[:1] == [start] else [start, *ids]

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            for _, context, continuation in requests:
                if len(continuation) > self.max_length:
                    raise ValueError(
                        f"evaluation.tasks={self.task}: a choice has {len(continuation)} tokens, the model {self.max_length} "
                        "positions; choose other tasks"
                    )
                self.n_truncated += len(context) + len(continuation) > self.max_length + 1
            answers = super()._loglikelihood_tokens(requests, *args, **kwargs)
            if wrong := next((value for value, _ in answers if not math.isfinite(value)), None):
                raise NoNumberError(f"a log-likelihood of {self.task} is {wrong}, so there is no accuracy")
            return answers

    with _quietly():
        return InMemory(
            pretrained=lm.model,
            tokenizer=copy.deepcopy(lm.tokenizer),  # lm-eval sets its padding token
            batch_size=batch_size,
            add_bos_token=add_bos_token,
            max_length=lm.max_positions,  # None: lm-eval finds one
            softmax_dtype=torch.float32,
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Context without the warnings of lm-eval, whose content is in the protocols, and without progress bars in logs."""
    harness = logging.getLogger("lm_eval")
    level = harness.level
    harness.setLevel(logging.ERROR)
    away = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with away:
            yield
    finally:
        harness.setLevel(level)
