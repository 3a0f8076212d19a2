// A tile of voxels through a head, a 1x1 convolution: logits from features, and back to the head's gradients.
#pragma once

#include "cpu/kernels/product.h"
#include "cpu/kernels/stage.h"
#include "cpu/kernels/weighted_loss.h"

namespace riskmap::cpu {
namespace {

// [n, C] from [C, n], both in whole vectors.
template <class acc_t>
static void turn(const acc_t* in, int64_t in_pitch, acc_t* out, int64_t out_pitch, int64_t rows, int64_t columns) {
  using F = typename Simd<acc_t>::F;
  constexpr int kLanes = Simd<acc_t>::kLanes;
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      F block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load<F>(in + (r + i) * in_pitch + c);
      transpose<acc_t>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(out + (c + i) * out_pitch + r, block[i]);
    }
}

template <class acc_t>
struct HeadTile {
  const HeadArgs& head;
  int64_t classes, channels, padded;  // C, F, and F in whole vectors
  int64_t pitch;
  acc_t* features;  // [padded, pitch]
  acc_t* turned;    // [tile, padded]

  HeadTile(const LossArgs& args, acc_t* scratch)
      : head(args.head),
        classes(args.logits.classes),
        channels(args.head.features.classes),
        padded(padded_channels(channels)),
        pitch(tile_pitch(tile_voxels(classes, args.logits.dtype))),
        features(scratch),
        turned(features + padded * pitch) {
    for (int64_t i = channels * pitch; i < padded * pitch; ++i) features[i] = acc_t(0);
  }

  // rows [C, pitch]; the features stay in scratch.
  void make_logits(int64_t image, int64_t begin, int64_t n, acc_t* rows) {
    stage_in(head.features, image, begin, n, features, pitch);
    const acc_t* weight = static_cast<const acc_t*>(head.weight);
    const acc_t* bias = static_cast<const acc_t*>(head.bias);
    multiply({{weight, channels, 1}, features, pitch, channels, bias, rows, pitch, classes, n});
  }

  // rows: the gradient of the logits that make_logits made last.
  void add_gradients(const HeadGradients& out, int64_t chunk, int64_t image, int64_t begin, int64_t n,
                     const acc_t* rows) {
    if (out.parameters) {
      acc_t* weight =
          static_cast<acc_t*>(out.parameters) + chunk / out.chunks_per_group * parameter_sums(classes, channels);
      turn(features, pitch, turned, padded, padded, n);
      multiply({{rows, pitch, 1}, turned, padded, n, nullptr, weight, padded, classes, padded});
      acc_t* bias = weight + classes * padded;
      for (int64_t c = 0; c < classes; ++c) {
        typename Simd<acc_t>::F sum{};
        for (int64_t v = 0; v < n; v += Simd<acc_t>::kLanes) sum += load<typename Simd<acc_t>::F>(rows + c * pitch + v);
        bias[c] += static_cast<acc_t>(horizontal_sum(sum));
      }
    }
    if (out.features.data) {
      const acc_t* weight = static_cast<const acc_t*>(head.weight);
      const acc_t* zeros = static_cast<const acc_t*>(head.zeros);
      multiply({{weight, 1, channels}, rows, pitch, classes, zeros, features, pitch, channels, n});
      stage_out(features, pitch, out.features, image, begin, n, false);
    }
  }

  static void multiply(const Product<acc_t>& product) { RISKMAP_CPU_CAPABILITY::multiply(product); }
};

}  // namespace
}  // namespace riskmap::cpu
