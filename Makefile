# Every target makes the virtual environment it needs. Needs: make, Python >= 3.11.
#
#   make demo     ask the small model that ships with the package, and watch it read
#   make test     all tests (CPU, offline)
#   make lint     ruff (rules, format) and types
#   make docs     write docs/cli.md anew from `msa --help`
#
# TORCH_ARGS goes to the `pip install` of torch alone, for instance to choose an index with builds
# for CPU; PYTEST_ARGS goes to pytest.

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
PYTEST_ARGS ?=
BIN := $(VENV)/bin

# torch comes first and alone: what follows then keeps the build that was chosen here.
TORCH := $(shell grep '^torch==' constraints.txt)
INSTALL_TORCH = $(BIN)/pip install --quiet $(TORCH_ARGS) $(TORCH)
INSTALL = $(BIN)/pip install --quiet --constraint constraints.txt --editable

.PHONY: help demo test lint types format docs clean

help:
	@sed -n '3,6s/^# *//p' Makefile

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# A full environment serves `make demo` too; the small one is enough for it.
$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/pip
	test -e $(VENV)/.full || $(INSTALL_TORCH)
	test -e $(VENV)/.full || $(INSTALL) .
	@touch $@

$(VENV)/.full: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL_TORCH)
	$(INSTALL) '.[dev,train,evaluate,documents]'
	@touch $@ $(VENV)/.core

demo: $(VENV)/.core
	@$(BIN)/msa demo

# The tests' models are tiny: a second thread costs more than it brings.
test: $(VENV)/.full
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS)

lint: $(VENV)/.full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

types: $(VENV)/.full
	$(BIN)/mypy

format: $(VENV)/.full
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.full
	$(BIN)/python tools/cli_docs.py docs/cli.md

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
