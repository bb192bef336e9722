"""DESIGN section 6, rules 1 to 4: who may import whom. Read from the source, not from what happens to be installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "svnup"
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix(): ast.parse(path.read_text("utf-8")) for path in ROOT.rglob("*.py")}

# package -> rooms or modules that may import it at all (a room stands for all that is in it)
ONLY_IN = {
    "hydra": {"cli", "config"},
    "omegaconf": {"cli", "config", "execute"},
    "transformers": {"model", "data", "recovery"},
    "peft": {"recovery"},
    "wandb": {"reports/wandb"},
    "lm_eval": {"evaluation/zero_shot"},
    "pandas": {"results", "reports"},
    "matplotlib": {"reports/figures"},
    "jinja2": {"reports"},
    "markupsafe": {"reports"},
    "datasets": {"data", "assets/tasks/docs_cloze"},
    "shapiq": {"shapley/library"},
    "gguf": {"model"},
    "triton": {"pruning/column_block_triton"},  # itself imported lazily
}
LAZY = {"wandb", "lm_eval", "matplotlib", "datasets", "shapiq", "gguf", "peft"}
# numpy, and nothing else of weight; with what of svnup they may know
BUDGETS = {"types", "pattern", "naming", "allocation"}
PURE = {
    "types": {"pattern"},
    "pattern": set(),
    "results/stored": set(),
    **{
        f"allocation/{name}": {"types", "pattern", "naming", "allocation", "files"}
        for name in ("__init__", "budget", "maps", "search", "rounds", "curves", "neuronal")
    },
    **{name: {"types", "shapley"} for name in MODULES if name.startswith("shapley/")},
}
LIGHT = [
    *("svnup.config", "svnup.types", "svnup.pattern", "svnup.allocation.maps", "svnup.allocation.search", "svnup.shapley"),
    *(
        "svnup.scoring.shapley",
        "svnup.scoring.published",
        "svnup.evaluation.zero_shot",
        "svnup.results.store",
        "svnup.cli.results",
    ),
]
# Who may know whom, from the bottom up: a room knows those before it, never one after it.
ORDER = (
    {"distributed", "files", "claims", "interruption", "memory", "outside", "pattern", "secrets", "memo", "keys", "units"},
    {"progress"},
    {"machines"},
    {"naming", "types", "shapley"},
    {"data", "results", "model"},
    {"game", "pruning", "evaluation"},
    {"scoring", "recovery"},
    {"allocation"},
    {"config"},
    {"plan", "pipeline"},
    {"execute", "rerun"},
    {"reports"},
    {"cli"},
)
HEAVY = ["torch", "transformers", "datasets", "wandb", "matplotlib"]


def imported(node):
    """Full dotted names that an import statement brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "absolute imports only"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports(tree):
    return {name for node in ast.walk(tree) for name in imported(node)}


def imports_when_loaded(tree):
    """Imports outside functions and outside `if TYPE_CHECKING`."""
    found, todo = set(), list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
            continue
        found.update(imported(node))
        todo += ast.iter_child_nodes(node)
    return found


def runtime_imports(tree):
    """Imports anywhere but under `if TYPE_CHECKING`."""
    unseen = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")]
    hidden = {id(inner) for node in unseen for inner in ast.walk(node)}
    return {name for node in ast.walk(tree) if id(node) not in hidden for name in imported(node)}


def room(name):
    return name.partition("/")[0]


def packages(names):
    return {name.partition(".")[0] for name in names}


def of_svnup(names):
    return {".".join(name.split(".")[1:2]) for name in names if name.startswith("svnup.")}


def test_the_modules_are_all_here():
    assert {"types", "game/layer_game", "model/language_model", "pruning/walk", "shapley/__init__", "pipeline"} <= set(MODULES)
    assert "numpy" in packages(imports(MODULES["types"]))
    assert "model" in of_svnup(imports(MODULES["game/layer_game"]))
    assert "torch" in packages(imports_when_loaded(MODULES["game/layer_game"]))


@pytest.mark.parametrize("name", sorted(PURE))
def test_rule_1_numbers_without_torch(name):
    allowed = set(sys.stdlib_module_names) | {"numpy", "svnup"} | ({"shapiq"} if name == "shapley/library" else set())
    assert packages(imports(MODULES[name])) <= allowed
    assert of_svnup(imports(MODULES[name])) <= PURE[name]


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("pruning/")))
def test_rule_2_pruning_sees_a_profile_and_nothing_of_its_origin(name):
    origins = {"scoring", "shapley", "allocation", "game", "evaluation", "pipeline", "config"}
    assert not of_svnup(imports(MODULES[name])) & origins


def test_rule_3_evaluation_does_not_know_pruning():
    rooms = [of_svnup(imports(tree)) for name, tree in MODULES.items() if name.startswith("evaluation/")]
    assert len(rooms) > 3
    assert not any(known & {"pruning"} for known in rooms)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_rule_4_each_large_library_has_one_door(name):
    used = packages(imports(MODULES[name])) & set(ONLY_IN)
    assert {package for package in used if not {name, room(name)} & ONLY_IN[package]} == set()
    assert packages(imports_when_loaded(MODULES[name])) & LAZY == set()
    assert "svnup.pruning.column_block_triton" not in {m.rpartition(".")[0] for m in imports_when_loaded(MODULES[name])}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_errors_are_raised_and_logged_not_printed_or_swallowed(name):
    tree = MODULES[name]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert name == "cli/results", f"{name}:{node.lineno} prints"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name}:{node.lineno} is a bare except"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nobody_asks_a_config_for_what_may_not_be_there(name):
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            assert "cfg" not in ast.unparse(node.func.value), f"{name}:{node.lineno}: {ast.unparse(node)}"


def test_yaml_is_read_by_hydra_alone():
    """Groups, options and defaults are asked of Hydra, which knows the user's folders, too; yaml of lm-eval by its loader."""
    readers = {name for name, tree in MODULES.items() if packages(imports(tree)) & {"yaml", "ruamel"}}
    assert readers == set()
    calls = [n.func for tree in MODULES.values() for n in ast.walk(tree) if isinstance(n, ast.Call)]
    assert {ast.unparse(call) for call in calls} & {"OmegaConf.load", "instantiate"} == set()
    assert "OmegaConf.to_container" in {ast.unparse(call) for call in calls}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_rule_5_no_arrow_runs_up(name):
    """Only a type checker may look up: what a room is handed, it need not import."""
    floors = {each: floor for floor, names in enumerate(ORDER) for each in names}
    if room(name) in floors:
        up = {each for each in of_svnup(runtime_imports(MODULES[name])) & floors.keys() if floors[each] > floors[room(name)]}
        assert up == set()
    else:
        assert name in ("__init__", "__main__", "language_model") or room(name) == "assets"


def test_every_room_has_its_floor():
    rooms = {room(name) for name in MODULES} - {"__init__", "__main__", "language_model", "assets"}
    assert rooms == set().union(*ORDER)


def test_checking_a_job_needs_no_torch():
    code = f"import sys, {', '.join(LIGHT)}; print(*sorted(set({HEAVY} + ['numpy']) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["numpy"]  # numpy, to see that the names are right
