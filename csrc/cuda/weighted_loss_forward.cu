// Forward pass of the weighted loss: one read of the logits, nothing of their size written.
#include "cuda/class_sums.cuh"
#include "cuda/loss_kernels.cuh"

namespace riskmap::cuda {
namespace {

// What a voxel of probability pi adds to P.
template <LossKind kKind>
__device__ __forceinline__ float to_predicted(const LossViews& in, float pi) {
  return kKind == LossKind::kAny && in.squared ? pi * pi : pi;
}

template <class T, int kSlots, LossKind kKind, bool kPlanar>
__global__ void __launch_bounds__(kThreads, 2) few_forward(const ForwardViews<TileVolume> args) {
  using Tile = FewTile<T, kSlots, kPlanar>;
  const LossViews& in = args.in;
  const Chunk chunk(in.chunking, in.voxels);
  const ClassWeightsOf<kKind, kFewClasses> weights(in);
  const bool class_sums = has_class_sums<kKind>(in);
  const LossRows rows = args.rows(chunk);
  FewClassSums<kSlots> sums;
  LossSums total;

  for (uint32_t first = chunk.begin; first < chunk.end; first += Tile::kVoxels) {
    const auto span = Tile::span(first, chunk.end);
    if (Tile::is_done(span, chunk.end)) break;
    Tile tile;
    VoxelData<float, kTileVoxels> data;
    tile.load(args.logits, chunk.image, first, chunk.end, span);
    data.load(in, rows, span);
    const bool used[] = {data.valid(0), data.valid(1), data.valid(2), data.valid(3)};
    clear_unused(tile, used);

    float value[kTileVoxels], ce_sum = 0;
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) {
      if constexpr (kKind == LossKind::kDice) {
        const float weight = data.valid(i) ? data.risk[i] : 0.0f;
        ce_sum += weight * sums.add(tile, i, data.label[i]);
        total.look_at_weight(weight);
        total.look_at_label(data.label[i]);
        if (in.foreground.data && data.label[i] == in.background) sums.masked_background += data.in_mask >> i & 1;
        continue;
      }
      const auto softmax = softmax_of<kKind>(tile, i, data.label[i], weights);
      const bool counted = kKind == LossKind::kAny ? data.counted(in, i) : data.valid(i);
      const float weighted = counted ? data.risk[i] * softmax.cross_entropy(weights, data.label[i]) : 0.0f;
      ce_sum += weighted;
      total.look(data, i);
      if (kKind == LossKind::kAny) value[i] = args.value(data, i, weighted);
      if (!class_sums) {
        total.count(in, data, i);
        continue;
      }
      const float inverse = data.valid(i) ? math::inverse(softmax.sum) : 0.0f;
      if (data.label[i] == in.background) sums.masked_background += data.in_mask >> i & 1;
#pragma unroll
      for (int c = 0; c < kSlots; ++c) {
        const float pi = tile.x[c][i] * inverse;
        sums.predicted[c] += to_predicted<kKind>(in, pi);
        const bool hit = data.label[i] == c;
        sums.intersection[c] += hit ? pi : 0.0f;
        sums.labelled[c] += hit;
      }
    }
    total.cross_entropy += static_cast<double>(ce_sum);
    if (kKind == LossKind::kAny && args.map.data) store_values(args.map_row(chunk), span, value);
  }
  const PartialColumns out = args.columns(chunk);
  if (class_sums) sums.count(in, total);
  write_sums(total, true, out);
  if (class_sums) sums.write(in, out);
}

template <LossKind kKind, bool kPlanar>
using ForwardExchange = ManyExchange<kKind == LossKind::kAny ? 3 : 2, 2, kPlanar>;

template <class T, int kSlots, LossKind kKind, bool kPlanar>
__global__ void __launch_bounds__(kManyWarps* kWarp, 1) many_forward(const ForwardViews<TileVolume> args) {
  const LossViews& in = args.in;
  const Chunk chunk(in.chunking, in.voxels);
  const ManyShape shape(in.classes);
  const ClassWeightsOf<kKind, kManyClasses + kManySlots> weights(in);
  const SharedSmoothingOf<kKind> smoothing(shape, weights);
  const bool class_sums = has_class_sums<kKind>(in);
  ForwardExchange<kKind, kPlanar> exchange(args.logits.channels_last);
  ManyClassSumsOf<kKind, kSlots> sums(in.classes);
  const LossRows rows = args.rows(chunk);
  LossSums total;
  __syncthreads();

  for (uint32_t first = chunk.begin; first < chunk.end; first += kWarpVoxels) {
    const auto own = shape.own(first, chunk.end);
    VoxelData<float, 1> data;
    float target = 0;
    if (shape.is_owner()) {
      data.load(in, rows, own);
      target = load_target<T>(args.logits, chunk.image, own.first, data.label[0]);
    }
    using Tile = ManyTile<T, kSlots, kPlanar>;
    Tile tile;
    float max[kTileVoxels], sum[kTileVoxels];
    tile.load(args.logits, shape, chunk.image, first, Tile::span(first, chunk.end), exchange.stage());
    largest_of(tile, max);
    exchange.post(0, max);
    smoothing.post(tile, shape, max, weights, exchange);
    exponentials(tile, max, sum);
    exchange.post(1, sum);
    __syncthreads();

    if (shape.is_owner()) {
      const auto softmax = exchange.softmax(shape.thread, target, smoothing);
      const bool counted = kKind == LossKind::kAny ? data.counted(in, 0) : data.valid(0);
      const float ce[1] = {counted ? data.risk[0] * softmax.cross_entropy(weights, data.label[0]) : 0.0f};
      total.cross_entropy += static_cast<double>(ce[0]);
      total.look(data, 0);
      total.count(in, data, 0);
      if (kKind == LossKind::kAny && args.map.data) {
        const float value[1] = {args.value(data, 0, ce[0])};
        store_values(args.map_row(chunk), own, value);
      }
      if (class_sums) {
        const float inverse = data.valid(0) ? math::inverse(softmax.sum) : 0.0f;
        sums.add_at_labels(data.label[0], softmax.at_label * inverse);
        exchange.result(0, shape.thread) = softmax.max;
        exchange.result(1, shape.thread) = inverse;
      }
    }
    __syncthreads();
    if (!class_sums) continue;

    float factor[kTileVoxels], largest[kTileVoxels];
    exchange.results(0, largest);
    exchange.results(1, factor);
    const bool used[] = {factor[0] != 0, factor[1] != 0, factor[2] != 0, factor[3] != 0};
    clear_unused(tile, used);
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) factor[i] *= used[i] ? math::exp(max[i] - largest[i]) : 0.0f;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) sums.predicted[k] += to_predicted<kKind>(in, tile.x[k][i] * factor[i]);
    }
  }
  const PartialColumns out = args.columns(chunk);
  write_sums(total, true, out);
  if (class_sums) sums.write(shape, in, out);
}

