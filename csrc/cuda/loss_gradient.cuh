// What the gradient kernels share: softmax and overlapping regions.
#pragma once

#include "cuda/loss.cuh"

namespace riskmap::cuda {

struct GradientViews {
  LossViews in;
  const void* grad_loss;
  Dtype grad_dtype;
  const double* scale;
  MapView grad_map;
  const double* dice_slopes;
  VolumeView grad_logits;
  MapView grad_risk;
  double* partial;

  __device__ __forceinline__ double grad() const { return grad_loss ? load_scalar(grad_loss, grad_dtype) : 1.0; }
};

template <int V>
GradientViews view_of(const LossBackward& args, int parts) {
  const int64_t batch = args.in.logits.batch;
  return {view_of<V>(args.in, args.chunking, parts),
          args.grad_loss,
          args.grad_dtype,
          args.scale,
          view_of<V>(args.grad_map, batch),
          args.dice_slopes,
          view_of<V>(args.grad_logits),
          view_of<V>(args.grad_risk, batch),
          args.partial};
}

// One voxel of a gradient.
template <class acc_t>
struct VoxelGradient {
  bool counted;  // its cross-entropy counts; a factor of 0 switches that part off
  bool used;     // elsewhere not even a NaN may reach the gradient
  bool bad;
  acc_t scale;        // of its cross-entropy in the loss, but for the risk
  acc_t scaled_risk;  // 0 where it does not count

  template <int V>
  __device__ __forceinline__ VoxelGradient(const GradientViews& args, const VoxelData<acc_t, V>& data, int i,
                                           acc_t factor, acc_t grad_map) {
    counted = factor != acc_t(0) && data.counted(args.in, i);
    used = args.in.class_sums ? data.valid(i) : counted;
    bad = data.label[i] == kBadLabel || data.bad_risk(i);
    scale = factor * grad_map;
    scaled_risk = counted ? scale * data.risk[i] : acc_t(0);
  }
  __device__ __forceinline__ acc_t finish(acc_t g) const { return bad ? not_a_number<acc_t>() : used ? g : acc_t(0); }
  __device__ __forceinline__ acc_t of_risk(acc_t ce) const {
    return bad ? not_a_number<acc_t>() : counted ? scale * ce : acc_t(0);
  }
};

}  // namespace riskmap::cuda
