# Finds torch and offers it as the imported target `torch_stable`.
#
# Only the stable ABI is used, so the headers and libtorch_cpu.so of any Python's torch suffice.
# find_package(Torch) is avoided: on CUDA builds of torch it requires a full CUDA toolkit.
set(RISKMAP_TORCH_PYTHON "${Python_EXECUTABLE}" CACHE FILEPATH "The Python whose torch to build against")

execute_process(
  COMMAND "${RISKMAP_TORCH_PYTHON}" -c
    "import torch, os; print(os.path.dirname(torch.__file__)); print(torch.__version__); print(torch.version.cuda or 'none')"
  OUTPUT_VARIABLE torch_facts ERROR_VARIABLE torch_error RESULT_VARIABLE torch_result
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT torch_result EQUAL 0)
  message(FATAL_ERROR "riskmap_ext: ${RISKMAP_TORCH_PYTHON} cannot import torch. Install torch >= 2.10 first, then build "
                      "with --no-build-isolation.\n${torch_error}")
endif()
string(REPLACE "\n" ";" torch_facts "${torch_facts}")
list(GET torch_facts 0 TORCH_DIR)
list(GET torch_facts 1 TORCH_VERSION)
list(GET torch_facts 2 TORCH_CUDA_VERSION)
if(TORCH_VERSION VERSION_LESS "2.10")
  message(FATAL_ERROR "riskmap_ext: needs torch >= 2.10, found ${TORCH_VERSION} in ${TORCH_DIR}")
endif()

add_library(torch_stable SHARED IMPORTED)
set_target_properties(torch_stable PROPERTIES
  IMPORTED_LOCATION "${TORCH_DIR}/lib/libtorch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX}"
  INTERFACE_INCLUDE_DIRECTORIES "${TORCH_DIR}/include")
target_compile_definitions(torch_stable INTERFACE
  TORCH_TARGET_VERSION=${RISKMAP_TORCH_TARGET_VERSION} TORCH_STABLE_ONLY)
