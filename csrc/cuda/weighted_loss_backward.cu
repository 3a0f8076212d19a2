// Gradient of the weighted loss: one read of the logits, one write of their gradient. As a backward pass it makes the
// softmax again, so that the forward pass has nothing to keep; where the loss is wanted too (in_one), it is forward
// and backward in one.
#include "cuda/loss_gradient.cuh"
#include "cuda/loss_kernels.cuh"

namespace riskmap::cuda {
namespace {

// The slopes of the Dice loss, grad times those of its sums, [2, kTable] in shared memory.
template <LossKind kKind, int kTable>
struct SlopeTable {
  float (*table)[kTable];

  // To be followed by a barrier.
  template <class Views>
  __device__ __forceinline__ SlopeTable(const Views& args, uint32_t image) {
    __shared__ float memory[2][kTable];
    table = memory;
    const int classes = args.in.classes;
    const bool wanted = has_class_sums<kKind>(args.in);
    for (int j = static_cast<int>(threadIdx.x); j < 2 * kTable; j += static_cast<int>(blockDim.x)) {
      const int c = j % kTable;
      memory[j / kTable][c] = wanted && c < classes ? args.slope(image, j / kTable, c) : 0.0f;
    }
  }
  __device__ __forceinline__ float overall(int c) const { return table[0][c]; }
  __device__ __forceinline__ float hit(int label) const { return label < 0 ? 0.0f : table[1][label]; }
};

template <int kTable>
struct SlopeTable<LossKind::kCrossEntropy, kTable> {
  template <class Views>
  __device__ __forceinline__ SlopeTable(const Views&, uint32_t) {}
  __device__ __forceinline__ float overall(int) const { return 0; }
  __device__ __forceinline__ float hit(int) const { return 0; }
};

// Element k of a voxel's gradient, plus what is added at its label.
template <LossKind kKind, class Weights>
__device__ __forceinline__ float element(const LossViews& in, float e, float of_exp, float of_slope, float overall,
                                         float scaled_risk, const Weights& weights, int k, float added) {
  if (kKind == LossKind::kCrossEntropy) return e * of_exp + added;
  if (kKind == LossKind::kDice) return e * (of_exp + of_slope * overall) + added;
  const float slope = in.squared ? e * overall : overall;
  return e * (of_exp + of_slope * slope) - scaled_risk * weights.smooth(k) + added;
}

template <class T, int kSlots, LossKind kKind, bool kPlanar>
__global__ void __launch_bounds__(kThreads, 2) few_backward(const GradientViews<TileVolume> args) {
  using Tile = FewTile<T, kSlots, kPlanar>;
  const LossViews& in = args.in;
  const Chunk chunk(in.chunking, in.voxels);
  const ClassWeightsOf<kKind, kFewClasses> weights(in);
  const SlopeTable<kKind, kSlots> slopes(args, chunk.image);
  const float factor = args.template factor<float, kKind>(chunk);
  __syncthreads();
  const LossRows rows(in, chunk.image);
  float overall[kSlots];
#pragma unroll
  for (int c = 0; c < kSlots; ++c) overall[c] = slopes.overall(c);
  LossSums total;

  for (uint32_t first = chunk.begin; first < chunk.end; first += Tile::kVoxels) {
    const auto span = Tile::span(first, chunk.end);
    if (Tile::is_done(span, chunk.end)) break;
    Tile tile;
    VoxelData<float, kTileVoxels> data;
    tile.load(args.logits, chunk.image, first, chunk.end, span);
    if (kKind == LossKind::kAny) {
      data.load(in, rows, span);
    } else {
      data.load_classes(in, rows, span);
    }
    float grad_map[kTileVoxels], grad_risk[kTileVoxels], ce_sum = 0;
    args.template load_grad_map<kKind>(chunk.image, span, grad_map);
    bool used[kTileVoxels];
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) used[i] = is_used<kKind>(in, data, i, factor);
    clear_unused(tile, used);

#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) {
      const int label = data.label[i];
      const auto softmax = softmax_of<kKind>(tile, i, label, weights);
      float sum = 0;
#pragma unroll
      for (int c = 0; c < kSlots; ++c) {
        if (kKind == LossKind::kCrossEntropy) break;
        const float e = tile.x[c][i];
        sum += (kKind == LossKind::kAny && in.squared ? e * e : e) * overall[c];
      }
      VoxelGradient<float> voxel;
      if constexpr (kKind == LossKind::kAny) {
        voxel = gradient_of<kKind>(args, data, i, factor, grad_map[i], softmax, weights, sum, slopes.hit(label));
        if (args.wants_cross_entropy()) {
          const float ce = softmax.cross_entropy(weights, label);
          grad_risk[i] = voxel.of_risk(ce);
          ce_sum += voxel.counted ? data.risk[i] * ce : 0.0f;
        }
        total.look(data, i);
      } else {
        voxel = usual_gradient_of<kKind>(data, i, factor, softmax, sum, slopes.hit(label), total);
      }
#pragma unroll
      for (int c = 0; c < kSlots; ++c) {
        const float added = label == c ? voxel.at_label : 0.0f;
        tile.x[c][i] = element<kKind>(in, tile.x[c][i], voxel.of_exp, voxel.of_slope, overall[c], voxel.scaled_risk,
                                      weights, c, added);
      }
    }
    tile.store(args.grad, chunk.image, first, chunk.end, span);
    total.cross_entropy += static_cast<double>(ce_sum + total.cross_entropy_in_float);
    total.cross_entropy_in_float = 0;
    if (kKind == LossKind::kAny && args.grad_risk.data)
      store_values(MapRow(args.grad_risk, chunk.image), span, grad_risk);
  }
  if (kKind != LossKind::kDice) args.finish(total, chunk);
}

