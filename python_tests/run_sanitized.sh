#!/usr/bin/env bash
# The tests of the ops with a CPU library that AddressSanitizer and UndefinedBehaviorSanitizer watch, once for each
# instruction set of this machine. Options go to pytest: python_tests/run_sanitized.sh -k regions
#
# `make sanitize` calls it. On its own it needs g++ and, as PYTHON, a Python with torch, numpy, pytest, cmake and
# pybind11. The sanitized library lies in build/asan and never beside the installed package.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(realpath -s "${PYTHON:-.venv/bin/python}")
export PATH="$(dirname "$python"):$PATH" CXX=${CXX:-g++}
build=$PWD/build/asan
package=$build/package

cmake -S . -B "$build" -DPython_EXECUTABLE="$python" -DRISKMAP_SANITIZE=address,undefined -DRISKMAP_CUDA=OFF
cmake --build "$build" --parallel
rm -rf "$package"
mkdir -p "$package"
cp -R riskmap_ext "$package"
rm -f "$package"/riskmap_ext/*.so
cmake --install "$build" --prefix "$package" > /dev/null

read -r -a tests < <("$python" "$PWD/python_tests/op_tests.py")
tests+=("$PWD"/python_tests/test_{determinism,errors}.py)

# Python itself is not sanitized: the runtime has to be loaded first, and Python's own leaks are no concern here.
watched() {
  PYTHONPATH=$package LD_PRELOAD="$($CXX -print-file-name=libasan.so) $($CXX -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 "$@"
}

root=$PWD
cd "$package" # Python looks in the current folder first
for capability in baseline avx2 avx512; do
  if ! RISKMAP_CPU_CAPABILITY=$capability watched "$python" -c "import riskmap_ext" 2> "$build/import.log"; then
    grep -q "this machine has no $capability" "$build/import.log" || { cat "$build/import.log" >&2; exit 1; }
    echo "$capability: not on this machine"
    continue
  fi
  echo "$capability:"
  RISKMAP_CPU_CAPABILITY=$capability watched "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" \
    -p no:cacheprovider -q -r fE -m "not cuda" "${tests[@]}" "$@"
done
