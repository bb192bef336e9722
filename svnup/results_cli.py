"""The `svnup-results` command: one function per subcommand, from parsed options to an exit code."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from svnup.results import load, run_folders
from svnup.types import ResultRow


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; a ValueError is the user's mistake: one line, exit code 2."""
    parser = argparse.ArgumentParser(prog="svnup-results", description="What to do with finished svnup runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _table_options(commands.add_parser("table", help="render the runs that lie in a results folder"))
    _rerun_options(commands.add_parser("rerun", help="repeat a run from its result, and compare the numbers"))
    _wandb_options(commands.add_parser("wandb", help="upload finished runs to W&B, each once"))
    options = parser.parse_args(argv)
    try:
        code: int = options.run(options)
        return code
    except ValueError as error:
        print(f"svnup-results: {error}", file=sys.stderr)
        return 2


def _rows(results_dir: str) -> list[ResultRow]:
    """The runs below a folder; raises ValueError where there are none."""
    if rows := load(results_dir):
        return rows
    raise ValueError(f"{results_dir}: no result.json below this folder; run svnup first, or name another")


def _write(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


def _table_options(parser: argparse.ArgumentParser) -> None:
    from svnup.tables import FORMATS

    parser.add_argument("results_dir")
    parser.add_argument("--format", choices=FORMATS, default="terminal")
    parser.add_argument("--output", type=Path, help="write the table to a file instead of standard output")
    parser.add_argument("--title", help="a heading above a Markdown table")
    parser.add_argument("--command", dest="made_by", help="the command that makes the table, named below its title")
    parser.set_defaults(run=_table)


def _table(options: argparse.Namespace) -> int:
    from svnup.tables import render

    _write(render(_rows(options.results_dir), options.format, title=options.title, command=options.made_by), options.output)
    return 0


def _rerun_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", help="the key of a run, or its beginning")
    parser.add_argument("--results-dir", default="results")
    parser.add_argument("--into", help="where the repetition goes; by default beside the results: RESULTS_DIR-rerun")
    parser.set_defaults(run=_rerun)


def _rerun(options: argparse.Namespace) -> int:
    """0 where all numbers came out equal or within 1 %, else 1."""
    from svnup.rerun import find, rerun

    place = Path(options.results_dir).resolve()
    row = find(place, options.key)
    try:
        repeated = rerun(row, options.into or place.with_name(f"{place.name}-rerun"))
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


def _wandb(options: argparse.Namespace) -> int:
    from svnup import plots
    from svnup.tracking import upload

    _rows(options.results_dir)
    given = {k: v for k in ("project", "entity", "group", "mode") if (v := getattr(options, k)) is not None}
    for folder in run_folders(options.results_dir):
        row = folder.read()
        if row is not None and row.status == "finished":
            print(f"{row.config_key}  {upload(folder.path, row, plots.figures, options.force, **given)}")
    return 0
