# Every target makes .venv and installs what it needs: each is the only command a fresh machine with
# Python >= 3.10, g++ and git needs. Another torch: make TORCH=torch==2.12.0 test
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test bench bench-full instructions lint format sanitize install clean

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
