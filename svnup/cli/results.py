"""The `svnup-results` command: one function per subcommand, from parsed options to an exit code."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from svnup import __version__
from svnup.cli.outcome import outcome, tell
from svnup.files import at_home, naming
from svnup.progress import close_output, open_streams, say
from svnup.reports.grid import FORMATS, csv_text, render_all
from svnup.results.row import ResultRow
from svnup.results.store import load, run_folders

Options = argparse.Namespace
PATHS = {"results_dir", "folder", "a", "b", "into", "output"}  # options, by their names


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; a ValueError, or a file that cannot be, is the user's mistake: one line, exit code 2."""
    parser = argparse.ArgumentParser(prog="svnup-results", description="What to do with the runs in a results folder.")
    parser.add_argument("--version", action="version", version=f"svnup {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _table_options(commands.add_parser("table", help="a table of runs: flat, or methods down and models or tasks across"))
    _list_options(commands.add_parser("list", help="one line per run, failed and running ones too"))
    _status_options(commands.add_parser("status", help="how far sweeps are: done, running where, failed, time left"))
    _show_options(commands.add_parser("show", help="all that is known of one run"))
    _compare_options(
        commands.add_parser("compare", help="which numbers of two folders or two tables differ (then exit code 1)")
    )
    _published_options(commands.add_parser("published", help="a table of the field: ours, published and the difference"))
    _export_options(commands.add_parser("export", help="every metric of every run with its whole configuration"))
    _recipe_options(commands.add_parser("recipe", help="the budget of a run as a recipe of llm-compressor"))
    _rerun_options(commands.add_parser("rerun", help="repeat a run from its result, and compare the numbers"))
    _wandb_options(commands.add_parser("wandb", help="upload runs that have ended to W&B, each once"))
    _report_options(commands.add_parser("report", help="write one HTML page about the runs that lie in a results folder"))
    open_streams()
    options = parser.parse_args(argv)
    try:
        for name in PATHS & vars(options).keys():
            if (path := getattr(options, name)) is not None:
                setattr(options, name, type(path)(at_home(name, path)))
        code: int = options.run(options)
        if (unsaid := close_output()) is not None:
            raise ValueError(unsaid)
        return code
    except (ValueError, OSError, KeyboardInterrupt) as error:
        message, code = outcome(error) or (str(error), 2)
        tell("svnup-results", message)
        return 2 if isinstance(error, OSError) else code


def _rows(results_dir: str) -> list[ResultRow]:
    """The runs below a folder; raises ValueError where there are none."""
    if rows := load(results_dir):
        return rows
    raise ValueError(f"{results_dir}: no result.json below this folder that can be read; run svnup first, or name another")


def _write(text: str, output: Path | None) -> None:
    if output is None:
        say(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        with naming(output):
            output.write_text(text, encoding="utf-8")


def _keys(text: str) -> list[str]:
    return [key.strip() for key in text.split(",") if key.strip()]


def _where(pairs: list[str], option: str = "--where") -> dict[str, list[str]]:
    """`key=value,value ...` as a mapping."""
    out = {}
    for pair in pairs:
        key, equals, values = pair.partition("=")
        if not (key and equals and values):
            raise ValueError(f"{option} {pair}: write key=value" + ("" if option == "--baseline" else ", or key=value,value"))
        out[key] = _keys(values)
    return out


def _where_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--where", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="only runs with these settings (a,b: or)"
    )


def _output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, default="terminal")
    parser.add_argument("--output", type=Path, help="write to a file instead of standard output")
    parser.add_argument("--title", help="a heading")
    parser.add_argument("--command", dest="made_by", help="the command that makes the table, named below its title")


def _ansi(options: Options) -> bool:
    return options.output is None and sys.stdout.isatty()


def _table_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results_dir")
    parser.add_argument("--rows", type=_keys, default=[], metavar="KEYS", help="what goes down, such as pruner,allocator")
    parser.add_argument("--columns", type=_keys, default=[], metavar="KEYS", help="what goes across, such as model,sparsity")
    parser.add_argument(
        "--metric", type=_keys, default=[], metavar="NAMES", help="names or patterns, such as docs/ppl or '*/acc'"
    )
    parser.add_argument("--baseline", type=_keys, default=[], metavar="KEY=VALUE", help="changes against this row, in %%")
    _where_option(parser)
    _output_options(parser)
    parser.set_defaults(run=_table)


