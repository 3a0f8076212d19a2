#pragma once

#include "ops/check.h"

namespace riskmap {

// source [B, Z, *S], target [B, *S] -> joint [C, Z] float64 (zeros on the same device when nothing is valid).
void check_leep_statistics(const Tensor& source, const Tensor& target, int64_t num_classes);

}  // namespace riskmap
