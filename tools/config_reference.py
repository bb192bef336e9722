"""Every key of the configuration with its default and meaning, from the comments in conf/.

    python tools/config_reference.py            # writes docs/reference_config.md; `make docs` does so, too

A key takes the comment behind it in its yaml file; without one, what its value refers to, or the comment that the same key has
elsewhere in its group, where all that have one agree. A key without a comment, and a file without a line at its top that says
what it is, raise ValueError.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from svnup.config.schema import GROUPS, Schema

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "reference_config.md"
COMMENT = re.compile(r"(?:^|\s)#\s*(.*)$")

# The typed top of the configuration has no yaml of its own.
TOP = {
    "sparsity": "fraction of zeros among the prunable weights, 0 to 1",
    "pattern": "unstructured; N:M, such as '2:4' (in quotes in a yaml file); or mixed:M, an N for each block",
    "seed": "of the calibration text and of allocators that draw; Shapley values do not depend on it",
    "protocol_gate": "a dense model that is off its known perplexity: error stops the job, warn goes on, off does not compare",
    "compare_uniform": "trial: a Shapley budget gives way to the uniform one if that loses no more (selection text); off",
    "selection_loss": "what allocators minimise on the selection text: nll, or kl, the divergence from the dense model",
    "results_dir": "folder for runs, sweeps and reports",
    "cache_dir": "folder for values of coalitions, losses and dense metrics; null: the user's cache folder (~/.cache/svnup)",
    "datasets_dir": "folder with local copies of the Hub's data sets, in folders organisation/name; null: none",
    "force": "true: run a finished job once more",
    "dry_run": "true: check everything, print the plan with its cost, and stop",
    "hardware": "the machine for which dry_run=true estimates times: a name of `machines`; here: this one, measured",
    "offload": "none; cpu: blocks wait in the CPU's memory; disk: they are read from the checkpoint one by one",
    "save_model": "true: write the pruned model into the run folder",
    "save_format": "of the saved model: dense, as from_pretrained reads it; bitmask: kept values and a bit for each weight",
    "save_masks": "true: write the masks into the run folder, for svnup.pruning.apply_masks",
}
ABOUT = {
    "model": "The model that is pruned.",
    "dataset": "The calibration text; the other texts have the same options (dataset@selection and so on).",
    "shapley": "How Shapley values are estimated, and of which game.",
    "allocator": "How the budget is divided among blocks.",
    "split": "How the budget of a block is divided among its linear layers.",
    "pruner": "How a matrix is pruned to its sparsity.",
    "recovery": "What is done to a block once it is pruned.",
    "evaluation": "What is measured of the dense and of the pruned model.",
    "tracker": "Where a run is recorded beside its folder.",
    "experiment": "Whole jobs and sweeps: files that set keys of the other groups.",
}


@dataclass(frozen=True)
class Key:
    """A key by its full path, with its value as the yaml has it and the comment behind it, empty where there is none."""

    path: str
    value: str
    comment: str
    leaf: bool


@dataclass(frozen=True)
class Option:
    """A file of a group: what its first comments say, its `_target_`, the files that it extends, its keys, and of which of
    these an option of another group has the keys below."""

    name: str
    about: str
    target: str
    extends: list[str]
    keys: list[Key]
    nested: dict[str, str]


def comment_of(line: str) -> str:
    """The comment behind the content of a line; none of the values in conf/ has a # in it."""
    found = COMMENT.search(line)
    return found[1].strip() if found else ""


def keys_of(node: yaml.Node, lines: list[str], prefix: str) -> Iterator[Key]:
    assert isinstance(node, yaml.MappingNode)
    for name, value in node.value:
        if name.value in ("_target_", "defaults", "hydra"):
            continue
        path = f"{prefix}{name.value}"
        comment = comment_of(lines[name.start_mark.line])
        if isinstance(value, yaml.MappingNode):
            yield Key(path, dict(plain(value)).get("_target_", ""), comment, leaf=False)
            yield from keys_of(value, lines, f"{path}.")
        else:
            yield Key(path, shown(value), comment, leaf=True)


def plain(node: yaml.MappingNode) -> Iterator[tuple[str, str]]:
    return ((name.value, value.value) for name, value in node.value)


