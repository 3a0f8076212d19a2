// The part of the weighted loss that forward and backward kernels share: what a call looks at, the voxels' labels and
// risks, class weights, and the sums of a block.
#pragma once

#include "cuda/tile.cuh"
#include "cuda/weighted_loss.h"
#include "math/weighted_loss.h"

namespace riskmap::cuda {

using math::LossKind;

// LossInputs as the kernels read them.
struct LossViews {
  MapView target, risk, foreground;
  LabelCode label;
  ClassWeight class_weight;
  double label_smoothing;
  uint32_t voxels;
  int classes, background;
  bool ce_in_foreground, class_sums, squared;
  Chunking chunking;
};

inline LossViews view_of(const LossInputs& in, const Chunking& chunking) {
  return {view_of(in.target),
          view_of(in.risk),
          view_of(in.foreground),
          in.label,
          in.class_weight,
          in.label_smoothing,
          static_cast<uint32_t>(in.logits.voxels),
          static_cast<int>(in.logits.classes),
          static_cast<int>(in.background),
          in.ce_in_foreground,
          in.class_sums,
          in.squared,
          chunking};
}

// Whether a tile can be read, and the maps beside it.
inline bool fits_tiles(const LossInputs& in) {
  const int64_t batch = in.logits.batch;
  return fits_tiles(in.logits) && has_packs<kTileVoxels>(in.target, batch) && has_packs<kTileVoxels>(in.risk, batch) &&
         has_packs<kTileVoxels>(in.foreground, batch);
}

// Whether a call is one of the usual ones.
inline bool is_usual(const LossInputs& in) {
  return !in.class_weight.data && in.label_smoothing == 0 && !in.ce_in_foreground && !in.squared && !in.regions;
}

// The maps of one image.
struct LossRows {
  MapRow target, risk, foreground;

  __device__ __forceinline__ LossRows(const LossViews& in, uint32_t image)
      : target(in.target, image), risk(in.risk, image), foreground(in.foreground, image) {}
};

// What they say about a thread's voxels.
template <class acc_t, int V>
struct VoxelData {
  int label[V];  // a class, kIgnored or kBadLabel
  acc_t risk[V];
  uint32_t in_mask;  // a bit for each voxel

  template <class Span>
  __device__ __forceinline__ void load(const LossViews& in, const LossRows& rows, const Span& span) {
    load_values(rows.risk, span, risk);
    load_labels(rows.target, in.label, span, label);
    in_mask = load_mask(rows.foreground, span);
  }
  // Where bad labels make no difference.
  template <class Span>
  __device__ __forceinline__ void load_classes(const LossViews& in, const LossRows& rows, const Span& span) {
    load_values(rows.risk, span, risk);
    load_labels<true>(rows.target, in.label, span, label);
    in_mask = 0;
  }
  __device__ __forceinline__ bool valid(int i) const { return label[i] >= 0; }
  // Labelled or inside the mask; every valid voxel where there is no background class.
  __device__ __forceinline__ bool foreground(const LossViews& in, int i) const {
    return valid(i) && (in.background < 0 || label[i] != in.background || (in_mask >> i & 1));
  }
  // Whether its cross-entropy counts.
  __device__ __forceinline__ bool counted(const LossViews& in, int i) const {
    return in.ce_in_foreground ? foreground(in, i) : valid(i);
  }
  // A risk that no caller may give: negative, NaN or infinite.
  __device__ __forceinline__ bool bad_risk(int i) const {
    const bool fine = (risk[i] >= acc_t(0)) & (risk[i] <= largest<acc_t>());
    return valid(i) & !fine;
  }
};

// A class weight that no caller may give.
__device__ __forceinline__ bool is_bad_weight(double weight) { return !(weight >= 0 && weight - weight == 0); }

__device__ __forceinline__ double weight_of(const ClassWeight& weight, int64_t c) {
  return weight.data ? load_scalar(weight.data, weight.dtype, c) : 1.0;
}

// Whether any is bad; every thread of the block must come here.
__device__ __forceinline__ bool has_bad_weight(const ClassWeight& weight, int64_t classes) {
  int bad = 0;
  for (int64_t c = threadIdx.x; weight.data && c < classes; c += blockDim.x) bad |= is_bad_weight(weight_of(weight, c));
  return __syncthreads_or(bad) != 0;
}

// Class weights and label smoothing; of up to kTable classes in shared memory, of more (0) where they are.
template <class acc_t, int kTable>
struct ClassWeights {
  static constexpr bool kNone = false;
  ClassWeight given;
  acc_t* table;
  acc_t factor, keep, smooth_factor;  // 1, or NaN where a weight is bad; 1 - eps; eps / C
  acc_t smooth_total;                 // sum_k smooth(k)

