// Source logits to transferability or voxel weight, one read of the logits, nothing kept but the map.
#include <type_traits>

#include "cpu/kernels/labels.h"
#include "cpu/kernels/source_tile.h"
#include "math/softmax.h"
#include "math/transferability_map.h"

namespace riskmap::cpu {
namespace {

// sum_z P(y|z) e_z with no more labels than lanes: a look-up for each z. Anything where the voxel is ignored.
template <class acc_t, class Column>
RISKMAP_HD typename Simd<acc_t>::F weigh_by_source(const TransferArgs& args, const Column& e,
                                                   typename Simd<acc_t>::I label) {
  const acc_t* table = static_cast<const acc_t*>(args.by_source);
  typename Simd<acc_t>::F weighted{};
  e.each([&](int z) RISKMAP_LAMBDA { weighted += e.get(z) * lookup_short(table + z * kMinTile, label); });
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
RISKMAP_HD typename Simd<acc_t>::F weigh(const TransferArgs& args, const Column& e, const int32_t* label) {
  if constexpr (!Column::kInRegisters) {
    if (args.num_classes > Simd<acc_t>::kLanes) return weigh_by_label<acc_t>(args, e.base, e.pitch, label);
  }
  return weigh_by_source<acc_t>(args, e, load_labels<acc_t>(label));
}

// Up to kLanes values, in float.
template <class acc_t>
RISKMAP_HD void store_map(float* out, typename Simd<acc_t>::F values, int64_t n) {
  constexpr int kLanes = Simd<acc_t>::kLanes;
  using Narrow = typename VectorOf<float, kLanes* static_cast<int>(sizeof(float))>::type;
  const Narrow narrow = __builtin_convertvector(values, Narrow);
  if (n >= kLanes) return store<Narrow>(out, narrow);
  std::memcpy(out, &narrow, sizeof(float) * static_cast<size_t>(n));
}

// Calls body with the curve as the kernel computes, its scheme a constant: no voxel asks for it.
template <class acc_t, class Body>
static void with_curve(const math::RiskCurve& curve, const Body& body) {
  const auto visit = [&](auto scheme) RISKMAP_LAMBDA {
    body(math::RiskCurveOf<acc_t>{scheme, static_cast<acc_t>(curve.rate), static_cast<acc_t>(curve.low),
                                  static_cast<acc_t>(curve.inverse_range)});
  };
  switch (curve.scheme) {
    case math::Scheme::kExponential: return visit(std::integral_constant<math::Scheme, math::Scheme::kExponential>{});
    case math::Scheme::kPower: return visit(std::integral_constant<math::Scheme, math::Scheme::kPower>{});
    case math::Scheme::kLinear: return visit(std::integral_constant<math::Scheme, math::Scheme::kLinear>{});
  }
}

template <class acc_t>
struct HardnessRange {
  using F = typename Simd<acc_t>::F;
  using I = typename Simd<acc_t>::I;
  F low = F{} + acc_t(1e30), high = F{} - acc_t(1);
  I foreground{};

  RISKMAP_MEMBER void add(F hardness, I valid, I is_foreground) {
    low = math::select(valid, math::minimum(hardness, low), low);
    high = math::select(valid, math::maximum(hardness, high), high);
    foreground = count_where(is_foreground, foreground);
  }
};

// From the likelihoods of a tile to the map. A loop of its own: one long chain of operations for each voxel would leave
// the processor waiting.
template <class acc_t>
__attribute__((noinline)) static void write_map(const TransferArgs& args, const acc_t* likelihood, const int32_t* label,
                                                int64_t n, float* out, HardnessRange<acc_t>& range) {
  using F = typename Simd<acc_t>::F;
  using I = typename Simd<acc_t>::I;
  const auto write = [&](const auto& value) RISKMAP_LAMBDA {
    for (int64_t v = 0; v < n; v += Simd<acc_t>::kLanes) {
      const I y = load_labels<acc_t>(label + v);
      const F t = math::transferability(load<F>(likelihood + v));
      store_map<acc_t>(out + v, value(t, y, I(y >= 0)), n - v);
    }
  };
  if (args.curve) {
    with_curve<acc_t>(*args.curve, [&](const auto& curve) RISKMAP_LAMBDA {
      write([&](F t, I, I valid) RISKMAP_LAMBDA { return math::select(valid, math::risk_weight(F(-t), curve), F{}); });
    });
  } else if (!args.wants_range) {
    write([&](F t, I, I valid) RISKMAP_LAMBDA { return math::select(valid, t, F{}); });
  } else {
    const auto background = static_cast<typename math::Traits<acc_t>::Bits>(args.background);
    HardnessRange<acc_t> of_tile = range;
    write([&](F t, I y, I valid) RISKMAP_LAMBDA {
      of_tile.add(-t, valid, valid & (y != background));
      return math::select(valid, t, F{} + acc_t(kIgnoredMark));
    });
    range = of_tile;
  }
}

template <class acc_t, class Column>
void transfer_chunk(const TransferArgs& args, int64_t chunk, void* scratch) {
  using F = typename Simd<acc_t>::F;
  constexpr int kLanes = Simd<acc_t>::kLanes;
  const Volume& source = args.source;
  const int64_t image = chunk / args.chunking.chunks_per_image;
  const int64_t first = chunk % args.chunking.chunks_per_image * args.chunking.voxels_per_chunk;
  const int64_t end = first + args.chunking.voxels_per_chunk;
  const int64_t last = end < source.voxels ? end : source.voxels;
  const int64_t tile = tile_voxels(padded_rows(args), source.dtype);
  const int64_t pitch = tile_pitch(tile);
  acc_t* rows = static_cast<acc_t*>(scratch);
  acc_t* likelihood = rows + padded_rows(args) * pitch;
  int32_t* label = reinterpret_cast<int32_t*>(likelihood + tile);
  const int64_t spare = padded_classes(args) - args.classes;
  for (int64_t i = args.classes * pitch; i < (args.classes + spare) * pitch; ++i) rows[i] = 0;

  int64_t bad_labels = 0;
  HardnessRange<acc_t> range;
  for (int64_t begin = first; begin < last; begin += tile) {
    const int64_t n = begin + tile < last ? tile : last - begin;
    bad_labels += stage_labels(args.target, image, begin, n, args.num_classes, args.ignore_index, label);
    const auto weigh_tile = [&](auto in) {
      for (int64_t v = 0; v < n; v += kLanes) {
        Column x(in, v, args.classes);
        const F max = math::max_logit<F>(x);
        const F sum = math::exp_in_place(x, max);
        store(likelihood + v, F(weigh<acc_t>(args, x, label + v) * math::inverse(sum)));
      }
    };
    bool done = false;
    if constexpr (Column::kInRegisters) {
      if (!args.regions) done = visit_in_place(source, image, begin, n, weigh_tile);
    }
    if (!done) weigh_tile(stage_source(args, image, begin, n, rows, pitch, spare));
    write_map(args, likelihood, label, n, args.out + image * source.voxels + begin, range);
  }
  TransferPartial& partial = args.partial[chunk];
  partial = {bad_labels, horizontal_count(range.foreground), range.low[0], range.high[0]};
  for (int i = 1; i < kLanes; ++i) {
    if (range.low[i] < partial.low) partial.low = range.low[i];
    if (range.high[i] > partial.high) partial.high = range.high[i];
  }
}

}  // namespace

namespace RISKMAP_CPU_CAPABILITY {

void transferability_map(const TransferArgs& args, int64_t chunk, void* scratch) {
  const auto run = [&](auto acc) {
    using acc_t = decltype(acc);
    // Many labels want their probabilities in scratch, however few the source's classes are.
    const bool short_table = args.num_classes <= Simd<acc_t>::kLanes;
    with_column<acc_t>(short_table ? args.classes : kMaxRegisterClasses + 1, [&](auto* column) {
      transfer_chunk<acc_t, std::remove_pointer_t<decltype(column)>>(args, chunk, scratch);
    });
  };
  if (args.source.dtype == Dtype::kDouble) return run(double{});
  run(float{});
}

void weigh_map(float* values, int64_t n, const math::RiskCurve& curve) {
  using F = Simd<float>::F;
  constexpr int kLanes = Simd<float>::kLanes;
  with_curve<float>(curve, [&](const auto& known) RISKMAP_LAMBDA {
    for (int64_t i = 0; i < n; i += kLanes) {
      F t{};
      if (n - i >= kLanes) {
        t = load<F>(values + i);
      } else {
        std::memcpy(&t, values + i, sizeof(float) * static_cast<size_t>(n - i));
      }
      store_map<float>(values + i, math::select(t == kIgnoredMark, F{}, math::risk_weight(F(-t), known)), n - i);
    }
  });
}

}  // namespace RISKMAP_CPU_CAPABILITY
}  // namespace riskmap::cpu
