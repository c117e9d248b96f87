# `make demo` and `make test` need nothing before them: both set up .venv when it is missing or out of date.
# PYTHON may name another interpreter: make setup PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
# What pins the packages; another file for an interpreter or an index that lacks these versions.
CONSTRAINTS ?= constraints.txt
PIP_INSTALL := CONSTRAINTS=$(CONSTRAINTS) bash .ci/install $(BIN)/python

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test check mutate soak calls floors roots sglang engines engines-sglang engines-vllm \
	bench fmt openapi clean

help:
	@echo "make demo     three nodes on this machine, a kill, a restore from memory"
	@echo "make test     the test suite"
	@echo "make check    linters, types, import rules, OpenAPI drift"
	@echo "make bench    the benchmarks"
	@echo "make fmt      format the code"
	@echo "make mutate   break the code on purpose, and see whether a test notices"
	@echo "make soak     randomised campaigns: pauses, slow links, flips, contents, kills,"
	@echo "              hostile peers, objects in /dev/shm (SEED=, MINUTES= of each)"
	@echo "make calls    thousands of generated API calls (downloads 40 MB; EXAMPLES=, SEED=)"
	@echo "make floors   the core of the tests with the lowest versions of dependencies"
	@echo "make roots    \`make demo\` and \`make test\` in minimal Debians (root, debootstrap)"
	@echo "make sglang   inside a real SGLang (downloads 0.4 GB)"
	@echo "make engines  whole servers: engines-sglang (15 minutes), engines-vllm (downloads 0.6 GB)"
	@echo "make openapi  write openapi/openapi.json"
	@echo "make setup    build .venv"
	@echo "make clean    remove .venv, caches and builds"

setup: $(STAMP)

# The last two: an environment may forbid Python to write bytecode, and every start of a node would compile all anew.
$(STAMP): pyproject.toml $(CONSTRAINTS) .ci/system-libraries .ci/install
	@PYTHON="$(PYTHON)" bash .ci/system-libraries
	@test -x $(BIN)/pip || { echo "building $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV): about 80 packages, some minutes the first time"
	@$(PIP_INSTALL) hatchling editables
	@$(PIP_INSTALL) --no-build-isolation --editable '.[cpu,dev]'
	@echo "compiling"
	@$(BIN)/python -m compileall -q app shm transfer
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "import app.cli.main, app.api.application, uvicorn, safetensors.torch"
	@touch $@

demo: setup
	@$(BIN)/hotspare demo

# Two processes share the tests: half of the time is waiting, and together they need less than 1 GiB of /dev/shm.
test: setup
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m app.api.openapi_document --check

mutate: setup
	@$(BIN)/python tools/mutate.py

# Of each campaign so many minutes: make soak SEED=7 MINUTES=20 CAMPAIGNS="pauses kills"; one round again: ROUND=3
MINUTES ?= 5
soak: setup
	@$(BIN)/python -m tests.soak $(CAMPAIGNS) --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(if $(ROUND),--round $(ROUND))

# SGLang and what it imports, beside .venv and not in it: Triton alone takes 1 GB, and torch must stay as it is.
SGLANG := build/sglang
$(SGLANG)/.set-up: tests/sglang/requirements.txt | $(STAMP)
	@rm -rf $(SGLANG)
	@echo "installing into $(SGLANG)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(SGLANG) --requirement $<
	@touch $@

sglang: setup $(SGLANG)/.set-up
	@PYTHONPATH=$(abspath $(SGLANG)) $(BIN)/python -m pytest tests/sglang

engines: engines-sglang engines-vllm

engines-sglang: setup $(SGLANG)/.set-up
	@PYTHONPATH=$(abspath $(SGLANG)) $(BIN)/python -m pytest tests/engines/sglang -s

# A whole vLLM for CPUs, in an environment of its own: it wants other versions than ours of much.
ENGINES_VLLM := build/engines-vllm
$(ENGINES_VLLM)/.set-up: tests/engines/vllm/requirements.txt pyproject.toml | $(STAMP)
	@rm -rf $(ENGINES_VLLM)
	@$(PYTHON) -m venv $(ENGINES_VLLM)
	@echo "installing into $(ENGINES_VLLM)"
	@bash .ci/install $(ENGINES_VLLM)/bin/python torch hatchling editables setuptools
	@$(ENGINES_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@$(ENGINES_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

engines-vllm: setup $(ENGINES_VLLM)/.set-up
	@ENGINES_VLLM=$(abspath $(ENGINES_VLLM))/bin/python $(BIN)/python -m pytest tests/engines/vllm

# schemathesis pins versions of its own: beside .venv and not in it. EXAMPLES=2000 makes some 30,000 calls.
SCHEMATHESIS := build/schemathesis
EXAMPLES ?= 100
$(SCHEMATHESIS)/bin/st:
	@$(PYTHON) -m venv $(SCHEMATHESIS)
	@$(SCHEMATHESIS)/bin/python -m pip install --quiet --disable-pip-version-check 'schemathesis>=4.3,<5'

calls: setup $(SCHEMATHESIS)/bin/st
	@$(BIN)/python tools/generated_calls.py --schemathesis $(abspath $(SCHEMATHESIS)/bin/st) --examples $(EXAMPLES) $(if $(SEED),--seed $(SEED))

# The lowest versions that pyproject.toml names, in an environment of their own. Old packages warn, which is no failure.
FLOORS := build/floors
FLOORS_TESTS := tests/shm tests/app/cli tests/app/terminal tests/app/cluster tests/contract/test_api.py \
    tests/contract/test_api_faults.py tests/transfer/engine $(filter-out %_transformers.py,$(wildcard tests/transfer/test_*.py))
$(FLOORS)/.set-up: pyproject.toml constraints.txt tools/floors.py .ci/install | $(STAMP)
	@rm -rf $(FLOORS)
	@$(PYTHON) -m venv $(FLOORS)
	@$(BIN)/python tools/floors.py > $(FLOORS)/requirements.txt
	@echo "installing into $(FLOORS)"
	@CONSTRAINTS=/dev/null bash .ci/install $(FLOORS)/bin/python --only-binary :all: --requirement $(FLOORS)/requirements.txt
	@touch $@

floors: setup $(FLOORS)/.set-up
	@$(FLOORS)/bin/python -m pytest --numprocesses 2 --dist worksteal -W default::DeprecationWarning $(FLOORS_TESTS)

# Which runs: make roots RUNS="bookworm:root trixie:somebody"; needs nothing of .venv.
roots:
	@bash tools/minimal_root.sh $(RUNS)

bench: setup
	@$(BIN)/python -m compileall -q app shm transfer
	@set -e; for script in $(wildcard tests/bench/*_figures.py); do echo "== $$script"; $(BIN)/python $$script; done

fmt: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

openapi: setup
	@$(BIN)/python -m app.api.openapi_document --write

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find app shm transfer tests -name __pycache__ -type d -prune -exec rm -rf {} +
