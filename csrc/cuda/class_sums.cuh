// What the forward passes of the loss share: the sums of the classes for Dice (I, P and G, see math/weighted_loss.h),
// and where a block's sums go.
#pragma once

#include "cuda/loss.cuh"

namespace riskmap::cuda {

template <class Logits>
struct ForwardViews {
  LossViews in;
  Logits logits;
  MapView map;
  double map_factor;
  double* partial;
  uint32_t* ticket;

  // Where the block's sums go.
  __device__ __forceinline__ PartialColumns columns(const Chunk& chunk) const {
    if (ticket && blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;
    return {partial, in.chunking, loss_columns(in.classes, in.class_sums), chunk};
  }
  __device__ __forceinline__ MapRow map_row(const Chunk& chunk) const { return {map, chunk.image}; }
  __device__ __forceinline__ LossRows rows(const Chunk& chunk) const { return {in, chunk.image}; }
  // Of the map of reduction none.
  template <class acc_t, int V>
  __device__ __forceinline__ acc_t value(const VoxelData<acc_t, V>& data, int i, acc_t weighted) const {
    const bool bad = data.label[i] == kBadLabel || data.bad_risk(i);
    return bad ? not_a_number<acc_t>() : map_factor == 0 ? acc_t(0) : weighted * static_cast<acc_t>(map_factor);
  }
};

template <class Logits>
ForwardViews<Logits> view_of(const LossForward& args, const Logits& logits) {
  return {view_of(args.in, args.chunking), logits, view_of(args.map), args.map_factor, args.partial, args.ticket};
}

// Where a == b: to = value, sum += x * y, ++count. What nvcc makes of the same in C++ takes twice the instructions.
__device__ __forceinline__ void take_where(int a, int b, float value, float& to, float x, float y, float& sum,
                                           uint32_t& count) {
#if defined(__CUDA_ARCH__)
  asm("{ .reg .pred p; setp.eq.s32 p, %3, %4; @p mov.f32 %0, %5; @p fma.rn.f32 %1, %6, %7, %1; @p add.u32 %2, %2, 1; }"
      : "+f"(to), "+f"(sum), "+r"(count)
      : "r"(a), "r"(b), "f"(value), "f"(x), "f"(y));
#else
  if (a != b) return;
  to = value;
  sum += x * y;
  ++count;
#endif
}

// Sums of the classes of a thread's voxels, all classes in every thread.
template <int kSlots>
struct FewClassSums {
  float intersection[kSlots] = {}, predicted[kSlots] = {};
  uint32_t labelled[kSlots] = {}, masked_background = 0;

  // Of a voxel with Dice: adds it, and returns its cross-entropy. Bad labels and ignored ones alike count nowhere.
  template <class Tile>
  __device__ __forceinline__ float add(const Tile& tile, int i, int label) {
    float max = tile.x[0][i], x[kSlots], e[kSlots];
#pragma unroll
    for (int c = 1; c < kSlots; ++c) max = fmaxf(max, tile.x[c][i]);
    float sum = 0, target = 0;
#pragma unroll
    for (int c = 0; c < kSlots; ++c) {
      x[c] = tile.x[c][i] - max;
      e[c] = math::exp(x[c]);
      sum = c == 0 ? e[c] : sum + e[c];
    }
    const float inverse = label >= 0 ? math::inverse(sum) : 0.0f;
#pragma unroll
    for (int c = 0; c < kSlots; ++c) {
      predicted[c] += e[c] * inverse;
      take_where(label, c, x[c], target, e[c], inverse, intersection[c], labelled[c]);
    }
    return math::log(sum) - target;
  }

  __device__ __forceinline__ void count(const LossViews& in, LossSums& total) const {
#pragma unroll
    for (int c = 0; c < kSlots; ++c) {
      total.valid += labelled[c];
      total.foreground += c == in.background ? masked_background : labelled[c];
    }
  }

