#include "ops/leep_statistics.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/capability.h"
#include "cpu/transfer.h"

namespace riskmap::cpu {

size_t statistics_scratch_bytes(const StatisticsArgs& args) {
  const int64_t rows = padded_rows(args);
  const int64_t tile = tile_voxels(rows, args.source.dtype);
  const int64_t elements = rows * tile_pitch(tile) + statistics_sums(args.classes, args.num_classes);
  return static_cast<size_t>(elements) * acc_size(args.source.dtype) + static_cast<size_t>(tile) * sizeof(int32_t);
}

Tensor leep_statistics(Tensor source, Tensor target, OptionalTensor regions, int64_t num_classes,
                       int64_t ignore_index) {
  check_leep_statistics(source, target, regions, num_classes);
  Tensor keep_source = source, keep_target = target;
  const SourceTables tables(source, regions);
  StatisticsArgs args{};
  static_cast<SourceArgs&>(args) = tables.args(source, target, keep_source, keep_target);
  args.num_classes = num_classes;
  args.ignore_index = ignore_index;

  // Few large chunks: each brings a table of its own to the sum.
  const int64_t table = num_classes * args.classes;
  const int64_t most_chunks = std::clamp<int64_t>((1 << 17) / table, 16, 256);
  const int64_t per_chunk = (args.source.batch * args.source.voxels + most_chunks - 1) / most_chunks;
  args.chunking = chunk_volume(args.source, std::max<int64_t>(4096, per_chunk) * args.source.classes);

  const size_t chunks = static_cast<size_t>(args.source.batch * args.chunking.chunks_per_image);
  std::vector<double> joint(chunks * static_cast<size_t>(table));
  std::vector<int64_t> bad_labels(chunks);
  args.joint = joint.data();
  args.bad_labels = bad_labels.data();
  auto* kernel = RISKMAP_CPU_KERNEL(leep_statistics);
  for_chunks(args.source, args.chunking, statistics_scratch_bytes(args),
             [&](int64_t chunk, void* scratch) { kernel(args, chunk, scratch); });

  int64_t bad = 0;
  for (int64_t count : bad_labels) bad += count;
  if (bad) raise_bad_labels("leep_statistics", target, bad, num_classes, ignore_index);

  Tensor result = empty({num_classes, args.classes}, ScalarType::Double);
  double* sum = static_cast<double*>(result.data_ptr());
  std::fill(sum, sum + table, 0.0);
  for (size_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < table; ++i) sum[i] += joint[chunk * static_cast<size_t>(table) + static_cast<size_t>(i)];
  return result;
}

}  // namespace riskmap::cpu

STABLE_TORCH_LIBRARY_IMPL(riskmap_ext, CPU, m) { m.impl("leep_statistics", TORCH_BOX(&riskmap::cpu::leep_statistics)); }
