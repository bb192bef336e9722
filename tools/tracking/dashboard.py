"""svnup's dashboard and report in W&B: a leaderboard, perplexity against sparsity, Shapley values and budgets per layer.

python tools/tracking/dashboard.py ENTITY PROJECT            # prints the specifications; no network, no account
python tools/tracking/dashboard.py ENTITY PROJECT --save     # saves both in the project
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import wandb_workspaces.expr as expr
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

LAYERS = {  # the table and the column that its bars show, with their title
    "charts/shapley_table": ("shapley", "Shapley value per layer"),
    "charts/sparsity_table": ("sparsity", "Sparsity per layer"),
}
METHODS = [wr.Config("names.model"), wr.Config("names.pruner"), wr.Config("names.allocator"), wr.Config("sparsity")]


def leaderboard(metric: str) -> list[Any]:
    """Each setting (model, pruner, allocator, sparsity) by the mean of a metric over its runs, and what each run costs."""
    setting = wr.Config("names.setting")
    return [
        wr.BarPlot(title=f"{metric} by setting", metrics=[metric], groupby=setting, groupby_aggfunc="mean"),
        wr.BarPlot(title="Seconds", metrics=["cost/seconds"]),
        wr.BarPlot(title="Peak memory (GiB)", metrics=["cost/peak_memory_gib"]),
    ]


def sparsity_sweep(metric: str) -> list[Any]:
    """What quality each sparsity costs: a point a run."""
    sparsity = wr.Config("sparsity")
    axes: list[wr.Config | wr.SummaryMetric] = [*METHODS, wr.SummaryMetric(metric)]
    columns = [wr.ParallelCoordinatesPlotColumn(axis) for axis in axes]
    return [
        wr.ScatterPlot(title=f"{metric} against sparsity", x=sparsity, y=wr.SummaryMetric(metric), log_y=True),
        wr.ScatterPlot(title="Change against the dense model", x=sparsity, y=wr.SummaryMetric(f"vs_dense/{metric}")),
        wr.ParallelCoordinatesPlot(title="Methods, sparsity and what comes of them", columns=columns),
    ]


def layers() -> list[Any]:
    """Shapley values and budgets: layers are the labels of bars."""
    bars = [
        wr.CustomChart(
            query={"summaryTable": {"tableKey": table}},
            chart_name="wandb/bar/v0",
            chart_fields={"label": "layer", "value": column},
            chart_strings={"title": title},
        )
        for table, (column, title) in LAYERS.items()
    ]
    return [*bars, wr.MediaBrowser(title="Figures", media_keys=["figures/shapley", "figures/profile"])]


def workspace(entity: str, project: str, metric: str) -> ws.Workspace:
    """The dashboard: its table of runs has the jobs without their stages, the best first; none whose numbers are of a part
    of the text, of some items of a task, or of a pruning that fell back."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name="svnup",
        sections=[
            ws.Section(name="Leaderboard", panels=leaderboard(metric), is_open=True),
            ws.Section(name="Sparsity sweep", panels=sparsity_sweep(metric), is_open=True),
            ws.Section(name="Shapley values and budgets", panels=layers(), is_open=True),
        ],
        runset_settings=ws.RunsetSettings(
            filters=expr.And(expr.Metric("JobType") == "prune", expr.Summary("comparable") == 1),
            order=[expr.Ordering(expr.Summary(metric), ascending=True)],
            pinned_columns=["run:displayName", f"summary:{metric}", f"summary:vs_dense/{metric}", "summary:sparsity/actual"],
        ),
    )


def report(entity: str, project: str, metric: str) -> wr.Report:
    """The same as a page to send to people."""
    columns = [f"summary:{metric}", f"summary:vs_dense/{metric}", "summary:sparsity/actual", "summary:cost/seconds"]
    runs = wr.Runset(  # of the report's own project: to name it takes a server that knows its number
        name="finished jobs",
        filters=expr.And(
            expr.Metric("JobType") == "prune", expr.Metric("State") == "finished", expr.Summary("comparable") == 1
        ),
        order=[wr.OrderBy(wr.SummaryMetric(metric), ascending=True)],
        pinned_columns=columns,
    )

    def grid(panels: list[Any]) -> wr.PanelGrid:
        return wr.PanelGrid(runsets=[runs], panels=panels)

    return wr.Report(
        entity=entity,
        project=project,
        title="Shapley-value based pruning",
        description=f"{metric} of pruned models, by method and sparsity, with the contribution and the budget of each layer.",
        blocks=[
            wr.TableOfContents(),
            wr.H1("Leaderboard"),
            wr.P("Each line is a job; the stages that it came from are runs of their own, linked by artifacts."),
            grid(leaderboard(metric)),
            wr.H1("Sparsity sweep"),
            grid(sparsity_sweep(metric)),
            wr.H1("Shapley values and budgets"),
            grid(layers()),
        ],
        width="fluid",
    )


def specification(made: ws.Workspace | wr.Report) -> dict[str, Any]:
    """What would be sent, as nested JSON values."""
    return dict(json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entity")
    parser.add_argument("project")
    parser.add_argument("--metric", default="docs/ppl", help="the metric that ranks, lower is better: docs/ppl, wikitext2/ppl")
    parser.add_argument("--save", action="store_true", help="save both in the project (needs `wandb login`)")
    options = parser.parse_args()
    made = [make(options.entity, options.project, options.metric) for make in (workspace, report)]
    if options.save:
        for one in made:
            sys.stdout.write(f"{one.save().url}\n")
    else:
        json.dump([specification(one) for one in made], sys.stdout, indent=1)
        sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
