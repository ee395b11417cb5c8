# Every target does its own set-up: a virtual environment in .venv, and only the packages it needs.

PYTHON ?= $(shell for python in python3 python3.12 python3.13 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
DEVICE := $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
CONSTRAINTS := constraints/$(DEVICE).txt
MODEL ?= books-4m
export GOMP_SPINCOUNT ?= 500# OpenMP threads park soon: spinning ones cost a busy machine far more than they gain

.PHONY: demo compress-demo test test-computed test-run check house notorch static serve bench bench-cpu-peers gpu clean

demo: $(VENV)/.ready-client ## build the packaged model, serve it, stream an answer, show the figures
	@$(BIN)/sailfish demo

compress-demo: $(VENV)/.ready-client ## compress the packaged model by three recipes; show size, quality and the page
	@rm -rf out/compress-demo
	@$(BIN)/sailfish compress books-4m -r w4a16-rtn -r w4a16-best -r w8a8-smooth --length 256 --samples 32 \
		-o out/compress-demo

serve: $(VENV)/.ready-client ## serve MODEL (default: the packaged one) on 127.0.0.1:8000
	@$(BIN)/sailfish serve $(MODEL)

bench: $(VENV)/.ready-client ## measure MODEL and append the figures to benchmarks/results
	@$(BIN)/sailfish bench engine $(MODEL)

bench-cpu-peers: $(VENV)/.ready-client ## build llama.cpp in build/peers, measure it and us in turns on this CPU
	@$(BIN)/python benchmarks/cpu_peers.py build/peers
	@env -u GOMP_SPINCOUNT $(BIN)/sailfish bench cpu --peers build/peers

check: $(VENV)/.ready-check ## format, lint, types, house rules, tests without torch
	@$(MAKE) --no-print-directory -j3 static house notorch

test: $(VENV)/.ready-test ## everything that needs no GPU, in halves at once
	@$(MAKE) --no-print-directory -j3 static test-computed test-run

gpu: $(VENV)/.ready-test ## the GPU suite, then the measurements
	@$(BIN)/python -m pytest -q -m gpu tests/gpu
	@$(BIN)/sailfish bench engine $(MODEL) --device cuda

test-computed: $(VENV)/.ready-test
	@OMP_NUM_THREADS=1 nice $(BIN)/python -m pytest -q -m "not gpu" -p no:cacheprovider tests/cpu

test-run: $(VENV)/.ready-test
	@$(BIN)/python -m pytest -q -m "not gpu" -p no:cacheprovider tests --ignore=tests/cpu

house notorch: $(VENV)/.ready-check
	@$(BIN)/python -m pytest -q -m "not slow" -p no:cacheprovider tests/$@

static: $(VENV)/.ready-check
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

clean: ## remove the virtual environment and every cache of the tools
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

$(VENV)/.ready-%: pyproject.toml $(CONSTRAINTS)
	@if [ -z "$(PYTHON)" ]; then echo "error: no Python 3.11 or newer found (install one, or set PYTHON=)"; exit 2; fi
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@echo "installing sailfish[$*] into $(VENV) with $(CONSTRAINTS)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$*]"
	@touch $@ $(if $(filter test,$*),$(VENV)/.ready-check $(VENV)/.ready-client)# which it includes
