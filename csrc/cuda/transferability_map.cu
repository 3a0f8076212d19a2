// Source logits to transferability or voxel weight: one read of the logits, nothing kept but the map.
#include "cuda/source.cuh"
#include "math/transferability_map.h"

namespace riskmap::cuda {
namespace {

// Partial results of a chunk, a column each.
enum TransferColumn : int { kLow, kHigh, kForeground, kTransferColumns };

template <class acc_t>
struct MapOptions {
  MapKind kind;
  int background;
  math::RiskCurveOf<acc_t> curve;
};

template <class Logits, class acc_t>
struct TransferViews {
  SourceViews in;
  Logits source;
  ConditionalTable conditional;
  MapOptions<acc_t> options;
  MapView out;
  double* partial;
};

// No probability, and what rounding may leave of one.
__device__ __forceinline__ bool is_bad_probability(double p) { return !(p >= 0 && p <= 1 + 1e-6); }

// The values of a map, and the range of the hardness and the foreground for the one that is finished later.
template <class acc_t>
struct MapMaker {
  MapOptions<acc_t> options;
  acc_t low = acc_t(1e30), high = acc_t(-1);
  uint32_t foreground = 0;

  __device__ __forceinline__ explicit MapMaker(const MapOptions<acc_t>& options_) : options(options_) {}

