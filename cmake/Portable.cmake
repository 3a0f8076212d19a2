# riskmap_make_portable(<target>...): builds libraries for manylinux_2_28 with the compiler of a newer system.
# They use the system's libstdc++, since exceptions cross into torch.
option(RISKMAP_PORTABLE "For systems with glibc 2.28 and the libstdc++ of g++ 8 (manylinux_2_28)" OFF)

set_source_files_properties(csrc/portable.cpp PROPERTIES COMPILE_OPTIONS -fno-lto)  # which drops .symver

function(riskmap_make_portable)
  if(RISKMAP_PORTABLE)
    foreach(target ${ARGN})
      target_sources(${target} PRIVATE csrc/portable.cpp)
      target_link_options(${target} PRIVATE -Wl,--wrap=log -Wl,--wrap=pthread_once -Wl,--gc-sections)
    endforeach()
  endif()
endfunction()