  // Every thread of the block must come here.
  __device__ __forceinline__ explicit ClassWeights(const LossViews& in)
      : given(in.class_weight),
        table(nullptr),
        factor(has_bad_weight(in.class_weight, in.classes) ? not_a_number<acc_t>() : acc_t(1)),
        keep(acc_t(1) - static_cast<acc_t>(in.label_smoothing)),
        smooth_factor(static_cast<acc_t>(in.label_smoothing) / static_cast<acc_t>(in.classes)),
        smooth_total(0) {
    if constexpr (kTable > 0) {
      __shared__ acc_t memory[kTable];
      for (int c = static_cast<int>(threadIdx.x); c < kTable; c += static_cast<int>(blockDim.x))
        memory[c] = c < in.classes ? of(c) : acc_t(0);
      table = memory;
      __syncthreads();
    }
    if (in.label_smoothing == 0) return;
    for (int c = lane_index(); c < in.classes; c += kWarp) smooth_total += smooth(c);
    smooth_total = warp_sum(smooth_total);
  }
  __device__ __forceinline__ acc_t of(int64_t c) const {
    return kTable > 0 && table ? table[c] : static_cast<acc_t>(weight_of(given, c)) * factor;
  }
  // (1 - eps) c[y]
  __device__ __forceinline__ acc_t hot(int label) const { return label < 0 ? acc_t(0) : keep * of(label); }
  // (eps / C) c[k]
  __device__ __forceinline__ acc_t smooth(int64_t c) const { return smooth_factor * of(c); }
};

// Whether the sums of the classes are wanted, or their slopes.
template <LossKind kKind>
__device__ __forceinline__ bool has_class_sums(const LossViews& in) {
  return kKind == LossKind::kAny ? in.class_sums : kKind == LossKind::kDice;
}

// Those of a usual call, as constants.
struct NoClassWeights {
  static constexpr bool kNone = true;
  static constexpr float smooth_total = 0;
  __device__ __forceinline__ explicit NoClassWeights(const LossViews&) {}
  __device__ __forceinline__ float hot(int) const { return 1; }
  __device__ __forceinline__ float smooth(int) const { return 0; }
};

template <LossKind kKind, int kTable>
using ClassWeightsOf = std::conditional_t<kKind == LossKind::kAny, ClassWeights<float, kTable>, NoClassWeights>;

// The softmax of a voxel.
template <class acc_t>
struct Softmax {
  acc_t max;
  acc_t sum;         // sum_k exp(x_k - max)
  acc_t target;      // x_y - max
  acc_t smooth_dot;  // see math::cross_entropy
  acc_t at_label;    // exp(target), where it is wanted and to be had for nothing

  template <class Weights>
  __device__ __forceinline__ acc_t cross_entropy(const Weights& weights, int label) const {
    if constexpr (Weights::kNone) return math::log(sum) - target;
    return math::cross_entropy(math::log(sum), target, acc_t(weights.hot(label)), acc_t(weights.smooth_total),
                               smooth_dot);
  }
};

// Of voxel i of a few classes; leaves the exponentials in x.
template <LossKind kKind, class Tile, class Weights>
__device__ __forceinline__ Softmax<float> softmax_of(Tile& tile, int i, int label, const Weights& weights) {
  constexpr int kSlots = static_cast<int>(sizeof(tile.x) / sizeof(tile.x[0]));
  Softmax<float> softmax{tile.x[0][i], 0, 0, 0, 0};
#pragma unroll
  for (int c = 1; c < kSlots; ++c) softmax.max = fmaxf(softmax.max, tile.x[c][i]);
#pragma unroll
  for (int c = 0; c < kSlots; ++c) {
    const float x = tile.x[c][i] - softmax.max;
    softmax.target = label == c ? x : softmax.target;
    if (kKind == LossKind::kAny && weights.smooth(c) != 0) softmax.smooth_dot += x * weights.smooth(c);
    tile.x[c][i] = math::exp(x);
    softmax.at_label = label == c ? tile.x[c][i] : softmax.at_label;
    softmax.sum = c == 0 ? tile.x[c][i] : softmax.sum + tile.x[c][i];
  }
  return softmax;
}

// What is not used must not count, not even a NaN.
template <class Tile>
__device__ __forceinline__ void clear_unused(Tile& tile, const bool (&used)[kTileVoxels]) {
  constexpr int kSlots = static_cast<int>(sizeof(tile.x) / sizeof(tile.x[0]));
  if (used[0] && used[1] && used[2] && used[3]) return;
#pragma unroll
  for (int k = 0; k < kSlots; ++k)
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) tile.x[k][i] = used[i] ? tile.x[k][i] : 0.0f;
}

