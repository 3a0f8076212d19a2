#pragma once

#include "ops/check.h"

namespace riskmap {

// source [B, Z, *S] (or [B, R, *S] with regions [R, Z]), target [B, *S] -> joint [C, Z] float64 (zeros on the same
// device when nothing is valid).
void check_leep_statistics(const Tensor& source, const Tensor& target, const OptionalTensor& regions,
                           int64_t num_classes);

}  // namespace riskmap
