# Every target does the set-up it needs, in .venv; `make help` lists them.

PYTHON ?= python3
TORCH ?= torch==2.13.0
NP ?= 4
TENSOR ?= 1
PIPELINE ?= 2
ARGS ?=
LINK ?= 10mbit

SETUP := $(wildcard hybridpar/install/*.py) setup.py
PIP := .venv/bin/python -m pip --disable-pip-version-check
ANY_PYTHON := $(if $(filter file,$(origin PYTHON)),--any-python)
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help demo test bench setup clean FORCE
.DEFAULT_GOAL := help

help:
	@echo 'make demo     train a small GPT on real text: NP=$(NP) ranks, PIPELINE=$(PIPELINE) TENSOR=$(TENSOR), data the rest'
	@echo '              for example: make demo NP=8 PIPELINE=2 TENSOR=2'
	@echo 'make test     run all tests (ARGS="-k mesh" to choose)'
	@echo 'make bench    compare with DDP, FSDP2, DTensor and torch pipelining, then sync policies over a slow link'
	@echo '              (LINK=$(LINK) between two hosts of namespaces; LINK= leaves them out)'
	@echo 'make setup    only the set-up: torch, hybridpar, MPI, Horovod into .venv'
	@echo 'make clean    remove .venv and what was built; the cache in ~/.cache/hybridpar stays'
	@echo
	@echo 'PYTHON=python3.12 chooses the Python for .venv, TORCH=torch==2.13.0 the torch.'

demo: .venv/ready
	.venv/bin/hybridpar run -np $(NP) --tensor $(TENSOR) --pipeline $(PIPELINE) examples/gpt.py $(ARGS)

test: .venv/ready
	.venv/bin/python -m pytest $(ARGS)

bench: .venv/ready
	.venv/bin/python -m benchmarks.compare $(ARGS)
	$(if $(LINK),.venv/bin/python -m benchmarks.policies --steps 32 --link $(LINK))

setup: .venv/ready

# A moved checkout or another PYTHON= makes .venv unfit; another TORCH= makes it unready.
ifneq ($(filter demo test bench setup,$(MAKECMDGOALS)),)
ifneq ($(shell $(PYTHON) -m hybridpar.install.venv --fits .venv $(ANY_PYTHON) 2>&1 || echo unfit)$(filter-out file,$(origin TORCH)),)
.venv/ready: FORCE
endif
endif

.venv/ready: $(SETUP)
	@$(PYTHON) -m hybridpar.install.venv .venv $(ANY_PYTHON)
	@echo 'Installing $(TORCH)'
	@$(PIP) install -q '$(TORCH)'
	@echo 'Installing hybridpar and what its tests and examples need'
	@$(PIP) install -q -e '.[test,examples]'
	@.venv/bin/python -m hybridpar.install
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
