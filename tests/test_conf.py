"""The files under conf/ compose, say what they promise, and the key of a configuration changes with what changes a number."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import rows as rows_of
from cli import RANDOM
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from svnup import config
from svnup.config import CONF
from svnup.config import job as config_job
from svnup.reports.published import FOLDER, Published

PUBLISHED = json.loads((FOLDER / "tables.json").read_text())["tables"]
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))
HUB = {
    "opt_125m": "facebook/opt-125m",
    "opt_1_3b": "facebook/opt-1.3b",
    "opt_6_7b": "facebook/opt-6.7b",
    "opt_13b": "facebook/opt-13b",
    "llama_7b": "huggyllama/llama-7b",
    "llama_13b": "huggyllama/llama-13b",
    "llama_30b": "huggyllama/llama-30b",
    "llama_65b": "huggyllama/llama-65b",
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "llama2_13b": "meta-llama/Llama-2-13b-hf",
    "llama2_70b": "meta-llama/Llama-2-70b-hf",
    "llama3_8b": "meta-llama/Meta-Llama-3-8B",
    "llama3_1_8b": "meta-llama/Llama-3.1-8B",
    "mistral_7b": "mistralai/Mistral-7B-v0.1",
    "qwen2_5_7b": "Qwen/Qwen2.5-7B",
}
SMOLLM2 = {"smollm2_135m": "HuggingFaceTB/SmolLM2-135M", "smollm2_135m_instruct_q4": "svnup/smollm2_135m_instruct_q4"}
ON_TINY = ["model=tiny", "dataset=docs", "dataset@shapley.game.data=docs", "evaluation.datasets=[docs]"]
SMALL = [*RANDOM, "shapley.window=2"]


@pytest.fixture(scope="module", autouse=True)
def _hydra():
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    return compose("config", overrides=list(overrides), return_hydra_config=False)


def plain(*overrides: str) -> dict[str, Any]:
    return OmegaConf.to_container(composed(*overrides), resolve=True)  # type: ignore[return-value]


def key(*overrides: str) -> str:
    return config.build(composed(*SMALL, *overrides)).key


def sweep_of(experiment: str) -> list[list[str]]:
    """The overrides of every job that the experiment's own sweep consists of."""
    params = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml").get("hydra", {}).get("sweeper", {}).get("params", {})
    parsed = OverridesParser.create().parse_overrides([f"{name}={values}" for name, values in params.items()])
    axes = [
        [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()] if o.is_sweep_override() else [o.input_line]
        for o in parsed
    ]
    return [list(job) for job in itertools.product(*axes)]


# -- what the files offer


def test_the_default_job():
    job = config.build(composed())
    assert job.model.name == "svnup/tiny"
    assert job.sparsity == 0.7
    assert type(job.pruner).__name__ == "Wanda"
    assert type(job.allocator).__name__ == "ScoreBudget"
    assert type(job.scorer.estimator).__name__ == "SlidingWindow"
    assert job.scorer.estimator.window == 5
    assert {k: s.name for k, s in job.evaluation.sources().items()} == {"datasets.docs": "docs"}
    assert {k: s.role for k, s in job.sources().items()} == {
        "dataset": "calibration",
        "shapley.game.data": "payoff",
        "evaluation.datasets.docs": "test",
        "selection": "selection",  # on which the budget is compared with the uniform one
    }
    assert {s.seq_len for s in job.sources().values()} == {256}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("table", [name for name in PUBLISHED if name in EXPERIMENTS])
