# Warnings for our own sources; torch's headers are system headers and cause none.
add_library(riskmap_warnings INTERFACE)
target_compile_options(riskmap_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wnon-virtual-dtor>)
option(RISKMAP_WERROR "Treat warnings as errors" OFF)
if(RISKMAP_WERROR)
  target_compile_options(riskmap_warnings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
