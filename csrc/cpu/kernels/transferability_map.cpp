// Source logits to transferability or voxel weight, one read of the logits, nothing kept but the map.
#include <type_traits>

#include "cpu/kernels/labels.h"
#include "cpu/kernels/source_tile.h"
#include "math/softmax.h"
#include "math/transferability_map.h"

namespace riskmap::cpu {
namespace {

// sum_z P(y|z) e_z with few labels: a look-up for each z.
template <class acc_t, class Column>
RISKMAP_HD typename Simd<acc_t>::F weigh_by_source(const TransferArgs& args, const Column& e,
                                                   typename Simd<acc_t>::I row_of) {
  const acc_t* table = static_cast<const acc_t*>(args.by_source);
  const int64_t pitch = table_pitch(args.num_classes);
  typename Simd<acc_t>::F weighted{};
  e.each([&](int z) RISKMAP_LAMBDA { weighted += e.get(z) * lookup(table + z * pitch, args.num_classes, row_of); });
  return weighted;
}

// The same with many labels: kLanes voxels x kLanes source classes are turned in registers, so that a row of the table
// is read as it lies. e: [padded_classes, pitch], 0 beyond Z.
template <class acc_t>
RISKMAP_HD typename Simd<acc_t>::F weigh_by_label(const TransferArgs& args, const acc_t* e, int64_t pitch,
                                                  const int32_t* label) {
  using F = typename Simd<acc_t>::F;
  constexpr int kLanes = Simd<acc_t>::kLanes;
  const int64_t row = padded_classes(args);
  const acc_t* table[kLanes];
  F sums[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    table[i] = static_cast<const acc_t*>(args.by_label) + (label[i] < 0 ? 0 : label[i]) * row;
    sums[i] = F{};
  }
  for (int64_t z = 0; z < args.classes; z += kLanes) {
    F block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = load<F>(e + (z + i) * pitch);
    transpose<acc_t>(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] += block[i] * load<F>(table[i] + z);
  }
  transpose<acc_t>(sums);
  F weighted{};
  for (int i = 0; i < kLanes; ++i) weighted += sums[i];
  return weighted;
}

template <class acc_t, class Column>
RISKMAP_HD typename Simd<acc_t>::F weigh(const TransferArgs& args, const Column& e, const int32_t* label,
                                         typename Simd<acc_t>::I row_of) {
  if constexpr (!Column::kInRegisters) {
    if (args.num_classes > Simd<acc_t>::kLanes) return weigh_by_label<acc_t>(args, e.base, e.pitch, label);
  }
  return weigh_by_source<acc_t>(args, e, row_of);
}

template <class acc_t, class Column>
void transfer_chunk(const TransferArgs& args, int64_t chunk, void* scratch) {
  using F = typename Simd<acc_t>::F;
  using I = typename Simd<acc_t>::I;
  constexpr int kLanes = Simd<acc_t>::kLanes;
  const Volume& source = args.source;
  const int64_t image = chunk / args.chunking.chunks_per_image;
  const int64_t first = chunk % args.chunking.chunks_per_image * args.chunking.voxels_per_chunk;
  const int64_t end = first + args.chunking.voxels_per_chunk;
  const int64_t last = end < source.voxels ? end : source.voxels;
  const int64_t tile = tile_voxels(padded_rows(args), source.dtype);
  const int64_t pitch = tile_pitch(tile);
  acc_t* rows = static_cast<acc_t*>(scratch);
  acc_t* result = rows + padded_rows(args) * pitch;
  int32_t* label = reinterpret_cast<int32_t*>(result + tile);
  const int64_t spare = padded_classes(args) - args.classes;
  for (int64_t i = args.classes * pitch; i < (args.classes + spare) * pitch; ++i) rows[i] = 0;

  int64_t bad_labels = 0;
  I foreground{};
  F low = F{} + acc_t(1e30), high = F{} - acc_t(1);
  for (int64_t begin = first; begin < last; begin += tile) {
    const int64_t n = begin + tile < last ? tile : last - begin;
    bad_labels += stage_labels(args.target, image, begin, n, args.num_classes, args.ignore_index, label);
    const auto transfer = [&](auto in) {
      for (int64_t v = 0; v < n; v += kLanes) {
        const I y = load_labels<acc_t>(label + v);
        const I valid = y >= 0;
        Column x(in, v, args.classes);
        const F max = math::max_logit<F>(x);
        const F sum = math::exp_in_place(x, max);
        store(result + v, F(weigh<acc_t>(args, x, label + v, I(y & valid)) * math::inverse(sum)));
      }
      // A loop of its own: one long chain of operations for each voxel would leave the processor waiting.
      for (int64_t v = 0; v < n; v += kLanes) {
        const I y = load_labels<acc_t>(label + v);
        const I valid = y >= 0;
        const F t = math::transferability(load<F>(result + v));
        const F hardness = -t;
        low = math::select(valid & (hardness < low), hardness, low);
        high = math::select(valid & (hardness > high), hardness, high);
        using Bits = typename math::Traits<acc_t>::Bits;
        foreground -= args.background < 0 ? valid : valid & (y != static_cast<Bits>(args.background));
        const F value = args.curve ? math::select(valid, math::risk_weight(hardness, *args.curve), F{})
                                   : math::select(valid, t, F{} + acc_t(kIgnoredMark));
        store(result + v, value);
      }
    };
    bool done = false;
    if constexpr (Column::kInRegisters) {
      if (!args.regions) done = visit_in_place(source, image, begin, n, transfer);
    }
    if (!done) transfer(stage_source(args, image, begin, n, rows, pitch, spare));
    float* out = args.out + image * source.voxels + begin;
    for (int64_t v = 0; v < n; ++v) out[v] = static_cast<float>(result[v]);
  }
  TransferPartial& partial = args.partial[chunk];
  partial = {bad_labels, static_cast<int64_t>(horizontal_sum(foreground)), low[0], high[0]};
  for (int i = 1; i < kLanes; ++i) {
    if (low[i] < partial.low) partial.low = low[i];
    if (high[i] > partial.high) partial.high = high[i];
  }
}

}  // namespace

namespace RISKMAP_CPU_CAPABILITY {

void transferability_map(const TransferArgs& args, int64_t chunk, void* scratch) {
  const auto run = [&](auto acc) {
    using acc_t = decltype(acc);
    with_column<acc_t>(args.classes, [&](auto* column) {
      transfer_chunk<acc_t, std::remove_pointer_t<decltype(column)>>(args, chunk, scratch);
    });
  };
  if (args.source.dtype == Dtype::kDouble) return run(double{});
  run(float{});
}

void finish_map(float* values, int64_t n, const math::RiskCurve* curve) {
  using F = Simd<float>::F;
  constexpr int kLanes = Simd<float>::kLanes;
  for (int64_t i = 0; i < n; i += kLanes) {
    const size_t bytes = sizeof(float) * static_cast<size_t>(n - i < kLanes ? n - i : kLanes);
    F t{};
    std::memcpy(&t, values + i, bytes);
    const F value = curve ? math::risk_weight(F(-t), *curve) : t;
    const F finished = math::select(t == kIgnoredMark, F{}, value);
    std::memcpy(values + i, &finished, bytes);
  }
}

}  // namespace RISKMAP_CPU_CAPABILITY
}  // namespace riskmap::cpu