def test_a_published_table_tells_the_jobs_of_its_sweep_apart(table):
    jobs = {tuple("model=tiny" if o.startswith("model=") else o for o in job) for job in sweep_of(table)}
    pruners = {o for job in jobs for o in job if o.startswith("pruner=")}
    alike = [job for job in sorted(jobs) if not pruners or min(pruners) in job]
    assert len(alike) > 1
    rows = {}
    for number, job in enumerate(alike, start=1):
        made = composed(f"experiment={table}", *job)
        row = rows_of.run(float(number), key=config.build(made).key)  # that of a uniform budget is the same for every game
        rows[row.config_key] = rows_of.changed(row, config=OmegaConf.to_container(made, resolve=True))
    ours = Published.load(table, ["tiny"], ["docs/ppl"]).ours(rows.values(), {})
    assert sum(cell.n for cell in ours.table.cells.values()) == len(rows)


@pytest.mark.parametrize(
    "experiment", [pytest.param(name, marks=[] if name in ("real", "smoke") else pytest.mark.slow) for name in EXPERIMENTS]
)
def test_every_value_that_an_experiment_sweeps_is_accepted(experiment):
    jobs = sweep_of(experiment)
    on_tiny = [o for o in (*ON_TINY, "model.seq_len=256") if "zero_shot" not in experiment or not o.startswith("evaluation")]
    keys: dict[tuple[str, ...], str] = {}
    tried = set()
    for job in [job for job in jobs if sum(a != b for a, b in zip(job, jobs[-1], strict=True)) < 2]:
        of_hub = tuple(o for o in job if o.startswith(("model", "dataset=")))
        if of_hub not in tried:
            composed(f"experiment={experiment}", *job)  # as it is; hub models need a network to go further
            tried.add(of_hub)
        plays = any("shapley" in o for o in job if o.startswith("allocator"))  # others have no game that could differ
        own = [o for o in job if not o.startswith(("model", "dataset="))]  # the built-in model has one text
        moving = tuple(o for o in own if plays or not o.startswith("shapley"))
        if moving not in keys:
            keys[moving] = config.build(composed(f"experiment={experiment}", *moving, *on_tiny)).key
    assert len(set(keys.values())) == len(keys), "two jobs of the sweep are the same"


def test_the_smoke_experiment_is_the_demo_s_grid():
    jobs = [config.build(composed("experiment=smoke", *job)) for job in sweep_of("smoke")]
    assert len(jobs) == 4
    methods = {(type(j.pruner).__name__, type(j.allocator).__name__, j.sparsity, j.model.name) for j in jobs}
    assert methods == {(p, a, 0.7, "svnup/tiny") for p in ("Wanda", "SparseGPT") for a in ("Uniform", "ScoreBudget")}


def test_every_model_yaml_is_tested_here():
    files = {p.stem for p in (CONF / "model").glob("*.yaml") if not p.stem.startswith("_")}
    assert files == {*HUB, *SMOLLM2, "tiny", "tiny_opt", "tiny_moe", "random", "pretrained"}


@pytest.mark.parametrize("model", SMOLLM2)
def test_small_real_models_read_the_texts_of_the_field_in_short_windows(model):
    cfg = plain(f"model={model}")
    assert cfg["model"]["pretrained_model_name_or_path"] == SMOLLM2[model]
    assert cfg["dataset"]["_target_"] == cfg["selection"]["_target_"] == cfg["shapley"]["game"]["data"]["_target_"]
    assert cfg["dataset"]["_target_"] == "svnup.data.C4"
    assert (cfg["evaluation"]["datasets"], cfg["model"]["test_text"]) == (None, "wikitext2")
    assert {cfg[part]["seq_len"] for part in ("model", "dataset", "selection", "evaluation")} == {512}


def test_the_table_of_a_real_model_reads_no_window_that_was_read_for_choices():
    real, table = plain("experiment=real")["evaluation"], plain("experiment=smollm2")["evaluation"]
    assert (real["skip"], real["n_seq"]) == (0, 32)
    assert (table["skip"], table["n_seq"]) == (32, 128)


