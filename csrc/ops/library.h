// The namespace of the ops; the test library of csrc/cuda_on_host is built with another.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef RISKMAP_NAMESPACE
#define RISKMAP_NAMESPACE riskmap_ext
#endif
