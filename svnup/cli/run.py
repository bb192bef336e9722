"""The `svnup` command: compose -> Job -> execute."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shlex
import sys
import traceback
import typing
from pathlib import Path
from typing import Any, TextIO

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.svnup_slurm import SlurmLauncher
from hydra_plugins.svnup_sweeper import Sweeper
from svnup import __version__, config, distributed
from svnup.cli import sweep as sweeps
from svnup.cli.outcome import end, outcome, tell
from svnup.cli.sweep import JobFailed
from svnup.execute import execute, print_plan
from svnup.interruption import Stopped, stoppable
from svnup.outside import is_ours, targets
from svnup.progress import close_output, open_streams, say, to_nobody
from svnup.results.provenance import Asked, python_path
from svnup.secrets import redact, redact_code

CONFIG_NAME = "config"
OF_SWEEPS = re.compile(r"[+~]*hydra([./]launcher|[./]sweeper|\.sweep\b|\.mode=)")  # overrides that a single job does not need
MULTIRUN = ("-m", "--multirun")


def main() -> int:
    """Run the command line; 0 when all went well, 2 for a user's mistake, 1 for a fault or a sweep in which a job failed, 130
    and 143 when it was interrupted (Ctrl-C, SIGTERM)."""
    open_streams()
    if "--version" in sys.argv[1:]:  # Hydra would say its own
        say(f"svnup {__version__}\n")
        return 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back as exceptions, and become one line here
    config.register()
    for plugin in (Sweeper, SlurmLauncher):  # which an editable installation keeps Hydra from finding
        Plugins.instance().register(plugin)
    with stoppable(), contextlib.redirect_stderr(typing.cast(TextIO, _Redacting(sys.stderr))):
        try:
            code = _run_in_step()
        except (KeyboardInterrupt, Stopped) as stop:
            code = _interrupted(stop)
        finally:
            with contextlib.suppress(OSError):
                config.KeepSecrets.redact()
    if (unsaid := close_output()) is not None:
        tell("svnup", unsaid)
        return code or 1
    return code


def _run_in_step() -> int:
    """Run the command line, together with the other processes of the job if there are some; the first one speaks for all."""
    try:
        with distributed.joined(), contextlib.ExitStack() as silence:
            if not distributed.is_first():
                nowhere = silence.enter_context(open(os.devnull, "w", encoding="utf-8"))
                silence.enter_context(contextlib.redirect_stdout(nowhere))
                silence.enter_context(contextlib.redirect_stderr(nowhere))
            try:
                return _compose_and_run()
            except (KeyboardInterrupt, Stopped) as stop:
                return _interrupted(stop)
            except Exception as error:  # a fault of the program, which ends in a traceback
                distributed.end(f"{type(error).__name__}: {error}", 1)
                raise
    except ValueError as error:  # of what torchrun should have said
        return end(str(error), 2)


def _interrupted(stop: KeyboardInterrupt | Stopped) -> int:
    way = "what is done is kept, and the same command goes on from there"
    return end(f"interrupted ({str(stop) or 'Ctrl-C'}); {way}", stop.code if isinstance(stop, Stopped) else 130)


class _Redacting:
    """A stream that takes secrets out of what others, such as Hydra, write there."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _compose_and_run() -> int:
    overrides = [a for a in sys.argv[1:] if not a.startswith("-")]
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda a: a not in MULTIRUN)  # Hydra knows -m before overrides or behind them
    program = ["python", "-m", "svnup"] if Path(sys.argv[0]).name == "__main__.py" else ["svnup"]
    if distributed.n_started() > 1:
        program = ["torchrun", f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', '1')}", "-m", "svnup"]
    codes: list[int] = []  # Hydra drops what a task returns
    texts: config.Texts = {}  # the jobs of a sweep read the same texts

    def task(cfg: Any) -> None:
        codes.append(_job(cfg, texts, program, overrides))

    try:
        with stoppable():
            config.check_choices(overrides)
            hydra.main(config_path=str(config.CONF), config_name=CONFIG_NAME, version_base="1.3")(task)()
    except JobFailed:
        return 1
    except BrokenPipeError:  # `svnup --help | head -1`
        to_nobody()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return end(config.explain(error, overrides, _own_folder()), 2)
    except OSError as error:
        if (told := outcome(error)) is None:
            raise
        return end(*told)
    return max(codes, default=0)


def _own_folder() -> str | None:
    """The folder of yaml files that `--config-dir` names."""
    flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flag.add_argument("--config-dir", "-cd")
    folder: str | None = flag.parse_known_args(sys.argv[1:])[0].config_dir
    return folder


def _job(cfg: Any, texts: config.Texts, program: list[str], given: list[str]) -> int:
    """One job of a sweep, or the only one; an error in a sweep is reported at once, since the sweep goes on."""
    hydra_cfg = HydraConfig.get()
    alone, sweep = hydra_cfg.mode != RunMode.MULTIRUN, None
    if not alone:
        config.KeepSecrets.redact()
        sweep = hydra_cfg.runtime.choices["experiment"] or _sweep_name(given)
    overrides = [redact_code(o) for o in hydra_cfg.overrides.task]
    try:
        with stoppable():  # also in the process of a launcher, which is not that of `main`
            number = None if alone else str(hydra_cfg.sweep.subdir)
            _run(cfg, texts, Asked(_command(cfg, program, hydra_cfg), overrides, sweep), number)
        return 0
    except Exception as error:
        told = outcome(error)
        message, code = told or (repr(error), 1)
        if told is not None:
            code = end(message, code)
        elif alone:
            raise
        else:
            sys.stderr.write(redact(traceback.format_exc()))
    # Outside the except block: Hydra keeps what is raised until the sweep ends, and a traceback would keep the model with it.
    if not alone:
        raise JobFailed(message)
    return code


def _command(cfg: Any, program: list[str], hydra_cfg: Any) -> str:
    """What to paste into a shell, in the same folder, to run this job alone, be it one of a sweep or not."""
    sources = {source.provider: source.path for source in hydra_cfg.runtime.config_sources}
    flags = {
        "--config-path": sources["main"] if Path(sources["main"]) != config.CONF else None,
        "--config-dir": sources.get("command-line"),
        "--config-name": hydra_cfg.job.config_name if hydra_cfg.job.config_name != CONFIG_NAME else None,
    }
    words = [word for name, value in flags.items() if value is not None for word in (name, value)]
    words += [redact_code(o) for o in hydra_cfg.overrides.hydra if not OF_SWEEPS.match(o)]
    if hydra_cfg.mode == RunMode.MULTIRUN and not any(o.startswith("hydra.mode=") for o in hydra_cfg.overrides.hydra):
        words.append("hydra.mode=RUN")  # as an experiment has it that sweeps
    path = python_path() if any(not is_ours(target) for target in targets(OmegaConf.to_container(cfg))) else None
    before = [f"PYTHONPATH={shlex.quote(path)}"] if path else []
    given = [redact_code(o) for o in hydra_cfg.overrides.task]
    return " ".join([*before, *map(shlex.quote, [*program, *words, *given])])


def _sweep_name(overrides: list[str]) -> str:
    """The display name of a sweep without an experiment: what it sweeps, in at most 120 characters, and a digest."""
    digest = hashlib.sha256(" ".join(overrides).encode()).hexdigest()[:6]
    return f"{' '.join(o for o in overrides if ',' in o)[:112]} {digest}".strip()


def _run(cfg: Any, texts: config.Texts, asked: Asked, number: str | None) -> None:
    """Build a job and run it; `number` is its own in a sweep."""
    job = config.build(cfg, texts)
    if number is not None and (told := sweeps.header(job.results_dir, number, job.key)) is not None:
        say(f"{told}\n")
    if job.dry_run:
        job.check_shapes()
        job.check_texts()
        if distributed.is_first():
            print_plan(job)
        return
    from svnup.reports import figures

    execute(job, asked, figures)
