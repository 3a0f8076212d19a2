// Gradients of a head's weight and bias: summed by groups of chunks, which depend on the shapes alone, and added up in
// order.
#pragma once

#include <cstdlib>
#include <memory>

#include "cpu/loss_inputs.h"

namespace riskmap::cpu {

class ParameterSums {
 public:
  explicit ParameterSums(const LossInputs& in);
  // For the kernels; features stay as they are.
  HeadGradients args(Volume features) const { return {features, sums_.get(), chunks_per_group_}; }
  int64_t chunks_per_group() const { return chunks_per_group_; }
  Tensor weight(ScalarType dtype) const;  // [C, F]
  Tensor bias(ScalarType dtype) const;    // [C]

 private:
  double total(int64_t index) const;

  bool double_;
  int64_t classes_, channels_, groups_, chunks_per_group_;
  std::unique_ptr<void, decltype(&std::free)> sums_;
};

}  // namespace riskmap::cpu
