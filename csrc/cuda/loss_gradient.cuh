// What the gradient kernels share: softmax and overlapping regions, and the loss where it is made in the same pass.
#pragma once

#include "cuda/last_block.cuh"
#include "cuda/loss.cuh"

namespace riskmap::cuda {

// The scale of a block's image from the counts of its voxels, or of all images. By one warp.
__device__ __forceinline__ double scale_by_warp(const LossInOne& args, const Chunk& chunk) {
  uint64_t valid = 0, foreground = 0, all_valid = 0, all_foreground = 0;
  int bad = 0;
  const auto count = [&](int64_t first, int64_t last, uint64_t& valid_sum, uint64_t& foreground_sum, int& any_bad) {
    for (int64_t j = first + lane_index(); j < last; j += kWarp) {
      const VoxelCount of_chunk = args.counts[j];
      valid_sum += of_chunk.valid;
      foreground_sum += of_chunk.foreground;
      any_bad |= of_chunk.bad_labels != 0;
    }
  };
  count(chunk.image * args.count_chunks, (chunk.image + int64_t(1)) * args.count_chunks, valid, foreground, bad);
  const uint64_t both = warp_sum(valid << 32 | foreground);  // there are less than 2^31 voxels in an image
  bad = __any_sync(kAllLanes, bad);
  if (args.normalization == math::Normalization::kBatchForeground ||
      args.normalization == math::Normalization::kBatchValid || args.normalization == math::Normalization::kWeighted) {
    int elsewhere = 0;
    count(0, args.batch * args.count_chunks, all_valid, all_foreground, elsewhere);
    all_valid = warp_sum(all_valid);
    all_foreground = warp_sum(all_foreground);
  }
  const math::VoxelCounts image{static_cast<int64_t>(both >> 32), static_cast<int64_t>(both & 0xffffffffu), 0};
  const math::VoxelCounts batch{static_cast<int64_t>(all_valid), static_cast<int64_t>(all_foreground),
                                static_cast<double>(all_valid)};
  const double n = math::normalizer(args.normalization, args.foreground_floor, image, batch, args.batch);
  return bad ? not_a_number<double>() : math::image_scale(args.reduction, args.ce_weight, n, args.batch);
}

// Every thread of the block must come here.
__device__ __forceinline__ double scale_from_counts(const LossInOne& args, const Chunk& chunk) {
  __shared__ double shared_scale;
  if (warp_index() == 0) {
    const double scale = scale_by_warp(args, chunk);
    if (lane_index() == 0) {
      shared_scale = scale;
      if (chunk.index == 0) args.scale[chunk.image] = scale;
    }
  }
  __syncthreads();
  return shared_scale;
}

__device__ __forceinline__ void write_loss(void* loss, bool is_double, double value) {
  if (is_double) {
    *static_cast<double*>(loss) = value;
  } else {
    *static_cast<float*>(loss) = static_cast<float>(value);
  }
}

__device__ __forceinline__ void write_nan(void* data, Dtype dtype, int64_t index) {
  switch (dtype) {
    case Dtype::kDouble: static_cast<double*>(data)[index] = not_a_number<double>(); break;
    case Dtype::kHalf: static_cast<uint16_t*>(data)[index] = 0x7e00; break;
    case Dtype::kBFloat16: static_cast<uint16_t*>(data)[index] = 0x7fc0; break;
    default: static_cast<float*>(data)[index] = not_a_number<float>(); break;
  }
}

template <class Logits>
struct GradientViews {
  LossViews in;
  Logits logits, grad;
  const void* grad_loss;
  Dtype grad_dtype;
  const double* scale;
  MapView grad_map;
  const double* dice_slopes;
  MapView grad_risk;
  LossInOne in_one;
  Volume written;  // grad, for what is rare

  __device__ __forceinline__ double grad_of_loss() const {
    return grad_loss ? load_scalar(grad_loss, grad_dtype) : 1.0;
  }
  template <class acc_t = float>
  __device__ __forceinline__ acc_t slope(uint32_t image, int which, int c) const {
    return static_cast<acc_t>(grad_of_loss() * dice_slopes[(image * int64_t(2) + which) * in.classes + c]);
  }
  // What the image's cross-entropy is multiplied by. Every thread of the block must come here.
  template <class acc_t, LossKind kKind>
  __device__ __forceinline__ acc_t factor(const Chunk& chunk) const {
    if (kKind != LossKind::kDice && in_one.loss) return static_cast<acc_t>(scale_from_counts(in_one, chunk));
    return static_cast<acc_t>(grad_of_loss() * scale[chunk.image]);
  }
  template <LossKind kKind, class acc_t, class Span>
  __device__ __forceinline__ void load_grad_map(uint32_t image, const Span& span,
                                                acc_t (&values)[Span::kVoxels]) const {
    if constexpr (kKind == LossKind::kAny) {
      load_values(MapRow(grad_map, image), span, values);
    } else {
#pragma unroll
      for (int i = 0; i < Span::kVoxels; ++i) values[i] = 1;
    }
  }
  __device__ __forceinline__ bool wants_cross_entropy() const { return grad_risk.data || in_one.loss; }

