# `make demo` and `make test` need nothing but Python >= 3.10: they create their own environment in $(VENV).
PYTHON ?= python3
VENV ?= .venv
# This very version, first: a bare "torch" would pull gigabytes of CUDA packages onto a machine that may have no GPU.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[demo,dev]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py

test: $(VENV)/.ready
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/bench_alignment.py
	$(BIN)/python benchmarks/bench_convergence.py
	$(BIN)/python benchmarks/bench_estimation.py
	$(BIN)/python benchmarks/bench_update.py
	$(BIN)/python benchmarks/bench_demo_rates.py

clean:
	rm -rf $(VENV) runs build dist
