#!/usr/bin/env bash
# The tests of the ops on the CUDA kernels, compiled for the CPU (csrc/cuda_on_host), as `make cuda-on-host`,
# `make cuda-on-host-asan` and `make cuda-on-host-tsan` call it:
#   python_tests/run_cuda_on_host.sh none | address | thread [options of pytest]
# address: AddressSanitizer and UndefinedBehaviorSanitizer. thread: ThreadSanitizer, on volumes of 8 voxels a side in
# several thread orders. It needs g++ and, as PYTHON, a Python with riskmap_ext installed and cmake and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

sanitizer=${1:?none, address or thread}
shift
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
export CXX=${CXX:-g++}
[ "$sanitizer" = none ] && name= || name=$sanitizer
RISKMAP_CUDA_ON_HOST_LIBRARY=$("$python" python_tests/cuda_on_host.py $name)
export RISKMAP_CUDA_ON_HOST_LIBRARY

run=("$python" -m pytest -p no:cacheprovider -q -r fE)
preload() { # Python itself is not sanitized: the runtime has to be loaded first
  echo "$("$CXX" -print-file-name="$1") $("$CXX" -print-file-name=libstdc++.so)"
}

case $sanitizer in
  none)
    # The cases of test_matches_reference come below, in their own files.
    "${run[@]}" -k "not test_matches_reference" python_tests/test_cuda_{on_host,faults,kernel_choice}.py "$@"
    "${run[@]}" --cuda-on-host -k "TestEqualsDiceCELoss or TestOverlappingChannels and not soft and not compile" \
      python_tests/test_monai_loss.py "$@"
    # One order is enough where it shows what every other shows: test_cuda_faults holds it against them.
    RISKMAP_CUDA_ON_HOST_ORDER=random:3 "${run[@]}" --cuda-on-host -m "not cuda" -k "not compile and not threads and not driver" \
      $("$python" python_tests/op_tests.py) python_tests/test_{identities,cuda_bad_values,overwrite_logits}.py "$@"
    ;;
  address)
    # Addresses hardly depend on the order of threads: the forward one and another.
    LD_PRELOAD=$(preload libasan.so) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
      "${run[@]}" -k "not TestEveryOrder or random:2" python_tests/test_cuda_on_host.py "$@"
    ;;
  thread)
    # Addresses may be too random for ThreadSanitizer; torch's own threads are not its business here.
    fixed=()
    setarch -R true 2> /dev/null && fixed=(setarch -R)
    LD_PRELOAD=$(preload libtsan.so) TSAN_OPTIONS=exitcode=66:halt_on_error=1 OMP_NUM_THREADS=1 \
      "${fixed[@]}" "${run[@]}" python_tests/test_cuda_on_host.py -k TestEveryOrder "$@"
    ;;
  *)
    echo "expected none, address or thread, got $sanitizer" >&2
    exit 2
    ;;
esac