  // The loss, where it is wanted. Every thread of the block must come here.
  __device__ __forceinline__ void finish(const LossSums& total, const Chunk& chunk) const {
    if (!in_one.loss) return;
    write_sums(total, false, {in_one.partial, in.chunking, kLossColumns, chunk});
    if (!is_last_block(in_one.ticket)) return;
    // Sums over chunks, as finish_loss makes them.
    const int64_t chunks = in.chunking.chunks_per_image;
    for (int64_t image = warp_index(); image < in_one.batch; image += static_cast<int>(blockDim.x) / kWarp) {
      double* const ce = in_one.partial + (image * kLossColumns + kCrossEntropy) * chunks;
      double* const bad_risk = in_one.partial + (image * kLossColumns + kBadRisk) * chunks;
      const double ce_sum = warp_sum_of(ce, chunks), bad_sum = warp_sum_of(bad_risk, chunks);
      __syncwarp();
      if (lane_index() != 0) continue;
      *ce = ce_sum;
      *bad_risk = bad_sum;
    }
    int bad = has_bad_weight(in.class_weight, in.classes);  // and a barrier
    double loss = 0;
    for (int64_t image = threadIdx.x; image < in_one.batch; image += blockDim.x) {
      const double own_scale = __ldcg(in_one.scale + image);
      if (own_scale != 0) loss += own_scale * in_one.partial[(image * kLossColumns + kCrossEntropy) * chunks];
      bad |= own_scale != own_scale;
    }
    for (int64_t image = 0; image < in_one.batch; ++image) {
      if (in_one.partial[(image * kLossColumns + kBadRisk) * chunks] == 0) continue;
      bad = 1;
      poison(image);
    }
    bad = __syncthreads_or(bad);
    loss = block_sum(loss);
    if (threadIdx.x == 0) write_loss(in_one.loss, in_one.loss_is_double, bad ? not_a_number<double>() : loss);
  }

 private:
  // Where an image has a bad risk its gradients are NaN, as where it has a bad label: only now it is known.
  __device__ __forceinline__ void poison(int64_t image) const {
    for (uint32_t voxel = threadIdx.x; voxel < in.voxels; voxel += blockDim.x) {
#pragma unroll 1
      for (int64_t c = 0; c < in.classes; ++c)
        write_nan(written.data, written.dtype,
                  image * written.stride_batch + c * written.stride_class + voxel * written.stride_voxel);
      if (grad_risk.data) write_nan(grad_risk.data + image * grad_risk.stride_bytes, grad_risk.dtype, voxel);
    }
  }
};

template <class Logits>
GradientViews<Logits> view_of(const LossBackward& args, const Logits& logits, const Logits& grad) {
  return {view_of(args.in, args.chunking),
          logits,
          grad,
          args.grad_loss,
          args.grad_dtype,
          args.scale,
          view_of(args.grad_map),
          args.dice_slopes,
          view_of(args.grad_risk),
          args.in_one,
          args.grad_logits};
}

// The gradient must lie as the logits do, and its maps must be read in packs as well.
inline bool fits_tiles(const LossBackward& args) {
  const int64_t batch = args.in.logits.batch;
  return fits_tiles(args.in) && fits_tiles(args.grad_logits) &&
         (args.grad_logits.stride_voxel == 1) == (args.in.logits.stride_voxel == 1) &&
         has_packs<kTileVoxels>(args.grad_map, batch) && has_packs<kTileVoxels>(args.grad_risk, batch);
}

// Whether a voxel has a gradient. Elsewhere not even a NaN may reach it.
template <LossKind kKind, class acc_t, int V>
__device__ __forceinline__ bool is_used(const LossViews& in, const VoxelData<acc_t, V>& data, int i, acc_t factor) {
  if (kKind == LossKind::kCrossEntropy) return data.valid(i) && factor != acc_t(0);
  if (kKind == LossKind::kDice || in.class_sums) return data.valid(i);
  return data.counted(in, i) && factor != acc_t(0);
}

// The gradient of one voxel: of class k it is
//   e_k (of_exp + of_slope overall_k [e_k where squared]) - scaled_risk smooth_k + (k = y ? at_label : 0)
// with e_k = exp(x_k - max).
template <class acc_t>
struct VoxelGradient {
  bool counted;  // its cross-entropy counts; a factor of 0 switches that part off
  bool used, bad;
  acc_t scale;        // of its cross-entropy in the loss, but for the risk
  acc_t scaled_risk;  // 0 where it does not count
  acc_t of_exp, of_slope, at_label;