// Posts: largest logit, sum of the exponentials, label smoothing, slopes. Results: see below.
template <LossKind kKind, bool kPlanar>
using BackwardExchange = ManyExchange<kKind == LossKind::kAny    ? 4
                                      : kKind == LossKind::kDice ? 3
                                                                 : 2,
                                      kKind == LossKind::kAny    ? 6
                                      : kKind == LossKind::kDice ? 5
                                                                 : 4,
                                      kPlanar>;
enum Result : int { kLargest, kLabel, kAtLabel, kOfExp, kOfSlope, kScaledRisk };

template <class T, int kSlots, LossKind kKind, bool kPlanar>
__global__ void __launch_bounds__(kManyWarps* kWarp, 1) many_backward(const GradientViews<TileVolume> args) {
  constexpr int kSlopes = kKind == LossKind::kAny ? 3 : 2;  // their place among the posts
  const LossViews& in = args.in;
  const Chunk chunk(in.chunking, in.voxels);
  const ManyShape shape(in.classes);
  const ClassWeightsOf<kKind, kManyClasses + kManySlots> weights(in);
  const SharedSmoothingOf<kKind> smoothing(shape, weights);
  const SlopeTable<kKind, kManyClasses + kManySlots> slopes(args, chunk.image);
  const float factor = args.template factor<float, kKind>(chunk);
  BackwardExchange<kKind, kPlanar> exchange(args.logits.channels_last);
  __syncthreads();
  const LossRows rows(in, chunk.image);
  LossSums total;

  for (uint32_t first = chunk.begin; first < chunk.end; first += kWarpVoxels) {
    const auto own = shape.own(first, chunk.end);
    VoxelData<float, 1> data;
    float target = 0, grad_map[1] = {};
    if (shape.is_owner()) {
      if (kKind == LossKind::kAny) {
        data.load(in, rows, own);
      } else {
        data.load_classes(in, rows, own);
      }
      args.template load_grad_map<kKind>(chunk.image, own, grad_map);
      target = load_target<T>(args.logits, chunk.image, own.first, data.label[0]);
    }
    using Tile = ManyTile<T, kSlots, kPlanar>;
    const auto span = Tile::span(first, chunk.end);
    Tile tile;
    float max[kTileVoxels], sum[kTileVoxels];
    tile.load(args.logits, shape, chunk.image, first, span, exchange.stage());
    largest_of(tile, max);
    exchange.post(0, max);
    smoothing.post(tile, shape, max, weights, exchange);
    exponentials(tile, max, sum);
    exchange.post(1, sum);
    if (has_class_sums<kKind>(in)) {
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) sum[i] = 0;
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        const float overall = slopes.overall(shape.first + k);
#pragma unroll
        for (int i = 0; i < kTileVoxels; ++i) {
          const float e = tile.x[k][i];
          sum[i] += (kKind == LossKind::kAny && in.squared ? e * e : e) * overall;
        }
      }
      exchange.post(kSlopes, sum);
    }
    __syncthreads();

    if (shape.is_owner()) {
      const uint32_t at = shape.thread;
      const int label = data.label[0];
      const auto softmax = exchange.softmax(at, target, smoothing);
      float slope_sum = 0;
      if (has_class_sums<kKind>(in))
        slope_sum = kKind == LossKind::kAny && in.squared ? exchange.sum_of_squares(kSlopes, at, softmax.max)
                                                          : exchange.sum(kSlopes, at, softmax.max);
      const VoxelGradient<float> voxel =
          gradient_of<kKind>(args, data, 0, factor, grad_map[0], softmax, weights, slope_sum, slopes.hit(label));
      if (kKind == LossKind::kCrossEntropy || (kKind == LossKind::kAny && args.wants_cross_entropy())) {
        const float ce = softmax.cross_entropy(weights, label), grad_risk[1] = {voxel.of_risk(ce)};
        total.cross_entropy += voxel.counted ? static_cast<double>(data.risk[0] * ce) : 0.0;
        if (kKind == LossKind::kAny && args.grad_risk.data)
          store_values(MapRow(args.grad_risk, chunk.image), own, grad_risk);
      }
      total.look(data, 0);
      exchange.result(kLargest, at) = softmax.max;
      exchange.result(kLabel, at) = __int_as_float(voxel.used || voxel.bad ? label : kIgnored);
      exchange.result(kAtLabel, at) =
          label < 0 ? 0.0f
                    : element<kKind>(in, softmax.at_label, voxel.of_exp, voxel.of_slope, slopes.overall(label),
                                     voxel.scaled_risk, weights, label, voxel.at_label);
      exchange.result(kOfExp, at) = voxel.of_exp;
      if (kKind != LossKind::kCrossEntropy) exchange.result(kOfSlope, at) = voxel.of_slope;
      if (kKind == LossKind::kAny) exchange.result(kScaledRisk, at) = voxel.scaled_risk;
    }
    __syncthreads();

    float label_bits[kTileVoxels], at_label[kTileVoxels], of_exp[kTileVoxels], scale[kTileVoxels];
    float of_slope[kTileVoxels] = {}, scaled_risk[kTileVoxels] = {};
    exchange.results(kLabel, label_bits);
    exchange.results(kLargest, scale);
    exchange.results(kOfExp, of_exp);
    exchange.results(kAtLabel, at_label);
    if (kKind != LossKind::kCrossEntropy) exchange.results(kOfSlope, of_slope);
    if (kKind == LossKind::kAny) exchange.results(kScaledRisk, scaled_risk);
    int label[kTileVoxels];
    bool used[kTileVoxels];
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) {
      label[i] = __float_as_int(label_bits[i]);
      used[i] = label[i] != kIgnored;
      // From here on relative to the voxel's largest logit.
      scale[i] = used[i] ? math::exp(max[i] - scale[i]) : 0.0f;
      if (kKind != LossKind::kAny) {
        of_exp[i] *= scale[i];
        of_slope[i] *= scale[i];
      }
    }
    clear_unused(tile, used);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const float overall = slopes.overall(shape.first + k);
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) {
        const float e = kKind == LossKind::kAny ? tile.x[k][i] * scale[i] : tile.x[k][i];
        tile.x[k][i] =
            element<kKind>(in, e, of_exp[i], of_slope[i], overall, scaled_risk[i], weights, shape.first + k, 0.0f);
      }
    }
    tile.store(args.grad, shape, chunk.image, first, span, exchange.stage(), label, at_label);
  }
  if (kKind != LossKind::kDice) args.finish(total, chunk);
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward_of_any(const GradientViews<AnyVolume> args) {
  using acc_t = typename AccOf<T>::type;
  constexpr LossKind kKind = LossKind::kAny;
  const LossViews& in = args.in;
  const Chunk chunk(in.chunking, in.voxels);
  const ClassWeights<acc_t, 0> weights(in);
  const acc_t factor = args.template factor<acc_t, kKind>(chunk);
  const auto overall = [&](int c) { return in.class_sums ? args.template slope<acc_t>(chunk.image, 0, c) : acc_t(0); };
  const LossRows rows(in, chunk.image);
  LossSums total;

  for (uint32_t at = chunk.begin + threadIdx.x; at < chunk.end; at += kThreads) {
    const Spread<1> span{at, chunk.end, 0};
    VoxelData<acc_t, 1> data;
    acc_t grad_map[1];
    data.load(in, rows, span);
    args.template load_grad_map<kKind>(chunk.image, span, grad_map);
    const int label = data.label[0];
    const AnyColumn<T> x(args.logits, chunk.image, at);
    const auto softmax = softmax_of_any(x, label, weights);
    acc_t sum = 0;
    if (in.class_sums)
      x.each([&](int c) {
        const acc_t e = math::exp(x.get(c) - softmax.max);
        sum += (in.squared ? e * e : e) * overall(c);
      });
    const acc_t hit = in.class_sums && label >= 0 ? args.template slope<acc_t>(chunk.image, 1, label) : acc_t(0);
    const auto voxel = gradient_of<kKind>(args, data, 0, factor, grad_map[0], softmax, weights, sum, hit);
    const acc_t ce = softmax.cross_entropy(weights, label), grad_risk[1] = {voxel.of_risk(ce)};
    total.cross_entropy += voxel.counted ? static_cast<double>(data.risk[0] * ce) : 0.0;
    total.look(data, 0);
    if (args.grad_risk.data) store_values(MapRow(args.grad_risk, chunk.image), span, grad_risk);
    T* out = voxel_of<T>(args.grad, chunk.image, at);
    x.each([&](int c) {
      const acc_t e = math::exp(x.get(c) - softmax.max);
      const acc_t slope = in.squared ? e * overall(c) : overall(c);
      const acc_t g = e * (voxel.of_exp + voxel.of_slope * slope) - voxel.scaled_risk * weights.smooth(c) +
                      (label == c ? voxel.at_label : acc_t(0));
      out[c * args.grad.stride_class] = from_acc<T>(voxel.bad ? not_a_number<acc_t>() : voxel.used ? g : acc_t(0));
    });
  }
  args.finish(total, chunk);
}

}  // namespace

