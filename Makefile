PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-all audit experiments lint docs clean
help:
	@echo "make demo      trains 10 simulated clients on handwritten digits, beside the centralised baseline"
	@echo "make test      the quick tests"
	@echo "make test-all  all tests"
	@echo "make experiments  compares the recipes with their headers, then the published experiments: hours"
	@echo "make audit     attacks on the shipped privacy, with what they prove beside what is claimed"
	@echo "make lint      ruff and mypy"
	@echo "make docs      builds the documentation into site/"
	@echo "make clean     removes what the others made, $(VENV) included"

# torch comes first and alone, so that a build of it that pip finds on disk (say, for CPU only) is taken.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all,dev]"
	touch $@

.PHONY: $(VENV)
$(VENV): $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow or not slow"

experiments: $(INSTALLED)
	$(BIN)/python benchmarks/recipes.py
	$(BIN)/python benchmarks/experiments.py

audit: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -rP tests/audit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site logs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
