// New tensors beside those that an op was given.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "ops/check.h"

namespace riskmap::cuda {

// Uninitialised, on the device of `like`.
inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace riskmap::cuda