def _table(options: Options) -> int:
    from svnup.reports import pivot, tables
    from svnup.results import select

    where = _where(options.where)
    runs = select.newest(select.choose(select.runs_of(_rows(options.results_dir)), where))
    rows = [run.row for run in runs]
    if not (options.rows or options.columns):
        for name in ("metric", "baseline"):
            if getattr(options, name):
                raise ValueError(f"--{name}: goes with --rows and --columns, such as --rows pruner,allocator --columns model")
        text = tables.render(rows, options.format, options.title, options.made_by, _ansi(options))
    else:
        metrics = select.metrics_of(runs, options.metric)
        baseline = {key: values[0] for key, values in _where(options.baseline, "--baseline").items()}
        table = pivot.pivot(runs, options.rows, options.columns, metrics, where=where, baseline=baseline)
        text = pivot.grid(table, options.title, tables.about(rows, options.made_by)).render(options.format, _ansi(options))
    _write(text, options.output)
    return 0


def _list_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results_dir")
    parser.add_argument("--sort", metavar="COLUMN", help="a column, such as docs/ppl or seconds")
    _where_option(parser)
    _output_options(parser)
    parser.set_defaults(run=_list)


def _list(options: Options) -> int:
    from svnup.reports import tables
    from svnup.results import select

    runs = select.choose(select.runs_of(_rows(options.results_dir)), _where(options.where))
    grid = tables.listing([run.row for run in runs], options.sort)
    _write(grid.render(options.format, _ansi(options)), options.output)
    return 0


def _status_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results_dir")
    parser.set_defaults(run=_status)


def _status(options: Options) -> int:
    from svnup.reports.status import status

    if not Path(options.results_dir).is_dir():
        raise ValueError(f"{options.results_dir}: no such folder; name one with results")
    say(status(options.results_dir))
    return 0


def _show_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results_dir")
    parser.add_argument("id", help="the key of a run, or how it begins")
    parser.set_defaults(run=_show)


def _show(options: Options) -> int:
    from svnup import config
    from svnup.reports import runs

    say(runs.show(runs.find(_rows(options.results_dir), options.id), config.defaults()))
    return 0


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="a results folder, or a table (.md, .csv)")
    parser.add_argument("b", type=Path, help="another")
    parser.add_argument("--tolerance", type=float, default=0.01, help="relative difference that is none (default 0.01)")
    parser.set_defaults(run=_compare)


def _compare(options: Options) -> int:
    from svnup.results.compare import compare

    if not 0 <= options.tolerance < math.inf:
        raise ValueError(f"--tolerance {options.tolerance:g}: a relative difference; choose 0 or more, such as 0.01")
    found = compare(options.a, options.b, options.tolerance)
    say("".join(f"{line}\n" for line in [*found.different, f"{options.a}, {options.b}: {found.summary()}"]))
    return int(bool(found.different))


def _published_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results_dir")
    parser.add_argument("--table", default="llama_70", help="llama_70 (default), sparsities, zero_shot_70, nm, an ablation")
    parser.add_argument("--model", type=_keys, default=[], metavar="NAMES", help="other models than the table's, such as tiny")
    parser.add_argument("--metric", type=_keys, default=[], metavar="NAMES", help="other metrics than the table's")
    parser.add_argument("--headline", action="store_true", help="only the change of SparseGPT by SV-NUP, per model")
    _where_option(parser)
    _output_options(parser)
    parser.set_defaults(run=_published)