@pytest.mark.parametrize("model", HUB)
def test_hub_models_follow_the_field_s_protocol(model):
    cfg = plain(f"model={model}")
    assert cfg["model"]["pretrained_model_name_or_path"] == HUB[model]
    assert cfg["model"]["trust_remote_code"] is False
    assert cfg["dataset"]["_target_"] == cfg["shapley"]["game"]["data"]["_target_"] == "svnup.data.C4"
    assert (cfg["dataset"]["role"], cfg["shapley"]["game"]["data"]["role"]) == ("calibration", "payoff")
    assert (cfg["dataset"]["n_seq"], cfg["dataset"]["seq_len"]) == (128, 2048)
    assert (cfg["evaluation"]["datasets"], cfg["model"]["test_text"]) == (None, "wikitext2")
    assert (cfg["evaluation"]["seq_len"], cfg["evaluation"]["n_seq"], cfg["evaluation"]["role"]) == (2048, None, "test")
    assert cfg["allocator"]["scorer"] == cfg["shapley"]
    for known in cfg["model"]["dense_ppl"]:
        assert known.keys() - {"n_windows"} == {"dataset", "seq_len", "ppl", "source"}
        if "n_windows" in known:  # of LLaMA's 341,469 tokens
            assert known["n_windows"] == 341_469 // known["seq_len"]


@pytest.mark.parametrize(("model", "tasks"), [("tiny", "cloze"), ("random", "cloze"), ("llama2_7b", "with_rte")])
def test_tasks_go_by_the_model_and_by_the_command_line(model, tasks):
    assert plain(f"model={model}", "evaluation=zero_shot")["evaluation"]["tasks"] == tasks
    full = plain(f"model={model}", "evaluation=full", "evaluation.tasks=[boolq,piqa]", "evaluation.n_seq=4")["evaluation"]
    assert full["tasks"] == ["boolq", "piqa"]
    assert full == plain(f"model={model}", "evaluation.n_seq=4")["evaluation"] | full


@pytest.mark.parametrize("shapley", ["exact", "sliding_window", "permutation"])
def test_the_payoff_text_of_hub_models_is_c4_with_every_estimator(shapley):
    cfg = plain("model=llama_7b", f"shapley={shapley}")
    assert cfg["shapley"]["game"]["data"]["_target_"] == "svnup.data.C4"


def test_the_command_line_beats_the_model_s_choice():
    cfg = plain("model=llama_7b", "dataset=wikitext2", "evaluation.datasets=[c4]", "model.seq_len=1024")
    assert cfg["dataset"]["_target_"] == "svnup.data.WikiText2"
    assert cfg["shapley"]["game"]["data"]["_target_"] == "svnup.data.C4"
    assert cfg["evaluation"]["datasets"] == ["c4"]
    assert cfg["dataset"]["seq_len"] == cfg["shapley"]["game"]["data"]["seq_len"] == cfg["evaluation"]["seq_len"] == 1024
    cfg = plain("model=llama_7b", "dataset@shapley.game.data=wikitext2")
    assert cfg["shapley"]["game"]["data"]["_target_"] == "svnup.data.WikiText2"
    assert cfg["shapley"]["game"]["data"]["role"] == "payoff"
    assert cfg["dataset"]["_target_"] == "svnup.data.C4"


