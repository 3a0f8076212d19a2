// Dice sums of a block: sum pi 1[y = c], sum pi and sum 1[y = c] over valid voxels, for every class.
#pragma once

#include "cuda/loss.cuh"

namespace riskmap::cuda {

// The block's places in the partial sums.
struct DiceColumns {
  double* first;
  int64_t stride;
  int classes;

  __device__ __forceinline__ DiceColumns(double* partial, const LossViews& in, int64_t image)
      : first(partial + (image * loss_columns(in.classes, true) + kLossColumns) * in.chunking.chunks_per_image +
              (blockIdx.x - image * in.chunking.chunks_per_image)),
        stride(in.chunking.chunks_per_image),
        classes(in.classes) {}
  __device__ __forceinline__ double& at(int which, int c) const { return first[(which * classes + c) * stride]; }
};

// What a voxel adds to P.
template <bool kSquared, class acc_t>
__device__ __forceinline__ acc_t dice_power(acc_t pi) {
  return kSquared ? pi * pi : pi;
}

// Columns in registers: every thread has sums of its own, in float over at most kMaxTilesPerChunk tiles.
template <class Column, int V, bool kShared = Column::kShared, bool kInRegisters = Column::kInRegisters>
struct DiceSums {
  using acc_t = typename Column::acc_t;
  static constexpr int kClasses = Column::kSlots;

  acc_t intersection[kClasses], predicted[kClasses], labelled[kClasses];

  __device__ __forceinline__ DiceSums(const LossViews&, const BlockShape&, const DiceColumns&) {
#pragma unroll
    for (int c = 0; c < kClasses; ++c) intersection[c] = predicted[c] = labelled[c] = 0;
  }

  // x holds the exponentials, `sum` their sum over all classes.
  template <bool kSquared>
  __device__ __forceinline__ void add(const Column& x, acc_t sum, int label) {
    const bool valid = label >= 0;
    const acc_t inverse = acc_t(1) / sum;
    x.each([&](int c) {
      const acc_t pi = valid ? x.get(c) * inverse : acc_t(0);
      const bool hit = label == c;
      predicted[c] += dice_power<kSquared>(pi);
      intersection[c] += hit ? pi : acc_t(0);
      labelled[c] += hit ? acc_t(1) : acc_t(0);
    });
  }

  __device__ __forceinline__ void write(const DiceColumns& out) {
    __shared__ acc_t warp_sums[kWarps][3 * kClasses];
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      const acc_t sums[3] = {warp_sum(intersection[c]), warp_sum(predicted[c]), warp_sum(labelled[c])};
#pragma unroll
      for (int k = 0; k < 3; ++k)
        if (lane_index() == 0) warp_sums[warp_index()][k * kClasses + c] = sums[k];
    }
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < 3 * kClasses; j += kThreads) {
      double sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += static_cast<double>(warp_sums[w][j]);
      out.at(j / kClasses, j % kClasses) = sum;
    }
  }
};

// Classes shared by warps. A voxel has one label: what belongs to it is kept in shared memory, a place for each lane.
template <class Column, int V>
struct DiceSums<Column, V, true, true> {
  using acc_t = typename Column::acc_t;
  using Places = acc_t[kSharedSlots][kWarp];
  using Counts = uint16_t[kSharedSlots][kWarp];

  acc_t predicted[kSharedSlots];
  Places* intersection;  // [kWarps]
  Counts* labelled;      // [kWarps]
  int part, parts, classes_per_part;

  __device__ __forceinline__ DiceSums(const LossViews& in, const BlockShape& shape, const DiceColumns&)
      : part(shape.part), parts(shape.parts), classes_per_part(in.classes_per_part) {
    __shared__ Places places[kWarps];
    __shared__ Counts counts[kWarps];
    intersection = places;
    labelled = counts;
#pragma unroll
    for (int c = 0; c < kSharedSlots; ++c) {
      predicted[c] = 0;
      intersection[warp_index()][c][lane_index()] = 0;
      labelled[warp_index()][c][lane_index()] = 0;
    }
  }

  template <bool kSquared>
  __device__ __forceinline__ void add(const Column& x, acc_t sum, int label) {
    const bool valid = label >= 0;
    const acc_t inverse = acc_t(1) / sum;
    acc_t pi_of_label = 0;
    x.each([&](int c) {
      const acc_t pi = valid ? x.get(c) * inverse : acc_t(0);
      predicted[c] += dice_power<kSquared>(pi);
      pi_of_label = label == x.class_of(c) ? pi : pi_of_label;
    });
    const int c = label - x.first;
    if (valid && c >= 0 && c < x.count) {
      intersection[warp_index()][c][lane_index()] += pi_of_label;
      labelled[warp_index()][c][lane_index()] += 1;
    }
  }

  __device__ __forceinline__ void write(const DiceColumns& out) {
    __shared__ acc_t warp_sums[kWarps][3][kSharedSlots];
#pragma unroll
    for (int c = 0; c < kSharedSlots; ++c) {
      const acc_t sums[3] = {warp_sum(intersection[warp_index()][c][lane_index()]), warp_sum(predicted[c]),
                             warp_sum(static_cast<acc_t>(labelled[warp_index()][c][lane_index()]))};
#pragma unroll
      for (int k = 0; k < 3; ++k)
        if (lane_index() == 0) warp_sums[warp_index()][k][c] = sums[k];
    }
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < 3 * out.classes; j += kThreads) {
      const int k = j / out.classes, c = j % out.classes;
      double sum = 0;
      for (int w = c / classes_per_part; w < kWarps; w += parts)
        sum += static_cast<double>(warp_sums[w][k][c % classes_per_part]);
      out.at(k, c) = sum;
    }
  }
};

// Columns in memory: the block sums class after class.
template <class Column, int V>
struct DiceSums<Column, V, false, false> {
  using acc_t = typename Column::acc_t;
  DiceColumns out;

  __device__ __forceinline__ DiceSums(const LossViews& in, const BlockShape&, const DiceColumns& columns)
      : out(columns) {
    if (!in.class_sums) return;
    for (int j = static_cast<int>(threadIdx.x); j < 3 * out.classes; j += kThreads)
      out.at(j / out.classes, j % out.classes) = 0;
    __syncthreads();
  }

  // All voxels of the block at once.
  template <bool kSquared>
  __device__ __forceinline__ void add_tile(const Column (&x)[V], const acc_t (&max)[V], const acc_t (&sum)[V],
                                           const int (&label)[V]) {
    for (int c = 0; c < out.classes; ++c) {
      acc_t intersection = 0, predicted = 0, labelled = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const acc_t pi = label[i] >= 0 ? x[i].exp_at(c, max[i]) * (acc_t(1) / sum[i]) : acc_t(0);
        const bool hit = label[i] == c;
        predicted += dice_power<kSquared>(pi);
        intersection += hit ? pi : acc_t(0);
        labelled += hit ? acc_t(1) : acc_t(0);
      }
      const double sums[3] = {block_sum(static_cast<double>(intersection)), block_sum(static_cast<double>(predicted)),
                              block_sum(static_cast<double>(labelled))};
#pragma unroll
      for (int k = 0; k < 3; ++k)
        if (threadIdx.x == 0) out.at(k, c) += sums[k];
    }
  }

  __device__ __forceinline__ void write(const DiceColumns&) {}
};

}  // namespace riskmap::cuda
