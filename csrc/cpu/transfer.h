// Shared by the ops that read source logits.
#pragma once

#include "cpu/kernels/leep.h"
#include "cpu/tensors.h"

namespace riskmap::cpu {

// The table of a source of regions, as [R, Z] in both precisions.
class SourceTables {
 public:
  SourceTables(const Tensor& source, const OptionalTensor& regions);
  SourceArgs args(const Tensor& source, const Tensor& target, Tensor& keep_source, Tensor& keep_target) const;

 private:
  int64_t classes_;
  std::vector<float> narrow_;
  std::vector<double> wide_;
};

struct TransferPass {
  Tensor map;                             // [B, *S] float32
  std::vector<TransferPartial> partials;  // [B, chunks_per_image]
  Chunking chunking;
};

// curve and wants_range: as in TransferArgs.
TransferPass transfer_pass(const char* op, const Tensor& source, const Tensor& target, const Tensor& conditional,
                           const OptionalTensor& regions, int64_t ignore_index, int64_t background,
                           const math::RiskCurve* curve, bool wants_range);

// Turns the marked T of `count` voxels from `begin` on into weights.
void weigh_map(Tensor& map, int64_t begin, int64_t count, const math::RiskCurve& curve);

}  // namespace riskmap::cpu