  __device__ __forceinline__ acc_t of_risk(acc_t ce) const {
    return bad ? not_a_number<acc_t>() : counted ? scale * ce : acc_t(0);
  }
};

// Of a usual call: a bad label or risk makes the factor NaN, or is found when the loss is finished.
template <LossKind kKind, int V>
__device__ __forceinline__ VoxelGradient<float> usual_gradient_of(const VoxelData<float, V>& data, int i, float factor,
                                                                  const Softmax<float>& softmax, float slope_sum,
                                                                  float hit, LossSums& total) {
  VoxelGradient<float> voxel{};
  const bool valid = data.valid(i);
  const float weight = valid ? data.risk[i] : 0.0f;
  voxel.scaled_risk = factor * weight;
  if constexpr (kKind == LossKind::kCrossEntropy) {
    total.look_at_weight(weight);
    total.cross_entropy_in_float += weight * (math::log(softmax.sum) - softmax.target);
    voxel.of_exp = voxel.scaled_risk * math::inverse(softmax.sum);
    voxel.at_label = -voxel.scaled_risk;
  } else {
    const float inverse = valid ? math::inverse(softmax.sum) : 0.0f;
    const float of_hit = softmax.at_label * inverse * hit;
    voxel.of_slope = inverse;
    // Rounded by itself: else each class would take two instructions more.
    voxel.of_exp = __fmul_rn(inverse, voxel.scaled_risk - (inverse * slope_sum + of_hit));
    voxel.at_label = of_hit - voxel.scaled_risk;
  }
  return voxel;
}

// slope_sum: sum_k e_k overall_k [e_k]; hit: the slope of I at the label.
template <LossKind kKind, class Views, class acc_t, int V, class Weights>
__device__ __forceinline__ VoxelGradient<acc_t> gradient_of(const Views& args, const VoxelData<acc_t, V>& data, int i,
                                                            acc_t factor, acc_t grad_map, const Softmax<acc_t>& softmax,
                                                            const Weights& weights, acc_t slope_sum, acc_t hit) {
  const LossViews& in = args.in;
  VoxelGradient<acc_t> voxel;
  voxel.used = is_used<kKind>(in, data, i, factor);
  voxel.counted = kKind == LossKind::kAny    ? factor != acc_t(0) && data.counted(in, i)
                  : kKind == LossKind::kDice ? factor != acc_t(0) && voxel.used
                                             : voxel.used;
  voxel.bad = data.label[i] == kBadLabel || data.bad_risk(i);
  voxel.scale = factor * grad_map;
  voxel.scaled_risk = voxel.bad ? not_a_number<acc_t>() : voxel.counted ? voxel.scale * data.risk[i] : acc_t(0);
  const acc_t inverse = voxel.used ? math::inverse(softmax.sum) : acc_t(0);
  const acc_t hot = Weights::kNone ? voxel.scaled_risk : voxel.scaled_risk * acc_t(weights.hot(data.label[i]));
  voxel.of_exp = inverse * (Weights::kNone ? hot : hot + voxel.scaled_risk * acc_t(weights.smooth_total));
  voxel.of_slope = inverse;
  voxel.at_label = -hot;
  if (kKind == LossKind::kDice || (kKind == LossKind::kAny && in.class_sums)) {
    const bool squared = kKind == LossKind::kAny && in.squared;
    if (squared) voxel.of_slope = acc_t(2) * inverse * inverse;
    const acc_t of_hit = voxel.used ? softmax.at_label * inverse * hit : acc_t(0);
    voxel.of_exp -= voxel.used ? inverse * (voxel.of_slope * slope_sum + of_hit) : acc_t(0);
    voxel.at_label += of_hit;
  }
  return voxel;
}

}  // namespace riskmap::cuda
