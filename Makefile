# Every target creates .venv and installs what it needs: on a fresh machine with Python >= 3.10, g++
# and git, any of them works as the only command. Another torch: make TORCH=torch==2.12.0 test
PYTHON ?= python3
TORCH ?= torch==2.13.0
NNUNET ?= nnunetv2==2.8.1 acvl-utils==0.2.6 dynamic-network-architectures==0.4.4 batchgenerators==0.25.5 \
  batchgeneratorsv2==0.3.6
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test bench bench-full bench-transfer bench-transfer-full instructions lint format sanitize docs docs-reference install clean wheel fuzz
.PHONY: fuzz-files kill-runs disk-faults long-life
.PHONY: cuda-on-host cuda-on-host-asan cuda-on-host-tsan cuda-release cuda-machine-code gpu-check

install: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy cmake ninja "pybind11>=2.13"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	-$(BIN)/python -m pip install --quiet --no-deps $(NNUNET)
	$(BIN)/python -m riskmap_ext.info
	touch $@

demo: install
	$(BIN)/riskmap demo

# Two processes at once; their OpenMP threads wait without spinning.
test: WORKERS ?= 2
test: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile

# N generated calls of the ops, after those of the last run; it prints how to repeat a failure.
fuzz: N ?= 20000
fuzz: install
	$(BIN)/python python_tests/fuzz.py --calls $(N)

# The same with spoilt files, for every command of the driver.
fuzz-files: N ?= 2000
fuzz-files: install
	$(BIN)/python python_tests/malformed.py --calls $(N)

# At least N kills of runs, at random moments. Then disks that fail or fill up; hours of training with kills.
kill-runs: N ?= 120
kill-runs: install
	$(BIN)/python python_tests/kills.py --kills $(N)

disk-faults: install
	$(BIN)/python python_tests/disks.py

long-life: N ?= 50000
long-life: install
	$(BIN)/python python_tests/long_life.py --steps $(N)

sanitize: install
	PYTHON=$(BIN)/python python_tests/run_sanitized.sh

# The CUDA kernels on CPU tensors, and under sanitizers: no GPU and no nvcc needed.
cuda-on-host: install
	PYTHON=$(BIN)/python python_tests/run_cuda_on_host.sh none

cuda-on-host-asan: install
	PYTHON=$(BIN)/python python_tests/run_cuda_on_host.sh address

cuda-on-host-tsan: install
	PYTHON=$(BIN)/python python_tests/run_cuda_on_host.sh thread

# The CUDA library for all release architectures, and its kernels' resources (csrc/cuda/resources.json).
cuda-release: install
ifeq ($(shell command -v $${CUDACXX:-nvcc}),)
	@echo "cuda-release: no nvcc on PATH and no CUDACXX: nothing is compiled"
else
	$(BIN)/cmake -S . -B build/cuda_release -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DRISKMAP_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=release
	$(BIN)/cmake --build build/cuda_release --target riskmap_cuda
	$(BIN)/python csrc/cuda/check_resources.py --build build/cuda_release
endif

# That library's machine code for sm_90, executed on the CPU: results, and kernel costs (budgets.json).
cuda-machine-code: install
ifneq ($(shell command -v $${CUDACXX:-nvcc}),)
	-$(BIN)/python -m pip install --quiet nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
endif
	$(BIN)/python csrc/cuda/machine_code/check.py --build build/cuda_release

# Uses the Python and torch of a machine that has a GPU: no environment is created.
gpu-check:
	$(PYTHON) python_tests/gpu_check.py $(GPU_CHECK_OPTIONS)

bench: install
	$(BIN)/python -m benchmarks.run

bench-full: install
	$(BIN)/python -m benchmarks.run --full

# Rows go to benchmarks/results/transfer, the page to docs/evidence.md; stored runs are not repeated.
TRANSFER_OPTIONS ?= --workers 2
TRANSFER_SECOND = hippocampi,brains,structures,lesion_spots,tissues,patients
bench-transfer: install
	$(BIN)/python -m benchmarks.transfer run --scenarios hippocampi --arms second --lengths short --seeds 10-12 \
	  --tuning-seeds 2 $(TRANSFER_OPTIONS)
	$(BIN)/python -m benchmarks.transfer report

# The decisive runs come first, then the rest.
bench-transfer-full: install
	$(BIN)/python -m benchmarks.transfer run --scenarios $(TRANSFER_SECOND) --arms second $(TRANSFER_OPTIONS)
	$(BIN)/python -m benchmarks.transfer run --scenarios shifted_1,shifted_2,shifted_4 --arms kept $(TRANSFER_OPTIONS)
	$(BIN)/python -m benchmarks.transfer run --scenarios hippocampi_residual,brains_residual --arms prior $(TRANSFER_OPTIONS)
	$(BIN)/python -m benchmarks.transfer run --scenarios hippocampi,brains --arms second-more $(TRANSFER_OPTIONS)
	$(BIN)/python -m benchmarks.transfer run --round 1 $(TRANSFER_OPTIONS)
	$(BIN)/python -m benchmarks.transfer report

instructions: install
	$(BIN)/python -m benchmarks.instructions

# The source archive and a wheel built from it for this Python, tested in a fresh environment; in dist/. For others:
#   make wheel WHEEL_OPTIONS="--python python3.10 python3.14 --cuda /usr/local/cuda-12.8/bin/nvcc"
WHEEL_OPTIONS ?= --torch "$(TORCH)"
wheel: install
	$(BIN)/python cmake/wheels.py $(WHEEL_OPTIONS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# The site, in build/site: warnings are errors. The variable silences an advertisement.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# docs/reference/ and docs/api.md from the configuration's models, the commands and the docstrings.
docs-reference: install
	$(BIN)/python docs/generate.py

clean:
	rm -rf build dist *.egg-info riskmap_ext/*.so
