"""The specifications for W&B: built offline, and held against what runs log and what Hydra composes."""

import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest
import yaml
from test_tracking import JOB, a_place, command, logged

from svnup.config import build, register

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parent.parent / "tools" / "tracking"


@pytest.fixture(scope="module")
def dashboard():
    pytest.importorskip("wandb_workspaces")
    spec = importlib.util.spec_from_file_location("dashboard", FOLDER / "dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with a_place(folder):
        done = command(*JOB, "tracker=wandb", "tracker.stages=false")
        assert done.code == 0, done.err
        (found,) = logged(folder / "results")
    return found


def walk(node):
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from walk(child)


def panels(specification):
    return [node for node in walk(specification) if "viewType" in node]


@pytest.fixture(scope="module", params=["workspace", "report"])
def made(request, dashboard):
    return dashboard.specification(getattr(dashboard, request.param)("someone", "project", "docs/ppl"))


def test_the_panels_are_there(made):
    kinds = [panel["viewType"] for panel in panels(made)]
    assert {k: kinds.count(k) for k in set(kinds)} == {
        "Bar Chart": 3,
        "Scatter Plot": 2,
        "Parallel Coordinates Plot": 1,
        "Vega2": 2,
        "Media Browser": 1,
    }
    titles = json.dumps(made)
    for title in ("Leaderboard", "Sparsity sweep", "Shapley values and budgets"):
        assert f'"{title}"' in titles


def test_every_key_of_the_specification_is_logged(made, run):
    text = json.dumps(made)
    summary = set(re.findall(r'"summary:([^"]+)"', text))
    config = set(re.findall(r'"config:([^"]+)"', text)) | {n["groupBy"] for n in walk(made) if "groupBy" in n}
    bars = {metric for node in walk(made) for metric in node.get("metrics", [])}
    media = {key for node in walk(made) for key in node.get("mediaKeys", [])}
    tables = {n["value"] for n in walk(made) if n.get("name") == "tableKey"}
    assert {"docs/ppl", "vs_dense/docs/ppl", "sparsity/actual"} <= summary
    assert {"docs/ppl", "cost/seconds"} <= bars
    assert len(media) == len(tables) == 2
    assert summary | bars | media | tables <= set(run.step)
    assert config == {f"names.value.{n}" for n in ("model", "pruner", "allocator", "setting")} | {"sparsity.value"}
    for path in config:
        top, *below = path.replace(".value", "", 1).split(".")
        value = run.config[top]
        for name in below:
            value = value[name]
        assert isinstance(value, str | float), path


def test_bars_are_those_that_the_run_draws(made, run):
    logged_bars = [shown["panel_config"] for shown in run.config["_wandb"]["visualize"].values()]
    drawn = {p["fieldSettings"]["value"]: (p["panelDefId"], p["fieldSettings"], p["stringSettings"]) for p in logged_bars}
    asked = {
        p["config"]["fieldSettings"]["value"]: tuple(p["config"][k] for k in ("panelDefId", "fieldSettings", "stringSettings"))
        for p in panels(made)
        if p["viewType"] == "Vega2"
    }
    assert asked == drawn
    assert set(asked) == {"shapley", "sparsity"}


def test_runs_are_jobs_and_the_best_comes_first(made):
    filters = [f for node in walk(made) if "runFeed" in node for f in node["filters"]["filters"]]
    assert {"jobType": "prune"}.items() <= {f["key"]["name"]: f["value"] for f in filters}.items()
    orders = [key for node in walk(made) if "sort" in node for key in node["sort"]["keys"]]
    assert {(o["key"]["section"], o["key"]["name"], o["ascending"]) for o in orders} == {("summary", "docs/ppl", True)}


def test_the_metric_can_be_chosen(dashboard):
    text = json.dumps(dashboard.specification(dashboard.workspace("a", "b", "wikitext2/ppl")))
    assert "docs/ppl" not in text
    assert "summary:wikitext2/ppl" in text


def test_the_sweep_passes_overrides_that_compose_to_jobs():
    from hydra import compose, initialize_config_dir
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    from svnup.config import CONF

    sweep = yaml.safe_load((FOLDER / "sweep.yaml").read_text())
    assert (sweep["program"], sweep["command"][0], sweep["command"][-1]) == ("svnup", "${program}", "${args_no_hyphens}")
    values = {k: v.get("values") or [v[n] for n in ("value", "min", "max") if n in v] for k, v in sweep["parameters"].items()}
    trials = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    assert len(trials) == 12
    register()
    keys = set()
    for trial in trials:
        args = create_sweep_command_args({"args": {k: {"value": v} for k, v in trial.items()}})["args_no_hyphens"]
        overrides = [*sweep["command"][1:-1], *args]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            job = build(compose("config", overrides=overrides))
        assert (job.config["allocator"]["lam"], job.sparsity) == (trial["allocator.lam"], trial["sparsity"])
        assert job.evaluation.role == "selection", "the test text chooses nothing"
        keys.add(job.key)
    assert len(keys) == len(trials)
    (source,) = job.evaluation.sources().values()
    assert sweep["metric"] == {"name": f"{source.name}/{source.role}/ppl", "goal": "minimize"}
