"""A part of `make chaos`."""

from __future__ import annotations

import argparse

import chaos
import fuzz
import pytest


@pytest.mark.slow
def test_nothing_is_lost_and_no_number_changes():
    report = chaos.Report()
    given = argparse.Namespace(kills=4, interruptions=3, faults=2, disks=2, together=1, saves=60, seed=1)
    with fuzz.nothing_written_outside():
        chaos.chaos(given, report)
    assert not report.lost, str(report)
    assert report.injected["SIGKILL"] == 4
    assert report.injected["SIGTERM"] + report.injected["SIGINT"] == 3
    assert sum(n for kind, n in report.injected.items() if kind.startswith("damaged file")) == 2 * len(chaos.READINGS)
    assert report.injected["saves of one model"] == 60


def test_a_change_of_number_would_be_seen():
    """The report of a run whose result has another number, or none."""
    report = chaos.Report()
    whole = {"a1": ("finished", {"docs/ppl": 8.0}, {}, None, None, {})}
    other = {"a1": ("finished", {"docs/ppl": 8.5}, {}, None, None, {})}
    assert "lost: nothing" in str(report)
    for found, words in ((other, "a1/metrics"), ({}, "a1")):
        assert chaos.differences(found, whole).endswith(words)
    report.check(False, "a number")
    assert str(report).endswith("lost: 1\na number")
