// The part of the weighted loss that forward and backward kernels share: inputs of a thread's voxels, softmax, terms.
#pragma once

#include "cuda/variant.cuh"
#include "cuda/weighted_loss.h"
#include "math/weighted_loss.h"

namespace riskmap::cuda {

// LossInputs as the kernels read them.
struct LossViews {
  VolumeView logits;
  MapView target, risk, foreground;
  LabelCode label;
  const void* class_weight;
  const void* smooth;
  int64_t voxels;
  double keep;  // 1 - label_smoothing
  int classes, background;
  int parts, classes_per_part;  // see SharedColumn; 1 and all classes elsewhere
  bool ce_in_foreground, class_sums;
  Chunking chunking;
};

template <int V>
LossViews view_of(const LossInputs& in, const Chunking& chunking, int parts) {
  const int64_t batch = in.logits.batch;
  const int classes = static_cast<int>(in.logits.classes);
  return {view_of<V>(in.logits),
          view_of<V>(in.target, batch),
          view_of<V>(in.risk, batch),
          view_of<V>(in.foreground, batch),
          in.label,
          in.class_weight,
          in.smooth,
          in.logits.voxels,
          1 - in.label_smoothing,
          classes,
          static_cast<int>(in.background),
          parts,
          (classes + parts - 1) / parts,
          in.ce_in_foreground,
          in.class_sums,
          chunking};
}

// What the maps say about a thread's voxels.
template <class acc_t, int V>
struct VoxelData {
  int label[V];  // a class, kIgnored or kBadLabel
  bool in_mask[V];
  acc_t risk[V];

  __device__ __forceinline__ void load(const LossViews& in, int64_t image, const Span<V>& span) {
    load_values(in.risk, image, span, risk);
    load_labels(in.target, in.label, image, span, label);
    load_mask(in.foreground, image, span, in_mask);
  }
  __device__ __forceinline__ bool valid(int i) const { return label[i] >= 0; }
  // Labelled or inside the mask; every valid voxel where there is no background class.
  __device__ __forceinline__ bool foreground(const LossViews& in, int i) const {
    return valid(i) && (in.background < 0 || label[i] != in.background || in_mask[i]);
  }
  // Whether its cross-entropy counts.
  __device__ __forceinline__ bool counted(const LossViews& in, int i) const {
    return in.ce_in_foreground ? foreground(in, i) : valid(i);
  }
  // A risk that no caller may give: negative, NaN or infinite.
  __device__ __forceinline__ bool bad_risk(int i) const {
    return valid(i) && !(risk[i] >= acc_t(0) && risk[i] - risk[i] == acc_t(0));
  }
};

// (1 - eps) c[y] of a valid voxel.
template <class acc_t>
__device__ __forceinline__ acc_t hot_factor(const LossViews& in, int label) {
  const acc_t keep = static_cast<acc_t>(in.keep);
  const acc_t* weight = static_cast<const acc_t*>(in.class_weight);
  return weight && label >= 0 ? keep * __ldg(weight + label) : keep;
}

template <class acc_t>
__device__ __forceinline__ acc_t smooth_total(const LossViews& in) {
  return in.smooth ? __ldg(static_cast<const acc_t*>(in.smooth) + in.classes) : acc_t(0);
}

// The softmax over one voxel's column. Logits are taken relative to the voxel's largest: a large common offset costs no
// digits.
template <class acc_t>
struct Softmax {
  acc_t max;
  acc_t sum;         // sum_c exp(x_c - max)
  acc_t target;      // x_y - max
  acc_t smooth_dot;  // see math::cross_entropy

  // All but max, which is given; leaves the exponentials in x.
  template <class Column>
  __device__ __forceinline__ void run(const LossViews& in, Column& x, int label) {
    target = x.pick(label, max);
    smooth_dot = 0;
    if (const acc_t* smooth = static_cast<const acc_t*>(in.smooth)) {
      x.each([&](int c) { smooth_dot += (x.get(c) - max) * __ldg(smooth + x.class_of(c)); });
    }
    sum = x.exps(max);
  }
  __device__ __forceinline__ acc_t cross_entropy(const LossViews& in, acc_t hot) const {
    return math::cross_entropy(math::log(sum), target, hot, smooth_total<acc_t>(in), smooth_dot);
  }
};

// Softmax of a thread's V voxels, then `finish(i, softmax)` for each. What `post(i, softmax)` leaves in extra is summed
// over the warps that share a voxel.
template <class Column, int V, class Exchange, class Post, class Finish>
__device__ __forceinline__ void for_voxels(const LossViews& in, Column (&x)[V], const int (&label)[V],
                                           Exchange& exchange, const Post& post, const Finish& finish) {
  using acc_t = typename Column::acc_t;
  if constexpr (Column::kShared) {
#pragma unroll
    for (int i = 0; i < V; ++i) exchange.post(0, i, math::max_logit<acc_t>(x[i]));
    exchange.meet();
#pragma unroll
    for (int i = 0; i < V; ++i) {
      Softmax<acc_t> softmax;
      softmax.max = exchange.max(0, i);
      softmax.run(in, x[i], label[i]);
      exchange.post(1, i, softmax.sum);
      exchange.post(2, i, softmax.target);
      if (in.smooth) exchange.post(3, i, softmax.smooth_dot);
      if (in.class_sums) exchange.post(4, i, post(i, softmax.max));
    }
    exchange.meet();
#pragma unroll
    for (int i = 0; i < V; ++i) {
      Softmax<acc_t> softmax;
      softmax.max = 0;  // of no use any more; slot 0 may hold the next tile's
      softmax.sum = exchange.sum(1, i);
      softmax.target = exchange.sum(2, i);
      softmax.smooth_dot = in.smooth ? exchange.sum(3, i) : acc_t(0);
      finish(i, softmax, in.class_sums ? exchange.sum(4, i) : acc_t(0));
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      Softmax<acc_t> softmax;
      softmax.max = math::max_logit<acc_t>(x[i]);
      softmax.run(in, x[i], label[i]);
      finish(i, softmax, post(i, softmax.max));
    }
  }
}

inline constexpr int kExchangeSlots = 5;

// What a thread adds up over its voxels besides Dice.
struct LossSums {
  double cross_entropy = 0;
  int valid = 0, foreground = 0, bad_labels = 0, bad_risk = 0;

  template <class acc_t, int V>
  __device__ __forceinline__ void add(const LossViews& in, const VoxelData<acc_t, V>& data, int i) {
    valid += data.valid(i);
    foreground += data.foreground(in, i);
    add_bad(data, i);
  }
  template <class acc_t, int V>
  __device__ __forceinline__ void add_bad(const VoxelData<acc_t, V>& data, int i) {
    bad_labels += data.label[i] == kBadLabel;
    bad_risk += data.bad_risk(i);
  }

  // Into the block's place of the partial sums; every thread must come here.
  __device__ __forceinline__ void write(double* partial, const Chunking& chunking, int64_t columns,
                                        int64_t image) const {
    const double ce = block_sum(cross_entropy);
    const int counts[4] = {block_sum(valid), block_sum(foreground), block_sum(bad_labels), block_sum(bad_risk)};
    if (threadIdx.x != 0) return;
    double* out =
        partial + (image * columns) * chunking.chunks_per_image + (blockIdx.x - image * chunking.chunks_per_image);
    out[kCrossEntropy * chunking.chunks_per_image] = ce;
#pragma unroll
    for (int j = 0; j < 4; ++j) out[(kValid + j) * chunking.chunks_per_image] = counts[j];
  }
};

}  // namespace riskmap::cuda
