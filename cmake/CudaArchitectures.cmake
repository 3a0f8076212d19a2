# The GPU architectures of the kernels: sets CMAKE_CUDA_ARCHITECTURES unless it is given.
#   -DCMAKE_CUDA_ARCHITECTURES=90            one, with PTX for later GPUs
#   -DCMAKE_CUDA_ARCHITECTURES=release       all architectures of a release
# Not given: the GPUs of this machine, or 90 if there are none.
# Code for 80 also runs on 86 and 89.
set(RISKMAP_RELEASE_ARCHITECTURES 75-real 80-real 90-real 100-real 120)

if(NOT CMAKE_CUDA_ARCHITECTURES AND DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}")
endif()
if(CMAKE_CUDA_ARCHITECTURES STREQUAL "release")
  set(CMAKE_CUDA_ARCHITECTURES ${RISKMAP_RELEASE_ARCHITECTURES})
elseif(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 90)
  find_program(RISKMAP_NVIDIA_SMI nvidia-smi)
  if(RISKMAP_NVIDIA_SMI)
    execute_process(COMMAND "${RISKMAP_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE capabilities RESULT_VARIABLE smi_result ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${capabilities}")
    if(smi_result EQUAL 0 AND capabilities)
      list(REMOVE_DUPLICATES capabilities)
      list(TRANSFORM capabilities REPLACE "\\." "")
      set(CMAKE_CUDA_ARCHITECTURES ${capabilities})
    endif()
  endif()
endif()
