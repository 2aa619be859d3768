# make sample   images from the shipped model, from nothing but Python
# make test     everything a change must pass: style, types, documentation, tests
# Overridable: PYTHON (which makes the virtual environment), VENV (where), TORCH (which build), WORKERS, PYTEST (more flags).
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST ?=
WORKERS ?= 2
OUTPUT ?= outputs
FUZZ ?= 100000

BIN := $(VENV)/bin
PROMPTS := --prompt "a red apple, noto style" --prompt "grinning face, twemoji style" \
	--prompt "red heart, fluent style" --prompt "watermelon, noto style"

.PHONY: help install install-dev sample test test-slow fuzz test-gpu lint format docs clean
.DEFAULT_GOAL := help

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for users and one for developers; both are redone when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# torch first and alone: an exact version keeps pip from taking a newer, larger build for one of the other packages.
$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev,torch,train,docs]"
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed ## virtual environment with the package

install-dev: $(VENV)/.installed-dev ## the same with everything tests and documentation need

sample: install ## four images from the shipped model, with timings
	$(BIN)/diffuse-jax generate $(PROMPTS) --num-inference-steps 25 --guidance-scale 5 --seed 0 1 2 3 --output $(OUTPUT)

lint: install-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install-dev ## the site, in docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

test: lint docs ## everything that CI checks, the tests last
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST)

test-slow: install-dev ## the tests that take minutes, and new random configurations of samplers
	$(BIN)/python -m pytest -m slow $(PYTEST)
	DIFFUSE_JAX_TEST_RANDOM=1 $(BIN)/python -m pytest tests/schedulers/test_properties.py $(PYTEST)

fuzz: install-dev ## FUZZ damaged files of all kinds (100,000), from another beginning each time
	DIFFUSE_JAX_FUZZ=$(FUZZ) DIFFUSE_JAX_TEST_SEED=$$$$ $(BIN)/python -m pytest -q tests/test_fuzz.py $(PYTEST)

test-gpu: install-dev ## parity with PyTorch on CUDA, and docs/results/parity_cuda.json
	JAX_PLATFORMS= XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python -m pytest -m gpu tests/torch_backend $(PYTEST)
	$(BIN)/python -m benchmarks.parity --device cuda

clean: ## caches and built documentation, not the virtual environment
	rm -rf docs/_build docs/_generated build dist .mypy_cache .ruff_cache .pytest_cache .cache
