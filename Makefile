# Every target makes the virtual environment it needs. Needs: make, Python >= 3.11.
#
#   make demo     ask questions about passages of Wikipedia, and watch the model find and read them
#   make test     all tests (CPU, offline)
#   make test-lowest, make test-newest
#                 the core tests with the lowest versions that pyproject.toml allows, and with the
#                 newest that there are, each in an environment of its own
#   make test-harness
#                 the model of lm-evaluation-harness, asked by it, in an environment of its own
#   make lint     ruff (rules, format) and types
#   make docs     docs/cli.md from `msa --help`; docs/ and the reference as a site in build/site
#   make dist     wheel and sdist, checked; the wheel is installed elsewhere and shows its demo
#
# TORCH_ARGS goes to the `pip install` of torch alone, for instance to choose an index with builds
# for CPU; PYTEST_ARGS goes to pytest, DEMO_ARGS to `msa demo`.

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BIN := $(VENV)/bin

# torch comes first and alone: what follows then keeps the build that was chosen here.
TORCH := $(shell grep '^torch==' constraints.txt)
INSTALL_TORCH = $(BIN)/pip install --quiet $(TORCH_ARGS) $(TORCH)
INSTALL = $(BIN)/pip install --quiet --constraint constraints.txt --editable

.PHONY: help demo test test-lowest test-newest test-harness lint types format docs dist clean

help:
	@sed -n '3,12s/^# *//p' Makefile

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
	$(INSTALL) '.[dev,train,evaluate,documents,distributed,serve,replicas,serve-test,docs,release]'
	@touch $@ $(VENV)/.core

demo: $(VENV)/.core
	@$(BIN)/msa demo $(DEMO_ARGS)

# The tests' models are tiny: a second thread costs more than it brings, a second process does not.
# Files stay whole, for their fixtures, and in order: the long ones, of tests/integration, come first.
PYTEST = OMP_NUM_THREADS=1 $(1)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.full
	$(call PYTEST,$(BIN)) $(PYTEST_ARGS)

# torch is the pinned one in both: other wheels are gigabytes of CUDA.
CORE_TESTS = tests/unit tests/integration/test_asking.py \
  tests/integration/test_training.py::test_a_run_logs_every_step_and_its_parts \
  tests/integration/test_training.py::test_the_exported_model_answers_from_a_bank
CORE_EXTRAS = '.[dev,train]'

test-lowest:
	test -e $(VENV)-lowest/bin/pip || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet $(TORCH_ARGS) $(TORCH)
	$(VENV)-lowest/bin/python tools/lowest_versions.py > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/pip install --quiet --constraint $(VENV)-lowest/constraints.txt \
	  --editable $(CORE_EXTRAS)
	$(call PYTEST,$(VENV)-lowest/bin) $(CORE_TESTS) $(PYTEST_ARGS)

test-newest:
	test -e $(VENV)-newest/bin/pip || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet $(TORCH_ARGS) $(TORCH)
	$(VENV)-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager $(TORCH) \
	  --editable $(CORE_EXTRAS)
	$(call PYTEST,$(VENV)-newest/bin) $(CORE_TESTS) $(PYTEST_ARGS)

# Scientific packages of half a gigabyte come with it, which nothing else here needs.
test-harness:
	test -e $(VENV)-harness/bin/pip || $(PYTHON) -m venv $(VENV)-harness
	$(VENV)-harness/bin/pip install --quiet $(TORCH_ARGS) $(TORCH)
	$(VENV)-harness/bin/pip install --quiet --constraint constraints.txt \
	  --editable '.[dev,train,harness]'
	OMP_NUM_THREADS=1 $(VENV)-harness/bin/pytest tests/integration/test_lm_eval_harness.py \
	  $(PYTEST_ARGS)

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
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The wheel is built from the sdist, so that both are known to be complete.
DIST_VENV = $(abspath $(VENV))-dist
dist: $(VENV)/.full
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv --clear $(DIST_VENV)
	$(DIST_VENV)/bin/pip install --quiet $(TORCH_ARGS) $(TORCH)
	$(DIST_VENV)/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd $(DIST_VENV) && bin/msa --help > help.txt && MSA_OFFLINE=1 bin/msa demo --worlds

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest $(VENV)-harness $(VENV)-dist build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
