PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Tests run in JOBS processes, each on one core; the tests of a file run in the same process.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
# What test-fast leaves out: tests of the Trainer, and of the helpers that start processes.
NOT_FAST := adapters audit callbacks cli contract examples gpu helpers serving trainer vertical test_benchmarks.py test_contributing.py test_docs.py test_recipes.py test_tutorials.py

.PHONY: help demo test test-fast test-all audit experiments soak fuzz third-party lint docs clean
help:
	@echo "make demo      trains 10 simulated clients on handwritten digits, beside the centralised baseline"
	@echo "make test      all tests but the slow ones, in JOBS=2 processes"
	@echo "make test-fast those that need no Trainer: about a minute"
	@echo "make test-all  all tests"
	@echo "make experiments  compares the recipes with their headers, then the published experiments: hours"
	@echo "make audit     attacks on the shipped privacy, with what they prove beside what is claimed"
	@echo "make soak      silos and a coordinator that are killed at random for 200 rounds: ten minutes or more"
	@echo "make fuzz      random and damaged calls to a coordinator for ten minutes"
	@echo "make third-party  modules of other packages in a federation, in environments of their own: 3 GB"
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
	$(PYTEST)

test-fast: $(INSTALLED)
	$(PYTEST) $(addprefix --ignore=tests/,$(NOT_FAST))

test-all: $(INSTALLED)
	$(PYTEST) -m "slow or not slow"

experiments: $(INSTALLED)
	$(BIN)/python benchmarks/recipes.py
	$(BIN)/python benchmarks/experiments.py

audit: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow or not slow" -rP tests/audit tests/callbacks/sample_level_dp tests/callbacks/test_run_record.py \
		tests/clients/test_draw_test.py tests/privacy tests/trainer/privacy

soak: $(INSTALLED)
	$(BIN)/python benchmarks/soak.py --silos 6 --rounds 200

fuzz: $(INSTALLED)
	FUZZ_SECONDS=600 $(BIN)/python -m pytest -m "slow or not slow" -rP tests/coordinator/test_fuzz.py

third-party:
	$(PYTHON) -m benchmarks.third_party

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-third-party* build dist site logs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
