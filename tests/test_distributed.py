"""Several processes of one job: what they share out makes what one process makes.

Two threads that meet where processes do stand for most of them; real ones, by torchrun, are few, since each imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import HERE, SMALL, command
from games import Given
from models import family_model, random_model
from test_experts import make

from svnup import config, distributed
from svnup.allocation import Budget
from svnup.allocation.splits import ErrorSplit, UniformSplit
from svnup.allocation.trial import Trial
from svnup.game import LayerGame
from svnup.model import language_model
from svnup.plan import plan
from svnup.pruning import prune_model
from svnup.pruning.dsnot import DSnoT
from svnup.pruning.magnitude import Magnitude
from svnup.pruning.reconstruct import Reconstruct
from svnup.pruning.refit import Refit
from svnup.pruning.ria import RIA
from svnup.pruning.sparsegpt import SparseGPT
from svnup.pruning.walk import adds_up
from svnup.pruning.wanda import Wanda
from svnup.shapley import all_coalitions
from svnup.types import SparsityProfile

ROOT = Path(__file__).parents[1]
TEXT = np.random.default_rng(3).integers(3, 97, size=(7, 24))
N = 2
PRUNERS = [Wanda(), RIA(), SparseGPT(), DSnoT(Wanda()), Refit(Magnitude())]


@pytest.fixture
def together(monkeypatch):
    """Runs a function of the number of a process in N threads that meet as processes do; returns what each returns."""
    barrier, here, box = threading.Barrier(N, timeout=60), threading.local(), [None] * N

    def gathered(value):
        if distributed.n_processes() == 1:
            return [value]
        box[here.number] = value
        barrier.wait()
        out = list(box)
        barrier.wait()
        return out

    def from_first(make):
        if distributed.n_processes() == 1:
            return make()
        made = None
        if here.number == 0:
            with distributed.alone():
                made = make()
        return gathered(made)[0]

    def added(tensor):
        return tensor.copy_(sum(gathered(tensor.clone()))) if distributed.n_processes() > 1 else tensor

    def as_first(tensor):
        return tensor.copy_(gathered(tensor.clone())[0]) if distributed.n_processes() > 1 else tensor

    def run(work):
        def one(number):
            here.number = number
            try:
                return work(number)
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(N) as pool:
            return list(pool.map(one, range(N)))

    monkeypatch.setattr(distributed, "n_processes", lambda: 1 if distributed._alone.get() or not hasattr(here, "number") else N)
    monkeypatch.setattr(distributed, "rank", lambda: getattr(here, "number", 0))
    stands_in = {"gathered": gathered, "from_first": from_first, "added": added, "as_first": as_first}
    for name, stand_in in stands_in.items():
        monkeypatch.setattr(distributed, name, stand_in)
    return run


def weights(lm):
    return torch.cat([p.detach().flatten() for i in range(lm.n_blocks) for p in lm.linear_parameters(i).values()])


def pruned(lm, pruner, recovery=None, text=TEXT):
    report = prune_model(lm, Budget(lm.block_params, 0.5, "unstructured").uniform(), pruner, text, recovery)
    return weights(lm), report


# -- statistics


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: type(p).__name__)
def test_a_model_is_pruned_by_statistics_of_all_its_processes(together, pruner):
    assert adds_up(pruner)
    whole, _ = pruned(family_model("llama"), pruner)
    models = [family_model("llama") for _ in range(N)]
    (first, report), (second, _) = together(lambda number: pruned(models[number], pruner))
    assert torch.equal(first, second), "the same bits in each process"
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert ((first == 0) != (whole == 0)).float().mean() < 2e-3, "sums in another order"
    alike, close = (first == 0) == (whole == 0), {"rtol": 0, "atol": 5e-3 * float(whole.abs().max())}
    assert torch.allclose(first[alike], whole[alike], **close)
    half, _ = pruned(family_model("llama"), pruner, text=TEXT[:4])
    assert not torch.allclose(half, whole, **close), "a share alone would tell"


@pytest.mark.parametrize("family", ["mixtral", "jetmoe"])
@pytest.mark.parametrize("text", [TEXT, TEXT[:2, :8]], ids=["enough tokens", "too few"])
def test_experts_are_pruned_by_what_all_processes_route_to_them(together, family, text):
    whole, of_whole = pruned(make(family), Wanda(), text=text)
    models = [make(family) for _ in range(N)]
    (first, report), (second, _) = together(lambda number: pruned(models[number], Wanda(), text=text))
    assert torch.equal(first, second)
    assert ((first == 0) != (whole == 0)).float().mean() < 1e-3
    assert [one.fallback for one in report.per_linear] == [one.fallback for one in of_whole.per_linear]


@pytest.mark.parametrize(
    ("pruner", "recovery", "text"),
    [
        (Wanda(), Reconstruct(epochs=1), TEXT),
        (Wanda(), None, TEXT[:1]),
        (Magnitude(), None, TEXT),
    ],
    ids=["recovery", "one sequence", "no inputs"],
)
def test_what_is_not_shared_out_each_process_does(together, pruner, recovery, text):
    whole, _ = pruned(family_model("opt"), pruner, recovery, text)
    models = [family_model("opt") for _ in range(N)]
    for found, _ in together(lambda number: pruned(models[number], pruner, recovery, text)):
        assert torch.equal(found, whole)


def test_what_processes_train_each_in_its_own_way_is_what_the_first_has_trained(together, monkeypatch):
    plain = Reconstruct.beside

    def trained_otherwise(recovery, lm, tokens):
        refits = plain(recovery, lm, tokens)
        refit = refits.refit

        def one(visit):
            out = refit(visit)
            for p in lm.linear_parameters(visit.index).values():
                p.data *= 1 + 0.01 * distributed.rank()
            return out

        monkeypatch.setattr(refits, "refit", one)
        return refits

    monkeypatch.setattr(Reconstruct, "beside", trained_otherwise)
    whole, _ = pruned(family_model("llama"), Wanda(), Reconstruct(epochs=1))
    models = [family_model("llama") for _ in range(N)]
    for found, _ in together(lambda number: pruned(models[number], Wanda(), Reconstruct(epochs=1))):
        assert torch.equal(found, whole)


def test_errors_divide_a_budget_alike_in_all_processes(together):
    models = [family_model("llama") for _ in range(N)]
    budget = Budget(models[0].block_params, 0.5, "unstructured").uniform()
    first, second = together(lambda number: ErrorSplit().divide(models[number], budget, Wanda(), TEXT))
    assert first.to_dict() == second.to_dict()


def test_a_pruner_whose_statistics_do_not_add_up_reads_all(together):
    class Plain(Wanda):
        def new_stats(self, weight):
            return type("Stats", (), {"squares": torch.zeros(weight.shape[1])})()

        def observe(self, stats, x):
            stats.squares = stats.squares + x.float().square().sum(0)

    assert not adds_up(Plain())
    assert not adds_up(DSnoT(Plain()))
    whole, _ = pruned(family_model("llama"), Plain())
    models = [family_model("llama") for _ in range(N)]
    assert all(torch.equal(found, whole) for found, _ in together(lambda number: pruned(models[number], Plain())))


# -- losses and games


@pytest.mark.parametrize("n_windows", [1, 5, 11])
def test_losses_of_windows_are_those_of_one_process(together, monkeypatch, n_windows):
    monkeypatch.setitem(language_model.BATCH_TOKENS, "cpu", 48)
    text, models = np.random.default_rng(n_windows).integers(3, 97, size=(n_windows, 24)), []
    expected = family_model("llama").nll(text)
    models += [family_model("llama") for _ in range(N)]
    runs = [[], []]
    for lm, of_one in zip(models, runs, strict=True):
        lm.blocks[0].mlp.register_forward_hook(lambda m, args, out, of_one=of_one: of_one.append(len(args[0])))
    assert all(np.array_equal(found, expected) for found in together(lambda number: models[number].nll(text)))
    assert n_windows == 1 or all(sum(of_one[-2:]) < n_windows for of_one in runs)


@pytest.mark.parametrize("cached", [True, False])
def test_a_game_is_shared_out(together, tmp_path, cached):
    one, coalitions = LayerGame(family_model("llama"), TEXT[:2]), all_coalitions(4)
    expected, empty = one(coalitions), one.v_empty
    cache = tmp_path if cached else None
    games = [LayerGame(family_model("llama"), TEXT[:2], cache_dir=cache) for _ in range(N)]
    found = together(lambda number: (games[number](coalitions), games[number].v_empty))
    assert all(np.array_equal(values, expected) and v_empty == empty for values, v_empty in found)
    assert [game.n_evaluations for game in games] == [16, 16], "each coalition once, by one of them"
    assert games[0].n_block_forwards == games[1].n_block_forwards >= one.n_block_forwards
    again = together(lambda number: games[number](coalitions[::3]))
    assert all(np.array_equal(values, expected[::3]) for values in again)
    assert [game.n_evaluations for game in games] == [16, 16]


@pytest.mark.parametrize("in_advance", [False, True])
def test_trials_are_shared_out(together, tmp_path, in_advance):
    text = np.random.default_rng(2).integers(5, 2048, size=(3, 24))

    def trial_of(folder):
        return Trial(random_model(3), Wanda(), UniformSplit(), text, Given(text), folder)

    rows = np.random.default_rng(0).uniform(0.2, 0.8, size=(5, 3))
    params = random_model(3).block_params
    tried = [(str(i), SparsityProfile(row, params, float(np.average(row, weights=params)))) for i, row in enumerate(rows)]
    one = trial_of(tmp_path / "one")
    expected = one.losses(tried, in_advance=in_advance)
    trials = [trial_of(tmp_path / "two") for _ in range(N)]
    assert together(lambda number: trials[number].losses(tried, in_advance=in_advance)) == [expected] * N
    reports = [trial.to_dict() for trial in (one, *trials)]
    assert [report["n_new_evaluations"] for report in reports] == [5, 5, 5]
    assert [report["n_selection_block_forwards"] for report in reports[1:]] == [
        15 if in_advance else pytest.approx(15, abs=3)
    ] * 2


# -- shares and mistakes


@pytest.mark.parametrize(("n", "parts"), [(0, [[], []]), (1, [[0], []]), (5, [[0, 1, 2], [3, 4]])])
def test_shares_are_neighbours_and_all_there_is(together, n, parts):
    assert together(lambda number: list(range(n)[distributed.share(n)])) == parts


def test_one_process_meets_nobody_and_imports_nothing():
    assert distributed.n_processes() == 1
    assert distributed.share(7) == slice(0, 7)
    assert distributed.gathered([1]) == [[1]]
    assert distributed.from_first(lambda: 3) == 3
    assert distributed.end("a reason", 2) == ("a reason", 2)
    code = "import sys, svnup.cli.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["offload=disk", "model=tiny"], "offload=disk: keeps the blocks of one process, not of 2"),
        (["model=tiny", "model.device_map=auto"], "model.device_map=auto: spreads one model over all GPUs"),
    ],
)
def test_what_several_processes_cannot_have_is_refused(monkeypatch, args, told):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=re.escape(told)):
        config.build(config.composed(*SMALL[5:], *HERE, "allocator=uniform", *args))


def test_several_processes_are_started_by_torchrun_and_for_one_job(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = command(*SMALL)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert done.err.startswith("svnup: WORLD_SIZE=2: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set")
    monkeypatch.setattr(distributed, "joined", contextlib.nullcontext)
    done = command("-m", *SMALL, "seed=0,1")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "the 2 processes of torchrun share one job; start the sweep without torchrun" in done.err


def test_the_plan_is_that_of_a_share(monkeypatch):
    job = config.build(config.composed(*SMALL, "allocator=shapley", "shapley=exact", "pruner=wanda"))
    one = plan(job)
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = plan(job, one.machine)
    steps = [{stage.name: stage.steps for stage in made.stages}["pruning"] for made in (one, two)]
    assert steps[1]["passes"].flop == steps[0]["passes"].flop / 2
    assert steps[1]["statistics"].moved == pytest.approx(steps[0]["statistics"].moved / 2)
    assert steps[1]["selection and update"] == steps[0]["selection and update"]
    assert (one.counts["shapley evaluations"], two.counts["shapley evaluations"]) == (8, 4)
    assert two.processes == 2


# -- real processes


def torchrun(*args, timeout=240):
    """N processes on this machine by torchrun; returns its exit code, standard output and standard error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={N}"]
    done = subprocess.run(
        [*launcher, *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_two_processes_meet(tmp_path):
    script = tmp_path / "meet.py"
    script.write_text(
        "import numpy as np, torch\n"
        "from svnup import distributed\n"
        "with distributed.joined():\n"
        "    number = distributed.rank()\n"
        "    total = distributed.added(torch.full((3,), 1.5 + number))\n"
        "    assert distributed.gathered({number: 'x'}) == [{0: 'x'}, {1: 'x'}]\n"
        "    assert distributed.from_first(lambda: distributed.share(9)) == slice(0, 9)\n"
        "    assert distributed.total(np.ones(2)).tolist() == [2.0, 2.0]\n"
        "    if distributed.is_first():\n"
        "        print(total.tolist(), distributed.share(3))\n"
    )
    code, out, err = torchrun(str(script))
    assert code == 0, err
    assert out == "[4.0, 4.0, 4.0] slice(0, 2, None)\n"


JOB = [*SMALL, "model.seq_len=128", "dataset.n_seq=5", "evaluation.n_seq=40", "allocator=shapley", "shapley=exact"]


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_a_job_of_two_processes_is_that_of_one(tmp_path, pruner):
    job = [*JOB, f"pruner={pruner}"]
    rows = []
    for name in ("one", "two"):
        folders = [f"results_dir={tmp_path / name}", f"cache_dir={tmp_path / name / 'cache'}"]
        if name == "one":
            assert command(*job, *folders).code == 0
        else:
            code, out, err = torchrun("-m", "svnup", *job, *folders)
            assert code == 0, err
            assert out.count("docs/ppl") == 1, "one of them tells"
        (result,) = (tmp_path / name / "runs").glob("*/result.json")
        rows.append(json.loads(result.read_text("utf-8")))
    one, two = rows
    assert [row["provenance"].get("processes", 1) for row in rows] == [1, 2]
    assert two["dense"]["docs/ppl"]["window_nll"] == one["dense"]["docs/ppl"]["window_nll"], "bit by bit"
    assert two["shapley"]["values"] == one["shapley"]["values"]
    assert two["shapley"]["n_new_evaluations"] == one["shapley"]["n_new_evaluations"] == 8
    losses = [row["metrics"]["docs/ppl"]["window_nll"] for row in rows]
    assert np.allclose(*losses, rtol=1e-5, atol=0)
    zeros = [[linear["n_zeros"] for linear in row["pruning"]["per_linear"]] for row in rows]
    assert zeros[0] == zeros[1]
    lines = [line for path in (tmp_path / "two" / "cache" / "games").glob("*/*.jsonl") for line in path.open()]
    assert len({json.loads(line)["coalition"] for line in lines}) == len(lines) == 8


BREAKS = """
import os, signal, sys
from svnup.cli.run import main
from svnup.model.language_model import LanguageModel

def breaks(self, tokens):
    {what}

if os.environ["RANK"] == "1":
    LanguageModel._nll = breaks
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "status", "told"),
    [
        ("raise ValueError('dataset.n_seq=5: broken on purpose; mend it')", 2, "failed", "dataset.n_seq=5: broken on purpose"),
        ("raise RuntimeError('a fault of the program')", 1, "failed", "RuntimeError: a fault of the program"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "interrupted", "interrupted (SIGTERM)"),
    ],
    ids=["mistake", "fault", "SIGTERM"],
)
def test_what_ends_one_process_ends_all_with_one_line(tmp_path, what, code, status, told):
    script = tmp_path / "breaks.py"
    script.write_text(BREAKS.format(what=what))
    folders = [f"results_dir={tmp_path / 'results'}", f"cache_dir={tmp_path / 'cache'}"]
    ended, _, err = torchrun(str(script), *JOB, *folders)
    assert ended == 1, "torchrun's own"
    assert [line.partition("svnup: ")[2][: len(told)] for line in err.splitlines() if line.startswith("svnup: ")] == [told]
    assert re.findall(r"exitcode *: (-?\d+)", err).count(str(code)) == N, err
    (result,) = (tmp_path / "results" / "runs").glob("*/result.json")
    row = json.loads(result.read_text("utf-8"))
    assert row["status"] == status
    assert told in row["error"]
