# Every target does its own set-up on a machine with Python >= 3.10, g++ and make.
PYTHON ?= python3
CPU_TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Further options for pip, e.g. PIP_FLAGS="--index-url https://pypi.example.org/simple".
PIP_FLAGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
# Here a compiler is there, so a kernel that does not build is an error and no warning.
export FASTLDM_BUILD ?= 1
CSRC := $(wildcard csrc/*.* csrc/*/*.*)
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(CSRC)
# Two workers of one thread each: what the figures in the docs assume, and no oversubscribed cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: demo model test test-long bench lint format clean

demo: .venv/.core
	@$(BIN)/fastldm generate "three black stars on a white background" --steps 25 --seed 1 -o demo.png

# The shipped model again, from its seeds: a night of one CPU core. After an interruption it goes on.
model: .venv/.core
	for part in scenes scenes_on scenes_arranged; do $(BIN)/fastldm train fastldm/training/$$part.toml || exit 1; done

test: .venv/.test
	$(PYTEST)

test-long: .venv/.test
	$(PYTEST) -m long

bench: .venv/.bench
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: .venv/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf build dist *.egg-info fastldm/*.so .venv

# The build of torch without CUDA: from the indexes pip knows, else from the one of the PyTorch project; where there is
# no build of that name (macOS), the plain one.
.venv/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) setuptools wheel pybind11
	$(PIP) "torch==2.13.0+cpu" 2>/dev/null || $(PIP) --extra-index-url $(CPU_TORCH_INDEX) torch
	@touch $@

.venv/.core: .venv/.torch $(BUILD_INPUTS)
	$(PIP) --no-build-isolation --editable .
	@touch $@

.venv/.test .venv/.bench .venv/.lint: .venv/.%: .venv/.core
	$(PIP) "fastldm[$*]"
	@touch $@