def shown(node: yaml.Node) -> str:
    """A value on one line, as yaml."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value) if node.style is None else f"'{node.value}'"
    return " ".join(yaml.serialize(node, Dumper=Flow, width=10**6).split())


class Flow(yaml.SafeDumper):
    """Writes lists and mappings on one line."""

    def serialize_node(self, node: yaml.Node, *args: Any) -> None:
        if isinstance(node, yaml.CollectionNode):
            node.flow_style = True
        super().serialize_node(node, *args)


def read(file: Path, prefix: str) -> Option:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    node = yaml.compose(text)
    assert isinstance(node, yaml.MappingNode)
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    about = " ".join(line.lstrip("# ") for line in lines[:first] if "@package" not in line)
    if not about:
        raise ValueError(f"{file.relative_to(ROOT)}: does not say what it is; begin it with a comment")
    given = yaml.safe_load(text).get("defaults", [])
    extends = [entry.partition("@")[0] for entry in given if isinstance(entry, str) and entry != "_self_"]
    groups = {way: option for entry in given if isinstance(entry, dict) for way, option in entry.items() if option}
    of_groups = [(way.strip("/").partition("@"), option) for way, option in groups.items() if "override" not in way]
    nested = {f"{prefix}{package}": f"{group}={option}" for (group, _, package), option in of_groups}
    everywhere = "# @package _global_" in lines
    keys = list(keys_of(node, lines, "" if everywhere else prefix))
    return Option(file.stem, about, dict(plain(node)).get("_target_", ""), extends, keys, nested)


def described(options: list[Option]) -> list[Option]:
    """The options with a comment at every key; raises ValueError with the keys that have none."""
    said: dict[str, set[str]] = defaultdict(set)
    for key in (key for option in options for key in option.keys if key.comment):
        said[key.path].add(key.comment)
    out, lacking = [], []
    for option in options:
        keys = []
        for key in option.keys:
            other = re.fullmatch(r"\$\{([\w.]+)\}", key.value)
            common = next(iter(said[key.path])) if len(said[key.path]) == 1 else ""
            if not key.leaf:
                common = "a class with the keys below" if key.value else ""
            comment = key.comment or (f"that of `{other[1]}`" if other else common)
            if not comment and key.leaf:
                lacking.append(f"{option.name}.yaml: {key.path}")
            keys.append(Key(key.path, key.value, comment, key.leaf))
        out.append(replace(option, keys=keys))
    if lacking:
        raise ValueError(f"keys without a comment; write one behind each: {'; '.join(lacking)}")
    return out


def rows(keys: list[Key]) -> list[str]:
    """A table of the keys; those above others stand there where they have a comment."""
    body = []
    for key in keys:
        if key.leaf or key.comment:
            value = f"`{key.value}`" if key.value else ""
            body.append(f"| `{key.path}` | {value} | {key.comment} |")
    return ["", "| key | default | meaning |", "| --- | --- | --- |", *body] if body else []


def section(group: str) -> list[str]:
    files = sorted((CONF / group).glob("*.yaml"))
    options = described([read(file, f"{group}.") for file in files]) if group != "experiment" else [read(f, "") for f in files]
    out = ["", f"## {group}", "", ABOUT[group]]
    for option in sorted(options, key=lambda option: (not option.name.startswith("_"), option.name)):
        shared = option.name.startswith("_")
        out += ["", f"### {f'shared keys ({option.name}.yaml)' if shared else f'{group}={option.name}'}", "", option.about]
        out += [f"Class: `{option.target}`."] if option.target else []
        extended = [f"`{name}`" for name in option.extends]
        out += [f"It has the keys of {' and '.join(extended)}, too."] if extended and group != "experiment" else []
        out += [f"`{key}` has the keys of `{of}`." for key, of in option.nested.items() if group != "experiment"]
        out += rows(option.keys) if group != "experiment" else []
    return out


def page() -> str:
    """The page, from the files of conf/ and the schema."""
    names = [field.name for field in fields(Schema) if field.name not in (*GROUPS, "machines")]
    if set(names) != set(TOP):
        raise ValueError(f"tools/config_reference.py: TOP and the schema differ in {sorted(set(names) ^ set(TOP))}")
    usual = {field.name: field.default for field in fields(Schema)}
    top = [Key(name, yaml.safe_dump(usual[name]).split("\n")[0].strip("'"), TOP[name], leaf=True) for name in names]
    job = (CONF / "config.yaml").read_text(encoding="utf-8")
    extra = [key for key in keys_of(yaml.compose(job), job.splitlines(), "") if key.path not in names]
    out = [
        "# Every key of the configuration",
        "",
        "Made from the comments in conf/ by `python tools/config_reference.py`. A group is chosen by `group=option`, a key",
        "is set by `key=value`; `svnup --cfg job` shows all of them for a command. `${...}` is the value of another key.",
        "",
        "## The job",
        *rows([*top, *described([Option("config", "", "", [], extra, {})])[0].keys]),
    ]
    for group in ABOUT:
        out += section(group)
    rates = read(CONF / "machines.yaml", "machines.")
    here = [key for key in rates.keys if key.path.startswith("machines.here.")]
    out += ["", "## machines", "", rates.about, *rows([replace(k, path=k.path.replace("here", "NAME")) for k in here])]
    return "\n".join(out) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