def _published(options: Options) -> int:
    from svnup.reports import published, tables

    if options.headline and options.table != "llama_70":
        raise ValueError(f"--table {options.table}: the headline is of llama_70; leave out --headline, or --table")
    table = published.Published.load(options.table, options.model, options.metric)
    if not Path(options.results_dir).is_dir():
        raise ValueError(
            f"{options.results_dir}: no such folder; name one with results, or an empty one for published numbers alone"
        )
    rows, where = load(options.results_dir), _where(options.where)
    ours = table.ours(rows, where)
    about = tables.about([run.row for run in ours.runs], options.made_by)
    parts = [] if options.headline else [published.side_by_side(table, ours, options.title, about)]
    if options.headline or (options.table == "llama_70" and options.format != "csv"):
        parts.append(published.headline(table, ours, options.title if options.headline else None))
    _write(render_all(parts, options.format, _ansi(options)), options.output)
    return 0


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results_dir")
    parser.add_argument("--format", choices=("csv", "jsonl"), default="csv")
    parser.add_argument("--output", type=Path, help="write to a file instead of standard output")
    _where_option(parser)
    parser.set_defaults(run=_export)


def _export(options: Options) -> int:
    from svnup.reports import runs
    from svnup.results import select

    chosen = [run.row for run in select.choose(select.runs_of(_rows(options.results_dir)), _where(options.where))]
    _write((csv_text if options.format == "csv" else runs.jsonl)(runs.records(chosen)), options.output)
    return 0


def _recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results_dir")
    parser.add_argument("id", help="the key of a run, or how it begins")
    parser.add_argument("--blocks", metavar="TARGET", help="what matches the names of the blocks, as llm-compressor has it")
    parser.add_argument("--output", type=Path, help="write to a file instead of standard output")
    parser.set_defaults(run=_recipe)


def _recipe(options: Options) -> int:
    from svnup.reports import recipe, runs

    row = runs.find(_rows(options.results_dir), options.id)
    _write(recipe.recipe(row, options.blocks or recipe.BLOCKS), options.output)
    return 0


def _rerun_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results_dir")
    parser.add_argument("id", nargs="?", help="the key of a run, or how it begins; alone: of one in the folder results")
    parser.add_argument("--results-dir", dest="folder", help=argparse.SUPPRESS)  # as it was written before
    parser.add_argument("--trust", action="store_true", help="run code from outside svnup that the result names, too")
    parser.add_argument("--into", help="where the repetition goes; by default beside the results: RESULTS_DIR-rerun")
    parser.set_defaults(run=_rerun)


def _rerun(options: Options) -> int:
    """0 where all numbers came out equal or within 1 %, else 1."""
    from svnup.reports import runs
    from svnup.rerun import rerun

    folder, key = options.results_dir, options.id
    if key is None:
        folder, key = options.folder or "results", options.results_dir
    place = Path(folder).resolve()
    row = runs.find(_rows(folder), key)
    try:
        repeated = rerun(row, options.into or place.with_name(f"{place.name}-rerun"), options.trust)
    except RuntimeError as error:
        print(f"svnup-results: {error}", file=sys.stderr)
        return 1
    _write(repeated.report(), None)
    return 0 if repeated.same else 1


def _wandb_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results_dir")
    parser.add_argument("--project", help="by default the one that the run was configured with, else svnup")
    parser.add_argument("--entity")
    parser.add_argument("--group", help="by default the sweep that the run belonged to")
    parser.add_argument("--mode", choices=("online", "offline"), help="by default as WANDB_MODE says")
    parser.add_argument("--force", action="store_true", help="upload also what has been, as new W&B runs")
    parser.set_defaults(run=_wandb)


def _wandb(options: Options) -> int:
    from svnup.reports import figures
    from svnup.reports.wandb import upload

    _rows(options.results_dir)
    given = {k: v for k in ("project", "entity", "group", "mode") if (v := getattr(options, k)) is not None}
    for folder in run_folders(options.results_dir):
        row = folder.read()
        if row is None:
            told = "passed over: its result.json cannot be read"
        elif row.status == "running":
            told = "passed over: it is running; upload it when it has ended"
        else:
            told = upload(folder.path, row, figures, options.force, **given)
        say(f"{folder.path.name if row is None else row.config_key}  {told}\n")
    return 0


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results_dir")
    parser.add_argument("--output", type=Path, help="by default report.html in the results folder")
    parser.set_defaults(run=_report)


def _report(options: Options) -> int:
    from svnup.reports.html import report
    from svnup.results import select

    runs = select.newest(select.runs_of(_rows(options.results_dir)))
    output = options.output or Path(options.results_dir) / "report.html"
    _write(report([run.row for run in runs]), output)
    say(f"{output}\n")
    return 0
