# make demo   from a fresh clone to the first answer, offline after the installation
# make test   the whole test suite, with lint and types
# Both create .venv with pinned versions (constraints.txt). PYTHON and PIP_ARGS can be set on the command line.
# make docs   docs/errors.md from the catalogue of errors and docs/cli.md from the help; tests fail where it was forgotten
# make notebook   runs docs/notebooks again and saves its outputs; make site   the documentation as a site, in build/site
# make torture   every fault of docs/reliability.md; about an hour on two cores, and goes on where it was stopped
# make bench  every benchmark, peers included, in .venv-bench (constraints-peers.txt); hours. make bench-setup installs only.

PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
PIP_ARGS ?=
BIN := .venv/bin
NATIVE := $(wildcard src/nsae_cli/kernels/native/*.c src/nsae_cli/kernels/native/*.h)
BENCH := .venv-bench/bin
SITE := .venv-docs/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
BENCH_INSTALL := $(BENCH)/python -m pip install --quiet --disable-pip-version-check \
	--constraint benchmarks/constraints-peers.txt $(PIP_ARGS)

.PHONY: demo test lint docs notebook site clean torture bench bench-setup

demo: .venv/demo.stamp
	$(BIN)/nsae run experiments/001-quickstart/config.yaml

test: .venv/test.stamp lint
	$(BIN)/python -m pytest

lint: .venv/test.stamp
	$(BIN)/ruff check src tests docs/*.py benchmarks experiments
	$(BIN)/ruff format --check src tests docs/*.py benchmarks experiments
	$(BIN)/mypy

torture: .venv/test.stamp
	$(BIN)/python tests/faults/torture.py

notebook: .venv/test.stamp
	$(BIN)/python docs/execute_notebook.py

site: .venv-docs/site.stamp
	NO_MKDOCS_2_WARNING=1 $(SITE)/mkdocs build --strict

docs: .venv/test.stamp
	$(BIN)/python docs/generate_errors.py
	$(BIN)/python docs/generate_cli.py

.venv/demo.stamp: pyproject.toml constraints.txt $(NATIVE) | .venv/bin/python
	@echo "installing nsae and its dependencies into .venv (several minutes the first time)"
	$(INSTALL) --editable .
	@touch $@

.venv/test.stamp: pyproject.toml constraints.txt $(NATIVE) | .venv/bin/python
	@echo "installing nsae, its dependencies and the test tools into .venv (several minutes the first time)"
	$(INSTALL) --editable '.[dev]'
	@touch $@

# Only what builds the site: no torch, and nsae itself is not needed.
.venv-docs/site.stamp: constraints.txt | .venv-docs/bin/python
	$(SITE)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS) \
		mkdocs-material mkdocs-jupyter
	@touch $@

.venv-docs/bin/python:
	@test -n "$(PYTHON)" || { echo "the site needs Python 3.11, 3.12 or 3.13 (set PYTHON=…)" >&2; exit 1; }
	$(PYTHON) -m venv .venv-docs

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "nsae needs Python 3.11, 3.12 or 3.13 (set PYTHON=…)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

bench-setup: .venv-bench/peers.stamp

bench: .venv-bench/peers.stamp
	$(BENCH)/python benchmarks/bench_train_step.py
	$(BENCH)/python benchmarks/bench_sparse_ops.py
	$(BENCH)/python benchmarks/bench_grid.py
	$(BENCH)/python benchmarks/bench_memory.py
	$(BENCH)/python benchmarks/bench_collect.py
	$(BENCH)/python benchmarks/bench_collect_peers.py
	$(BENCH)/python benchmarks/bench_peers.py
	$(BENCH)/python benchmarks/bench_whole_run.py

# torch first and alone: a CPU build that PIP_ARGS names then satisfies everybody else.
.venv-bench/peers.stamp: pyproject.toml benchmarks/constraints-peers.txt $(NATIVE) | .venv-bench/bin/python
	@echo "installing nsae and the packages it is compared with into .venv-bench (several minutes the first time)"
	$(BENCH_INSTALL) torch
	$(BENCH_INSTALL) --editable . sae-lens transformer-lens natsort schedulefree numba
	$(BENCH_INSTALL) --no-deps eai-sparsify dictionary-learning
	@touch $@

.venv-bench/bin/python:
	@test -n "$(PYTHON)" || { echo "nsae needs Python 3.11, 3.12 or 3.13 (set PYTHON=…)" >&2; exit 1; }
	$(PYTHON) -m venv .venv-bench

clean:
	rm -rf .venv .venv-bench .venv-docs .cache build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