def test_data_sets_of_an_evaluation_are_nodes_of_their_own(tmp_path):
    for name in ("mine", "other"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    test, more = "evaluation.datasets.test", "evaluation.datasets.more"
    given = [f"dataset@{test}=text_file", f"{test}.path={tmp_path}/mine.txt", f"+dataset@{more}=text_file"]
    given += [f"{more}.path={tmp_path}/other.txt", f"{more}.n_seq=7", f"{more}.role=selection", f"{more}.seed=5"]
    job = config.build(composed(*SMALL, *given, "evaluation.seq_len=16", "evaluation.n_seq=3", "seed=9"))
    assert {k: (s.n_seq, s.seq_len, s.role, s.seed) for k, s in job.evaluation.datasets.items()} == {
        "test": (3, 16, "test", 0),
        "more": (7, 16, "selection", 5),
    }
    assert (job.dataset.role, job.dataset.seed, job.dataset.seq_len) == ("calibration", 9, 128)


@pytest.mark.parametrize("name", ["docs", "wikitext2", "c4"])
def test_a_data_set_in_a_word_is_what_its_yaml_makes(name):
    word = config.build(composed(*SMALL, f"evaluation.datasets=[{name}]"))
    node = config.build(composed(*SMALL, f"+dataset@evaluation.datasets.{name}={name}"))
    of_model = config.build(composed(*SMALL, f"model.test_text={name}"))
    assert word.config["evaluation"] == node.config["evaluation"] == of_model.config["evaluation"]
    assert word.key == node.key == of_model.key


def test_an_experiment_chooses_the_data_sets_of_its_evaluation(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - /dataset@evaluation.datasets.wiki: wikitext2\n  - override /dataset@evaluation.datasets.test: c4\n"
        "evaluation: {n_seq: 2, datasets: {wiki: {n_seq: 3}}}\n"
    )
    for evaluation in ("ppl", "full"):
        own = f"hydra.searchpath=[file://{tmp_path}]"
        datasets = plain(own, f"evaluation={evaluation}", "experiment=mine")["evaluation"]["datasets"]
        assert {k: (v["_target_"], v["n_seq"]) for k, v in datasets.items()} == {
            "test": ("svnup.data.C4", 2),
            "wiki": ("svnup.data.WikiText2", 3),
        }


def test_the_four_lines_of_the_docs(tmp_path, monkeypatch):
    """Each role reads the file that is given for it."""
    text = (CONF.parent / "docs" / "evaluation.md").read_text("utf-8").partition("## Texts of one's own")[2]
    command = text[text.index("    svnup ") :].partition("\n\n")[0].replace("\\\n", " ")
    monkeypatch.chdir(tmp_path)
    files = [word.partition("=")[2] for word in command.split() if ".path=" in word]
    for file in files:
        Path(file).write_text(f"words of the {file} text")
    job = config.build(composed(*SMALL, *command.split()[1:], "allocator.lam=auto"))
    read = {key: (source.path, source.role) for key, source in job.sources().items()}
    roles = ["calibration", "payoff", "selection", "test"]
    places = ["dataset", "shapley.game.data", "selection", "evaluation.datasets.test"]
    assert read == {place: (f"{role}.txt", role) for place, role in zip(places, roles, strict=True)}


def test_calibration_seeds_do_not_touch_the_game():
    cfg = plain("seed=7")
    assert cfg["dataset"]["seed"] == 7
    assert cfg["shapley"]["game"]["data"]["seed"] == 0


def test_an_experiment_wins_over_the_defaults_and_the_command_line_over_it(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /pruner: magnitude\n  - override /allocator: uniform\n"
        "sparsity: 0.3\ndataset: {n_seq: 5}\nmodel: {seq_len: 64}\n"
    )
    own = f"hydra.searchpath=[file://{tmp_path}]"
    default = plain()
    assert (default["sparsity"], default["dataset"]["n_seq"], default["model"]["seq_len"]) == (0.7, 128, 256)
    cfg = plain(own, "experiment=mine")
    assert (cfg["sparsity"], cfg["dataset"]["n_seq"], cfg["dataset"]["seq_len"]) == (0.3, 5, 64)
    assert cfg["pruner"]["_target_"] == "svnup.pruning.magnitude.Magnitude"
    assert cfg["allocator"]["_target_"] == "svnup.allocation.maps.Uniform"
    cfg = plain(own, "experiment=mine", "sparsity=0.4", "dataset.n_seq=6", "pruner=sparsegpt")
    assert (cfg["sparsity"], cfg["dataset"]["n_seq"], cfg["dataset"]["seq_len"]) == (0.4, 6, 64)
    assert cfg["pruner"]["_target_"] == "svnup.pruning.sparsegpt.SparseGPT"


def test_a_misspelt_key_in_an_experiment_file_is_refused(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "typo.yaml").write_text("# @package _global_\nallocator: {lamda: 0.3}\n")
    cfg = composed(f"hydra.searchpath=[file://{tmp_path}]", "experiment=typo")
    with pytest.raises(ValueError, match=r"^allocator\.lamda=0\.3: .*no such option; did you mean lam\?"):
        config.build(cfg)


# -- what the configuration copies of itself


def test_leave_one_out_is_the_window_of_one_block_in_the_game_of_any_estimator():
    own = plain("allocator=leave_one_out", "shapley=kernel", "shapley.budget=60", "shapley.game.payoff=kl", "shapley.shard=0/2")
    same = plain("shapley=leave_one_out", "shapley.game.payoff=kl", "shapley.shard=0/2")
    assert own["allocator"] == same["allocator"] | {"compare_uniform": "off"}
    assert own["shapley"]["sampling"] == "kernel"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("shapley.window=40", r"^shapley\.window=40: "),
        ("allocator=leave_one_out allocator.scorer.window=40", r"^allocator\.scorer\.window=40: "),
        ("allocator=leave_one_out shapley.game.payoff=loss", r"^shapley\.game\.payoff=loss: choose one of "),
        (
            "allocator=shapley_margins shapley.game.data.role=test",
            r"^shapley\.game\.data\.role=test: .*use shapley\.game",
        ),
        ("shapley=kernel shapley.budget=???", r"^shapley\.budget: has no value yet; add shapley\.budget="),
        ("shapley.game.absence=prune +pruner.patern=2", r"^pruner\.patern=2: .*did you mean pattern\?"),
        ("shapley=gates shapley.game.payoff=kl", r"^shapley\.game\.payoff=kl: gates need "),
        ("shapley.game=7", r"^shapley\.game=7: must be a node"),
        ("shapley.shard=2/2", r"^shapley\.shard=2/2: choose k/n"),
        (
            "pruner=none shapley.window=2 shapley.game.absence=prune",
            r"choose another pruner: \+pruner@shapley\.game\.pruner=",
        ),
    ],
)
def test_a_mistake_in_what_is_copied_is_told_by_the_key_where_it_was_made(given, said):
    with pytest.raises(ValueError, match=said):
        config.build(composed(*RANDOM, *given.split()))


