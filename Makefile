# make demo   the main job on the embedded base model: a hundred facts written, then recalled by another process
# make test   the whole test suite
# make test-vllm   a store served by vLLM and asked for everything; installs vLLM (3.4 GB) into build/vllm
# make test-ray   writes on a Ray cluster of this machine, in an environment of its own, .venv-ray (RAY_VENV=… names one)
# make test-oldest, test-newest   the tests on the least versions that pyproject.toml asks for, on the newest (torch as in CI)
# make lint   what CI checks beside the tests
# make docs   the documentation as a site, in build/site
# make wheel-check   wheel and sdist in dist/, the wheel tried in an environment of its own
# make venv   only the virtual environment, .venv
#
# Each target creates .venv if it is missing and brings it up to date when the requirements change.

PYTHON ?= python3
BIN := .venv/bin
DEMO_STORE := build/demo
RAY_VENV ?= .venv-ray

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-oldest test-newest test-ray test-vllm lint format docs wheel-check

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "loramem needs Python 3.11 or later: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: venv
	rm -rf $(DEMO_STORE)
	$(BIN)/loramem write examples/phonebook.jsonl --store $(DEMO_STORE)
	$(BIN)/loramem verify --store $(DEMO_STORE)
	$(BIN)/python examples/02_check_recall.py examples/phonebook.jsonl $(DEMO_STORE)

test: venv
	$(BIN)/python -m pytest --numprocesses auto

test-slow: venv
	$(BIN)/python -m pytest --numprocesses auto --runslow

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest --numprocesses auto

test-newest: .venv-newest/installed
	.venv-newest/bin/python -m pytest --numprocesses auto

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[dev]'
	touch $@

.venv-newest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet "$$(grep ^torch== constraints.txt)"
	.venv-newest/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

test-vllm: venv
	tests/vllm.sh

test-ray: $(RAY_VENV)/installed
	$(RAY_VENV)/bin/python -m pytest --override-ini=python_files=ray_cluster.py tests/ray_cluster.py

$(RAY_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(RAY_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ray]'
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

wheel-check: venv
	PYTHON=$(PYTHON) tests/wheel.sh

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