  // Every thread of the block must come here.
  __device__ __forceinline__ void write(const LossViews& in, const PartialColumns& out) const {
    constexpr int kNumbers = kSlots <= 2 ? 8 : kSlots <= 5 ? 16 : 32;
    float numbers[kNumbers] = {};
#pragma unroll
    for (int c = 0; c < kSlots; ++c) {
      numbers[c] = intersection[c];
      numbers[kSlots + c] = predicted[c];
      numbers[2 * kSlots + c] = static_cast<float>(labelled[c]);
    }
    __shared__ float of_warp[kWarps][kNumbers];
    const float sum = sum_over_warp(numbers);
    if (lane_index() < kNumbers) of_warp[warp_index()][lane_index()] = sum;
    __syncthreads();
    const int j = static_cast<int>(threadIdx.x), which = j / kSlots, c = j % kSlots;
    if (which >= 3 || c >= in.classes) return;
    double all = 0;
    for (int w = 0; w < kWarps; ++w) all += static_cast<double>(of_warp[w][j]);
    out[class_column(which, in.classes, c)] = all;
  }
};

// The same where the warps of a block share the classes: P in the thread that has the class, I and G with the warps
// that look after the voxels.
template <int kSlots>
struct ManyClassSums {
  float predicted[kSlots] = {};
  double (*intersection)[kManyClasses];
  uint32_t (*labelled)[kManyClasses];

  // To be followed by a barrier.
  __device__ __forceinline__ explicit ManyClassSums(int classes) {
    __shared__ double sums[kOwnerWarps][kManyClasses];
    __shared__ uint32_t counts[kOwnerWarps][kManyClasses];
    intersection = sums;
    labelled = counts;
    for (int c = static_cast<int>(threadIdx.x); c < classes; c += static_cast<int>(blockDim.x)) {
#pragma unroll
      for (int w = 0; w < kOwnerWarps; ++w) {
        sums[w][c] = 0;
        counts[w][c] = 0;
      }
    }
  }

  // Of a warp's voxels, one label after the other.
  __device__ __forceinline__ void add_at_labels(int label, float pi) {
    for (uint32_t left = __ballot_sync(kAllLanes, label >= 0); left != 0;) {
      const int y = __shfl_sync(kAllLanes, label, __ffs(static_cast<int>(left)) - 1);
      const uint32_t same = __ballot_sync(kAllLanes, label == y);
      const float sum = warp_sum(label == y ? pi : 0.0f);
      if (lane_index() == 0) {
        intersection[warp_index()][y] += static_cast<double>(sum);
        labelled[warp_index()][y] += static_cast<uint32_t>(__popc(same));
      }
      left &= ~same;
    }
  }

  // After a barrier.
  __device__ __forceinline__ void write(const ManyShape& shape, const LossViews& in, const PartialColumns& out) {
    const float sum = sum_over_warp(predicted);
    if (lane_index() < shape.count) out[class_column(1, in.classes, shape.first + lane_index())] = sum;
    for (int c = static_cast<int>(threadIdx.x); c < in.classes; c += static_cast<int>(blockDim.x)) {
      double all = 0, count = 0;
      for (int w = 0; w < kOwnerWarps; ++w) {
        all += intersection[w][c];
        count += labelled[w][c];
      }
      out[class_column(0, in.classes, c)] = all;
      out[class_column(2, in.classes, c)] = count;
    }
  }
};

template <int kSlots>
struct NoClassSums {
  float predicted[kSlots];
  __device__ __forceinline__ explicit NoClassSums(int) {}
  __device__ __forceinline__ void add_at_labels(int, float) {}
  __device__ __forceinline__ void write(const ManyShape&, const LossViews&, const PartialColumns&) {}
};

template <LossKind kKind, int kSlots>
using ManyClassSumsOf =
    std::conditional_t<kKind == LossKind::kCrossEntropy, NoClassSums<kSlots>, ManyClassSums<kSlots>>;

// Of a class in memory, by a warp: its lanes take turns with the voxels.
struct WarpClassSums {
  double sums[3] = {};

  __device__ __forceinline__ void add(double pi, bool squared, bool hit) {
    sums[0] += hit ? pi : 0.0;
    sums[1] += squared ? pi * pi : pi;
    sums[2] += hit;
  }
  // `first`: whether these are the first sums of the block.
  __device__ __forceinline__ void write(bool first, int classes, int c, const PartialColumns& out) const {
#pragma unroll
    for (int which = 0; which < 3; ++which) {
      const double sum = warp_sum(sums[which]);
      double& column = out[class_column(which, classes, c)];
      if (lane_index() == 0) column = first ? sum : column + sum;
    }
  }
};

}  // namespace riskmap::cuda