  // p: sum_z P(y|z) theta_z
  __device__ __forceinline__ acc_t value(int label, acc_t p) {
    const acc_t t = math::transferability(p), hardness = -t;
    if (options.kind == MapKind::kMarked && label >= 0) {
      low = hardness < low ? hardness : low;
      high = hardness > high ? hardness : high;
      foreground += label != options.background;
    }
    const acc_t ignored = options.kind == MapKind::kMarked ? acc_t(kIgnoredMark) : acc_t(0);
    const acc_t valid = options.kind == MapKind::kRisk ? math::risk_weight(hardness, options.curve) : t;
    return label >= 0 ? valid : label == kBadLabel ? not_a_number<acc_t>() : ignored;
  }
  // Every thread of the block must come here.
  __device__ __forceinline__ void write(double* partial, const Chunking& chunking, const Chunk& chunk) {
    if (options.kind != MapKind::kMarked) return;
    low = block_least(low);
    high = -block_least(-high);
    foreground = block_sum(foreground);
    if (threadIdx.x != 0) return;
    double* out = partial + chunk.image * int64_t(kTransferColumns) * chunking.chunks_per_image + chunk.index;
    out[kLow * chunking.chunks_per_image] = static_cast<double>(low);
    out[kHigh * chunking.chunks_per_image] = static_cast<double>(high);
    out[kForeground * chunking.chunks_per_image] = foreground;
  }
};

constexpr int kSmallTable = 1024;

template <class T, int kSlots, bool kExact>
__global__ void __launch_bounds__(kThreads, 2) few_transfer(const TransferViews<TileVolume, float> args) {
  alignas(16) __shared__ float table[kSmallTable];
  const SourceViews& in = args.in;
  const Chunk chunk(in.chunking, in.voxels);
  MapMaker<float> map(args.options);
  int bad = 0;
  for (int j = static_cast<int>(threadIdx.x); j < args.conditional.count; j += kThreads) {
    const double p = load_scalar(args.conditional.values, args.conditional.dtype, j);
    bad |= is_bad_probability(p);
    table[j] = static_cast<float>(p);
  }
  bad = __syncthreads_or(bad);
  const MapRow target(in.target, chunk.image), out(args.out, chunk.image);
  const float poison = bad ? not_a_number<float>() : 0.0f;

  for (uint32_t first = chunk.begin; first < chunk.end; first += kThreads * kTileVoxels) {
    using Tile = FewTile<T, kSlots, kExact>;
    const auto span = Tile::span(first, chunk.end);
    if (Tile::is_done(span, chunk.end)) break;
    Tile tile;
    int label[kTileVoxels];
    float value[kTileVoxels];
    load_source(tile, in, args.source, chunk.image, first, chunk.end, span);
    load_labels(target, in.label, span, label);
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) {
      const float sum = exponentials_of(tile, i);
      const float* row = table + (label[i] < 0 ? 0 : label[i]) * (kExact ? kSlots : in.classes);
      float weighted = 0;
      if constexpr (kExact) {
        const auto pack = Pack<float, kSlots>::load_shared(row);
#pragma unroll
        for (int z = 0; z < kSlots; ++z) weighted += tile.x[z][i] * pack.values[z];
      } else {
#pragma unroll
        for (int z = 0; z < kSlots; ++z)
          if (z < in.classes) weighted += tile.x[z][i] * row[z];
      }
      value[i] = map.value(label[i], weighted * math::inverse(sum) + poison);
    }
    store_values_as<float>(out, span, value);
  }
  map.write(args.partial, in.chunking, chunk);
}

template <bool kPlanar>
using TransferExchange = ManyExchange<3, 0, kPlanar>;

template <class T, int kSlots, bool kPlanar>
__global__ void __launch_bounds__(kManyWarps* kWarp, 1) many_transfer(const TransferViews<TileVolume, float> args) {
  __shared__ int labels[kWarpVoxels];
  const SourceViews& in = args.in;
  const Chunk chunk(in.chunking, in.voxels);
  const ManyShape shape(in.classes);
  const TileVoxels voxels(args.source);
  const float* table = static_cast<const float*>(args.conditional.table) + shape.first;
  TransferExchange<kPlanar> exchange(args.source.channels_last);
  MapMaker<float> map(args.options);
  const MapRow target(in.target, chunk.image), out(args.out, chunk.image);

  for (uint32_t first = chunk.begin; first < chunk.end; first += kWarpVoxels) {
    const auto own = shape.own(first, chunk.end);
    int label[1] = {kIgnored};
    if (!kPlanar && args.source.channels_last) __syncthreads();  // it is loaded through the memory of the exchange
    using Tile = ManyTile<T, kSlots, kPlanar>;
    Tile tile;
    tile.load(args.source, shape, chunk.image, first, Tile::span(first, chunk.end), exchange.stage());
    if (shape.is_owner()) {
      load_labels(target, in.label, own, label);
      labels[shape.thread] = label[0] < 0 ? 0 : label[0];
    }
    __syncthreads();
    float max[kTileVoxels], sum[kTileVoxels], weighted[kTileVoxels] = {};
    largest_of(tile, max);
    exponentials(tile, max, sum);
    const float* row[kTileVoxels];
    bool same = true;
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) {
      const int y = labels[voxels.at(i)];
      row[i] = table + static_cast<int64_t>(y) * in.classes;
      same &= y == labels[0];
    }
    if (__all_sync(kAllLanes, same)) {
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        const float weight = k < shape.count ? __ldg(row[0] + k) : 0.0f;
#pragma unroll
        for (int i = 0; i < kTileVoxels; ++i) weighted[i] += tile.x[k][i] * weight;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        if (k >= shape.count) break;
#pragma unroll
        for (int i = 0; i < kTileVoxels; ++i) weighted[i] += tile.x[k][i] * __ldg(row[i] + k);
      }
    }
    exchange.post(0, max);
    exchange.post(1, sum);
    exchange.post(2, weighted);
    __syncthreads();
    if (!shape.is_owner()) continue;
    const uint32_t at = shape.thread;
    const float largest = exchange.largest(at);
    const float value[1] = {
        map.value(label[0], exchange.sum(2, at, largest) * math::inverse(exchange.sum(1, at, largest)))};
    store_values_as<float>(out, own, value);
  }
  __syncthreads();
  map.write(args.partial, in.chunking, chunk);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    transfer_of_any(const TransferViews<AnyVolume, typename AccOf<T>::type> args) {
  using acc_t = typename AccOf<T>::type;
  const SourceViews& in = args.in;
  const Chunk chunk(in.chunking, in.voxels);
  const acc_t* table = static_cast<const acc_t*>(args.conditional.table);
  MapMaker<acc_t> map(args.options);
  const MapRow target(in.target, chunk.image), out(args.out, chunk.image);
  for (uint32_t at = chunk.begin + threadIdx.x; at < chunk.end; at += kThreads) {
    const Spread<1> span{at, chunk.end, 0};
    int label[1];
    load_labels(target, in.label, span, label);
    const SourceColumn<T> x(in, args.source, chunk.image, at);
    const acc_t* row = table + static_cast<int64_t>(label[0] < 0 ? 0 : label[0]) * in.classes;
    const acc_t max = math::max_logit<acc_t>(x);
    acc_t sum = 0, weighted = 0;
    x.each([&](int z) {
      const acc_t e = math::exp(x.get(z) - max);
      sum += e;
      weighted += e * __ldg(row + z);
    });
    const acc_t value[1] = {map.value(label[0], weighted / sum)};
    store_values_as<float>(out, span, value);
  }
  map.write(args.partial, in.chunking, chunk);
}

// One block.
template <class acc_t>
__global__ void __launch_bounds__(kThreads) table_kernel(const ConditionalTable args) {
  int bad = 0;
  for (int64_t i = threadIdx.x; i < args.count; i += kThreads)
    bad |= is_bad_probability(load_scalar(args.values, args.dtype, i));
  bad = __syncthreads_or(bad);
  acc_t* table = static_cast<acc_t*>(args.table);
  for (int64_t i = threadIdx.x; i < args.count; i += kThreads)
    table[i] = bad ? not_a_number<acc_t>() : static_cast<acc_t>(load_scalar(args.values, args.dtype, i));
}

struct FinishViews {
  FinishRiskMap args;
  Chunking chunking;
};

