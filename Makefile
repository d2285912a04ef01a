# Two commands do everything: `make run` and `make test`. The rest is for contributors.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FUZZ_STAMP := $(VENV)/.installed-fuzz
ARGS ?=
PROTOS := $(shell find proto -name '*.proto' | sort)
SERVICES := $(shell find proto -name '*_service.proto' | sort)
CODE := agent bench cloud common deploy firmware_sim keys tests

.PHONY: help run soak test test-socketcan test-crash test-powercut test-feed simulate fuzz mutants nightly lint format proto proto-check lock bench bench-socketcan clean

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is %s; set PYTHON=" % sys.version.split()[0])'
	@echo "Setting up $(VENV) (about a minute, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

run: $(STAMP) ## The main job, from grant to bill, with real processes (ARGS=--keep leaves it running)
	@$(BIN)/python -m deploy.demo.story $(ARGS)

test: $(STAMP) ## All tests that a change must pass
	@$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# 77: there can be no guest here, and the reason was said.
GUEST = PYTHONPATH=.:tests $(BIN)/python -m tools.guest
IN_GUEST = $(BIN)/python -m pytest -q -p no:cacheprovider --timeout 120

test-socketcan: $(STAMP) ## The bus suite on real SocketCAN: vcan0 if it is here, else a guest's, and two emulated controllers
	@$(GUEST) -- $(IN_GUEST) tests/bus -k "not virtual and not slcan and not controllers and not pulled" $(ARGS) || test $$? = 77
	@$(GUEST) --kvaser -- $(IN_GUEST) tests/bus -k "controllers or pulled" $(ARGS) || test $$? = 77

test-crash: $(STAMP) ## 50 rounds of kill -9 in a drive (ROUNDS=50)
	@FOD_CRASH_ROUNDS=$${ROUNDS:-50} $(BIN)/python -m pytest --timeout 1200 -s tests/e2e/test_crash_rounds.py $(ARGS)

test-powercut: $(STAMP) ## Power cuts of the journal on ext4 in a guest, and a control that must lose data (CUTS=5)
	@PYTHONPATH=.:tests $(BIN)/python -m tools.powercut --cuts $(or $(CUTS),5) || test $$? = 77
	@PYTHONPATH=.:tests $(BIN)/python -m tools.powercut --cuts 1 --control || test $$? = 77

simulate: $(STAMP) ## Months of life of many vehicles, by new seeds (SEEDS=1000), or one again: FOD_SEED=N make simulate
	@if test -n "$${FOD_SEED:-}"; then set -- -k this_seed; else export FOD_SEEDS=$${SEEDS:-1000}; fi; \
		$(BIN)/python -m pytest --timeout 1200 -s tests/simulation "$$@" $(ARGS)

test-feed: $(STAMP) ## A year of a vehicle billed through the usage feed, to the unit (DAYS=365)
	@FOD_FEED_DAYS=$${DAYS:-365} $(BIN)/python -m pytest -s tests/e2e/test_usage_feed.py $(ARGS)


$(FUZZ_STAMP): $(STAMP) requirements-fuzz.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements-fuzz.lock
	@touch $@

fuzz: $(FUZZ_STAMP) ## Coverage-guided fuzzing of every parser (SECONDS=60 for each, JOBS=1 at a time, TARGET=NAME, INPUT=FILE)
	@PYTHONPATH=.:tests $(BIN)/python -m fuzz.run --seconds $(or $(SECONDS),60) --jobs $(or $(JOBS),1) $(if $(TARGET),--target $(TARGET)) $(if $(INPUT),--input $(INPUT))

mutants: $(STAMP) ## Changes that no test notices, in agent/trust/ and the guard (ONLY=FILE, SAMPLE=100)
	@PYTHONPATH=.:tests $(BIN)/python -m tools.mutants $(if $(ONLY),--only $(ONLY)) $(if $(SAMPLE),--sample $(SAMPLE)) $(ARGS)

nightly: $(STAMP) ## The long forms of the tests
	@$(MAKE) test-crash ROUNDS=50
	@$(MAKE) test-powercut CUTS=20
	@$(MAKE) test-feed
	@$(MAKE) simulate SEEDS=10000
	@$(MAKE) mutants ARGS=--fresh
	@$(MAKE) fuzz SECONDS=1200
	@$(MAKE) soak

lint: $(STAMP) proto-check ## Style, types, direction of imports, contracts
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy $(CODE)
	@$(BIN)/lint-imports --no-logo
	@cd proto && ../$(BIN)/buf lint

format: $(STAMP) ## Format the code
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

define generate
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I proto --python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I proto --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(SERVICES)
endef

proto: $(STAMP) ## Generate openfod/ from proto/
	@rm -rf openfod
	@$(call generate,.)

proto-check: $(STAMP) ## Check that openfod/ is what proto/ says
	@rm -rf .cache/proto && mkdir -p .cache/proto
	@$(call generate,.cache/proto)
	@diff -r -x __pycache__ .cache/proto/openfod openfod || { echo "openfod/ is not what proto/ says; run: make proto"; exit 1; }

lock: ## Renew the lock files (needs uv)
	uv pip compile --quiet --universal --generate-hashes --no-header --no-emit-index-url --python-version 3.11 --extra cloud --extra sim --extra dev pyproject.toml -o requirements.lock
	uv pip compile --quiet --universal --generate-hashes --no-header --no-emit-index-url --python-version 3.11 --group fuzz -o requirements-fuzz.lock
	uv pip compile --quiet --universal --generate-hashes --no-header --no-emit-index-url --python-version 3.11 pyproject.toml -o requirements-agent.lock

bench: $(STAMP) ## Benchmarks; prints figures (ARGS=NAME for one of them)
	@$(BIN)/python -m bench $(ARGS)

soak: $(STAMP) ## An hour of an agent at full load: memory, wake-ups, journal (SECONDS=3600)
	@SECONDS=$(or $(SECONDS),3600) $(BIN)/python -m bench.soak

bench-socketcan: $(STAMP) ## The benchmark of a fully loaded bus, on vcan0 if it is here, else in an emulated machine, where ratios count
	@test -e /sys/class/net/vcan0 || export OPENFOD_BENCH_SLOW=16; $(GUEST) --qemu --timeout 1800 -- $(BIN)/python -m bench bus_load || test $$? = 77

clean: ## Remove what was made, the environment included
	rm -rf $(VENV) .cache run dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