// Anything else. The classes of a tile are shared out to the warps once the softmax of its voxels is known.
constexpr int kAnyVoxels = 1024;

template <class T>
__global__ void __launch_bounds__(kThreads) forward_of_any(const ForwardViews<AnyVolume> args) {
  using acc_t = typename AccOf<T>::type;
  __shared__ acc_t maxima[kAnyVoxels], inverses[kAnyVoxels];
  __shared__ int labels[kAnyVoxels];
  const LossViews& in = args.in;
  const Chunk chunk(in.chunking, in.voxels);
  const ClassWeights<acc_t, 0> weights(in);
  const PartialColumns out = args.columns(chunk);
  const LossRows rows = args.rows(chunk);
  LossSums total;

  for (uint32_t first = chunk.begin; first < chunk.end; first += kAnyVoxels) {
    const uint32_t end = chunk.end - first < kAnyVoxels ? chunk.end : first + kAnyVoxels;
    for (uint32_t voxel = first + threadIdx.x; voxel < end; voxel += kThreads) {
      const Spread<1> span{voxel, end, 1};
      VoxelData<acc_t, 1> data;
      data.load(in, rows, span);
      const AnyColumn<T> x(args.logits, chunk.image, voxel);
      const int label = data.label[0];
      const auto softmax = softmax_of_any(x, label, weights);
      const acc_t value[1] = {data.counted(in, 0) ? data.risk[0] * softmax.cross_entropy(weights, label) : acc_t(0)};
      total.cross_entropy += static_cast<double>(value[0]);
      total.look(data, 0);
      total.count(in, data, 0);
      const acc_t mapped[1] = {args.value(data, 0, value[0])};
      if (args.map.data) store_values(args.map_row(chunk), span, mapped);
      maxima[voxel - first] = softmax.max;
      inverses[voxel - first] = acc_t(1) / softmax.sum;
      labels[voxel - first] = label;
    }
    if (!in.class_sums) continue;
    __syncthreads();
    for (int c = warp_index(); c < in.classes; c += kWarps) {
      WarpClassSums sums;
      for (uint32_t voxel = first + static_cast<uint32_t>(lane_index()); voxel < end; voxel += kWarp) {
        const uint32_t at = voxel - first;
        if (labels[at] < 0) continue;
        const AnyColumn<T> x(args.logits, chunk.image, voxel);
        sums.add(static_cast<double>(math::exp(x.get(c) - maxima[at]) * inverses[at]), in.squared, labels[at] == c);
      }
      sums.write(first == chunk.begin, in.classes, c, out);
    }
    __syncthreads();
  }
  write_sums(total, true, out);
}

}  // namespace

