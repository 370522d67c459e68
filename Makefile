# make demo          fine-tunes twice on 2 MPI ranks, dense and under a plan, and compares
# make test          every part once, in about five minutes, with the versions that it last passed on (tests/constraints.txt)
# make test-full     make test, then the long tests: matrices of engines, examples, hangs, kills, slow links
# make test-slurm    slurm/*.sh on a real Slurm of virtual nodes; needs root and Debian's slurmctld, slurmd, slurm-client, munge
# make lint          style and types
# make wheel         dist/*.whl
# make test-oldest   all tests, those on Slurm too, with Python 3.10 and the lowest supported versions
# make test-middle   what rests on undocumented parts of torch and DeepSpeed, with versions halfway between lowest and newest
# make test-newest   test-full and lint with the newest versions that pip finds, as on a fresh machine
# make constraints   the same, and then everybody installs these versions
# make test-matrix   every engine, plan, precision and optimiser on 2 and 4 ranks, about 1,150 checks in six launches, each a
#                     second or two on a free machine; test and test-full run a choice of them
# make soak-results  a results file's writer killed at 100 random moments
# make soak          ranks of a run killed at 200 random moments; started again with the same file, it goes on where it ended
# make check-all     all of these but constraints, before a release; takes many hours
# make clean         removes what the others made, except runs

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
# Every target fills the machine by itself.
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
OLDEST_VENV := .venv-oldest
NEWEST_VENV := .venv-newest
MIDDLE_VENV := .venv-middle
MIDDLE := torch==2.12.1 torchvision==0.27.1 deepspeed==0.18.3
# The ranks share the cores: one thread each.
export OMP_NUM_THREADS := 1
PYTEST = python -m pytest --durations=20 $(PYTEST_ARGS)

# The newest Python of 3.10 to 3.13 that runs and can make venvs; a name on PATH may be a shim that does neither.
find_python = for p in $(1); do \
	if "$$p" -c 'import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; \
	then python="$$p"; break; fi; done; \
	: "$${python:?no Python found among: $(1); install one with its venv module}"

PYTHONS ?= python3.13 python3.12 python3.11 python3.10 python3 $(wildcard $(HOME)/.pyenv/versions/3.1[0-3].*/bin/python)
PYTHON310S ?= python3.10 $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python)

.PHONY: help demo test test-full test-slurm test-matrix test-oldest test-middle test-newest lint check-all constraints \
	soak soak-results wheel clean no-newest
help:
	@sed -n '/^#/!q; s/..//p' Makefile

$(BIN)/python:
	@$(call find_python,$(PYTHONS))
	"$$python" -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

# The versions that the suite last passed on, but a build of torch chosen by hand (+cpu, a cluster's own) stays.
CONSTRAINTS := tests/constraints.txt
$(VENV)/constraints.txt: $(CONSTRAINTS) | $(BIN)/python
	builds=$$($(BIN)/python -m pip freeze | grep -E '^torch(vision)?==.*\+' || true)
	{ sed "$${builds:+/^torch/d}" $<; echo "$$builds"; } > $@

# Editable, so that only changed requirements need a new installation.
$(VENV)/.installed: pyproject.toml $(VENV)/constraints.txt
	$(BIN)/python -m pip install -e '.[mpi]' -c $(VENV)/constraints.txt
	$(BIN)/python -c 'import torchvision' || \
		{ echo "torch and torchvision in $(VENV) do not fit together: install both from one index" >&2; exit 1; }
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e '.[mpi,test,lint]' -c $(VENV)/constraints.txt
	touch $@

demo: $(VENV)/.installed
	export PATH="$(CURDIR)/$(BIN):$$PATH"
	rm -rf runs/demo-dense runs/demo
	mpirun -n 2 d2ft-hpc train configs/demo.yaml train.epochs=10 run.name=demo-dense plan.planner=dense
	mpirun -n 2 d2ft-hpc train configs/demo.yaml train.epochs=10
	d2ft-hpc report runs/demo-dense runs/demo --html runs/report.html --png runs/demo.png