# -- misspelt keys under a _target_ node


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("+model.num_layer=3", r"^model\.num_layer=3: "),
        ("+dataset.sed=1", r"^dataset\.sed=1: .*did you mean seed\?"),
        ("+shapley.windw=3", r"^shapley\.windw=3: .*did you mean window\?"),
        ("+shapley.game.payof=neg_nll", r"^shapley\.game\.payof=neg_nll: .*did you mean payoff\?"),
        ("+shapley.game.data.sed=1", r"^shapley\.game\.data\.sed=1: .*did you mean seed\?"),
        ("+allocator.lamb=1", r"^allocator\.lamb=1: .*did you mean lam\?"),
        ("+pruner.patern=1", r"^pruner\.patern=1: .*did you mean pattern\?"),
        ("+evaluation.nseq=1", r"^evaluation\.nseq=1: .*did you mean n_seq\?"),
        ("+tracker.project=x", r"^tracker\.project=x: .*NoTracker has no such option"),
        ("+evaluation.datasets.docs.sed=1", r"^evaluation\.datasets\.docs\.sed=1: .*did you mean seed\?"),
    ],
)
def test_misspelt_keys_are_refused_by_name(given, said):
    with pytest.raises(ValueError, match=said):
        config.build(composed(*SMALL, "+dataset@evaluation.datasets.docs=docs", given))


# -- the key of a configuration


@pytest.fixture(scope="module")
def base_key(_hydra) -> str:
    return key()


