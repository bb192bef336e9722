"""What goes wrong around a job: disks, limits, signals, other processes, damaged files. It ends in a line, nothing finished is
lost, and the next run completes."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import SMALL_W2

from svnup import claims, files, pipeline
from svnup.allocation import Budget
from svnup.allocation.maps import FromFile
from svnup.claims import claimed, holder
from svnup.evaluation import protocol
from svnup.files import alive, fault, replacing, sealed, unfinished, unsealed, write_text
from svnup.memo import Memo
from svnup.model.checkpoint import Checkpoint, in_place, read_tensors, save_tensors, write_bitmask
from svnup.pruning import apply_masks, save_masks
from svnup.results.store import CLAIM, MOVES, RunFolder, load
from svnup.types import Metric, Metrics

JOB = ["allocator=uniform", "pruner=magnitude"]


@pytest.fixture
def run_folder():
    def one():
        (path,) = Path("results/runs").iterdir()
        return RunFolder(path)

    return one


# -- files


def test_a_file_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def break_off():
        with replacing(path) as partial:
            partial.write_text("ne")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as caught:
        break_off()
    assert caught.value.filename == str(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]


def test_what_dead_processes_left_is_cleared_and_nothing_else(tmp_path, nobody):
    mine = unfinished(tmp_path / "model").name.rpartition(".")[0]
    left = [f"{mine}.{nobody}", f".model.elsewhere.{nobody}", f"{mine}.{os.getppid()}", ".modeler.x.1", "model", f"{mine}.old"]
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    assert unfinished(tmp_path / "model").parent == tmp_path
    assert {p.name for p in tmp_path.iterdir()} == set(left[1:])
    assert (alive(nobody), alive(os.getpid()), alive(1)) == (False, True, True)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), ["/x/y: No space left", "make room"]),
        (OSError(errno.EFBIG, "File too large", b"/x/y"), ["/x/y", "ulimit -f"]),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 999), ["nnn...", "shorter"]),
        (OSError(errno.EMFILE, "Too many open files"), ["ulimit -n"]),
        (OSError("no number"), None),
        (KeyError("x"), None),
    ],
)
def test_an_error_of_the_system_is_a_line_with_the_way_out(error, words):
    told = fault(error)
    assert told is None if words is None else all(word in told for word in words)
    assert told is None or len(told) < 400


def test_what_a_library_says_of_the_system_is_told_alike(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, files.naming(tmp_path / "x"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "x"))


# -- checksums


def flipped(data: bytes, draw: random.Random) -> bytes:
    where = draw.randrange(len(data))
    return data[:where] + bytes([data[where] ^ 1 << draw.randrange(8)]) + data[where + 1 :]


def test_a_seal_sees_every_change_and_lets_older_files_pass():
    data = {"sparsity": [0.5, 0.7], "name": "ü", "n": 3}
    text, draw = json.dumps(sealed(data)), random.Random(0)
    assert unsealed(json.loads(text)) == data == unsealed(data)
    silent = 0
    for _ in range(300):
        try:
            silent += unsealed(json.loads(flipped(text.encode(), draw))) != data
        except ValueError:
            continue
    assert silent <= 12, "only where the flip is in the word sha256 itself, and then the rest is as it was"


def test_no_damaged_tensor_is_read_in_silence(tmp_path):
    """Of masks, blocks of offloaded models and bitmask checkpoints."""
    generator, draw = torch.Generator().manual_seed(0), random.Random(1)
    weights = torch.randn(16, 24, generator=generator)
    weights[weights.abs() < 0.8] = 0
    tensors = {"a.weight": weights, "b": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(5)}
    (tmp_path / "c").mkdir()
    write_bitmask(tmp_path / "c", [tensors], {"a.weight"})
    save_tensors(tensors, tmp_path / "t")
    told = []
    for file in (tmp_path / "t", *(tmp_path / "c").iterdir()):
        whole = file.read_bytes()
        for _ in range(80):
            file.write_bytes(flipped(whole, draw))
            try:
                found = read_tensors(file) if file.name == "t" else Checkpoint(tmp_path / "c").read(tensors)
            except ValueError as error:
                told.append(str(tmp_path) in str(error))
                continue
            assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        file.write_bytes(whole)
    assert len(told) > 150
    assert all(told)
    assert torch.equal(Checkpoint(tmp_path / "c").read(["a.weight"])["a.weight"], weights)


def test_files_without_checksums_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "x")
    assert torch.equal(read_tensors(tmp_path / "x")["x"], torch.ones(2))


def test_damaged_masks_change_no_model(tmp_path, random_model):
    lm, draw = random_model(2), random.Random(2)
    with torch.no_grad():
        lm.blocks[0].mlp.up_proj.weight[:, ::2] = 0
    save_masks(lm, tmp_path / "masks")
    whole, before = (tmp_path / "masks").read_bytes(), lm.fingerprint()
    for _ in range(40):
        (tmp_path / "masks").write_bytes(flipped(whole, draw))
        with contextlib.suppress(ValueError):
            apply_masks(lm, tmp_path / "masks")
        assert lm.fingerprint() == before


def test_a_damaged_profile_is_refused_by_its_key(tmp_path):
    path = tmp_path / "profile.json"
    data = {"sparsity": [0.5, 0.7], "params": [4, 4], "target": 0.6, "pattern": "unstructured"}
    path.write_text(json.dumps(sealed(data)))
    FromFile(str(path)).check(Budget(np.array([4, 4]), 0.6))
    path.write_text(path.read_text().replace("[0.5, 0.7]", "[0.7, 0.5]"))
    with pytest.raises(ValueError, match=r"path=.*profile.json: .*checksum"):
        FromFile(str(path)).check(Budget(np.array([4, 4]), 0.6))


def test_a_damaged_dense_number_is_set_aside_and_measured_again(tmp_path, caplog):
    class Model:
        device = torch.device("cpu")

        def fingerprint(self):
            return "f"

    calls = []

    def measure(_):
        calls.append(1)
        return Metrics({"docs/ppl": Metric(12.5, {"n_windows": 3, "seq_len": 8, "role": "test"})})

    def ask():
        return protocol.measured_once(Model(), {}, tmp_path, measure, protocol.unchecked)["docs/ppl"].value

    assert (ask(), ask(), len(calls)) == (12.5, 12.5, 1)
    (path,) = (tmp_path / "dense").iterdir()
    whole, draw = path.read_bytes(), random.Random(3)
    for _ in range(120):
        path.write_bytes(damaged := flipped(whole, draw))
        caplog.clear()
        assert ask() == 12.5
        assert path.read_bytes() in (whole, damaged)
        assert (path.read_bytes() == whole) == (str(path) in caplog.text)
    assert len(calls) > 100
    path.write_text(json.dumps({"docs/ppl": {"value": 7.0, "protocol": {}}}))
    assert ask() == 7.0, "a file of an earlier version"


def test_a_torn_line_of_a_full_disk_costs_one_value(tmp_path, monkeypatch):
    memo = Memo(tmp_path, "cpu")
    memo.add("01", 1.0)

    class Full:
        name, written = str(tmp_path / "x.jsonl"), b""

        def write(self, data):
            if self.written:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.written = bytes(data[:9])
            memo_file.write(self.written)
            return 9

    memo_file, memo._file = memo._file, Full()
    with pytest.raises(OSError, match="No space left") as caught:
        memo.add("10", 2.0)
    assert caught.value.filename.endswith("x.jsonl")
    assert Memo(tmp_path, "cpu").values == {"01": 1.0}
    again = Memo(tmp_path, "cpu")
    again.add("10", 2.0)
    assert Memo(tmp_path, "cpu").values == {"01": 1.0, "10": 2.0}


def test_a_folder_where_a_file_belongs_is_set_aside(tmp_path, caplog):
    path = tmp_path / "numbers.json"
    for content in ("first", "second"):
        path.unlink(missing_ok=True)
        path.mkdir()
        (path / "inside").write_text(content)
        write_text(path, "whole")
        assert path.read_text() == "whole"
        assert (tmp_path / "numbers.json.damaged" / "inside").read_text() == content
    assert caplog.text.count("a folder where a file belongs") == 2


def test_a_file_of_values_that_cannot_be_read_is_passed_over(tmp_path, caplog):
    Memo(tmp_path, "cpu").add("01", 1.0)
    (tmp_path / "dangling.jsonl").symlink_to("nowhere")
    (tmp_path / "folder.jsonl").mkdir()
    assert Memo(tmp_path, "cpu").values == {"01": 1.0}
    assert [name in caplog.text for name in ("dangling.jsonl", "folder.jsonl")] == [True, True]


def test_a_changed_result_is_none_and_its_job_runs_again(svnup, run_folder):
    assert svnup(*JOB)[0] == 0
    folder = run_folder()
    file, row = folder.path / "result.json", folder.read()
    whole = file.read_text()
    value = str(row.metrics["docs/ppl"].value)
    assert whole.count(value) == 1
    file.write_text(whole.replace(value, "1.5"))
    assert folder.read() is None
    code, out, _ = svnup(*JOB)
    assert (code, "it is kept as result.json.damaged" in out) == (0, True)
    assert folder.read().metrics == row.metrics
    assert "1.5" in (folder.path / "result.json.damaged").read_text()


# -- several processes


def test_a_claim_is_one_processs_at_a_time(tmp_path):
    inside, most, waited = [0], [0], []

    def work():
        with claimed(tmp_path / "claim", lambda: waited.append(holder(tmp_path / "claim"))):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.3)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert any(who and str(os.getpid()) in who for who in waited)
    assert list(tmp_path.iterdir()) == []


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path):
    code = (
        "import os, sys, pathlib; from svnup.claims import claimed; p = pathlib.Path(sys.argv[1])\nwith claimed(p): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "claim")], check=False).returncode == 9
    assert (tmp_path / "claim").is_file()
    assert holder(tmp_path / "claim") is None
    start = time.monotonic()
    with claimed(tmp_path / "claim"):
        assert time.monotonic() - start < 20


def test_a_claim_in_which_nobody_is_named_is_nobodys(tmp_path):
    """Its process was killed between making the file and writing its name."""
    (tmp_path / "claim").touch()
    os.utime(tmp_path / "claim", (1, 1))
    with claimed(tmp_path / "claim"):
        assert (tmp_path / "claim").stat().st_size
    assert list(tmp_path.iterdir()) == []


def test_a_claim_of_another_host_is_dead_when_it_is_not_touched(tmp_path, nobody):
    place = tmp_path / "claim"
    assert claims.is_dead(place, "elsewhere", 1)
    place.touch()
    assert not claims.is_dead(place, "elsewhere", 1)
    os.utime(place, (1, 1))
    assert claims.is_dead(place, "elsewhere", 1)
    here = claims.socket.gethostname()
    assert [claims.is_dead(place, here, pid) for pid in (os.getpid(), nobody, -1)] == [False, True, True]


def test_many_savers_of_one_model_leave_a_whole_one(tmp_path):
    errors = []

    def fill(name):
        def write(folder):
            for part in ("a", "b", "c"):
                (folder / part).write_text(name)
                time.sleep(0.01)

        return write

    def save(name):
        try:
            for _ in range(5):
                in_place(tmp_path / "model", fill(name))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(f"{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert len({p.read_text() for p in (tmp_path / "model").iterdir()}) == 1


def test_a_second_process_with_the_same_job_uses_the_result_of_the_first(svnup, run_folder, monkeypatch):
    """It comes while the first is running, and computes nothing."""
    assert svnup(*JOB)[0] == 0
    folder = run_folder()
    row = folder.read()
    (folder.path / "result.json").unlink()
    asked = []

    @contextlib.contextmanager
    def busy(self, waiting):
        waiting("process 7 of elsewhere")
        folder.write(row)
        asked.append(self.path)
        yield

    monkeypatch.setattr(RunFolder, "claimed", busy)
    monkeypatch.setattr(pipeline, "run", None)
    code, out, _ = svnup(*JOB)
    assert (code, len(asked)) == (0, 1)
    assert "is computed by process 7 of elsewhere: this process waits for it" in out
    assert "already finished" in out


# -- interruptions


@pytest.mark.parametrize("after", [AttributeError("half done"), ValueError("half done"), None], ids=repr)
def test_an_interruption_is_one_whatever_interrupted_code_makes_of_it(after, svnup, monkeypatch):
    def main(**_):
        def interrupted():
            try:
                signal.raise_signal(signal.SIGTERM)
            except BaseException:
                if after is not None:
                    raise after from None

        return lambda task: interrupted

    monkeypatch.setattr("svnup.cli.run.hydra.main", main)
    code, _, err = svnup()
    assert (code, err.count("\n")) == (143, 1)
    assert "svnup: interrupted (SIGTERM); what is done is kept" in err


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["alone", "sweep"])
def test_an_interrupted_run_says_so_and_the_next_completes(number, code, word, sweep, svnup, run_folder, monkeypatch):
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs in the background ignore it
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "prune_model", lambda *_: os.kill(os.getpid(), number) or time.sleep(5))
        patch.setattr(signal, "getsignal", signal.getsignal)
        before = signal.getsignal(signal.SIGTERM)
        ended, _, err = svnup(*JOB, *sweep)
        assert ended == code
        assert f"svnup: interrupted ({word}); what is done is kept" in err
        assert "Traceback" not in err
        assert signal.getsignal(signal.SIGTERM) == before
    signal.signal(signal.SIGINT, own)
    row = run_folder().read()
    assert (row.status, row.process, row.metrics) == ("interrupted", None, {})
    assert not (run_folder().path / CLAIM).exists()
    ended, _, err = svnup(*JOB)
    assert (ended, run_folder().read().status) == (0, "finished")


def test_a_run_whose_process_died_is_shown_as_dead(svnup, run_folder, nobody, capsys):
    from svnup.cli.results import main

    assert svnup(*JOB)[0] == 0
    folder = run_folder()
    data = unsealed(json.loads((folder.path / "result.json").read_text()))
    host = claims.socket.gethostname()
    for pid, status in ((os.getpid(), "running"), (nobody, "dead")):
        process = {"host": host, "pid": pid}
        (folder.path / "result.json").write_text(json.dumps(data | {"status": "running", "process": process, "metrics": {}}))
        (folder.path / CLAIM).touch()
        os.utime(folder.path / CLAIM, (1, 1))
        assert folder.read().status == status
        assert main(["list", "results"]) == 0
        assert status in capsys.readouterr().out
    for command in (["table", "results"], ["report", "results"], ["show", "results", data["config_key"]]):
        assert main(command) == 0
        assert "dead" in capsys.readouterr().out + Path("results/report.html").read_text() if command[0] == "report" else True
    assert [row.status for row in load("results")] == ["dead"]
    code, _, _ = svnup(*JOB)
    assert (code, folder.read().status) == (0, "finished")


# -- results that stand until there is another


def test_force_keeps_what_there_was_until_there_is_another(svnup, run_folder, monkeypatch):
    job = [*JOB, "save_model=true", "save_masks=true"]
    assert svnup(*job)[0] == 0
    folder = run_folder()

    def state():
        kept = ("result.json", "profile.json", "masks.safetensors", "model/model.safetensors", "model/profile.json")
        return {name: (folder.path / name).stat().st_mtime_ns for name in kept}

    before = state()
    for stage in ("prune_model", "save_masks"):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, stage, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert svnup(*job, "force=true")[0] == 130
        assert state() == before
        assert folder.read().status == "finished"
    assert svnup(*job)[0] == 0
    assert not folder.unfinished.exists()
    assert svnup(*job, "force=true")[0] == 0
    assert all(now > before[name] for name, now in state().items())


def test_a_kill_between_model_and_result_is_made_good(svnup, run_folder, monkeypatch):
    """All is in unfinished/ before anything moves, so that the next process goes on with the moves."""
    job = [*JOB, "save_model=true", "save_masks=true"]
    assert svnup(*job)[0] == 0
    folder = run_folder()
    old, masks = folder.read().provenance.started, (folder.path / "masks.safetensors").stat().st_ino
    time.sleep(1.1)  # `started` tells seconds
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert svnup(*JOB, "save_model=true", "force=true")[0] == 130
    assert (folder.unfinished / MOVES).is_file()
    assert folder.read().provenance.started == old
    assert (folder.path / "masks.safetensors").stat().st_ino == masks
    monkeypatch.setattr(pipeline, "run", None)
    code, out, _ = svnup(*JOB, "save_model=true")
    assert (code, "already finished" in out) == (0, True)
    assert folder.read().provenance.started > old
    assert not folder.unfinished.exists()
    assert not (folder.path / "masks.safetensors").exists(), "of the earlier pruning"
    assert set(folder.models()) == {"dense"}


@pytest.mark.parametrize("told", [{"gone": ["../../../x"]}, {"moves": {"model": "../../x"}}, {"moves": 5}, {"row": "{}"}])
def test_moves_that_a_stranger_has_written_move_nothing(told, tmp_path, caplog):
    import rows

    row = rows.run(8.25)
    folder = RunFolder.of(tmp_path / "r", row.config_key)
    rows.write(tmp_path / "r", row)
    (tmp_path / "x").write_text("kept")
    (folder.unfinished / "model").mkdir(parents=True)
    whole = {"row": row.to_json(), "moves": {"model": "model"}, "gone": ["masks.safetensors"]}
    (folder.unfinished / MOVES).write_text(json.dumps(whole | told))
    folder.finish_publishing()
    assert "damaged" in caplog.text
    assert ((tmp_path / "x").read_text(), (folder.unfinished / "model").is_dir()) == ("kept", True)
    (folder.unfinished / MOVES).write_text(json.dumps(whole))
    folder.finish_publishing()
    assert ((folder.path / "model").is_dir(), folder.unfinished.exists()) == (True, False)


# -- disks, limits, output


def test_a_full_disk_is_one_line_and_the_next_run_completes(svnup, run_folder, monkeypatch):
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results/model")

        patch.setattr(pipeline, "save_masks", full)
        for sweep in ([], ["-m"]):
            code, _, err = svnup(*JOB, "save_masks=true", *sweep)
            said = [line for line in err.splitlines() if line.startswith("svnup: ")]
            assert (code, len(said)) == (1, 1)
            assert "results/model: No space left on device; make room there and start again" in said[0]
            assert "Traceback" not in err
    assert run_folder().read().status == "failed"
    assert "full" in (run_folder().path / "svnup.log").read_text(), "the traceback is in the log"
    assert svnup(*JOB, "save_masks=true")[0] == 0


@pytest.mark.thinned(3)
@pytest.mark.parametrize("key", ["results_dir", "cache_dir", "dataset.path", "allocator.path", "datasets_dir"])
def test_a_name_that_is_too_long_is_one_line(key, svnup):
    group = {"allocator.path": ["allocator=from_file"], "dataset.path": ["dataset=text_file"]}.get(key, [])
    for sweep in ([], ["-m"]):
        code, _, err = svnup(*group, f"{key}={'n' * 300}", *sweep)
        assert code in (1, 2)
        assert "Traceback" not in err
        assert len([line for line in err.splitlines() if line.startswith("svnup: ")]) == 1, err


def run_command(code: str, where: Path, *args: str, **options):
    env = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(where / "xdg")}
    call = [
        sys.executable,
        "-c",
        f"{code}\nimport sys; from svnup.cli.run import main; sys.exit(main())",
        *SMALL_W2,
        *JOB,
        *args,
    ]
    return subprocess.run(call, cwd=where, env=env, text=True, stderr=subprocess.PIPE, timeout=300, check=False, **options)


@pytest.mark.slow
def test_standard_output_that_takes_nothing_loses_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        done = run_command("", tmp_path, stdout=full)
    assert (done.returncode, done.stderr.count("standard output: No space left")) == (1, 1)
    assert "Traceback" not in done.stderr
    assert [row.status for row in load(tmp_path)] == ["finished"]
    closed = run_command("", tmp_path, preexec_fn=lambda: os.close(1))
    assert (closed.returncode, closed.stderr.count("standard output: is closed")) == (1, 1)
    assert "Traceback" not in closed.stderr
    assert run_command("", tmp_path, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.slow
def test_a_limit_of_files_is_one_line_and_the_next_run_completes(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    done = run_command(limit, tmp_path, "save_model=true", stdout=subprocess.DEVNULL)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.rglob(".model.*"))
    again = run_command("", tmp_path, "save_model=true", stdout=subprocess.DEVNULL)
    assert again.returncode == 0, again.stderr
    (row,) = load(tmp_path)
    assert row.status == "finished"


def test_nothing_that_only_some_systems_have_is_imported_with_svnup():
    here = Path(files.__file__).parent
    found = [p.name for p in here.rglob("*.py") if re.search(r"^(import|from) (fcntl|resource|pwd|grp)\b", p.read_text(), re.M)]
    assert found == []


def test_a_log_that_cannot_be_written_stops_no_run(tmp_path, capsys):
    from svnup.execute import _LogFile

    handler = _LogFile(tmp_path / "log")
    logger = logging.getLogger("svnup")
    logger.addHandler(handler)
    handler.stream.close()
    handler.stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    try:
        logger.error("one")
        logger.error("two")
    finally:
        logger.removeHandler(handler)
    assert "Traceback" not in capsys.readouterr().err