void launch_weighted_loss_backward(const LossBackward& args, cudaStream_t stream) {
  const Volume& logits = args.in.logits;
  const int64_t blocks = args.chunking.chunks(logits.batch);
  if (blocks == 0) return;
  const bool usual = is_usual(args.in) && !args.grad_map.data && !args.grad_risk.data;
  with_loss_kernel(args.in, fits_tiles(args), usual, [&](auto kernel) {
    using Kernel = decltype(kernel);
    using T = typename Kernel::T;
    if constexpr (Kernel::kWay == LossWay::kAny) {
      launch(backward_of_any<T>, blocks, kThreads, 0, stream,
             view_of(args, any_view_of(logits), any_view_of(args.grad_logits)));
    } else {
      const auto views = view_of(args, tile_view_of(logits), tile_view_of(args.grad_logits));
      if constexpr (Kernel::kWay == LossWay::kFew) {
        using Tile = FewTile<T, Kernel::kSlots, Kernel::kPlanar>;
        launch(few_backward<T, Kernel::kSlots, Kernel::kKind, Kernel::kPlanar>, blocks, kThreads,
               Tile::shared_bytes(views.logits), stream, views);
      } else {
        launch(many_backward<T, Kernel::kSlots, Kernel::kKind, Kernel::kPlanar>, blocks,
               ManyShape::warps_of(logits.classes) * kWarp,
               BackwardExchange<Kernel::kKind, Kernel::kPlanar>::shared_bytes(
                   views.logits, ManyTile<T, 4, false>::stage_bytes(views.logits)),
               stream, views);
      }
    }
  });
}

}  // namespace riskmap::cuda
