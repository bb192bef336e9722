"""A budget as a recipe of llm-compressor; that the tool prunes by it so is seen by `make interop`."""

from __future__ import annotations

import re

import pytest
import yaml
from cli import HERE, SMALL, command, results
from rows import PRUNERS, changed, run

from svnup.reports.recipe import recipe

PROFILE = {"sparsity": [0.5, 0.70625], "target": 0.603125, "params": [10, 10], "pattern": "unstructured"}
LINEARS = [
    {"mlp.up_proj": {"sparsity": 0.25, "size": 5}, "mlp.down_proj": {"sparsity": 0.75, "size": 5}},
    {"mlp.up_proj": {"sparsity": 0.70625, "size": 10}},
]


def row(pruner="wanda", **profile):
    made = run(20.0, pruner=pruner)
    return changed(made, profile=PROFILE | profile)


def modifier(text):
    ((name, options),) = yaml.safe_load(text)["pruning_stage"]["pruning_modifiers"].items()
    return name, options


def test_each_block_has_its_sparsity():
    name, options = modifier(recipe(row()))
    assert name == "WandaPruningModifier"
    assert options["sparsity"] == PROFILE["sparsity"]
    assert options["mask_structure"] == "0:0"
    (target,) = options["targets"]
    pattern = re.compile(target.removeprefix("re:"))
    blocks = ["model.layers.0", "transformer.h.11", "model.decoder.layers.3", "gpt_neox.layers.7"]
    others = ["model.layers", "model.layers.0.mlp", "model.layers.0.mlp.experts.3", "lm_head", "model.norm"]
    assert [bool(pattern.match(n)) for n in blocks + others] == [True] * 4 + [False] * 5
    assert modifier(recipe(row(), r"re:.*layer\.\d+$"))[1]["targets"] == [r"re:.*layer\.\d+$"]


def test_options_and_patterns_of_the_pruner_go_with_it():
    made = row("sparsegpt")
    made = changed(made, config=made.config | {"pruner": PRUNERS["sparsegpt"] | {"damp": 0.05, "block_size": 64}})
    name, options = modifier(recipe(made))
    assert (name, options["dampening_frac"], options["block_size"]) == ("SparseGPTModifier", 0.05, 64)
    assert modifier(recipe(row(pattern="2:4", sparsity=[0.5, 0.5], target=0.5)))[1]["mask_structure"] == "2:4"


def test_linear_layers_of_their_own_are_named_in_the_order_of_the_model():
    _, options = modifier(recipe(row(linears=LINEARS)))
    assert options["sparsity"] == [0.25, 0.75, 0.70625]
    names = [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.10.mlp.up_proj",
    ]
    found = [[bool(re.match(target.removeprefix("re:"), name)) for target in options["targets"]] for name in names]
    assert found == [[True, False, False], [False, True, False], [False, False, True], [False, False, False]]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: row("magnitude"), r"^pruner=magnitude: llm-compressor has none .* wanda or sparsegpt$"),
        (lambda: row(pattern="mixed:8"), r"^pattern=mixed:8: a recipe has one pattern"),
        (lambda: changed(run(20.0), profile=None), r"^\w+: finished, without a budget; "),
        (
            lambda: row(linears=[{"mlp.experts.0.w1": {"sparsity": 0.5, "size": 10}}, LINEARS[1]]),
            r"^mlp.experts.0.w1: a recipe",
        ),
    ],
)
def test_what_a_recipe_cannot_say_is_told_in_a_line(made, said):
    with pytest.raises(ValueError, match=said):
        recipe(made())


def test_the_command_writes_the_recipe_of_a_run(own_place, tmp_path):
    job = [*SMALL, "allocator=random", "shapley.window=2", *HERE]
    assert command(*job).code == 0
    done = results("recipe", "results", "", "--output", "recipe.yaml")
    assert done.code == 0, done.err
    name, options = modifier((tmp_path / "recipe.yaml").read_text())
    assert name == "WandaPruningModifier"
    assert len(set(options["sparsity"])) == 3
    refused = results("recipe", "results", "zzz")
    assert refused.code == 2
    assert len(refused.err.strip().splitlines()) == 1
