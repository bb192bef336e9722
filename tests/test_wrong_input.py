"""Every mistake ends with exit code 2 and a line that names the key, what was given and the way out; nothing is written."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli import SMALL, SMALL_W2, command, process
from transformers import AutoConfig, AutoModelForCausalLM

from svnup.model.source import BUILT_IN_FOLDER

pytestmark = pytest.mark.usefixtures("own_place")


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def refused(*args: str) -> str:
    """Run the command in this process; assert that it is refused as promised, and return the last line on stderr."""
    before = tree(Path.cwd())
    code, out, err = command(*args)
    assert code == 2, err
    assert "Traceback" not in out + err
    last = err.rstrip("\n").splitlines()[-1]
    assert last.startswith("svnup: ")
    assert tree(Path.cwd()) == before, "something was written"
    return last


# (arguments, what the line must say: the key with the value, and the way out)
CONFIG_ALONE = {
    "unknown key": (["sparsty=0.5"], ["sparsty=0.5", "did you mean sparsity?"]),
    "unknown nested key": (["shapley.windw=3"], ["shapley.windw=3", "did you mean shapley.window?"]),
    "unknown key added with plus": (["+sparsty=0.5"], ["sparsty=0.5", "did you mean sparsity?"]),
    "a key taken away": (["~sparsity"], ["~sparsity", "leave out ~sparsity"]),
    "a group taken away": (["~selection"], ["~selection", "leave out ~selection"]),
    "numbers for an option": (["dataset=[0, 4]"], ["dataset=[0, 4]", "by its name; choose dataset=..."]),
    "a list in a list of options": (["dataset@selection=[docs,[c4]]"], ["by its name; choose dataset@selection=..."]),
    "a list for a yes or no": (["+machines.here.verified=[]"], ["machines.here.verified=[]", "must be true or false"]),
    "no name for a folder": (["cache_dir="], ["cache_dir=''", "name a folder"]),
    "known perplexity no number": (
        ["model.dense_ppl=[{dataset: docs, seq_len: 32, ppl: low, source: here}]"],
        ["model.dense_ppl={'dataset': 'docs'", "a ppl above 0"],
    ),
    "size below zero": (["model.intermediate_size=-3"], ["model.intermediate_size=-3", "at least 1"]),
    "entry of a list": (["tracker=wandb", "tracker.tags=[a,7]"], ["tracker.tags=['a', 7]", "entry 7 must be text"]),
    "unknown key, nothing near": (["xyzzy=1"], ["xyzzy=1", "svnup --cfg job shows all"]),
    "key of other options": (
        ["pruner=magnitude", "pruner.damp=0.1"],
        [
            "pruner.damp=0.1",
            "pruner=alps,",
            ",sparsegpt,",
            "alone have that key",
            "in a sweep over them write ++pruner.damp=0.1",
        ],
    ),
    "key of other options, added with plus": (["+pruner.dampp=0.1"], ["pruner.dampp=0.1", "no such option"]),
    "unknown group": (["modl=tiny"], ["modl=tiny", "did you mean model?"]),
    "unknown model": (["model=tinny"], ["model=tinny", "choose among", "llama_7b", "did you mean tiny?"]),
    "unknown pruner": (
        ["pruner=wand"],
        ["pruner=wand", "magnitude, magnitude_refit, none, ria", "did you mean wanda?"],
    ),
    "unknown experiment": (["experiment=smok"], ["experiment=smok", "did you mean smoke?"]),
    "unknown data set": (["dataset=wikitext"], ["dataset=wikitext", "did you mean wikitext2?"]),
    "unknown evaluation data set": (["evaluation.datasets=[doc]"], ["evaluation.datasets=['doc']", "did you mean docs?"]),
    "evaluation data sets not a list": (["evaluation.datasets=docs"], ["evaluation.datasets=docs", "[docs]"]),
    "no evaluation data set": (["evaluation.datasets=[]"], ["evaluation.datasets=[]", "evaluation=none"]),
    "unknown task": (
        ["evaluation=zero_shot", "evaluation.tasks=[bolq]"],
        ["evaluation.tasks=bolq", "no such task", "did you mean boolq?"],
    ),
    "unknown set of tasks": (
        ["evaluation=zero_shot", "evaluation.tasks=boolq"],
        ["evaluation.tasks=boolq", "choose a set", "or list tasks"],
    ),
    "task option typo": (["evaluation=zero_shot", "+evaluation.limt=5"], ["evaluation.limt=5", "did you mean limit?"]),
    "limit zero": (["evaluation=full", "evaluation.limit=0"], ["evaluation.limit=0", "1 or more"]),
    "tasks, offloaded": (["evaluation=zero_shot", "offload=cpu"], ["offload=cpu", "whole model", "evaluation=ppl"]),
    "sparsity in percent": (["sparsity=70"], ["sparsity=70", "[0, 1)", "did you mean sparsity=0.7?"]),
    "sparsity 1": (["sparsity=1"], ["sparsity=1", "[0, 1)"]),
    "sparsity negative": (["sparsity=-0.1"], ["sparsity=-0.1", "[0, 1)"]),
    "sparsity nan": (["sparsity=nan"], ["sparsity=nan", "finite number"]),
    "sparsity not a number": (["sparsity=much"], ["sparsity=much", "right type"]),
    "lower bound above": (["allocator.lower=0.8"], ["allocator.lower=0.8", "sparsity=0.7", "widen the bounds"]),
    "upper bound below": (["allocator.upper=0.6"], ["upper=0.6", "sparsity=0.7", "widen the bounds"]),
    "bounds crossed": (["allocator.lower=0.9", "allocator.upper=0.1"], ["allocator.lower=0.9", "lower <= upper"]),
    "lam out of range": (["allocator.lam=2"], ["allocator.lam=2", "0 to 1"]),
    "lam not a number": (["allocator.lam=big"], ["allocator.lam=big", "must be a number"]),
    "scale typo": (["allocator.scale=lgo"], ["allocator.scale=lgo", "clip, rank, log, raw"]),
    "window larger than the model": (["shapley.window=4"], ["shapley.window=4", "3", "choose 1 to 3"]),
    "window zero": (["shapley.window=0"], ["shapley.window=0", "choose 1 to 3"]),
    "stride larger than the window": (["shapley.stride=3"], ["shapley.stride=3", "window=2"]),
    "payoff typo": (["shapley.game.payoff=nll"], ["shapley.game.payoff=nll", "did you mean neg_nll?"]),
    "fixed N:M, another sparsity": (["allocator=uniform", "pattern='2:4'"], ["pattern=2:4", "add sparsity=0.5"]),
    "fixed N:M, not uniform": (["pattern='2:4'", "sparsity=0.5"], ["pattern=2:4", "add allocator=uniform"]),
    "N:M beyond the width": (
        ["pattern='2:4'", "sparsity=0.5", "allocator=uniform", "model.intermediate_size=66"],
        ["pattern=2:4", "66", "pattern=unstructured"],
    ),
    "pattern unquoted in yaml": (["pattern=124"], ["pattern=124", "'2:4'", "quotes"]),
    "pattern upside down": (["pattern='4:2'"], ["pattern=4:2", "0 < N < M"]),
    "pattern typo": (["pattern=unstructred"], ["pattern=unstructred", "'unstructured' or N:M"]),
    "dtype typo": (["model.dtype=flaot32"], ["model.dtype=flaot32", "did you mean float32?"]),
    "device typo": (["model.device=gpu"], ["model.device=gpu", "choose auto, cpu"]),
    "device missing": (["model.device=cuda:99"], ["model.device=cuda:99", "choose auto or cpu"]),
    "a head of odd size": (["model.hidden_size=34"], ["model.hidden_size=34", "even rotary dimension"]),
    "heads do not divide": (["model.hidden_size=33"], ["model.hidden_size=33", "multiple of num_attention_heads=2"]),
    "vocabulary too small": (["model.vocab_size=100"], ["model.vocab_size=100", "2048 or more"]),
    "no layers": (["model.num_hidden_layers=0"], ["model.num_hidden_layers=0", "at least 1"]),
    "layers not a number": (["model.num_hidden_layers=few"], ["model.num_hidden_layers=few", "whole number"]),
    "no windows": (["dataset.n_seq=0"], ["dataset.n_seq=0", "at least one"]),
    "windows not a number": (["dataset.n_seq=many"], ["dataset.n_seq=many", "whole number"]),
    "windows of one token": (["dataset.seq_len=1"], ["dataset.seq_len=1", "at least 2"]),
    "windows beyond the positions": (["dataset.seq_len=4096"], ["dataset.seq_len=4096", "2048 positions", "at most"]),
    "evaluation beyond the positions": (
        ["evaluation.seq_len=4096"],
        ["evaluation.seq_len=4096", "2048 positions", "model.seq_len=2048"],
    ),
    "a word for the game's text": (["shapley.game.data=docs"], ["shapley.game.data=docs", "dataset@shapley.game.data=docs"]),
    "no text for the game": (["shapley.game.data=null"], ["shapley.game.data=None: must be a node"]),
    "a key without a value": (["sparsity"], ["sparsity: not in Hydra's syntax", "write key=value"]),
    "a word for a base pruner": (["pruner=dsnot", "pruner.base=magnitude"], ["pruner.base=magnitude: must be a node"]),
    "calibration on test text": (["dataset.role=test"], ["dataset.role=test", "use dataset.role=calibration"]),
    "game on test text": (
        ["shapley.game.data.role=test"],
        ["shapley.game.data.role=test", "use shapley.game.data.role=payoff"],
    ),
    "game on selection text": (["shapley.game.data.role=selection"], ["pays coalitions", "shapley.game.data.role=payoff"]),
    "role typo": (["evaluation.role=tst"], ["role=tst", "did you mean test?"]),
    "seed not whole": (["seed=1.5"], ["seed=1.5", "right type"]),
    "selection is no option of a group": (
        ["selection=wikitext2"],
        ["selection=wikitext2: must be a node", "dataset@selection="],
    ),
    "no scores, tuned": (["allocator.scorer=null", "allocator.lam=auto"], ["allocator.scorer=null", "needs scores"]),
    "known number without a source": (["model.dense_ppl=[{dataset:docs}]"], ["model.dense_ppl={'dataset': 'docs'}", "seq_len"]),
    "results in a file": (["results_dir=/dev/null/x"], ["results_dir=/dev/null/x", "/dev/null is not a writable directory"]),
    "cache in a file": (["cache_dir=/dev/null"], ["cache_dir=/dev/null", "choose another"]),
    "gate typo": (["protocol_gate=of"], ["protocol_gate=of", "error, warn or off"]),
    "force not a truth value": (["force=maybe"], ["force=maybe", "right type"]),
    "selection loss typo": (["selection_loss=kll"], ["selection_loss=kll", "nll or kl", "did you mean kl?"]),
    "wandb mode typo": (["tracker=wandb", "tracker.mode=of"], ["tracker.mode=of", "offline"]),
    "text file without a path": (["dataset=text_file"], ["dataset.path", "add dataset.path="]),
    "text file missing": (
        ["dataset=text_file", "dataset.path=nope.txt"],
        ["dataset.path=nope.txt", "no such file"],
    ),
    "payoff text missing": (
        ["dataset@shapley.game.data=text_file", "+shapley.game.data.path=nope.txt"],
        ["shapley.game.data.path=nope.txt", "no such file"],
    ),
    "a folder of data sets missing": (["datasets_dir=nowhere"], ["datasets_dir=nowhere", "no such folder", "allenai/c4"]),
    "an evaluation text without a path": (
        ["dataset@evaluation.datasets.test=text_file"],
        ["evaluation.datasets.test.path", "add evaluation.datasets.test.path="],
    ),
    "an evaluation text in the old form": (
        ["evaluation.datasets=[{text_file: {path: nope.txt}}]"],
        ["evaluation.datasets=", "dataset@evaluation.datasets.test=text_file"],
    ),
    "an evaluation text in a word": (
        ["model.test_text=text_file"],
        ["model.test_text=text_file", "dataset@evaluation.datasets.test=text_file"],
    ),
    "a second evaluation text without a plus": (
        ["dataset@evaluation.datasets.mine=docs"],
        ["dataset@evaluation.datasets.mine=docs", "put a + before it"],
    ),
    "an evaluation text by its path alone": (
        ["evaluation.datasets.test.path=my.txt"],
        ["evaluation.datasets.test.path=my.txt", "add dataset@evaluation.datasets.test=text_file"],
    ),
    "a second evaluation text by its path alone": (
        ["evaluation.datasets.news.path=my.txt"],
        ["no data set is called news", "add +dataset@evaluation.datasets.news=text_file"],
    ),
    "a node for a group": (
        ["pruner={_target_: my.Pruner, size: 3}"],
        ["pruner={_target_: my.Pruner, size: 3}: a group", "by name, pruner=..."],
    ),
    "evaluation texts as a list and by name": (
        ["dataset@evaluation.datasets.test=docs", "evaluation.datasets=[docs]"],
        ["evaluation.datasets:", "in one way"],
    ),
    "one evaluation text twice": (["evaluation.datasets=[docs,docs]"], ["evaluation.datasets=", "docs/ppl", "once"]),
    "evaluation text missing": (
        ["dataset@evaluation.datasets.test=text_file", "evaluation.datasets.test.path=nope.txt"],
        ["evaluation.datasets.test.path=nope.txt", "no such file"],
    ),
    "profile not given": (["allocator=from_file"], ["allocator.path", "add allocator.path="]),
    "profile missing": (
        ["allocator=from_file", "allocator.path=nope.json"],
        ["allocator.path=nope.json", "profile.json of a run"],
    ),
    "target that does not exist": (
        ["pruner._target_=svnup.pruning.wanda.Wnada"],
        ["pruner._target_=svnup.pruning.wanda.Wnada", "check the spelling"],
    ),
    "mixed pattern beyond its steps": (
        ["pattern='mixed:8'", "sparsity=0.95", "allocator=uniform"],
        ["pattern=mixed:8", "sparsity=0.95", "at most 0.875", "pattern=unstructured"],
    ),
    "mixed pattern that does not exist": (["pattern='mixed:1'"], ["pattern=mixed:1", "'mixed:8'"]),
    "mixed pattern beyond the width": (
        ["pattern='mixed:8'", "model.intermediate_size=68"],
        ["pattern=mixed:8", "68", "pattern=unstructured"],
    ),
    "offload typo": (["offload=dsk"], ["offload=dsk", "none, cpu or disk", "did you mean disk?"]),
    "offload of random weights to disk": (["offload=disk"], ["offload=disk", "no checkpoint", "offload=cpu"]),
    "offload with stand-ins": (
        ["offload=cpu", "shapley.game.absence=prune"],
        ["offload=cpu", "shapley.game.absence=prune", "absence=skip"],
    ),
    "split unknown": (["split=errors"], ["split=errors", "error, outliers, shapley, uniform", "did you mean error?"]),
    "split without errors": (["split=error", "pruner=magnitude"], ["split=error", "errors of a pruner", "another pruner"]),
    "split that prunes twice, offloaded": (["split=error", "offload=cpu"], ["offload=cpu", "split=error", "split=uniform"]),
    "split under a fixed N:M": (
        ["split=outliers", "pattern='2:4'", "sparsity=0.5", "allocator=uniform"],
        ["pattern=2:4", "share its N", "split=uniform"],
    ),
    "split under mixed N:M": (["split=error", "pattern='mixed:8'"], ["pattern=mixed:8", "split=uniform"]),
    "split amplitude": (["split=error", "split.lam=2"], ["split.lam=2", "0 to 1"]),
    "split option of another": (["split=error", "+split.threshold=3"], ["split.threshold=3", "no such option"]),
    "split threshold": (["split=outliers", "split.threshold=0"], ["split.threshold=0", "positive"]),
    "save format typo": (["save_model=true", "save_format=bitmap"], ["save_format=bitmap", "dense or bitmask", "did you mean"]),
    "save format of nothing": (["save_format=bitmask"], ["save_format=bitmask", "add save_model=true"]),
    "save masks not a truth value": (["save_masks=perhaps"], ["save_masks=perhaps", "right type"]),
    "override syntax": (["dataset.n_seq=[1"], ["dataset.n_seq=[1", "quotes"]),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", CONFIG_ALONE)
def test_config_mistakes(case):
    args, said = CONFIG_ALONE[case]
    small = [a for a in SMALL_W2 if args[0] != "evaluation=zero_shot" or not a.startswith("evaluation.")]  # it has no windows
    line = refused(*small, "results_dir=results", "cache_dir=cache", *args)
    assert [s for s in said if s not in line] == [], line


def test_an_unknown_option_in_a_sweep_stops_it_before_its_first_job():
    done = command("-m", *SMALL_W2, "results_dir=r", "cache_dir=c", "pruner=magnitude,wand")
    assert done.code == 2
    last = done.err.rstrip("\n").splitlines()[-1]
    assert last.startswith("svnup: pruner=wand: choose among alps, dsnot, magnitude, magnitude_refit, none, ria")
    assert {t for t in tree(Path.cwd()) if not t.startswith("r/sweeps")} == {"r"}  # Hydra's own record of the sweep, no run


def test_exact_with_too_many_blocks_names_the_alternatives_with_their_cost():
    line = refused(*SMALL, "shapley=exact", "model.num_hidden_layers=32")
    assert "shapley=exact" in line
    assert "32 blocks" in line
    assert f"{2**32:.2g}" in line
    assert "shapley=sliding_window" in line
    assert "464" in line  # (n - w + 2) 2^(w - 1) for n = 32, w = 5
    assert "shapley=permutation" in line
    assert "126" in line  # 4 n - 2


def test_permutation_budget():
    line = refused(*SMALL, "shapley=permutation")
    assert "shapley.budget" in line
    line = refused(*SMALL, "shapley=permutation", "shapley.budget=9")
    assert "shapley.budget=9" in line
    assert "least budget is 10" in line  # 4 n - 2 for n = 3
    line = refused(*SMALL, "shapley=permutation", "shapley.budget=60", "shapley.stop=5")
    assert "shapley.stop=5: must be a node of keys and values" in line
    line = refused(*SMALL, "shapley=permutation", "shapley.budget=60", "shapley.stop={stderr: low}")
    assert "stderr=low must be a number" in line


def bad_texts(folder: Path) -> dict[str, tuple[str, list[str]]]:
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\n ")
    (folder / "short.txt").write_text("Return the sum of the values.\n" * 4)
    (folder / "latin.txt").write_bytes("Größe ".encode("latin-1") * 500)
    (folder / "fake.txt.gz").write_bytes(b"this is no gzip file at all")
    (folder / "torn.txt.gz").write_bytes(gzip.compress(b"some words of text " * 500)[:-12])
    (folder / "folder.txt").mkdir()
    return {
        "empty.txt": ("empty.txt", ["dataset.path=empty.txt", "empty", "name a file"]),
        "blank.txt": ("blank.txt", ["dataset.path=blank.txt", "no text", "name a file"]),
        "short.txt": ("short.txt", ["dataset.n_seq=4", "text_file", "windows of seq_len=32", "ask for fewer"]),
        "latin.txt": ("latin.txt", ["dataset.path=latin.txt", "UTF-8", "convert"]),
        "fake.txt.gz": ("fake.txt.gz", ["dataset.path=fake.txt.gz"]),
        "torn.txt.gz": ("torn.txt.gz", ["dataset.path=torn.txt.gz"]),
        "folder.txt": ("folder.txt", ["dataset.path=folder.txt", "name a text file"]),
    }


@pytest.mark.parametrize(
    "name", ["empty.txt", "blank.txt", "short.txt", "latin.txt", "fake.txt.gz", "torn.txt.gz", "folder.txt"]
)
def test_bad_text_files(name, tmp_path):
    path, said = bad_texts(tmp_path)[name]
    line = refused(*SMALL_W2, "dataset=text_file", f"dataset.path={path}")
    assert [s for s in said if s not in line] == [], line


def test_more_windows_than_the_built_in_text_has():
    line = refused(*SMALL_W2, "dataset.n_seq=1000000")
    assert "dataset.n_seq=1000000" in line
    assert "calibration text of docs" in line
    assert "ask for fewer" in line


def local(path: str) -> list[str]:
    return ["model=tiny", f"model.pretrained_model_name_or_path={path}", "evaluation.n_seq=4", "dataset.n_seq=4"]


def test_model_paths(tmp_path):
    key = "model.pretrained_model_name_or_path"
    line = refused(*local("./nowhere"))
    assert f"{key}=./nowhere" in line
    assert "no such folder" in line
    assert "hub name" in line
    (tmp_path / "bare").mkdir()
    line = refused(*local("./bare"))
    assert f"{key}=./bare" in line
    assert "config.json" in line
    assert "save_pretrained" in line
    (tmp_path / "bare" / "config.json").write_text("{not json")
    line = refused(*local("./bare"))
    assert f"{key}=./bare" in line
    assert "not JSON" in line
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "blt"}')  # which is made of several stacks
    line = refused(*local("./bare"))
    assert f"{key}=./bare" in line
    assert "number of blocks" in line
    (tmp_path / "file").write_text("a file, not a folder")
    line = refused(*local("./file"))
    assert f"{key}=./file" in line


@pytest.mark.parametrize("name", ["mine", "./mine", "below/mine", "an-organisation/a-model"])
def test_a_folder_or_hub_name_for_an_option_of_the_model_names_the_way(name, tmp_path):
    if name != "an-organisation/a-model":
        (tmp_path / name).mkdir(parents=True)
    line = refused(f"model={name}")
    assert line.startswith(f"svnup: model={name}: no option")
    assert line.endswith(f" model=pretrained model.pretrained_model_name_or_path={name}")


def test_offload_of_checkpoints(monkeypatch, tmp_path):
    """A model that is spread over devices cannot wait elsewhere; one without safetensors, or with torn ones, cannot on disk."""
    from importlib.machinery import ModuleSpec

    monkeypatch.setattr("svnup.model.source.find_spec", lambda name: ModuleSpec(name, None))  # as if accelerate were there
    for offload in ("cpu", "disk"):
        line = refused(*local("svnup/tiny"), f"offload={offload}", "model.device_map=auto")
        assert "model.device_map=auto" in line
        assert f"device_map=null with offload={offload}" in line
    (tmp_path / "bits").mkdir()
    (tmp_path / "bits" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 5}')
    (tmp_path / "bits" / "svnup_bitmask.json").write_text("{}")
    line = refused(*local("./bits"), "model.device_map=auto")
    assert "model.device_map=auto" in line
    assert "svnup-expand" in line
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 5}')
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"pickled")
    line = refused(*local("./old"), "offload=disk")
    assert "old: no safetensors checkpoint" in line
    assert "safe_serialization" in line
    (tmp_path / "old" / "model.safetensors").write_bytes(b"torn")
    line = refused(*local("./old"), "offload=disk")
    assert "model.safetensors: cannot be read" in line
    assert "copy the checkpoint again" in line


def test_a_checkpoint_without_a_tokenizer(random_model, tmp_path):
    random_model(5).model.save_pretrained(tmp_path / "bare")
    line = refused(*local("./bare"))
    assert "bare" in line
    assert "tokenizer" in line


VOCABULARY = {"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "start_token_id": 0}


def of_shape(folder: Path, model_type: str, **shape: object) -> list[str]:
    """A checkpoint of random weights with the built-in tokenizer, in a folder."""
    config = AutoConfig.for_model(model_type, **VOCABULARY | shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in BUILT_IN_FOLDER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return [*local(f"./{folder.name}"), "model.seq_len=32", "allocator=uniform", "pruner=magnitude"]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("model_type", "shape", "said"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24}, "24 positions"),
        ("gpt_neo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}, None),
        ("ctrl", {"n_embd": 32, "dff": 48, "n_layer": 3, "n_head": 4, "n_positions": 24}, "24 positions"),
        ("mpt", {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 24}, "too long for the model (Attempting"),
        ("bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}, None),
    ],
)
def test_positions_are_known_by_whatever_name_a_family_has_for_them(model_type, shape, said, tmp_path):
    args = of_shape(tmp_path / "shape", model_type, **shape)
    if said is not None:
        line = refused(*args)
        assert line.startswith("svnup: evaluation.seq_len=32: ")
        assert said in line
        assert "for all texts by model.seq_len=" in line
    done = command(*args, "model.seq_len=24", "dry_run=true")
    assert done.code == 0, done.err


def test_widths_that_differ_between_blocks(tmp_path):
    widths = {"intermediate_size": [64, 66], "num_hidden_layers": 2, "activation_sparsity_pattern": [0.0, 0.0]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_kv_shared_layers": 0}
    sizes = {"hidden_size": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 2048, "laurel_rank": 4}
    kinds = {"layer_types": ["full_attention"] * 2, "altup_num_inputs": 4}
    args = of_shape(tmp_path / "shape", "gemma3n_text", **widths, **heads, **sizes, **kinds)
    line = refused(*args, "pattern='2:4'", "sparsity=0.5")
    assert "pattern=2:4" in line
    assert "the 66 inputs of block 1, mlp.down_proj" in line


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    line = refused(*of_shape(tmp_path / "shape", "llama", **shape, vocab_size=1000))
    assert re.search(r"model=\./shape: its tokenizer gives token [12]\d{3} in the text of evaluation\.datasets", line)
    assert "the model has 1000 embeddings; use the tokenizer that" in line


def write_profile(path: Path, sparsity: list[float], target: float) -> None:
    path.write_text(json.dumps({"sparsity": sparsity, "params": [10240] * len(sparsity), "target": target}))


def test_profile_files(tmp_path):
    def given(name: str) -> str:
        return refused(*SMALL_W2, "allocator=from_file", f"allocator.path={name}")

    write_profile(tmp_path / "four.json", [0.6, 0.7, 0.7, 0.8], 0.7)
    line = given("four.json")
    assert "allocator.path=four.json" in line
    assert "4 blocks" in line
    assert "has 3" in line
    write_profile(tmp_path / "half.json", [0.4, 0.5, 0.6], 0.5)
    line = given("half.json")
    assert "allocator.path=half.json" in line
    assert "sparsity=0.7" in line
    assert "add sparsity=0.5" in line
    (tmp_path / "lacking.json").write_text('{"sparsity": [0.7, 0.7, 0.7]}')
    line = given("lacking.json")
    assert "allocator.path=lacking.json" in line
    assert "params" in line
    (tmp_path / "torn.json").write_text('{"sparsity": [0.7, 0.')
    assert "allocator.path=torn.json" in given("torn.json")
    (tmp_path / "list.json").write_text("[0.7, 0.7, 0.7]")
    assert "allocator.path=list.json" in given("list.json")
    write_profile(tmp_path / "wild.json", [1.4, 0.0, 0.7], 0.7)
    assert "allocator.path=wild.json" in given("wild.json")


def test_a_profile_with_other_params_than_the_model_does_not_fit(tmp_path):
    """Mean 0.7 by its own params (7 : 1 : 2), not by the equal ones of the model: seen on the shapes, before weights load."""
    data = {"sparsity": [0.75, 0.55, 0.6], "params": [7000, 1000, 2000], "target": 0.7}
    (tmp_path / "other.json").write_text(json.dumps(data))
    line = refused(*SMALL_W2, "allocator=from_file", "allocator.path=other.json")
    assert "allocator.path=other.json" in line
    assert "does not fit" in line


def test_fixed_pattern_with_a_profile_that_is_not_uniform(tmp_path):
    write_profile(tmp_path / "half.json", [0.4, 0.5, 0.6], 0.5)
    args = ["allocator=from_file", "allocator.path=half.json", "sparsity=0.5", "pattern='2:4'"]
    line = refused(*SMALL_W2, *args)
    assert "pattern=2:4" in line
    assert "allocator=uniform" in line


def test_a_model_of_the_hub_that_is_not_here():
    last = refused("model=llama_7b")
    for said in ("model.pretrained_model_name_or_path=huggyllama/llama-7b", "Hub", "local folder"):
        assert said in last


def test_the_real_command(tmp_path):
    done = process("shapley.window=13", cwd=tmp_path)
    assert done.code == 2, done.err
    assert "Traceback" not in done.out + done.err
    last = done.err.rstrip("\n").splitlines()[-1]
    assert last.startswith("svnup: ")
    for said in ("shapley.window=13", "12", "choose 1 to 12"):
        assert said in last
    assert tree(tmp_path) == set()


def test_config_mistakes_are_found_without_importing_torch(tmp_path):
    """What makes the answer quick: nothing heavy is imported where the configuration alone shows the mistake."""
    (tmp_path / "home").mkdir()
    code = (
        "import sys; from svnup.cli.run import main; sys.argv = ['svnup', 'shapley.window=13']; code = main();"
        "print(code, [m for m in ('torch', 'transformers', 'datasets', 'wandb', 'matplotlib') if m in sys.modules])"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "2 []\n", done.stderr


def test_a_nan_loss_names_the_stage_and_is_no_number(tmp_path):
    """Only running shows it: the run folder records the failure, and no metric."""
    import torch

    from svnup.model.source import Random

    lm = Random(num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=2).load()
    with torch.no_grad():
        lm.blocks[1].mlp.down_proj.weight[0, 0] = float("nan")
    lm.save(tmp_path / "broken")
    args = [*local("./broken"), "model.seq_len=32", "allocator=uniform", "pruner=none", "results_dir=r", "cache_dir=c"]
    code, _, err = command(*args)
    assert code == 2
    assert "Traceback" not in err
    last = err.rstrip("\n").splitlines()[-1]
    assert re.match(r"svnup: stage dense: no \S+/ppl of the dense model \(the loss is nan", last)
    (result,) = (tmp_path / "r" / "runs").glob("*/result.json")
    row = json.loads(result.read_text())
    assert row["status"] == "failed"
    assert "stage dense" in row["error"]
    assert row["metrics"] == {}


def test_negative_seed():
    assert "seed=-1" in refused(*SMALL_W2, "seed=-1")


def test_group_set_to_null():
    assert "pruner" in refused(*SMALL_W2, "pruner=null")


@pytest.mark.parametrize(("given", "said"), [("results_dir=null", "results_dir"), ("cache_dir=[1]", "cache_dir=[1]")])
def test_wrong_type_of_a_folder(given, said):
    line = refused(*SMALL_W2, given)
    assert line.startswith(f"svnup: {said}")
    assert "object_type" not in line


@pytest.mark.parametrize("given", ["model.num_attention_heads=0", "model.num_key_value_heads=3"])
def test_impossible_heads(given):
    assert given in refused(*SMALL_W2, given, "results_dir=r", "cache_dir=c")
