"""What is installed is whole: configuration, models, texts, tasks and published numbers travel in the wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("svnup", "hydra_plugins", "conf", "experiments/published", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


@pytest.mark.slow
def test_a_wheel_runs_where_there_is_no_checkout(tmp_path):
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in BUILT_FROM:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("svnup-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    def run(*args: str) -> str:
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(elsewhere / "code")]), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, *args], cwd=elsewhere, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert run("-c", "import svnup; print(svnup.__file__)").startswith(str(site))
    for model in ("tiny", "tiny_opt", "tiny_moe"):
        assert "plan of" in run("-m", "svnup", f"model={model}", "evaluation=full", "dry_run=true")
    assert "llama_7b" in run("-c", "from svnup.cli.results import main; main(['published', '.'])")
    row = "from rows import run, write; from pathlib import Path; write(Path('results'), run(30.0))"
    run("-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); {row}")
    run("-c", "from svnup.cli.results import main; assert main(['report', 'results']) == 0")
    assert "<!DOCTYPE html>" in (elsewhere / "results" / "report.html").read_text()
    (elsewhere / "code").mkdir()
    (elsewhere / "code" / "own.py").write_text(
        "from svnup.pruning.magnitude import Magnitude\n\n\nclass Own(Magnitude):\n    pass\n"
    )
    (elsewhere / "conf" / "pruner").mkdir(parents=True)
    (elsewhere / "conf" / "pruner" / "own.yaml").write_text("_target_: own.Own\npattern: ${pattern}\n")
    assert "plan of svnup/tiny own uniform" in run(
        "-m", "svnup", "--config-dir", "conf", "pruner=own", "allocator=uniform", "dry_run=true"
    )