// From marked hardness to weights: every block makes the curve of its image. Without foreground the range is
// degenerate: the weight is 1.
template <class Span>
__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishViews views) {
  constexpr int V = Span::kVoxels;
  const FinishRiskMap& args = views.args;
  const Chunk chunk(views.chunking, static_cast<uint32_t>(args.voxels));
  const double* partial = args.partial + chunk.image * int64_t(kTransferColumns) * args.chunks_per_image;
  double low = 1e30, high = -1, foreground = 0;
  for (int64_t j = threadIdx.x; j < args.chunks_per_image; j += kThreads) {
    const double chunk_low = partial[kLow * args.chunks_per_image + j];
    const double chunk_high = partial[kHigh * args.chunks_per_image + j];
    low = chunk_low < low ? chunk_low : low;
    high = chunk_high > high ? chunk_high : high;
    foreground += partial[kForeground * args.chunks_per_image + j];
  }
  low = block_least(low);
  high = -block_least(-high);
  if (block_sum(foreground) == 0) low = high = 0;
  const math::RiskCurve exact = math::make_risk_curve(args.scheme, args.log_base, args.alpha, args.scale, low, high);
  const math::RiskCurveOf<float> curve{exact.scheme, static_cast<float>(exact.rate), static_cast<float>(exact.low),
                                       static_cast<float>(exact.inverse_range)};
  const MapView map{reinterpret_cast<char*>(args.map), args.voxels * static_cast<int64_t>(sizeof(float)), Dtype::kFloat,
                    static_cast<int>(sizeof(float))};
  const MapRow row(map, chunk.image);
  for (uint32_t tile = chunk.begin; tile < chunk.end; tile += kThreads * V) {
    const Span span{tile + threadIdx.x * V, chunk.end};
    if (!span.has(0)) break;
    auto pack = Pack<float, V>::load_shared(reinterpret_cast<const float*>(row.data) + span.first);
#pragma unroll
    for (int i = 0; i < V; ++i)
      pack.values[i] = pack.values[i] == kIgnoredMark ? 0.0f : math::risk_weight(-pack.values[i], curve);
    store_elements(row, span, pack);
  }
}

SourceWay transfer_way(const SourceInputs& in) { return way_of(in, in.num_classes * in.classes <= kSmallTable); }

}  // namespace

bool has_small_table(const SourceInputs& in) { return transfer_way(in) == SourceWay::kFew; }

Chunking transfer_chunking(const SourceInputs& in) {
  const SourceWay way = transfer_way(in);
  const int64_t tile = way == SourceWay::kFew    ? kThreads * kTileVoxels
                       : way == SourceWay::kMany ? kWarpVoxels
                                                 : kThreads;
  const int64_t blocks = usual_blocks() * (way == SourceWay::kMany && in.classes <= 64 ? 2 : 1);
  return chunk_voxels(in.source.batch, in.source.voxels, tile, INT32_MAX / (kThreads * kTileVoxels), blocks);
}

void make_conditional_table(const ConditionalTable& args, cudaStream_t stream) {
  launch(args.to_double ? table_kernel<double> : table_kernel<float>, 1, kThreads, 0, stream, args);
}

void launch_transfer(const Transfer& args, cudaStream_t stream) {
  const Volume& source = args.in.source;
  const int64_t blocks = args.chunking.chunks(source.batch);
  if (blocks == 0) return;
  with_source_kernel(args.in, transfer_way(args.in), [&](auto kernel) {
    using Kernel = decltype(kernel);
    using T = typename Kernel::T;
    using acc_t = typename AccOf<T>::type;
    const MapOptions<acc_t> options{args.kind,
                                    static_cast<int>(args.background),
                                    {args.curve.scheme, static_cast<acc_t>(args.curve.rate),
                                     static_cast<acc_t>(args.curve.low), static_cast<acc_t>(args.curve.inverse_range)}};
    const auto views = [&](auto view) {
      return TransferViews<decltype(view), acc_t>{view_of(args.in, args.chunking),
                                                  view,
                                                  args.conditional,
                                                  options,
                                                  view_of(VoxelMap{args.out, Dtype::kFloat, source.voxels}),
                                                  args.partial};
    };
    if constexpr (Kernel::kWay == SourceWay::kAny) {
      launch(transfer_of_any<T>, blocks, kThreads, 0, stream, views(any_view_of(source)));
    } else {
      const TileVolume view = tile_view_of(source);
      if constexpr (Kernel::kWay == SourceWay::kFew) {
        launch(few_transfer<T, Kernel::kSlots, Kernel::kExact>, blocks, kThreads,
               FewTile<T, Kernel::kSlots, Kernel::kExact>::shared_bytes(view), stream, views(view));
      } else {
        launch(many_transfer<T, Kernel::kSlots, Kernel::kExact>, blocks, ManyShape::warps_of(args.in.classes) * kWarp,
               TransferExchange<false>::shared_bytes(view, ManyTile<T, 4, false>::stage_bytes(view)), stream,
               views(view));
      }
    }
  });
}

void launch_finish_risk_map(const FinishRiskMap& args, cudaStream_t stream) {
  const bool packs = is_multiple(args.voxels, kTileVoxels);
  const Chunking chunking =
      chunk_voxels(args.batch, args.voxels, kThreads * (packs ? kTileVoxels : 1), INT32_MAX / 1024);
  if (chunking.chunks(args.batch) == 0) return;
  launch(packs ? finish_kernel<Neighbours<kTileVoxels>> : finish_kernel<Neighbours<1>>, chunking.chunks(args.batch),
         kThreads, 0, stream, FinishViews{args, chunking});
}

}  // namespace riskmap::cuda
