# `make demo` and `make test` need only Python >= 3.10. They create an environment in $(VENV).
PYTHON ?= python3
VENV ?= .venv
# Installed first, in this version: without a version, "torch" would install gigabytes of CUDA packages on machines
# that may have no GPU.
TORCH ?= torch==2.13.0
# DeepSpeed, and those of its requirements that are not in the environment.
DEEPSPEED ?= deepspeed==0.19.8 hjson py-cpuinfo einops msgpack ninja nvidia-ml-py
BIN := $(VENV)/bin
# The tests run in this many processes, each with one thread; a file runs in one process.
PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

.PHONY: demo test test-all campaign mutants test-zero3 test-oldest test-versions test-frameworks lint docs dist bench clean

$(VENV)/.ready: pyproject.toml
	@echo "Making an environment in $(VENV), once: first $(TORCH) (some 200 MB and more), then the other packages."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	@echo "Installing the other packages: a few minutes."
	$(BIN)/pip install --editable ".[cli,demo,dev,docs]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py

test: $(VENV)/.ready
	$(PYTEST) --quick

test-all: $(VENV)/.ready
	$(PYTEST)

# DeepSpeed is installed in a folder of its own, so that no other test imports it. At its first use it builds a kernel
# with g++.
$(VENV)/zero3/.ready: $(VENV)/.ready
	$(BIN)/pip install --quiet setuptools wheel
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --target $(VENV)/zero3 --upgrade $(DEEPSPEED)
	touch $@

test-zero3: $(VENV)/zero3/.ready
	PYTHONPATH=$(VENV)/zero3 $(BIN)/python -m pytest tests/test_launch.py -k zero3

# Kills, full disks, damaged files, dead processes and extreme numbers; docs/reliability.md describes it. ARGUMENTS, for
# instance --seed 3 --part kills, are those of `python -m campaign`.
campaign: $(VENV)/.ready
	OMP_NUM_THREADS=1 PYTHONPATH=tests:benchmarks $(BIN)/python -m campaign $(ARGUMENTS)

# First the lines that each test runs, then the mutants.
mutants: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py --measure
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py --record benchmarks/results/mutants.json

# The next three make environments of their own, one after the other, and remove them. With uv on the path they take less
# time. test-versions downloads about 4 GB, most of it for the oldest torch.
VERSIONS := $(BIN)/python benchmarks/versions.py --torch $(TORCH)

test-oldest: $(VENV)/.ready
	$(VERSIONS) --only "oldest libraries" --smoke

test-versions: $(VENV)/.ready
	$(VERSIONS)

test-frameworks: $(VENV)/.ready
	$(VERSIONS) --frameworks

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in build/site. A warning (a link that leads nowhere, a page without a line in `nav`) is an error, and so is
# a script, a style or a font from the network.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	! grep --recursive --extended-regexp --include='*.html' '<(script|link|img)[^>]+(src|href)="https?:' build/site

# What a release uploads, in dist/.
dist: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m zipfile --list dist/*.whl | grep lora_ga/py.typed

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/bench_alignment.py
	$(BIN)/python benchmarks/bench_estimation.py
	$(BIN)/python benchmarks/bench_update.py
	$(BIN)/python benchmarks/bench_demo_rates.py

clean:
	rm -rf $(VENV) runs build dist
