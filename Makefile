# Everything runs in .venv, which the first target that needs it creates from constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format tables study benchmarks clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(READY)  ## create .venv and install the pinned environment and svnup (editable)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "svnup needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## Shapley values, budgets and perplexities of the built-in model (one to two minutes once installed)
	$(OFFLINE) $(BIN)/svnup -m experiment=smoke results_dir=results/demo cache_dir=results/cache
	$(BIN)/svnup-results table results/demo
	@$(BIN)/svnup-results report results/demo

test: $(READY)  ## the test suite, without its slow part
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'not slow and not gpu'

test-all: $(READY)  ## the slow part of the test suite
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'slow and not gpu'

lint: $(READY)  ## ruff, ruff format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: $(READY)  ## remake the committed tables under results/tables
	$(OFFLINE) $(BIN)/svnup -m experiment=smoke results_dir=results/demo cache_dir=results/cache
	$(BIN)/svnup-results table results/demo --format markdown --output results/tables/smoke.md \
		--title 'Smoke experiment' --command 'make tables'
	$(BIN)/svnup-results report results/demo

study: $(READY)  ## make study NAME=estimators|games|pruners: remake a study's table and figure
	@test -f experiments/$(NAME)/run.py || { echo "NAME=$(NAME): choose estimators, games or pruners" >&2; exit 2; }
	$(OFFLINE) $(BIN)/python experiments/$(NAME)/run.py

benchmarks: $(READY)  ## cost of Shapley values, pruning and offloading (about 25 minutes)
	$(OFFLINE) $(BIN)/python experiments/benchmarks/shapley_cost.py --output results/benchmarks/shapley_cost.md
	$(OFFLINE) $(BIN)/python experiments/benchmarks/pruning_cost.py --output results/benchmarks/pruning_cost.md
	$(OFFLINE) $(BIN)/python experiments/benchmarks/offload.py --output results/benchmarks/offload.md

clean:  ## remove the environment and everything that runs wrote (not the committed tables)
	rm -rf $(VENV) results/demo results/runs results/cache results/sweeps *.egg-info build