@pytest.mark.parametrize(
    "given",
    [
        "results_dir=elsewhere",
        "cache_dir=elsewhere",
        "force=true",
        "dry_run=true",
        "save_model=true",
        "tracker=wandb",
        "datasets_dir=/",
        "model.device=cpu",
        "model.test_tasks=with_rte",  # counts where it is evaluated
        "shapley.window=2",  # what it is anyway
    ],
)
def test_key_is_unchanged_by_what_changes_no_number(given, base_key):
    assert key(given) == base_key


@pytest.mark.parametrize(
    "given",
    [
        "sparsity=0.6",
        "seed=1",
        "pruner=sparsegpt",
        "pruner=none",
        "allocator.lam=0.2",
        "allocator.scale=rank",
        "allocator.upper=0.8",
        "allocator=uniform",
        "shapley.window=3",
        "shapley.aggregation=centred",
        "shapley.game.payoff=neg_ppl",
        "shapley.game.data.n_seq=4",
        "dataset.n_seq=64",
        "dataset.seq_len=64",
        "model.seed=1",
        "model.dtype=bfloat16",
        "model.num_hidden_layers=4",
        "evaluation.n_seq=4",
        "evaluation=none",
        "evaluation=zero_shot",
        "evaluation=full",
        "evaluation.role=selection",
    ],
)
def test_key_changes_with_what_changes_a_number(given, base_key):
    assert key(given) != base_key


def test_key_changes_with_the_pattern():
    assert key("allocator=uniform", "sparsity=0.5", "pattern='2:4'") != key("allocator=uniform", "sparsity=0.5")


@pytest.mark.parametrize(
    "given", ["shapley.window=3", "shapley=exact", "shapley.game.payoff=neg_ppl", "shapley.game.data.n_seq=3"]
)
def test_key_ignores_shapley_where_the_allocator_does_not_use_it(given):
    small = SMALL[:-1] if given == "shapley=exact" else SMALL  # exact has no window

    def uniform(*overrides: str) -> str:
        return config.build(composed(*small, "allocator=uniform", *overrides)).key

    assert uniform(given) == uniform()


def test_key_depends_on_the_version_of_the_numbers(base_key, monkeypatch):
    monkeypatch.setattr(config_job, "NUMBERS_VERSION", config_job.NUMBERS_VERSION + 1)
    assert key() != base_key


def test_key_of_a_pretrained_model_ignores_where_it_runs():
    def tiny(*overrides: str) -> str:
        return config.build(composed(*overrides)).key

    assert tiny() == tiny("model.device=cpu")
    with pytest.raises(ValueError, match=r"^model\.device_map=everywhere: choose auto"):
        tiny("model.device_map=everywhere")
    assert len({tiny(), tiny("model.dtype=bfloat16"), tiny("model.attn_implementation=eager")}) == 3


def test_the_stored_configuration_is_resolved_and_holds_the_key_s_parts():
    job = config.build(composed(*SMALL, "seed=3"))
    assert job.config["dataset"]["seed"] == 3
    assert job.config["dataset"]["seq_len"] == 128
    assert "${" not in str(job.config)
    assert "???" not in str(job.config)


# -- choices the schema makes


@pytest.mark.parametrize("group", ["model", "dataset", "shapley", "allocator", "pruner", "evaluation", "tracker"])
def test_every_target_can_be_imported_and_takes_the_arguments_of_its_yaml(group):
    """Every option of every group, each against its constructor's signature."""
    import inspect

    from hydra.utils import get_object

    checked = 0
    for file in sorted(Path(CONF / group).glob("*.yaml")):
        if file.stem.startswith("_"):
            continue
        node = plain(f"{group}={file.stem}")[group]
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        assert set(node) - {"_target_", "scorer", "game", "shard"} <= set(parameters), file
        assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values()), f"{file}: **kwargs swallow typos"
        checked += 1
    assert checked >= 2
