"""Dotted keys of nested mappings, and how commands end."""

import errno
import os

import numpy as np
import pytest

from experiments.study import interval, segment_means
from svnup.cli.outcome import outcome, tell
from svnup.keys import did_you_mean, flatten, walk

NODE = {"seed": 1, "game": {"data": {"seed": 2, "n_seq": None}, "empty": {}}, "list": [{"a": 1}]}


def test_keys_of_nested_mappings():
    assert [key for key, _ in walk(NODE)] == [
        *("seed", "game", "game.data", "game.data.seed", "game.data.n_seq", "game.empty", "list")
    ]
    assert flatten(NODE) == {"seed": 1, "game.data.seed": 2, "game.data.n_seq": None, "list": [{"a": 1}]}
    assert flatten({}) == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [("windw", "; did you mean window?"), ("WINDOW", "; did you mean window?"), ("lam", "; did you mean Lam?"), ("x", "")],
)
def test_the_key_that_was_meant(given, said):
    assert did_you_mean(given, ("window", "Lam", "n_seq")) == said


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("seed=x: choose a number"), 2, "seed=x: choose a number"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there"), 1, "there: No space left on device; make room"),
        (KeyboardInterrupt(), 130, "interrupted (Ctrl-C)"),
    ],
)
def test_an_error_that_is_no_fault_of_the_program_ends_in_a_line(error, code, words):
    message, found = outcome(error)
    assert found == code
    assert message.startswith(words)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a"), OSError("no number")], ids=repr)
def test_a_fault_of_the_program_ends_in_its_traceback(error):
    assert outcome(error) is None


def test_what_is_told_is_one_line_without_secrets(monkeypatch, capsys):
    monkeypatch.setenv("MY_TOKEN", "s3cret-of-mine-0")
    tell("svnup", "a\n  b \x1b[31m s3cret-of-mine-0")
    assert capsys.readouterr().err == "svnup: a b \\x1b[31m [MY_TOKEN]\n"


def test_segments_of_windows_and_the_interval_of_draws():
    losses = np.arange(14.0).reshape(2, 7)
    assert segment_means(losses, 3).tolist() == [[1.0, 3.5, 5.5], [8.0, 10.5, 12.5]]
    assert segment_means(losses[0], 7).tolist() == losses[0].tolist()
    assert interval(np.arange(1001.0)) == (25.0, 975.0)
