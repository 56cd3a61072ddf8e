# Everything here needs Python 3.11 or newer with venv, a C++ compiler and pip; nothing else.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Arguments of `latent-rl demo`, for example DEMO_ARGS="--task role-play --seed 1".
DEMO_ARGS ?=
BENCH_ARGS ?= run
# Small models run up to 40 times slower when the threads of two processes spin on the same cores.
WORKERS ?= 2
# Installed where torch brings no Triton (its CPU build): interpreter and compile tests need one.
TRITON := triton==3.6.0

TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
NATIVE := $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS := pyproject.toml CMakeLists.txt constraints.txt $(NATIVE) $(VENV)/kernels.list

EMULATOR := $(shell find tests/emulator -name "*.cpp" -o -name "*.h" -o -name "*.cu")

.PHONY: FORCE help setup demo test check-style types lint unit demo-test gpu-test sanitize mutate bench clean

help:
	@echo "make demo      set up and run the whole method on real images, with a table and a report"
	@echo "make test      lint, types, builds, unit tests, kernels without a GPU, a short demo"
	@echo "make bench     time the ops against their peers (BENCH_ARGS=...)"
	@echo "make lint      style and types"
	@echo "make gpu-test  the tests that need a CUDA device"
	@echo "make sanitize  compute-sanitizer over every kernel (SANITIZE_ARGS=...)"
	@echo "make mutate    break every kernel in one place and see a test turn red (MUTATE=word)"
	@echo "make setup     the development environment in $(VENV)"
	@echo "make clean     remove builds, caches and $(VENV)"

# Torch first, and alone: what follows then finds it installed and keeps it.
$(VENV)/torch.stamp: constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python found; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than Python 3.11; set PYTHON=" >&2; exit 2; }
	@echo "setting up $(VENV) with $(PYTHON): a few minutes, once"
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) install -q "$(TORCH)"
	@touch $@

# An editable install finds edited kernels by itself, but new files only after a reinstall.
$(VENV)/kernels.list: FORCE
	@mkdir -p $(VENV)
	@find kernels -name '*.py' | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(VENV)/demo.stamp: $(VENV)/torch.stamp $(BUILD_INPUTS)
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp $(BUILD_INPUTS)
	$(PIP) install -q -c constraints.txt -e '.[demo,eval,judge,peft,dev]' pytest-xdist
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install -q $(TRITON)
	@touch $@ $(VENV)/demo.stamp

setup: $(VENV)/dev.stamp

demo: $(VENV)/demo.stamp
	$(BIN)/latent-rl demo $(DEMO_ARGS)

test: lint unit demo-test

lint: check-style types

check-style: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(EMULATOR)

types: $(VENV)/dev.stamp
	$(BIN)/mypy

unit: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'not gpu' $(PYTEST_ARGS)

# A fiftieth of the demo's steps says nothing about learning; it says that every step runs and hands over.
demo-test: $(VENV)/dev.stamp
	rm -rf build/demo-test
	$(BIN)/latent-rl demo --task both --scale 0.02 --out build/demo-test --no-resume

# Most of the time is Triton compiling; what takes many gigabytes stays in one process.
gpu-test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m gpu tests/gpu $(PYTEST_ARGS)

sanitize: $(VENV)/dev.stamp
	$(BIN)/python -m tests.sanitize $(SANITIZE_ARGS)

# The peers that run on a CPU; those of a GPU come with the extra bench-cuda.
$(VENV)/bench.stamp: $(VENV)/dev.stamp
	$(PIP) install -q -c constraints.txt -e '.[bench]'
	@touch $@

mutate: $(VENV)/dev.stamp
	$(BIN)/python -m tests.mutation $(MUTATE)

bench: $(VENV)/bench.stamp
	$(BIN)/latent-rl bench $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find latent_rl tests benchmarks kernels examples -name __pycache__ -type d -prune -exec rm -rf {} +
