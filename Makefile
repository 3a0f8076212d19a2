# Every target makes .venv and installs what it needs: each is the only command a fresh machine with
# Python >= 3.10, g++ and git needs. Another torch: make TORCH=torch==2.12.0 test
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test bench bench-full instructions lint format sanitize install clean
.PHONY: cuda-on-host cuda-on-host-asan cuda-on-host-tsan gpu-check

install: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy cmake ninja "pybind11>=2.12"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	$(BIN)/python -m riskmap_ext.info
	touch $@

demo: install
	$(BIN)/riskmap demo

test: install
	$(BIN)/python -m pytest

sanitize: install
	PYTHON=$(BIN)/python python_tests/run_sanitized.sh

# The CUDA kernels on CPU tensors, and under sanitizers: no GPU and no nvcc needed.
cuda-on-host: install
	PYTHON=$(BIN)/python python_tests/run_cuda_on_host.sh none

cuda-on-host-asan: install
	PYTHON=$(BIN)/python python_tests/run_cuda_on_host.sh address

cuda-on-host-tsan: install
	PYTHON=$(BIN)/python python_tests/run_cuda_on_host.sh thread

# With the Python and the torch of a machine that has a GPU: no environment is made.
gpu-check:
	$(PYTHON) python_tests/gpu_check.py $(GPU_CHECK_OPTIONS)

bench: install benchmarks/.peers
	$(BIN)/python -m benchmarks.run

bench-full: install benchmarks/.peers
	$(BIN)/python -m benchmarks.run --full

instructions: install
	$(BIN)/python -m benchmarks.instructions

# nnU-Net's loss needs torch alone; without network its columns stay empty.
benchmarks/.peers:
	-$(BIN)/python -m pip install --quiet --no-deps --target $@ nnunetv2==2.8.1

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp')

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp')

clean:
	rm -rf build dist *.egg-info riskmap_ext/*.so
