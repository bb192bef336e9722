"""Values that flow between the rooms are checked on construction."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import rows

from svnup.pattern import Pattern
from svnup.results.row import SCHEMA_VERSION, Measured, Protocol, Provenance, ResultRow
from svnup.types import BlockScores, Cost, LinearReport, Metric, Metrics, PruneReport, ShapleyValues, Share, SparsityProfile


@pytest.mark.parametrize(
    ("text", "zeros", "group"),
    [("unstructured", None, None), ("2:4", 2, 4), ("4:8", 4, 8), ("1:2", 1, 2), ("10:16", 10, 16)],
)
def test_patterns_that_exist(text, zeros, group):
    pattern = Pattern.parse(text)
    assert (pattern.text, pattern.zeros, pattern.group, pattern.mixed) == (text, zeros, group, False)
    assert Pattern.parse(text) is pattern, "parsed once"


@pytest.mark.parametrize("pattern", ["4:4", "5:4", "0:4", "2:4:8", "two:four", "", "-1:4", "2:", "2:4 "])
def test_patterns_that_do_not(pattern):
    with pytest.raises(ValueError, match=r"pattern=.*unstructured.*N:M"):
        Pattern.parse(pattern)


def test_the_pattern_that_yaml_turned_into_a_number_is_explained():
    with pytest.raises(ValueError, match=r"pattern=124.*in quotes"):
        Pattern.parse("124")


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [[1.0, 2.0]], 3.0])
def test_scores_are_finite_vectors(values):
    with pytest.raises(ValueError, match="finite"):
        BlockScores(values, "x")


def test_scores_are_float64_copies_that_cannot_be_changed():
    given = np.array([1, 2, 3])
    scores = BlockScores(given, "x")
    given[0] = 9
    assert scores.values.tolist() == [1.0, 2.0, 3.0]
    assert scores.values.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        scores.values[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        scores.method = "y"


def test_scores_have_one_of_two_directions():
    assert BlockScores([1.0], "x").higher_is == "denser"
    with pytest.raises(ValueError, match=r"higher_is='better'.*denser.*sparser"):
        BlockScores([1.0], "x", higher_is="better")


def test_scores_of_a_part_are_the_sums_over_its_players():
    scores = BlockScores([1.0, 2.0, 4.0, 8.0], "x", "sparser", Cost(n_evaluations=3))
    assert scores.per_unit(4) is scores
    blocks = scores.per_unit(2)
    assert blocks.values.tolist() == [3.0, 12.0]
    assert (blocks.method, blocks.higher_is, blocks.cost) == ("x", "sparser", scores.cost)


def test_efficiency_gap_is_the_sum_less_what_there_was_to_divide():
    values = ShapleyValues([1.0, 2.5, -0.5], "x", v_empty=-4.0, v_full=-0.75)
    assert values.efficiency_gap == pytest.approx(3.0 - 3.25, abs=1e-15)


@pytest.mark.parametrize("wrong", [{"v_empty": math.nan}, {"v_full": math.inf}, {"stderr": [0.1, math.nan]}])
def test_shapley_values_are_finite_throughout(wrong):
    with pytest.raises(ValueError, match="finite"):
        ShapleyValues([1.0, 2.0], "x", **wrong)


def test_shapley_values_as_json():
    cost = Cost(8, 7, 3, 2, 0.5)
    data = json.loads(json.dumps(ShapleyValues([1.0, 2.0], "m", cost=cost, stderr=[0.1, 0.2], v_full=3.5).to_dict()))
    expected = {
        "values": [1.0, 2.0],
        "method": "m",
        "higher_is": "denser",
        "stderr": [0.1, 0.2],
        "v_empty": 0.0,
        "v_full": 3.5,
        "efficiency_gap": -0.5,
        "n_evaluations": 8,
        "n_block_forwards": 7,
        "n_new_evaluations": 3,
        "n_new_block_forwards": 2,
        "seconds": 0.5,
    }
    assert expected.items() <= data.items()
    assert ShapleyValues([1.0], "m").to_dict()["stderr"] is None


def test_a_profile_has_the_weighted_mean_that_it_claims():
    profile = SparsityProfile([0.2, 0.6], [100, 300], 0.5)  # (20 + 180) / 400
    assert profile.mean == pytest.approx(0.5, abs=1e-15)
    assert not profile.sparsity.flags.writeable
    assert not profile.params.flags.writeable
    with pytest.raises(ValueError, match=r"mean sparsity is 0\.5.*target 0\.4"):
        SparsityProfile([0.2, 0.6], [100, 300], 0.4)  # the unweighted mean
    with pytest.raises(ValueError, match="mean sparsity"):
        SparsityProfile([0.2, 0.6], [100, 300], 0.500002)


@pytest.mark.parametrize(
    ("sparsity", "params", "pattern", "message"),
    [
        ([-0.1, 0.9], [1, 1], "unstructured", r"\[0, 1\]"),
        ([1.1, -0.3], [1, 1], "unstructured", r"\[0, 1\]"),
        ([0.4, 0.4], [1, 1, 1], "unstructured", "positive params"),
        ([0.4, 0.4], [1, 0], "unstructured", "positive params"),
        ([0.4, math.nan], [1, 1], "unstructured", "finite"),
        ([0.4, 0.4], [1, 1], "4:2", "pattern=4:2"),
    ],
)
def test_profiles_that_make_no_sense(sparsity, params, pattern, message):
    with pytest.raises(ValueError, match=message):
        SparsityProfile(sparsity, params, 0.4, pattern)


def test_a_profile_without_a_target_is_refused():
    with pytest.raises(ValueError, match="target"):
        SparsityProfile([0.4, 0.4], [1, 1], math.nan)


def test_there_is_one_standard_error_per_value():
    with pytest.raises(ValueError, match="standard errors"):
        ShapleyValues([1.0, 2.0], "x", stderr=[0.1])


def test_profiles_survive_json():
    profile = SparsityProfile([0.25, 0.75], [4, 4], 0.5, "2:4")
    again = SparsityProfile.from_dict(json.loads(json.dumps(profile.to_dict())))
    assert again.sparsity.tolist() == [0.25, 0.75]
    assert again.params.tolist() == [4, 4]
    assert (again.target, again.pattern) == (0.5, "2:4")


def test_prune_report_counts_weights_not_linears():
    linears = (
        LinearReport(0, "a", 10, 100, 0.1, 0.0),
        LinearReport(1, "a", 60, 100, 0.2, 0.0),
        LinearReport(1, "b", 0, 200, None, 0.0),
    )
    report = PruneReport(linears, {"total": 1.0}, 5)
    assert report.sparsity == 70 / 400
    assert report.block_sparsity(2).tolist() == [0.1, 0.2]
    assert [row["sparsity"] for row in report.to_dict()["per_linear"]] == [0.1, 0.6, 0.0]
    json.dumps(report.to_dict(), allow_nan=False)


def test_metrics_are_finite_or_say_why_not():
    with pytest.raises(ValueError, match="finite"):
        Metric(math.inf, {"seq_len": 8})
    metrics = Metrics({"docs/ppl": Metric(12.5, {"seq_len": 8}), "c4/ppl": Metric(math.nan, {}, "no text")})
    text = json.dumps(metrics.to_dict(), allow_nan=False)
    again = Metrics.from_dict(json.loads(text))
    assert again["docs/ppl"] == Metric(12.5, {"seq_len": 8})
    assert math.isnan(again["c4/ppl"].value)
    assert again["c4/ppl"].reason == "no text"


def test_result_rows_survive_json_and_carry_their_version():
    method = {"_target_": "svnup.some.Method"}
    config = {"model": {}, "pruner": method, "allocator": method, "sparsity": 0.5, "pattern": "unstructured", "seed": 0}
    number = Measured(1.5, Protocol(n_windows=2, seq_len=8, role="test"))
    row = ResultRow("finished", "k", config | {"a": {"b": [1, None]}}, Provenance(), {"weights": "w"}, {"docs/ppl": number})
    assert ResultRow.from_json(row.to_json()) == ResultRow.from_dict(row.to_dict()) == row
    assert json.loads(row.to_json())["schema_version"] == SCHEMA_VERSION
    with pytest.raises(ValueError, match=rf"schema_version=99.*{SCHEMA_VERSION}"):
        ResultRow.from_json(json.dumps(json.loads(row.to_json()) | {"schema_version": 99}))
    del config["seed"]
    with pytest.raises(ValueError, match="config: lacks seed"):
        ResultRow.from_json(ResultRow("finished", "k", config, Provenance(), {}).to_json())
    with pytest.raises(ValueError, match="JSON compliant"):
        replace(row, seconds=math.nan).to_json()


def test_a_result_is_written_as_it_was_read_with_what_it_lacks_and_what_is_not_known():
    """Files of earlier and of later versions: no key appears, none goes, and their order stays."""
    data = rows.run(20.0, allocator="shapley").to_dict()
    data["metrics"]["docs/ppl"]["protocol"] = {"seq_len": 8, "of_tomorrow": [1, {"a": None}], "n_windows": 3}
    data["shapley"] = {"method": "Exact()", "values": [1, 2.5], "stderr": None}
    del data["stages"]
    row = ResultRow.from_dict(data)
    assert json.dumps(row.to_dict()) == json.dumps(data)
    assert (row.metrics["docs/ppl"].protocol.n_windows, row.shapley.values, row.stages) == (3, (1, 2.5), None)
    assert row.metrics["docs/ppl"].protocol.more == {"of_tomorrow": [1, {"a": None}]}
    later = replace(row, shapley=replace(row.shapley, n_evaluations=4)).to_dict()
    assert later["shapley"] == {"method": "Exact()", "values": [1, 2.5], "stderr": None, "n_evaluations": 4}


def test_two_protocols_that_differ_in_a_key_that_no_reader_knows_differ():
    one, other = (Protocol.from_dict({"seq_len": 8, "of_tomorrow": n}) for n in (1, 2))
    assert one != other
    assert one == Protocol.from_dict({"of_tomorrow": 1, "seq_len": 8})


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("shapley.values.1", "2", "shapley.values.1: must be a number"),
        ("shapley.n_evaluations", 1.5, "shapley.n_evaluations: must be a whole number"),
        ("shapley.seconds", True, "shapley.seconds: must be a number"),
        ("sparsity", {"actual": 0.5}, "sparsity: lacks target"),
        ("metrics.docs/ppl.protocol.seq_len", "8", "metrics.docs/ppl.protocol.seq_len: must be a whole number"),
        ("pruning.per_linear.0", [], "pruning.per_linear.0: must be an object"),
        ("profile.params", 7, "profile.params: must be a list"),
        ("status", "over", "status: must be one of running, finished, failed, interrupted, dead"),
        ("config.pruner._target_", None, "config.pruner._target_: must be text"),
        ("tomorrow", 1, f"tomorrow: results of version {SCHEMA_VERSION} have no such key"),
    ],
)
def test_what_is_of_another_type_is_told_by_its_key(path, value, told):
    data = json.loads(rows.run(20.0, allocator="shapley").to_json())
    *outer, last = path.split(".") if "docs/ppl" not in path else ["metrics", "docs/ppl", "protocol", "seq_len"]
    node = data
    for name in outer:
        node = node[int(name) if isinstance(node, list) else name]
    node[int(last) if isinstance(node, list) else last] = value
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        ResultRow.from_dict(data)


def test_what_a_job_measured_that_is_not_finite_is_null_and_said():
    blank = rows.stored(**{name: getattr(rows.run(), name) for name in ("config_key", "config")} | {"provenance": {}})
    linear = {"block": 0, "name": "q", "n_zeros": 1, "size": 2, "error": math.inf, "seconds": 0.5, "fallback": None}
    row = blank.finished(pruning={"per_linear": [linear], "seconds": {}}, seconds=2.0)
    assert (row.status, row.seconds, row.pruning.per_linear[0].error) == ("finished", 2.0, None)
    assert row.not_finite == {"pruning.per_linear.0.error": "inf"}
    assert blank.finished(seconds=1.0).not_finite is None


# -- steps, and linears


@pytest.mark.parametrize(("text", "group"), [("mixed:8", 8), ("mixed:2", 2), ("mixed:16", 16)])
def test_mixed_patterns(text, group):
    assert (Pattern.parse(text).zeros, Pattern.parse(text).group, Pattern.parse(text).mixed) == (None, group, True)


@pytest.mark.parametrize("pattern", ["mixed:1", "mixed:0", "mixed:", "mixed", "mixed:2:4", "mixed:08", "2:mixed", "mixed:-8"])
def test_mixed_patterns_that_do_not_exist(pattern):
    with pytest.raises(ValueError, match=r"pattern=.*unstructured.*N:M.*mixed:8"):
        Pattern.parse(pattern)


def test_the_steps_of_a_pattern():
    assert Pattern.parse("unstructured").steps(0.5) is None
    assert Pattern.parse("2:4").steps(0.5) == (2, 4)
    assert [Pattern.parse("mixed:8").steps(n / 8) for n in range(9)] == [(n, 8) for n in range(9)]


def test_a_mixed_profile_is_in_steps_and_keeps_what_was_requested():
    profile = SparsityProfile([0.5, 0.75], [10, 10], 0.62, "mixed:8", requested=[0.51, 0.73])
    assert profile.requested.tolist() == [0.51, 0.73]
    assert not profile.requested.flags.writeable
    again = SparsityProfile.from_dict(json.loads(json.dumps(profile.to_dict())))
    assert again.to_dict() == profile.to_dict()
    assert again.requested.tolist() == [0.51, 0.73]
    assert "requested" not in SparsityProfile([0.5], [1], 0.5).to_dict()


@pytest.mark.parametrize(
    ("sparsity", "requested", "message"),
    [
        ([0.5, 0.75], None, "steps of 1/8"),
        ([0.5, 0.74], [0.5, 0.74], "steps of 1/8"),
        ([0.5, 0.75], [0.5, 0.62], "mean sparsity"),
        ([0.5, 0.5], [0.62, 0.62], "mean sparsity"),  # by 0.12, and a step of one of two equal blocks is 0.0625
        ([0.5, 0.75], [0.62], "1 requested sparsities for 2"),
        ([0.5, 0.75], [0.62, math.nan], "finite"),
    ],
)
def test_mixed_profiles_that_make_no_sense(sparsity, requested, message):
    with pytest.raises(ValueError, match=message):
        SparsityProfile(sparsity, [10, 10], 0.62, "mixed:8", requested=requested)


LINEARS = ({"a": Share(0.25, 20), "b": Share(0.75, 20)}, {"a": Share(0.6, 30), "b": Share(0.6, 10)})


def test_linears_have_sparsities_of_their_own():
    profile = SparsityProfile([0.5, 0.6], [40, 40], 0.55, linears=LINEARS)
    assert [profile.of(0, "a"), profile.of(0, "b"), profile.of(1, "b")] == [0.25, 0.75, 0.6]
    assert SparsityProfile([0.5, 0.6], [40, 40], 0.55).of(1, "anything") == 0.6
    again = SparsityProfile.from_dict(json.loads(json.dumps(profile.to_dict())))
    assert again.linears == LINEARS
    assert again.to_dict() == profile.to_dict()
    assert "linears" not in SparsityProfile([0.5], [1], 0.5).to_dict()


@pytest.mark.parametrize(
    ("linears", "message"),
    [
        (LINEARS[:1], "linear layers of 1 blocks in a profile of 2"),
        ((LINEARS[0], {"a": Share(0.6, 30)}), "block 1: its linear layers have 30 weights"),
        ((LINEARS[0], {"a": Share(0.7, 30), "b": Share(0.6, 10)}), r"block 1: .* mean sparsity 0\.675"),
        (({"a": Share(1.25, 20), "b": Share(-0.25, 20)}, LINEARS[1]), "block 0"),
        (({}, LINEARS[1]), "block 0: its linear layers have 0 weights"),
    ],
)
def test_linears_that_do_not_make_up_their_block(linears, message):
    with pytest.raises(ValueError, match=message):
        SparsityProfile([0.5, 0.6], [40, 40], 0.55, linears=linears)


def test_the_linears_of_a_block_share_its_n():
    shares = tuple({"a": Share(0.5, 40)} for _ in range(2))
    for pattern, requested in (("2:4", None), ("mixed:8", [0.5, 0.5])):
        with pytest.raises(ValueError, match=rf"pattern={pattern}: .*pattern=unstructured"):
            SparsityProfile([0.5, 0.5], [40, 40], 0.5, pattern, requested, shares)
