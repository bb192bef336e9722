"""Numbers in the documentation are those of the committed tables, and no result in prose is typed by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import ModuleType

import pytest
from scripts import script

ROOT = Path(__file__).parent.parent
COUNT = r"(?:\d+|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)"
RESULTS = {  # what reads like a result, where no script inserted it
    "a percentage": r"[-+]?\d[\d.,]* ?%",
    "a decimal": r"(?<![\w.+-])[-+]?\d+\.\d+(?![\w.])",
    "an error": r"±",
    "a factor": r"\b[\d.,]+ (?:times|nats|points)\b",
    "a count of cases": rf"\b{COUNT} (?:of|in) (?:all |the |these )*{COUNT}\b",
    "a share": r"\b(?:a|one|two|three|four) (?:third|quarter|fifth|sixth|tenth)s?\b",
}
SETTINGS = {  # what is no result
    "sparsities": r"\b[5-8]0(?:, [5-8]0)*(?:(?: to| and) [5-8]0)? %",
    "confidence, and Student's factor with three seeds": r"95 % interval|4\.30",
    "margin of the protocol gate": r"off by more than 2 %",
    "an aim": r"within 3 % of `search` at 20 times",
    "guessing": r"against ln V = 7\.6",
    "versions and papers": r"Python 3\.\d+|torch \d+\.\d+\.\d+|arXiv \d{4}\.\d{5}",
    "scale of differences": r"within (?:a percent|a standard deviation or two)",
    "what the sign means": r"^- ± is over calibration seeds|mean ± standard deviation over the seeds",
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return script("tools/insert_numbers.py")


@pytest.fixture(scope="module")
def values(tool: ModuleType) -> dict[str, str]:
    return tool.numbers()


def prose(page: str) -> str:
    """A page without what a script inserted, code, links' targets, comments and settings."""
    page = re.sub(r"<!--n:([a-z0-9-]+)-->.*?<!--/n-->", "", page, flags=re.DOTALL)
    for setting in SETTINGS.values():
        page = re.sub(setting, "", page, flags=re.MULTILINE)
    page = re.sub(r"^```.*?^```|<!--.*?-->|`[^`]*`|(?<=\])\([^)]*\)", "", page, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(line for line in page.splitlines() if not line.startswith("    "))


def results_in(page: str) -> list[str]:
    return [f"{kind}: {found}" for kind, pattern in RESULTS.items() for found in re.findall(pattern, prose(page))]


@pytest.mark.parametrize(
    "name",
    ["README.md", "docs/choosing.md", "docs/leaderboard.md", "docs/real_model.md"],
    ids=lambda name: name.rpartition("/")[2],
)
def test_pages_say_what_the_tables_say(tool, values, name):
    assert name in tool.PAGES
    page = (ROOT / name).read_text(encoding="utf-8")
    assert tool.MARK.search(page)
    assert page == tool.filled(page, values), "make numbers"
    assert page.count("<!--n:") == page.count("<!--/n-->") == len(tool.MARK.findall(page)), "every mark is closed"
    assert results_in(page) == [], "mark it, with its name in tools/insert_numbers.py"


@pytest.mark.parametrize(
    "typed",
    ["is 12.5 % lower", "23 of 24 cells", "nine of twelve", "2.4 times the cost", "19.74 there", "± 0.1", "a tenth of it"],
)
def test_a_result_that_is_typed_is_found(typed):
    assert results_in(f"Sublayers: {typed}.")


def test_settings_code_and_inserted_numbers_are_no_results():
    page = "At 70 % by `lam=0.15`, [a](b/2.5) and <!--n:share-->12.5 %<!--/n--> (arXiv 2505.01731).\n\n    svnup  # 3.5 times"
    assert results_in(page) == []


def test_a_number_is_inserted_and_a_name_that_is_none_is_refused(tool):
    page = "It is <!--n:gain-->7<!--/n--> and <!--n:table--><!--/n-->"
    assert tool.filled(page, {"gain": "12 %", "table": "\n| a |\n"}) == (
        "It is <!--n:gain-->12 %<!--/n--> and <!--n:table-->\n| a |\n<!--/n-->"
    )
    with pytest.raises(ValueError, match=r"<!--n:gian-->: no such number"):
        tool.filled("<!--n:gian-->7<!--/n-->", {"gain": "12 %"})


def test_columns_of_the_same_name_are_kept_apart(tool):
    line = tool.row(tool.lines_of("leaderboard.md", "## tiny, 70 % (dense 12.43)"), allocator="shapley")
    assert (line["vs uniform"][:5], line["vs uniform 2"][:5], line["cost 3"]) == ("-53.0", "-31.2", "49")


# -- which differences are more than chance


@pytest.fixture(scope="module")
def comparisons() -> ModuleType:
    return script("experiments/leaderboard/comparisons.py")


def test_the_comparisons_are_those_of_the_leaderboard(comparisons):
    assert (comparisons.TABLES / "comparisons.md").read_text(encoding="utf-8") == comparisons.report(comparisons.read()), (
        "make study NAME=comparisons"
    )


CELL = ("tiny", "wanda", "0.7")


def test_three_seeds_have_a_wide_interval(comparisons):
    logs = (0.01, 0.02, 0.03)
    found = comparisons.change({CELL: {"a": [math.exp(x) for x in logs], "b": [1.0, 1.0, 1.0]}}, CELL, "a", "b")
    error = 0.01 / math.sqrt(3)
    assert found.mean == pytest.approx(100 * math.expm1(0.02))
    assert found.low == pytest.approx(100 * math.expm1(0.02 - 4.3027 * error))
    assert found.high == pytest.approx(100 * math.expm1(0.02 + 4.3027 * error))
    assert found.p == pytest.approx(0.0742, abs=1e-4), "Student's t of 2 sqrt(3), two degrees of freedom"


def test_at_the_end_of_its_interval_a_difference_has_p_of_five_percent(comparisons):
    mean = comparisons.T_95 * 0.01 / math.sqrt(3)
    board = {CELL: {"a": [math.exp(mean + x) for x in (-0.01, 0.0, 0.01)], "b": [1.0, 1.0, 1.0]}}
    found = comparisons.change(board, CELL, "a", "b")
    assert found.p == pytest.approx(0.05, abs=1e-5)
    assert found.low == pytest.approx(0, abs=1e-9)


def test_what_the_seeds_do_not_change_is_not_tested(comparisons):
    same = comparisons.change({CELL: {"a": [2.0, 2.1, 2.2], "b": [2.0, 2.1, 2.2]}}, CELL, "a", "b")
    assert same.mean == 0
    assert math.isnan(same.p)
    cell = ("tiny", "magnitude", "0.7")
    found = comparisons.change({cell: {"a": [2.0, 2.0, 2.0], "b": [3.0, 3.0, 3.1]}}, cell, "a", "b")
    assert math.isnan(found.low)


def test_holm_corrects_step_by_step_and_leaves_out_what_is_not_tested(comparisons):
    assert comparisons.holm([0.04, math.nan, 0.01, 0.03])[0::2] == pytest.approx([0.06, 0.03])
    assert comparisons.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert comparisons.holm([0.5, 0.9]) == [1.0, 1.0]


def test_the_best_rival_is_no_control(comparisons):
    board = {CELL: {"random": [1.0], "search": [2.0], "curves": [3.0], "mine": [0.5]}}
    assert comparisons.best_rival(board, CELL, "mine") == "search"
    assert comparisons.best_rival(board, CELL, "mine", without=("search",)) == "curves"