// Voxels that a block of the kernels holds at once, and blocks that a GPU has room for.
Chunking loss_chunking(const LossInputs& in) {
  const int64_t batch = in.logits.batch, classes = in.logits.classes, voxels = in.logits.voxels;
  if (!fits_tiles(in)) return chunk_voxels(batch, voxels, kThreads, 64);
  if (classes <= kFewClasses) return chunk_voxels(batch, voxels, kThreads * kTileVoxels, 64);
  return chunk_voxels(batch, voxels, kWarpVoxels, 256, usual_blocks() * (classes <= 64 ? 2 : 1));
}

void launch_weighted_loss_forward(const LossForward& args, cudaStream_t stream) {
  const Volume& logits = args.in.logits;
  const int64_t blocks = args.chunking.chunks(logits.batch);
  if (blocks == 0) return;
  with_loss_kernel(args.in, fits_tiles(args.in), is_usual(args.in) && !args.map.data, [&](auto kernel) {
    using Kernel = decltype(kernel);
    using T = typename Kernel::T;
    if constexpr (Kernel::kWay == LossWay::kAny) {
      launch(forward_of_any<T>, blocks, kThreads, 0, stream, view_of(args, any_view_of(logits)));
    } else if constexpr (Kernel::kWay == LossWay::kFew) {
      using Tile = FewTile<T, Kernel::kSlots, Kernel::kPlanar>;
      const TileVolume view = tile_view_of(logits);
      launch(few_forward<T, Kernel::kSlots, Kernel::kKind, Kernel::kPlanar>, blocks, kThreads, Tile::shared_bytes(view),
             stream, view_of(args, view));
    } else {
      const TileVolume view = tile_view_of(logits);
      launch(
          many_forward<T, Kernel::kSlots, Kernel::kKind, Kernel::kPlanar>, blocks,
          ManyShape::warps_of(view.classes) * kWarp,
          ForwardExchange<Kernel::kKind, Kernel::kPlanar>::shared_bytes(view, ManyTile<T, 4, false>::stage_bytes(view)),
          stream, view_of(args, view));
    }
  });
}

}  // namespace riskmap::cuda
