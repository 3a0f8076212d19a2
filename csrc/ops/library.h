// The namespace of the ops, and where their schemas are defined: beside the checks, RISKMAP_SCHEMAS(m) { m.def(...); }.
// Every backend has the checks, but a schema may be defined once: by the CPU library alone. The test library of
// csrc/cuda_on_host has a namespace of its own, and defines them there.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef RISKMAP_NAMESPACE
#define RISKMAP_NAMESPACE riskmap_ext
#endif

#if defined(RISKMAP_DEFINES_SCHEMAS)
#define RISKMAP_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(RISKMAP_NAMESPACE, m)
#else
#define RISKMAP_SCHEMAS(m) \
  template <class Unused>  \
  [[maybe_unused]] static void schemas_elsewhere(Unused& m)
#endif
