# Compiles each kernel source once for every CPU instruction set, as object libraries.
# The instruction set is selected when the library is loaded (csrc/cpu/capability.cpp).

set(RISKMAP_CPU_CAPABILITIES baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND RISKMAP_CPU_CAPABILITIES avx2 avx512)
endif()
set(RISKMAP_CPU_FLAGS_baseline "")
set(RISKMAP_CPU_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2)
set(RISKMAP_CPU_FLAGS_avx512 -mavx2 -mfma -mf16c -mbmi2 -mavx512f -mavx512bw -mavx512dq -mavx512vl
    -mprefer-vector-width=512)

# riskmap_add_cpu_kernels(<target> <source>...) adds the sources to <target>, compiled for each instruction set.
function(riskmap_add_cpu_kernels target)
  foreach(capability IN LISTS RISKMAP_CPU_CAPABILITIES)
    set(objects ${target}_${capability})
    add_library(${objects} OBJECT ${ARGN})
    set_target_properties(${objects} PROPERTIES POSITION_INDEPENDENT_CODE ON)
    target_include_directories(${objects} PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
    target_compile_definitions(${objects} PRIVATE RISKMAP_CPU_CAPABILITY=${capability})
    target_compile_options(${objects} PRIVATE ${RISKMAP_CPU_FLAGS_${capability}} -fno-math-errno -fno-trapping-math
                           -ffp-contract=fast -Wno-psabi)
    target_link_libraries(${objects} PRIVATE riskmap_warnings)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
  endforeach()
endfunction()
