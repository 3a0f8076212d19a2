# riskmap_add_cuda_library(<source>...) builds libriskmap_cuda from kernels (.cu, without torch headers) and glue (.cpp).
function(riskmap_add_cuda_library)
  # torch builds without CUDA lack libtorch_cuda. This stub has the few functions of it that are called, and gives the
  # library the right dependency. It stays in the build folder.
  add_library(riskmap_torch_cuda_stub SHARED csrc/cuda/torch_cuda_stub.cpp)
  set_target_properties(riskmap_torch_cuda_stub PROPERTIES
    OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/torch_cuda_stub)

  add_library(riskmap_cuda SHARED ${ARGN})
  set_target_properties(riskmap_cuda PROPERTIES
    CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
    CUDA_VISIBILITY_PRESET hidden
    CUDA_RUNTIME_LIBRARY Shared)  # torch's own, already in the process
  target_include_directories(riskmap_cuda PRIVATE csrc)
  target_include_directories(riskmap_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_definitions(riskmap_cuda PRIVATE
    RISKMAP_CUDA_ARCHITECTURES="${RISKMAP_CUDA_ARCHITECTURES}" $<$<COMPILE_LANGUAGE:CXX>:USE_CUDA>)
  # Divisions to 2 ulp instead of 1/2: enough here, with a quarter of the instructions. Compression cuts code to a fifth.
  target_compile_options(riskmap_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-prec-div=false;-Xfatbin=-compress-all>)
  target_link_libraries(riskmap_cuda PRIVATE torch_stable riskmap_torch_cuda_stub riskmap_warnings)
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    target_link_options(riskmap_cuda PRIVATE -Wl,-z,defs -Wl,--as-needed)
  endif()
  riskmap_make_portable(riskmap_cuda)
  # For the separate CUDA wheel (cmake/wheels.py).
  file(WRITE ${PROJECT_BINARY_DIR}/cuda_wheel.py
    "VERSION = \"${RISKMAP_VERSION}\"\n"
    "TOOLKIT = \"${RISKMAP_CUDA_TOOLKIT}\"\n"
    "ARCHITECTURES = \"${RISKMAP_CUDA_ARCHITECTURES}\"\n")
  install(TARGETS riskmap_cuda LIBRARY DESTINATION riskmap_ext)
endfunction()
