# make quickstart   trains on the built-in data and prints the table of results
# make test         runs the fast tests
# make help         lists all targets
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# Uses the first candidate that is Python 3.11, 3.12 or 3.13; PYTHON=… chooses another.
CANDIDATES := python3.12 python3.11 python3.13 python3 python
GOOD := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	if $$p -c "$(GOOD)" >/dev/null 2>&1; then command -v $$p; break; fi; done)
RUN := .venv/bin/python
# The device that runs compute on: that of the environment that there is, else the CPU.
ENVIRONMENT_DEVICE := $(shell cat .venv/device 2>/dev/null || echo cpu)
DEVICE ?= $(ENVIRONMENT_DEVICE)
REQUIREMENTS_gpu := requirements-gpu.txt
REQUIREMENTS_tpu := requirements-tpu.txt
# Further arguments for the command of a target: make quickstart ARGS="--config.seed=1"
ARGS ?=
# Without bytecode each of the tests' processes would compile the package's source again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup quickstart test test-slow test-tpu check bench notebook clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/ready ## create .venv for runs and tests; DEVICE=gpu or DEVICE=tpu for these

# An environment for another device is made anew.
ifneq ($(DEVICE),$(ENVIRONMENT_DEVICE))
.PHONY: .venv/ready
endif

.venv/ready: requirements.txt requirements-dev.txt $(REQUIREMENTS_$(DEVICE))
	@case "$(DEVICE)" in cpu | gpu | tpu) ;; *) \
		echo "DEVICE=$(DEVICE) is not known: make it cpu, gpu or tpu." >&2; \
		exit 1 ;; esac
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c "$(GOOD)" >/dev/null 2>&1; then \
		echo "This project runs on Python 3.11, 3.12 or 3.13; none was found: install one, or name it with PYTHON=/path/to/python." >&2; \
		exit 1; fi
	@rm -rf .venv
	"$(PYTHON)" -m venv .venv
	@echo "$(DEVICE)" >.venv/device
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt \
		$(addprefix -r ,$(REQUIREMENTS_$(DEVICE)))
	@touch $@

quickstart: setup ## train teacher, students and control on the built-in street scenes
	$(RUN) -m semiseg_jax.main --config=configs/streets.py $(ARGS)

test: setup ## run the fast tests
	$(RUN) -m pytest -n auto --maxprocesses=4 --dist=worksteal $(ARGS)

test-slow: setup ## run the tests that take minutes
	SEMISEG_TEST_SHAPES=0 $(RUN) -m pytest -m slow -n auto --maxprocesses=2 --dist=worksteal --durations=40 -rs $(ARGS)

# The TPU compiler is installed in a separate folder, because JAX starts differently in an
# environment that contains libtpu.
test-tpu: setup ## compile a training step for a TPU (none needed), check memory and traffic
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target=.venv-libtpu libtpu==0.0.42.1
	PYTHONPATH=.venv-libtpu $(RUN) -m pytest -m "slow or not slow" -k "v5e or tpu_mesh" \
		tests/test_plan_slow.py tests/planning/test_planner.py tests/planning/test_optimized_hlo.py \
		$(ARGS)

check: setup ## check lint, types, layers, shell scripts
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	.venv/bin/lint-imports
	.venv/bin/shellcheck launch/*.sh

bench: setup ## make bench NAME=train_step: measure speed beside other libraries
	$(RUN) benchmarks/$(NAME).py $(ARGS)

notebook: setup ## execute docs/library.ipynb and store its outputs, after a change of it
	rm -rf runs/library
	$(RUN) -m tests.notebook

clean: ## remove the environment and caches
	rm -rf .venv .venv-* .mypy_cache .pytest_cache .ruff_cache
