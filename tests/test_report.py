"""The page about a results folder: well-formed, self-contained, escaped, the same bytes each time, and fair."""

import base64
import copy
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from markupsafe import Markup
from rows import changed, run

from svnup.cli.results import main
from svnup.reports import svg
from svnup.reports.html import report
from svnup.reports.svg import element
from svnup.reports.templates import _breaks
from svnup.results.row import Measured, Protocol, ResultRow
from svnup.results.store import RunFolder, load

VOID = {"meta", "input", "wbr"}
HOSTILE = "</pre></title></style></script><script>alert(1)</script>\"'><img src=x onerror=alert(1)> & Ω"
EXACT = "Exact()"


class Page(HTMLParser):
    """Elements in their order, each with its attributes and the text inside; raises where tags do not nest."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.found = [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        node = {"tag": tag, "in": list(self.open), "text": "", **{k: v or "" for k, v in attrs}}
        self.found.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open[-1]["tag"] == tag, f"</{tag}> inside <{self.open[-1]['tag']}>"
        self.open.pop()

    def handle_data(self, data):
        for node in self.open:
            node["text"] += data.replace("\N{NO-BREAK SPACE}", " ")

    def all(self, tag, **attributes):
        wanted = {k.rstrip("_"): v for k, v in attributes.items()}
        return [n for n in self.found if n["tag"] == tag and all(n.get(k) == v for k, v in wanted.items())]

    def inside(self, node, tag):
        return [n for n in self.found if n["tag"] == tag and any(outer is node for outer in n["in"])]

    def by_id(self, name):
        (node,) = (n for n in self.found if n.get("id") == name)
        return node

    def board(self):
        """The leaderboard, cells by heading."""
        section = self.by_id("leaderboard")
        head = [n["text"] for n in self.inside(section, "th") if n.get("scope") == "col"]
        rows = self.inside(self.by_id("board"), "tr")
        body = self.by_id("board")
        here = [n for n in self.found if n["tag"] in ("th", "td") and any(outer is body for outer in n["in"])]
        cells = [[n for n in here if n["in"][-1] is row] for row in rows]
        return [dict(zip(head, (c["text"] for c in line), strict=True)) for line in cells]


def estimator(name, **options):
    return {
        "_target_": f"svnup.shapley.x.{name}",
        **options,
        "game": {"payoff": "recip_ppl", "absence": "skip", "players": "block"},
    }


def row(key, ppl=30.0, *, allocator="uniform", values=None, method=None, cost=10, seq_len=256, n_blocks=2, **given):
    """A result of few blocks; of `given` scorer, tuning and pruning stand in it as they are, the rest makes the row."""
    scorer, tuning, pruning = (given.pop(name, None) for name in ("scorer", "tuning", "pruning"))
    lengths = {"measured": {"seq_len": seq_len}, "evaluation__seq_len": seq_len, "dataset__n_seq": 16}
    made = run(ppl, key=key, allocator=allocator, dense=12.5, **lengths, **given)
    made = replace(made, provenance=replace(made.provenance, command=f"svnup key={key}", git="c0ffee"))
    made = changed(made, tuning=tuning, pruning=pruning)
    if scorer is not None:
        made.config["allocator"]["scorer"] = scorer
    if made.status != "finished":
        return replace(made, metrics={}, dense={}, sparsity=None, profile=None, shapley=None)
    profile = {"sparsity": [made.config["sparsity"]] * n_blocks, "params": [10] * n_blocks, "target": made.config["sparsity"]}
    if allocator == "shapley":
        method, values = method or "SlidingWindow(window=5)", values if values is not None else [0.7, 0.2]
        counts = {"n_evaluations": 4, "n_block_forwards": cost, "n_backward_passes": 0}
        shapley = {"values": values, "stderr": None, "method": method, "higher_is": "denser"} | counts
        made = changed(made, shapley=shapley)
    return changed(made, profile=profile)


def sweep():
    """Methods, sparsities, seeds, pruners, models, patterns, protocols, estimators, and runs that went wrong."""
    rows = [
        row(f"{allocator[0]}{sparsity}{seed}{pruner}", 20.0 + 50 * sparsity + seed - (allocator == "shapley"), **which)
        for allocator in ("uniform", "shapley")
        for sparsity in (0.5, 0.6, 0.7)
        for seed in (0, 1, 2)
        for pruner in ("wanda", "sparsegpt")
        for which in [{"allocator": allocator, "sparsity": sparsity, "seed": seed, "pruner": pruner}]
    ]
    curve = [{"label": "lam=0", "loss": 3.5}, {"label": "lam=0.1", "loss": None}, {"label": "lam=0.2", "loss": 3.25}]
    tuning = {"curve": curve, "n_evaluations": 3, "n_sequences": 4}
    rows.append(row("tuned", 25.0, allocator="shapley", scorer=estimator("Exact"), method=EXACT, tuning=tuning))
    rows.append(row("other", 91.0, model="org/llama-7b", n_blocks=32))
    rows.append(row("short", 44.0, seq_len=128))
    rows.append(row("2of4", 33.0, pattern="2:4", sparsity=0.5))
    rows.append(row("failed1", status="failed"))
    rows.append(row("running1", status="running", seed=7))
    rows.append(row("fell", pruning={"per_linear": [{"fallback": "no inverse: magnitude instead"}]}, seed=8))
    return rows


@pytest.fixture(scope="module")
def whole():
    return report(sweep())


# -- the page as a page


def test_it_is_well_formed_and_every_reference_is_kept(whole):
    page = Page(whole)
    ids = [n["id"] for n in page.found if "id" in n]
    assert len(ids) == len(set(ids))
    links = [n["href"] for n in page.all("a")]
    assert len(links) > 40
    assert {link[1:] for link in links} | {n["aria-labelledby"] for n in page.all("section")} <= set(ids)
    assert page.all("html", lang="en")
    assert len(page.all("h1")) == 1
    assert all(n["text"].strip() for n in page.all("button"))
    assert all(n["aria-label"] for n in page.all("svg", role="img"))
    assert all(n.get("scope") for n in page.all("th"))


def test_it_loads_nothing(whole):
    page = Page(whole)
    for node in page.found:
        assert not {"src", "srcset", "data", "poster", "action", "background"} & set(node), node
        assert node.get("href", "#").startswith("#"), node
    assert {n["tag"] for n in page.found} & {"link", "img", "iframe", "object", "embed", "base"} == set()
    (style,), (script,) = page.all("style"), page.all("script")
    assert not re.search(r"url\(|@import|https?:", style["text"])
    assert not re.search(r"https?:|fetch\(|XMLHttp|import\(", script["text"])
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in policy["content"]


def test_headings_sort_by_keyboard(whole):
    page = Page(whole)
    heads = [n for n in page.inside(page.by_id("leaderboard"), "th") if "aria-sort" in n]
    assert len(heads) >= 6
    assert all(len(page.inside(head, "button")) == 1 for head in heads)


def test_every_run_has_its_page():
    rows = sweep()
    page = Page(report(rows))
    for one in rows:
        text = page.by_id(f"run-{one.config_key}")["text"]
        assert f"svnup key={one.config_key}" in text
        assert f"seed: {one.config['seed']}" in text, "its configuration"
        assert "git: c0ffee" in text
        if one.status == "finished":
            assert "seq_len: " in text, "its protocol"
    assert len(page.inside(page.by_id("all-runs"), "details")) >= len(rows)
    charts = page.inside(page.by_id("run-tuned"), "svg")
    assert [n["aria-label"].partition(":")[0] for n in charts] == [
        "Shapley value per layer",
        "Sparsity per layer in percent",
        "Loss of what was tried",
    ]
    assert [p["data-tip"] for p in page.inside(charts[2], "path") if "data-tip" in p] == ["lam=0: 3.5000", "lam=0.2: 3.2500"]


def test_what_went_wrong_is_shown_and_ranked_nowhere(whole):
    page = Page(whole)
    assert "ValueError: no luck" in page.by_id("run-failed1")["text"]
    assert "has not ended" in page.by_id("run-running1")["text"]
    assert "no inverse: magnitude instead" in page.by_id("run-fell")["text"]
    for key, status in (("failed1", "failed"), ("running1", "running"), ("fell", "fallback")):
        assert page.inside(page.by_id(f"run-{key}"), "span"), "a badge"
        assert status in page.by_id(f"run-{key}")["text"]
    assert "failedrunning" not in whole
    assert page.by_id("leaderboard")["text"].count("fallback") == 1
    assert "34 finished" not in page.all("dl", class_="tiles")[0]["text"]


# -- what results hold is text and nothing else


def poisoned(node, key=""):
    """The same with a hostile string wherever text is free, and in place of every key that is not ours."""
    if isinstance(node, dict):
        return {k: poisoned(v, k) for k, v in node.items()} | (
            {HOSTILE: HOSTILE} if key in ("config", "protocol", "versions") else {}
        )
    if isinstance(node, list):
        return [poisoned(item, key) for item in node]
    return HOSTILE if isinstance(node, str) and key not in ("status", "config_key", "higher_is") else node


@pytest.mark.slow
def test_hostile_text_stays_text():
    rows = []
    for one in sweep():
        data = poisoned(json.loads(one.to_json()))
        data["metrics"] = {f"{HOSTILE}/ppl": v for v in data["metrics"].values()}
        data["dense"] = {f"{HOSTILE}/ppl": v for v in data["dense"].values()}
        if data["profile"]:
            data["scores"] = {"values": data["profile"]["sparsity"], "method": HOSTILE, "higher_is": "denser"}
        rows.append(ResultRow.from_dict(data))
    clean, page = Page(report(sweep())), Page(report(rows))
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert page.all("script")[0]["text"] == clean.all("script")[0]["text"]
    assert {n["tag"] for n in page.found} == {n["tag"] for n in clean.found}
    assert not [k for n in page.found for k in n if k.startswith("on")]
    for place in ("leaderboard", "sparsity", "layers", "protocols", "runs"):
        assert HOSTILE in page.by_id(place)["text"], place
    assert HOSTILE in page.all("footer")[0]["text"]
    assert any(HOSTILE in n.get("data-tip", "") for n in page.found)


def test_an_element_escapes_all_but_markup():
    assert element("b", "<i>", title='"<') == '<b title="&#34;&lt;">&lt;i&gt;</b>'
    assert element("b", element("i"), Markup("&amp;"), class_="c", id=None) == '<b class="c"><i></i>&amp;</b>'


# -- the same results make the same bytes


def test_order_and_copies_of_results_do_not_matter(whole):
    rows = sweep()
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        assert report(rows + rows[:5]) == whole


@pytest.mark.slow
def test_the_command_writes_the_same_bytes_wherever_the_folder_lies(tmp_path, capsys):
    for place in ("a", "b/c"):
        for one in sweep():
            RunFolder.of(tmp_path / place, one.config_key).write(one)
        assert main(["report", str(tmp_path / place)]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / place / "report.html")
    first = (tmp_path / "a" / "report.html").read_bytes()
    assert first == (tmp_path / "b/c" / "report.html").read_bytes()
    assert str(tmp_path).encode() not in first
    assert main(["report", str(tmp_path / "a"), "--output", str(tmp_path / "new" / "x.html")]) == 0
    assert (tmp_path / "new" / "x.html").read_bytes() == first
    code = "from svnup.results.store import load; from svnup.reports.html import report; "
    code += f"print(report(load({str(tmp_path / 'a')!r})), end='')"
    another = os.environ | {"PYTHONHASHSEED": "1"}  # sets have another order
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=another, check=True).stdout == first


def test_a_folder_without_runs_is_a_mistake(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "no result.json below this folder" in errors
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no runs"):
        report(load(tmp_path))


# -- fair comparisons


def test_means_over_seeds_and_the_change_of_each_seed():
    rows = [row(f"u{s}", v, seed=s) for s, v in enumerate([40.0, 50.0, 80.0])]
    rows += [row(f"s{s}", v, seed=s, allocator="shapley") for s, v in enumerate([20.0, 30.0, 40.0])]
    page = Page(report(rows))
    shapley, uniform = page.board()
    assert shapley["docs/ppl"] == "best30.00 ± 10.00"
    assert shapley["vs uniform of docs/ppl"] == "−46.7 % ± 5.8", "of -50, -40 and -50 %"
    assert uniform["docs/ppl"] == "56.67 ± 20.82"
    assert uniform["vs uniform of docs/ppl"] == "–"
    assert shapley["runs by seed"].split() == ["0", "1", "2"]
    assert shapley["dense of docs/ppl"] == "12.50"


def test_runs_that_differ_in_more_than_seeds_are_apart():
    other = row("b", 60.0, seed=1)
    other.config["dataset"]["n_seq"] = 99
    methods = [line["method"] for line in Page(report([row("a", 40.0), other])).board()]
    assert [m[len("uniform") :].replace("wanda", "") for m in methods] == ["[dataset.n_seq=16]", "[dataset.n_seq=99]"]


def test_models_of_one_name_and_another_configuration_are_apart():
    rows = [row("a", 111.11, sparsity=0.5), row("b", 222.22, sparsity=0.6)]
    rows[1].config["model"]["dtype"] = "bfloat16"
    page = Page(report(rows))
    assert {line["model"] for line in page.board()} == {"tiny", "tiny [dtype=bfloat16]"}
    assert not [n for n in page.all("svg", role="img") if "111.11" in n["text"] and "222.22" in n["text"]]


def test_protocols_share_neither_a_chart_nor_a_ranking():
    sparsities = (0.5, 0.6, 0.7)
    rows = [row(f"a{s}", 111.11 + 100 * s, sparsity=s) for s in sparsities]
    rows += [row(f"b{s}", 22.22 + s, sparsity=s, seq_len=128) for s in sparsities]
    rows += [row(f"c{s}", 211.11 + 100 * s, sparsity=s, allocator="shapley") for s in sparsities]
    rows += [row(f"d{s}", 21.11 + s, sparsity=s, allocator="shapley", seq_len=128) for s in sparsities]
    page = Page(report(rows))
    columns = [
        n["text"] for n in page.inside(page.by_id("leaderboard"), "button") if re.fullmatch(r"docs/ppl \[\w+\]", n["text"])
    ]
    assert len(columns) == 2
    board = page.board()
    marked = {(line["sparsity"], c) for line in board for c in columns if line[c].startswith("best")}
    assert marked == {(f"{100 * s:g} %", c) for s in sparsities for c in columns}, "each protocol has its own best"
    changes = {line[f"vs uniform of {c}"][0] for line in board for c in columns}
    assert changes == {"–", "+", "−"}, "worse under one protocol, better under the other"
    charts = [n for n in page.inside(page.by_id("sparsity"), "svg") if n.get("role") == "img"]
    tips = [{p["data-tip"] for p in page.inside(n, "path") if "data-tip" in p} for n in charts]
    assert len(charts) == 2
    assert [len(t) for t in tips] == [6, 6]
    for chart, shown in zip(charts, tips, strict=True):
        named = [c for c in columns if c in chart["aria-label"]]
        assert len(named) == 1
        assert len({float(t.rpartition(": ")[2]) < 30 for t in shown}) == 1
    assert set(columns) <= {n["text"] for n in page.inside(page.by_id("protocols"), "th")}


def test_a_change_is_only_against_uniform_runs_of_the_same_protocol_and_setting():
    rows = [
        row("u", 40.0, seq_len=128),
        row("s", 20.0, allocator="shapley"),
        row("p", 20.0, pruner="sparsegpt", allocator="shapley"),
    ]
    assert not re.search(r"−\d", Page(report(rows)).by_id("leaderboard")["text"])


def test_estimators_are_measured_against_the_exact_values_of_their_own_game():
    def played(key, method, values, seed=0, payoff="recip_ppl", cost=10, pruner="wanda"):
        scorer = estimator(method.partition("(")[0], seed=seed)
        scorer["game"]["payoff"] = payoff
        return row(key, allocator="shapley", scorer=scorer, method=method, values=values, cost=cost, pruner=pruner)

    rows = [
        played("a", "Permutation(budget=8, seed=0, antithetic=True)", [1.0, 4.0], cost=9),
        played("b", "Permutation(budget=8, seed=1, antithetic=True)", [1.0, 5.0], seed=1, cost=11),
        played("b2", "Permutation(budget=8, seed=1, antithetic=True)", [1.0, 5.0], seed=1, cost=11, pruner="sparsegpt"),
    ]
    assert "Left out" in Page(report(rows)).by_id("estimators")["text"]
    assert "Left out" in Page(report([*rows, played("x", EXACT, [1.0, 3.0], payoff="kl")])).by_id("estimators")["text"]
    page = Page(report([*rows, played("x", EXACT, [1.0, 3.0], cost=99), played("y", EXACT, [9.0, 9.0], payoff="kl")]))
    section = page.by_id("estimators")
    line = [n["text"] for n in page.inside(section, "tr")][1]
    errors = np.array([np.sqrt(1 / 2), np.sqrt(4 / 2)]) / np.std([1.0, 3.0])
    assert line == f"permutation10{errors.mean():.4f} ± {errors.std(ddof=1):.4f}2"
    assert "exact: 99" in section["text"]
    assert len([n for n in page.inside(section, "svg") if n.get("role") == "img"]) == 1


def measured_on_part(one):
    """The same run, measured on part of the text."""
    entry = one.metrics["docs/ppl"]
    return replace(one, metrics={"docs/ppl": replace(entry, protocol=replace(entry.protocol, complete=False))})


def test_a_number_from_part_of_a_text_is_never_the_headline():
    whole = [row("u", 40.0, seed=1), row("s", 36.0, seed=1, allocator="shapley")]
    part = [measured_on_part(row("pu", 40.0)), measured_on_part(row("ps", 4.0, allocator="shapley"))]
    headline = Page(report([*whole, *part])).all("dl", class_="tiles")[0]["text"]
    assert "−10.0 %" in headline
    assert "−90.0 %" not in headline
    page = Page(report(part))
    assert "part of a text" in page.all("dl", class_="tiles")[0]["text"]
    assert not re.search(r"\d %", page.all("dl", class_="tiles")[0]["text"])
    assert "−90.0 %" in page.by_id("leaderboard")["text"], "the table has it, with its protocol"


def test_a_component_that_has_moved_is_the_same():
    rows = [row("u", 40.0), row("s", 20.0, allocator="shapley")]
    rows[0].config["model"]["_target_"] = "svnup.model.Pretrained"
    (shapley, uniform) = Page(report(rows)).board()
    assert (shapley["vs uniform of docs/ppl"], uniform["method"].strip()) == ("−50.0 %", "uniformwanda")


def test_values_of_different_games_share_no_chart():
    rows = [row("a", allocator="shapley", values=[0.111, 0.5]), row("b", allocator="shapley", values=[0.222, 0.5])]
    rows[1].config["allocator"]["scorer"]["game"]["payoff"] = "kl"
    page = Page(report(rows))
    charts = [n["aria-label"] for n in page.inside(page.by_id("layers"), "svg") if n.get("role") == "img"]
    assert charts.count("Shapley values of tiny") == 2


def test_attention_and_mlp_apart_are_named():
    rows = [row("a", allocator="shapley", values=[0.1, 0.2, 0.3, 0.4])]
    page = Page(report(rows))
    assert "0 attention" in page.by_id("layers")["text"]
    assert "1 mlp" in page.by_id("layers")["text"]


def test_runs_without_anything_still_make_a_page():
    page = Page(report([row("f", status="failed")]))
    for place in ("sparsity", "layers", "estimators", "protocols"):
        assert "Left out" in page.by_id(place)["text"]
    assert "ValueError: no luck" in page.by_id("runs")["text"]


def test_a_metric_without_a_value_says_why():
    broken = row("a")
    broken.metrics["docs/ppl"] = replace(broken.metrics["docs/ppl"], value=None, reason="the loss is nan")
    assert "none: the loss is nan" in Page(report([broken])).by_id("run-a")["text"]


def test_of_accuracies_more_is_better_and_a_part_of_a_task_is_compared_with_nothing():
    rows = []
    for key, accuracy in (("a", 40.0), ("b", 60.0)):
        one = row(key, allocator="uniform" if key == "a" else "shapley")
        for name, limit in (("boolq/acc", None), ("piqa/acc", 10)):
            one.metrics[name] = Measured(accuracy, Protocol(dataset=name, num_fewshot=0, limit=limit), stderr=1.5)
        rows.append(one)
    page = Page(report(rows))
    best = {
        name: [v for line in page.board() for k, v in line.items() if k.startswith(name)] for name in ("boolq/acc", "piqa/acc")
    }
    assert sorted(best["boolq/acc"]) == ["40.00", "best60.00"]
    assert sorted(best["piqa/acc"]) == ["40.00", "60.00"]
    assert "60.0000 ± 1.5000" in page.by_id("run-b")["text"]


@pytest.mark.slow
def test_five_hundred_runs_of_a_deep_model_are_a_page_of_a_few_megabytes():
    rng = np.random.default_rng(0)
    rows = []
    for i in range(500):
        which = {"sparsity": (0.4, 0.5, 0.6, 0.7, 0.8)[i % 5], "seed": i // 5 % 5}
        one = row(
            f"k{i:04}", float(rng.uniform(10, 500)), allocator="shapley", values=rng.random(32).tolist(), n_blocks=32, **which
        )
        one.config["allocator"]["lam"] = i // 25
        one.config["selection"] = {f"option_{j}": "some value" for j in range(80)}  # a configuration as long as real ones
        rows.append(one)
    html = report(rows)
    assert html.count('<details id="run-') == 500
    assert len(html.encode()) < 6e6


# -- the filter


def test_lines_and_charts_name_the_runs_that_they_are_of(whole):
    """By this the filter moves them: places of runs in their order on the page."""
    page = Page(whole)
    runs = [n for n in page.inside(page.by_id("all-runs"), "details") if n.get("id", "").startswith("run-")]
    assert [n["data-status"] for n in runs].count("failed") == 1
    keys = [n["id"].removeprefix("run-") for n in runs]
    for line in page.inside(page.by_id("board"), "tr"):
        linked = {n["href"].removeprefix("#run-") for n in page.inside(line, "a")}
        assert {keys[int(place)] for place in line["data-runs"].split()} == linked
    for place in ("sparsity", "layers"):
        drawn = [n for n in page.inside(page.by_id(place), "g") if "data-s" in n]
        assert drawn
        for series in drawn:
            of = {keys[int(i)] for i in series["data-runs"].split()}
            assert of
            assert all((key[0] == "s") == series["data-s"].startswith("shapley") for key in of if key[1:2] == "0")
            marks = [n for n in page.inside(series, "path") if "data-runs" in n]
            assert {i for n in marks for i in n["data-runs"].split()} <= set(series["data-runs"].split())
    folded = page.inside(page.by_id("sparsity"), "table")
    assert all("data-runs" in head for table in folded for head in page.inside(table, "th")[1:3])


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
@pytest.mark.parametrize("words", ["shapley", "nobody"])
def test_in_a_browser_the_filter_moves_all_that_is_of_runs(whole, tmp_path, words):
    act = f'<script>words.value = "{words}"; filter();</script>'
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", whole).replace("</body>", f"{act}</body>")
    (tmp_path / "page.html").write_text(page)
    command = [BROWSER, "--headless=new", "--no-sandbox", f"--user-data-dir={tmp_path / 'home'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    page = Page(done.stdout)
    runs = [n for n in page.inside(page.by_id("all-runs"), "details") if n.get("id", "").startswith("run-")]
    chosen = {str(i) for i, n in enumerate(runs) if "hidden" not in n}
    assert page.by_id("count")["text"] == f"{len(chosen)} of {len(runs)} runs"
    assert len(chosen) == (len([n for n in runs if "shapley" in n["text"].split("Command")[0]]) if words == "shapley" else 0)
    for node in page.found:
        if "data-runs" in node:
            assert ("hidden" in node) == (not chosen & set(node["data-runs"].split()))
    for section in page.all("section"):
        left = [n for n in page.found if "data-runs" in n and any(o is section for o in n["in"]) and "hidden" not in n]
        (nothing,) = (n for n in page.inside(section, "p") if "nothing" in n.get("class", ""))
        if section["id"] in ("leaderboard", "sparsity", "layers", "runs"):
            assert ("hidden" in nothing) == bool(left or (section["id"] == "runs" and chosen))


# -- charts


def test_a_reference_that_is_far_away_does_not_squeeze_the_values():
    far, near = svg.Reference(10.0, "dense"), svg.Reference(90.0, "dense")
    assert svg.logarithmic("x", [100.0, 150.0], far).low > 90
    assert svg.logarithmic("x", [100.0, 150.0], near).low < 90
    assert svg.logarithmic("x", [100.0], far).low < 10, "one value has no range"
    shown = [svg.Series("a", [svg.Point(0, 100.0), svg.Point(1, 150.0)])]
    chart = svg.lines("t", svg.linear("x", [0, 1]), svg.logarithmic("y", [100.0, 150.0], far), shown, far)
    assert "dense (below the chart)" in chart
    assert 'class="ref"' not in chart


@pytest.mark.parametrize("draw", ["lines", "bars", "scatter", "ranking"])
def test_no_label_lies_on_what_is_drawn(draw):
    points = [svg.Point(i, 100.0 + 10 * i, 95.0 + 10 * i, 105.0 + 10 * i) for i in range(5)]
    reference = svg.Reference(120.0 if draw != "scatter" else 2.0, "a name")
    x, y = svg.linear("x", [0, 4]), svg.linear("a label that is so long that it needs a line of its own", [90.0, 150.0])
    if draw == "ranking":
        rows = [svg.Series("long_name_" * 12, [svg.Point(p.y, 0, p.low, p.high)]) for p in points]
        chart = svg.ranking("t", svg.linear("x", [90.0, 150.0]), rows, reference)
    else:
        series = svg.Series("a", points)
        chart = getattr(svg, draw)("t", x, y, series if draw == "bars" else [series], reference)
    page = Page(f"<svg>{chart}</svg>")
    (name,) = page.all("text", class_="refname")
    heights = [float(v) for n in page.all("path", class_="m") for v in re.findall(r"^M[\d.]+ ([\d.]+)", n["d"])]
    heights += [float(v) for n in page.all("path", class_="bar") for v in re.findall(r"V([\d.]+)h", n["d"])]
    assert len(heights) == 5
    assert float(name["y"]) < min(heights)
    if draw == "ranking":
        for row, height in zip((n for n in page.all("g") if "data-row" in n), heights, strict=True):
            (text,) = page.inside(row, "text")
            further = [n for n in page.inside(row, "tspan") if "dy" in n]
            assert len(further) == 2
            assert float(text["y"]) + sum(float(n["dy"]) for n in further) < height - 4
    else:
        (label,) = (n for n in page.all("text") if n["text"].startswith("a label"))
        assert float(label["y"]) < float(name["y"]), "two long ones have a line each"


@pytest.mark.parametrize(
    "name",
    [
        "org/a_model_with_a_long_name-instruct-v0.2",
        "dataset.n_seq=16, lam=0.00125",
        "shapley [allocator.scorer.window=5]",
        "x" * 99,
    ],
)
def test_names_break_at_separators(name):
    parts = svg.pieces(name)
    assert "".join(parts) == name
    for before, after in pairwise(parts):
        assert not (before[-1].isalnum() and after[0].isalnum())
        assert not re.search(r"\d\.$", before), "a number is one piece"
    html = Page(f"<p>{_breaks(name)}</p>")
    assert html.all("p")[0]["text"] == name
    assert len(html.all("wbr")) <= len(parts) - 1
    lines = svg._wrapped(name, 24)
    assert all(len(line) <= 24 for line in lines)
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")


@pytest.mark.parametrize("seed", range(30))
def test_axes_hold_their_values_and_keep_their_order(seed):
    rng = np.random.default_rng(seed)
    values = np.exp(rng.normal(rng.uniform(-5, 8), rng.uniform(0.001, 3), size=rng.integers(1, 9))).tolist()
    signed = [v * s for v, s in zip(values, rng.choice([-1, 1, 1], size=len(values)), strict=True)]
    for axis, shown in (
        (svg.logarithmic("x", values), values),
        (svg.linear("x", signed), signed),
        (svg.symlog("x", signed), signed),
    ):
        at = [axis.at(v) for v in sorted(shown)]
        assert all(-1e-9 <= a <= 1 + 1e-9 for a in at)
        assert at == sorted(at)
        assert all(axis.low - 1e-9 <= t <= axis.high + 1e-9 for t in axis.ticks)
        assert 1 <= len(set(axis.ticks)) == len(axis.ticks) <= 9


def test_styles_differ_until_they_run_out():
    seen = {(s.classes, s.marker) for s in (svg.Series("", [], style) for style in range(33))}
    assert len(seen) == 33


def test_a_whisker_and_a_band_are_drawn_where_they_are_known():
    x, y = svg.linear("x", [0.0, 1.0]), svg.linear("y", [0.0, 4.0])
    band = svg.lines("t", x, y, [svg.Series("a", [svg.Point(0, 1, 0, 2), svg.Point(1, 2, 1, 3)])])
    alone = svg.lines("t", x, y, [svg.Series("a", [svg.Point(0, 1, 0, 2)])])
    bare = svg.lines("t", x, y, [svg.Series("a", [svg.Point(0, 1), svg.Point(1, 2)])])
    assert ('class="band"' in band, 'class="whisker"' in band) == (True, False)
    assert ('class="band"' in alone, 'class="whisker"' in alone) == (False, True)
    assert 'class="band"' not in bare
    assert 'class="whisker"' not in bare


def test_rows_are_not_changed():
    rows = sweep()
    before = copy.deepcopy(rows)
    report(rows)
    assert rows == before
