# Every task of this project. `make` alone lists them; each one makes the environment first if that is needed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# The scripts of an environment hold its absolute path: a checkout that was moved or copied needs a new one.
STAMP := $(VENV)/.installed-$(shell pwd | cksum | cut -d' ' -f1)

# PYTHON=python3.12 chooses an interpreter; STATE=folder keeps the demo's state elsewhere than in the checkout.
# SEEDS, FIRST_SEED, KILLS and DAYS say how much to simulate, to kill and to bill.
PYTHON ?=
SEEDS ?= 2000
FIRST_SEED ?= 0
KILLS ?= 200
DAYS ?= 90
# How many tests run at once: most of them wait for a site's clock. Those that start a whole Airflow run alone.
WORKERS ?= auto
STATE ?=
WHERE := $(if $(STATE),--state "$(STATE)")

.PHONY: help
help:  ## List these targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMP)  ## Make the environment in .venv, with every pinned dependency.

.PHONY: demo
demo: setup  ## Bill five days of sample usage through real Airflow to the sandbox, and prove it (first time 5 minutes).
	@exec $(BIN)/python include/sandbox/demo.py demo $(WHERE)

.PHONY: up
up: setup  ## Keep Airflow's UI and the sandbox running until Ctrl-C; prints address and login.
	@exec $(BIN)/python include/sandbox/demo.py up $(WHERE)

.PHONY: sandbox
sandbox: setup  ## Run the sandbox billing sites alone on port 8400 until Ctrl-C (stop `make up` first).
	@mkdir -p .demo
	exec $(BIN)/usage-billing sandbox --worlds include/sandbox/worlds --books .demo/books.sqlite --port 8400 \
	  --port-file .demo/sandbox.port

.PHONY: test
test: lint types contracts  ## Check everything: lint, types, import contracts, all tests.
	@$(BIN)/python -m pytest -m "not acceptance" -n $(WORKERS) --dist loadgroup
	exec $(BIN)/python -m pytest -m acceptance

.PHONY: lint
lint: setup  ## Check style and formatting.
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: setup  ## Check types.
	@$(BIN)/mypy
	MYPYPATH=plugins:include/sandbox $(BIN)/mypy include/sandbox/*.py include/sandbox/preload/*.py

.PHONY: contracts
contracts: setup  ## Check that the layers import one way only.
	@PYTHONPATH=plugins $(BIN)/lint-imports

.PHONY: simulate
simulate: setup  ## Draw SEEDS histories from FIRST_SEED on, on both ledgers, and check the promise in each.
	@exec $(BIN)/usage-billing simulate --first-seed $(FIRST_SEED) --seeds $(SEEDS) --ledger both

.PHONY: crash
crash: setup  ## Kill real Airflow tasks by SIGKILL while they deliver, KILLS times, and compare (half an hour and more).
	@exec $(BIN)/python include/sandbox/crash.py --kills $(KILLS)

.PHONY: backfills
backfills: setup  ## Bill DAYS days in any order through real Airflow, while rows come late and change, and compare.
	@exec $(BIN)/python include/sandbox/any_order.py --days $(DAYS)

.PHONY: bench
bench: setup  ## Measure each stage and the whole road at 100,000 and 1,000,000 rows.
	@exec $(BIN)/python include/sandbox/bench.py

.PHONY: bench-suite
bench-suite: setup  ## Measure ten expectations on 1,000,000 rows beside the same rules written by hand.
	@exec $(BIN)/python include/sandbox/bench_suite.py

.PHONY: constraints
constraints: setup  ## Resolve the dependencies into constraints.txt again; UPGRADE=1 takes the newest versions.
	@$(BIN)/uv pip compile --quiet $(if $(UPGRADE),--upgrade) --universal --python-version 3.11 --no-header --extra dev pyproject.toml -o constraints.txt

.PHONY: build
build: setup  ## Build the wheel into dist.
	@$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

.PHONY: demo-reset
demo-reset:  ## Forget the demo: its ledger, books, warehouse and Airflow's home.
	@rm -rf .demo .airflow

.PHONY: clean
clean: demo-reset  ## Remove everything that these targets made, the environment too.
	@rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@fits() { "$$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }
	can_make() { "$$1" -c 'import ensurepip, venv' 2>/dev/null; }
	find_python() {
	  for candidate in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do
	    if fits "$$candidate" && "$$@" "$$candidate"; then echo "$$candidate"; return; fi
	  done
	}
	as_root() {
	  if [ "$$(id -u)" = 0 ]; then "$$@"; elif command -v sudo >/dev/null; then sudo -n "$$@"; else return 1; fi
	}
	install() {
	  command -v apt-get >/dev/null && as_root apt-get update -qq </dev/null &&
	    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$$@" </dev/null >/dev/null
	}
	if [ ! -e $@ ]; then
	  python=$$(find_python can_make)
	  if [ -z "$$python$(PYTHON)" ]; then
	    bare=$$(find_python true)
	    missing=$${bare:+$$("$$bare" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')}
	    install $${missing:-python3 python3-venv} || true
	    python=$$(find_python can_make)
	  fi
	  if [ -z "$$python" ]; then
	    echo "Python 3.11, 3.12 or 3.13 with its venv module is missing and could not be installed from here." >&2
	    echo "On Debian or Ubuntu: sudo apt-get install $${missing:-python3 python3-venv}" >&2
	    echo "With an interpreter elsewhere: make setup PYTHON=/path/to/python3.12" >&2
	    exit 1
	  fi
	  echo "Making $(VENV) with $$("$$python" --version)."
	  "$$python" -m venv --clear $(VENV)
	fi
	echo "Installing the pinned dependencies: 1 to 3 minutes, about 1 GB."
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" </dev/null
	touch $@
