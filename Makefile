# Needs make, git and Python 3.11 or newer; everything else is installed into .venv (yours) and .venv-nox (the checks').
.DEFAULT_GOAL := help
.PHONY: help quickstart test lint format docs notebooks clean

# The first interpreter that really runs and is new enough (a version manager may leave names that do not run).
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; break; }; done)
PIP := -m pip --disable-pip-version-check -qq
# Where the default index offers CUDA builds only, this names one with CPU builds.
TORCH_INDEX := $(if $(SKY_TORCH_INDEX),--index-url $(SKY_TORCH_INDEX))
NOX := .venv-nox/bin/python -m nox

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | awk -F'\t' '{ printf "make %-12s %s\n", $$1, $$2 }'

python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "skyGPT needs Python 3.11 or newer ($(or $(PYTHON),python3): $$("$(or $(PYTHON),python3)" -V 2>&1 | tail -n 1)); install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }

.venv/ready: constraints.txt $(wildcard packages/*/pyproject.toml) | python
	@echo "installing torch and the workspace into .venv (once; a minute or more)"
	@"$(PYTHON)" -m venv .venv
	@.venv/bin/python $(PIP) install --no-compile --constraint constraints.txt $(TORCH_INDEX) torch
	@.venv/bin/python $(PIP) install --constraint constraints.txt $(foreach package,$(wildcard packages/*/pyproject.toml),--editable $(dir $(package)))
	@touch $@

.venv-nox/ready: Makefile | python
	@echo "installing nox into .venv-nox (once)"
	@"$(PYTHON)" -m venv .venv-nox
	@.venv-nox/bin/python $(PIP) install "nox>=2026.10" pre-commit
	@touch $@

quickstart: .venv/ready  ## install the workspace into .venv and train a first model (minutes)
	.venv/bin/sky quickstart

test: .venv-nox/ready  ## run the whole test matrix
	.venv-nox/bin/python tools/matrix.py

lint: .venv-nox/ready  ## check format, style and types
	$(NOX) -r -s lint

format: .venv-nox/ready  ## rewrite what the linter can rewrite
	$(NOX) -r -s lint -- fix

docs: .venv-nox/ready  ## build the documentation into docs/_build/html
	$(NOX) -r -s docs

notebooks: .venv-nox/ready  ## execute every notebook in smoke mode
	$(NOX) -r -s notebooks

clean:  ## remove environments, caches and builds; runs/ and data/ stay
	rm -rf .venv .venv-nox .nox .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