# The tests start mpirun, torchrun and deepspeed by name. Those of one process run two at a time, each worker with files
# of its own until it has none, so that a module's runs are made once; the others run in turn. Ranks often wait for one
# another: in `test` both parts run at once, and what the second one says comes at the end.
test: $(VENV)/.installed-dev
	export PATH="$(CURDIR)/$(BIN):$$PATH"
	ranks=$$(mktemp)
	printf '%s\0' "$(PYTEST) tests/distributed tests/gpu -m 'not full' > $$ranks 2>&1" \
		"$(PYTEST) tests/unit -n 2 --dist worksteal -m 'not full'" |
		xargs -0 -n 1 -P 2 bash -c && failed=0 || failed=$$?
	cat $$ranks
	rm $$ranks
	exit $$failed

test-full: test
	export PATH="$(CURDIR)/$(BIN):$$PATH"
	$(PYTEST) tests/unit -n 2 --dist worksteal -m full
	$(PYTEST) tests/distributed -m full

test-slurm: $(VENV)/.installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PYTEST) tests/slurm

soak-results: $(VENV)/.installed-dev
	D2FT_KILLS=100 $(BIN)/python -m pytest tests/unit/test_results.py -k killed_at_random -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

SOAK ?= tests/soak/kills.jsonl
soak: $(VENV)/.installed-dev
	$(BIN)/python -m tests.soak.kills $(SOAK) --kills 200

$(OLDEST_VENV)/.installed: pyproject.toml tests/oldest.py
	@$(call find_python,$(PYTHON310S))
	"$$python" -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install -q --upgrade pip
	$(OLDEST_VENV)/bin/python tests/oldest.py > $(OLDEST_VENV)/constraints.txt
	$(OLDEST_VENV)/bin/python -m pip install -e '.[mpi,test]' -c $(OLDEST_VENV)/constraints.txt
	touch $@

test-oldest: $(OLDEST_VENV)/.installed
	export PATH="$(CURDIR)/$(OLDEST_VENV)/bin:$$PATH"
	$(PYTEST) tests/unit -n 2 --dist worksteal
	$(PYTEST) tests/distributed tests/gpu tests/slurm

$(MIDDLE_VENV)/.installed: pyproject.toml Makefile $(CONSTRAINTS)
	@$(call find_python,$(PYTHONS))
	"$$python" -m venv $(MIDDLE_VENV)
	$(MIDDLE_VENV)/bin/python -m pip install -q --upgrade pip
	{ printf '%s\n' $(MIDDLE); grep -vE '^(torch|torchvision|deepspeed|setuptools)==' $(CONSTRAINTS); } > $(MIDDLE_VENV)/constraints.txt
	$(MIDDLE_VENV)/bin/python -m pip install -e '.[mpi,test]' -c $(MIDDLE_VENV)/constraints.txt
	touch $@

test-middle: $(MIDDLE_VENV)/.installed
	export PATH="$(CURDIR)/$(MIDDLE_VENV)/bin:$$PATH"
	$(PYTEST) tests/unit/test_private_names.py tests/unit/test_flat_parameters.py
	$(PYTEST) tests/distributed/test_engines.py tests/distributed/test_torch_engines.py -m 'not full'

test-matrix: $(VENV)/.installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" D2FT_WHOLE_MATRIX=1 python -m pytest tests/distributed/test_engines.py \
		tests/distributed/test_torch_engines.py tests/distributed/test_parallel.py

# On its own: `make -n` runs a recipe that names $(MAKE), all of it.
no-newest:
	rm -rf $(NEWEST_VENV)

test-newest: no-newest
	$(MAKE) test-full lint VENV=$(NEWEST_VENV) CONSTRAINTS=/dev/null

constraints: test-newest
	$(NEWEST_VENV)/bin/python tests/constraints.py > tests/constraints.txt

# What ends soonest comes first. A commit's soak goes on where it ended.
check-all: lint wheel demo test-full test-slurm soak-results test-middle test-oldest test-newest test-matrix
	$(MAKE) soak SOAK=runs/kills-$$(git rev-parse --short HEAD).jsonl

wheel: | $(BIN)/python
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(MIDDLE_VENV) $(NEWEST_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
