# The kernels of csrc/cuda compiled by g++ and run on CPU tensors, for tests; nothing here is installed.
option(RISKMAP_CUDA_ON_HOST "Build the CUDA kernels for the CPU, and programs with seeded faults, for tests" OFF)

# riskmap_add_cuda_on_host(<source>...): builds the library riskmap_cuda_on_host from these sources of the ops and the
# CUDA library, and the programs faults, faults_address and faults_thread, which differ in their sanitizers.
function(riskmap_add_cuda_on_host)
  if(RISKMAP_CUDA_ENABLED)
    message(FATAL_ERROR "riskmap_ext: RISKMAP_CUDA_ON_HOST=ON compiles the .cu files with g++: set RISKMAP_CUDA=OFF")
  endif()
  set(folder ${PROJECT_SOURCE_DIR}/csrc/cuda_on_host)

  # The runner announces fibers to the sanitizers; it must not be instrumented itself.
  add_library(cuda_on_host_runner OBJECT ${folder}/runner.cpp)
  target_compile_options(cuda_on_host_runner PRIVATE -O2 -fno-sanitize=all)
  target_link_libraries(cuda_on_host_runner PRIVATE riskmap_warnings)
  set_target_properties(cuda_on_host_runner PROPERTIES POSITION_INDEPENDENT_CODE ON)

  add_library(riskmap_cuda_on_host SHARED ${ARGN})
  riskmap_kernels_on_host(riskmap_cuda_on_host ${ARGN})
  target_compile_definitions(riskmap_cuda_on_host PRIVATE RISKMAP_NAMESPACE=riskmap_cuda_on_host RISKMAP_DEFINES_SCHEMAS)
  target_link_libraries(riskmap_cuda_on_host PRIVATE torch_stable)
  if(RISKMAP_SANITIZE)
    # Skip UBSan checks that AddressSanitizer covers, and make its checks calls: a fifth of the compile time.
    target_compile_options(riskmap_cuda_on_host PRIVATE -g1 -fno-sanitize-recover=all
      -fno-sanitize=null,pointer-overflow --param=asan-instrumentation-with-call-threshold=0)
  endif()

  file(GLOB faults CONFIGURE_DEPENDS ${folder}/faults/*.cu)
  foreach(sanitizer IN ITEMS none address thread)
    set(program faults_${sanitizer})
    add_executable(${program} ${folder}/faults/main.cpp ${faults})
    riskmap_kernels_on_host(${program} ${faults})
    set_target_properties(${program} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
    target_compile_options(${program} PRIVATE -g -O1)
    if(NOT sanitizer STREQUAL "none")
      string(REPLACE "address" "address,undefined" flags ${sanitizer})
      target_compile_options(${program} PRIVATE -fsanitize=${flags} -fno-sanitize-recover=all -fno-omit-frame-pointer)
      target_link_options(${program} PRIVATE -fsanitize=${flags})
    endif()
  endforeach()
endfunction()

# Compiles the .cu files among the sources of a target as C++, and links the runner.
function(riskmap_kernels_on_host target)
  set(kernels ${ARGN})
  list(FILTER kernels INCLUDE REGEX "\\.cu$")
  set_source_files_properties(${kernels} PROPERTIES LANGUAGE CXX)
  target_compile_definitions(${target} PRIVATE RISKMAP_CUDA_ON_HOST)
  target_include_directories(${target} PRIVATE
    ${PROJECT_SOURCE_DIR}/csrc/cuda_on_host ${PROJECT_SOURCE_DIR}/csrc)
  # As in nvcc: no strict aliasing, and its own pragmas. Anything above -O1 takes longer to compile than it saves.
  target_compile_options(${target} PRIVATE -O1 -fno-strict-aliasing -Wno-unknown-pragmas)
  target_link_libraries(${target} PRIVATE riskmap_warnings cuda_on_host_runner)
endfunction()
