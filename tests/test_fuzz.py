"""A part of `make fuzz`, and what it has found."""

from __future__ import annotations

import csv
import io

import fuzz
import pytest

from svnup.reports.grid import Cell, Grid, csv_text


@pytest.mark.slow
def test_configurations_that_nobody_would_write_end_in_a_line():
    found = fuzz.Found()
    with fuzz.nothing_written_outside():
        ends = fuzz.fuzz_configurations(500, 7, found) + fuzz.fuzz_commands(10, 7, found)
    assert not found, found.report()
    assert ends["plans"] > 130, "about a third are jobs"
    assert ends["lines"] > 200


@pytest.mark.slow
def test_results_that_nobody_would_write_end_in_a_line():
    found = fuzz.Found()
    with fuzz.nothing_written_outside():
        ends = fuzz.fuzz_files(100, 7, fuzz.whole_results(), found)
    assert not found, found.report()
    assert ends["exit code 0"] > 100


STRANGE = "<img src=x onerror=alert(1)>\n# a heading\n[a link](javascript:x) ![i](http://x) a|b & c"


def test_markdown_makes_nothing_of_what_a_result_says():
    grid = Grid([("name",), (STRANGE,)], [[Cell(STRANGE), Cell(STRANGE, best=True)]], STRANGE, STRANGE, [STRANGE])
    text = grid.render("markdown")
    assert not [line for line in text.splitlines()[1:] if line.startswith("#")]
    assert not [mark for mark in ("<img", "](javascript", "](http") if mark in text]
    (line,) = [line for line in text.splitlines() if line.startswith("| &lt;img") and "**" in line]
    assert line.replace("\\|", "").count("|") == 3


def test_csv_has_no_formulas():
    values = [
        "=1+1",
        "+cmd|' /C calc'!A0",
        "-2+3",
        "@x",
        "\tx",
        "-",
        "-3.5",
        "+1.0 %",
        "-12,5 %",
        "1e-5",
        "plain",
        -3,
        2.5,
        None,
    ]
    text = csv_text([{"=name": value} for value in values])
    (head, *lines) = csv.reader(io.StringIO(text))
    assert head == ["'=name"]
    expected = [
        "'=1+1",
        "'+cmd|' /C calc'!A0",
        "'-2+3",
        "'@x",
        "'\tx",
        "-",
        "-3.5",
        "+1.0 %",
        "-12,5 %",
        "1e-5",
        "plain",
        "-3",
        "2.5",
    ]
    assert [line[0] if line else "" for line in lines] == [*expected, ""]
