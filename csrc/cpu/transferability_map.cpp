#include "ops/transferability_map.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/capability.h"
#include "cpu/transfer.h"

namespace riskmap::cpu {
namespace {

void check_probabilities(const char* op, const std::vector<double>& values, int64_t source_classes) {
  for (size_t i = 0; i < values.size(); ++i) {
    check(values[i] >= 0 && values[i] <= 1 + 1e-6, op,
          ": conditional must hold probabilities P(y|z) within [0, 1], got ", values[i], " at [",
          static_cast<int64_t>(i) / source_classes, ", ", static_cast<int64_t>(i) % source_classes, "]");
  }
}

// P(y|z), values [C, Z], in the two layouts that TransferArgs names.
template <class acc_t>
struct ConditionalTables {
  std::vector<acc_t> by_source, by_label;

  ConditionalTables(const std::vector<double>& values, TransferArgs& args) {
    const int64_t classes = args.num_classes, source_classes = args.classes;
    const int64_t label_pitch = padded_classes(args);
    by_source.resize(static_cast<size_t>(source_classes * kMinTile));
    by_label.resize(static_cast<size_t>(classes * label_pitch));
    for (int64_t y = 0; y < classes; ++y)
      for (int64_t z = 0; z < source_classes; ++z) {
        const acc_t p = static_cast<acc_t>(values[static_cast<size_t>(y * source_classes + z)]);
        if (classes <= kMinTile) by_source[static_cast<size_t>(z * kMinTile + y)] = p;
        by_label[static_cast<size_t>(y * label_pitch + z)] = p;
      }
    args.by_source = by_source.data();
    args.by_label = by_label.data();
  }
};

}  // namespace

size_t transfer_scratch_bytes(const TransferArgs& args) {
  const int64_t rows = padded_rows(args);
  const int64_t tile = tile_voxels(rows, args.source.dtype);
  return static_cast<size_t>(rows * tile_pitch(tile) + tile) * acc_size(args.source.dtype) +
         static_cast<size_t>(tile) * sizeof(int32_t);
}

SourceTables::SourceTables(const Tensor& source, const OptionalTensor& regions)
    : classes_(regions ? regions->size(1) : source.size(1)) {
  if (!regions) return;
  wide_ = region_rows(*regions, classes_);
  narrow_.assign(wide_.begin(), wide_.end());
}

SourceArgs SourceTables::args(const Tensor& source, const Tensor& target, Tensor& keep_source,
                              Tensor& keep_target) const {
  const Volume volume = view_volume(source, keep_source);
  const void* table = volume.dtype == Dtype::kDouble ? static_cast<const void*>(wide_.data()) : narrow_.data();
  return {volume, wide_.empty() ? nullptr : table, classes_, view_map(target, keep_target)};
}

TransferPass transfer_pass(const char* op, const Tensor& source, const Tensor& target, const Tensor& conditional,
                           const OptionalTensor& regions, int64_t ignore_index, int64_t background,
                           const math::RiskCurve* curve, bool wants_range) {
  Tensor keep_source = source, keep_target = target;
  const SourceTables tables(source, regions);
  TransferArgs args{};
  static_cast<SourceArgs&>(args) = tables.args(source, target, keep_source, keep_target);
  args.num_classes = conditional.size(0);
  args.ignore_index = ignore_index;
  args.background = background;
  args.chunking = chunk_volume(args.source);
  args.curve = curve;
  args.wants_range = wants_range;

  const std::vector<double> values = values_of(conditional);
  check_probabilities(op, values, args.classes);
  std::optional<ConditionalTables<float>> narrow;
  std::optional<ConditionalTables<double>> wide;
  if (args.source.dtype == Dtype::kDouble) {
    wide.emplace(values, args);
  } else {
    narrow.emplace(values, args);
  }

  const size_t chunks = static_cast<size_t>(args.source.batch * args.chunking.chunks_per_image);
  TransferPass pass{empty_map(source, ScalarType::Float), std::vector<TransferPartial>(chunks), args.chunking};
  args.out = static_cast<float*>(pass.map.data_ptr());
  args.partial = pass.partials.data();
  auto* kernel = RISKMAP_CPU_KERNEL(transferability_map);
  for_chunks(args.source, args.chunking, transfer_scratch_bytes(args),
             [&](int64_t chunk, void* scratch) { kernel(args, chunk, scratch); });

  int64_t bad = 0;
  for (const TransferPartial& partial : pass.partials) bad += partial.bad_labels;
  if (bad) raise_bad_labels(op, target, bad, args.num_classes, ignore_index);
  return pass;
}

void weigh_map(Tensor& map, int64_t begin, int64_t count, const math::RiskCurve& curve) {
  float* values = static_cast<float*>(map.data_ptr()) + begin;
  auto* kernel = RISKMAP_CPU_KERNEL(weigh_map);
  constexpr int64_t kBlock = 1 << 14;
  torch::stable::parallel_for(0, (count + kBlock - 1) / kBlock, 4, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(count, last * kBlock);
    kernel(values + first * kBlock, end - first * kBlock, curve);
  });
}

Tensor transferability_map(Tensor source, Tensor target, Tensor conditional, OptionalTensor regions,
                           int64_t ignore_index) {
  check_transferability_map("transferability_map", source, target, conditional, regions);
  return transfer_pass("transferability_map", source, target, conditional, regions, ignore_index, -1, nullptr, false)
      .map;
}

}  // namespace riskmap::cpu

STABLE_TORCH_LIBRARY_IMPL(riskmap_ext, CPU, m) {
  m.impl("transferability_map", TORCH_BOX(&riskmap::cpu::transferability_map));
}
