# Decides whether the CUDA library is built and says why: sets RISKMAP_CUDA_ENABLED and RISKMAP_CUDA_REASON.
set(RISKMAP_CUDA AUTO CACHE STRING "Build the CUDA library: AUTO, ON or OFF")
set_property(CACHE RISKMAP_CUDA PROPERTY STRINGS AUTO ON OFF)

set(RISKMAP_CUDA_ENABLED OFF)
if(RISKMAP_CUDA STREQUAL "OFF")
  set(RISKMAP_CUDA_REASON "switched off with RISKMAP_CUDA=OFF")
elseif(NOT EXISTS "${PROJECT_SOURCE_DIR}/csrc/cuda")
  if(RISKMAP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "riskmap_ext: RISKMAP_CUDA=ON, but this version has no CUDA kernels yet")
  endif()
  set(RISKMAP_CUDA_REASON "this version has no CUDA kernels yet")
endif()
message(STATUS "riskmap_ext: CUDA ${RISKMAP_CUDA_ENABLED} (${RISKMAP_CUDA_REASON})")
