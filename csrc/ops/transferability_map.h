#pragma once

#include "ops/check.h"

namespace riskmap {

// source [B, Z, *S] (or [B, R, *S] with regions [R, Z]), target [B, *S], conditional [C, Z] -> [B, *S] float32. `op`
// names the caller in messages.
void check_transferability_map(const char* op, const Tensor& source, const Tensor& target, const Tensor& conditional,
                               const OptionalTensor& regions);

}  // namespace riskmap