// Where each thread walks through the classes of a voxel.
template <class Column, class Weights>
__device__ __forceinline__ Softmax<typename Column::acc_t> softmax_of_any(const Column& x, int label,
                                                                          const Weights& weights) {
  using acc_t = typename Column::acc_t;
  Softmax<acc_t> softmax{math::max_logit<acc_t>(x), 0, 0, 0, 0};
  x.each([&](int c) {
    const acc_t v = x.get(c) - softmax.max, smooth = weights.smooth(c);
    if (label == c) softmax.target = v;
    if (smooth != acc_t(0)) softmax.smooth_dot += v * smooth;
    softmax.sum += math::exp(v);
  });
  softmax.at_label = math::exp(softmax.target);
  return softmax;
}

// The logit at the label of a voxel.
template <class T>
__device__ __forceinline__ float load_target(const TileVolume& logits, uint32_t image, uint32_t voxel, int label) {
  if (label < 0) return 0;
  const uint32_t y = static_cast<uint32_t>(label), classes = static_cast<uint32_t>(logits.classes);
  const uint32_t at = logits.channels_last ? voxel * classes + y : y * logits.stride_class + voxel;
  return to_acc<float>(Pack<T, 1>::load(image_of<const T>(logits, image) + at).values[0]);
}

// What a thread adds up over its voxels besides the sums of the classes.
struct LossSums {
  double cross_entropy = 0;
  float cross_entropy_in_float = 0;  // of a few voxels
  uint32_t valid = 0, foreground = 0;
  int least_label = 0;
  bool bad_risk = false;
  uint32_t largest_weight = 0;  // its bits

  template <class acc_t, int V>
  __device__ __forceinline__ void count(const LossViews& in, const VoxelData<acc_t, V>& data, int i) {
    valid += data.valid(i);
    foreground += data.foreground(in, i);
  }
  template <class acc_t, int V>
  __device__ __forceinline__ void look(const VoxelData<acc_t, V>& data, int i) {
    look_at_label(data.label[i]);
    bad_risk |= data.bad_risk(i);
  }
  // A risk, or 0 where it does not count: those that no caller may give have larger bits than any other.
  __device__ __forceinline__ void look_at_weight(float weight) {
    const uint32_t bits = math::bit_cast<uint32_t>(weight + 0.0f);  // of -0 those of 0
    largest_weight = bits > largest_weight ? bits : largest_weight;
  }
  __device__ __forceinline__ void look_at_label(int label) { least_label = label < least_label ? label : least_label; }
  __device__ __forceinline__ bool has_bad_label() const { return least_label == kBadLabel; }
  __device__ __forceinline__ bool has_bad_risk() const { return bad_risk || largest_weight > 0x7f7fffffu; }
};

// A block's places in the partial sums [B, columns, chunks].
struct PartialColumns {
  double* first;
  int64_t stride;

  __device__ __forceinline__ PartialColumns(double* partial, const Chunking& chunking, int64_t columns,
                                            const Chunk& chunk)
      : first(partial + chunk.image * columns * chunking.chunks_per_image + chunk.index),
        stride(chunking.chunks_per_image) {}
  __device__ __forceinline__ double& operator[](int64_t column) const { return first[column * stride]; }
};

// Those of the sums of the classes: I, P, G.
__device__ __forceinline__ int64_t class_column(int which, int64_t classes, int64_t c) {
  return kLossColumns + which * classes + c;
}

// Every thread must come here.
__device__ __forceinline__ void write_sums(const LossSums& sums, bool counts, const PartialColumns& out) {
  __shared__ double ce_of_warp[kMaxWarps];
  __shared__ uint64_t counts_of_warp[kMaxWarps];
  __shared__ uint32_t bad_of_warp[kMaxWarps];
  const double warp_ce = warp_sum(sums.cross_entropy);
  // Both numbers are below 2^31 in an image.
  const uint64_t warp_counts = counts ? warp_sum(uint64_t(sums.valid) << 32 | sums.foreground) : 0;
  const uint32_t bad =
      (__any_sync(kAllLanes, sums.has_bad_label()) ? 1u : 0u) | (__any_sync(kAllLanes, sums.has_bad_risk()) ? 2u : 0u);
  if (lane_index() == 0) {
    ce_of_warp[warp_index()] = warp_ce;
    counts_of_warp[warp_index()] = warp_counts;
    bad_of_warp[warp_index()] = bad;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double ce = 0;
  uint64_t both = 0;
  uint32_t any_bad = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    ce += ce_of_warp[w];
    both += counts_of_warp[w];
    any_bad |= bad_of_warp[w];
  }
  out[kCrossEntropy] = ce;
  out[kValid] = static_cast<double>(both >> 32);
  out[kForegroundVoxels] = static_cast<double>(both & 0xffffffffu);
  out[kBadLabels] = any_bad & 1;
  out[kBadRisk] = any_bad >> 1;
}

}  // namespace riskmap::cuda
