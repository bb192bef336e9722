"""The `svnup-results` command: one function per subcommand, from parsed options to an exit code."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from svnup.results import load
from svnup.types import ResultRow


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; a ValueError is the user's mistake: one line, exit code 2."""
    parser = argparse.ArgumentParser(prog="svnup-results", description="What to do with finished svnup runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _table_options(commands.add_parser("table", help="render the runs that lie in a results folder"))
    _report_options(commands.add_parser("report", help="write one HTML page about the runs that lie in a results folder"))
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


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results_dir")
    parser.add_argument("--output", type=Path, help="by default report.html in the results folder")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from svnup.report import report

    output = options.output or Path(options.results_dir) / "report.html"
    _write(report(_rows(options.results_dir)), output)
    print(output)
    return 0
