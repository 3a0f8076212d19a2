// Source logits to transferability or voxel weight: one read of the logits, nothing kept but the map.
#include "cuda/source.cuh"
#include "math/transferability_map.h"

namespace riskmap::cuda {
namespace {

// Partial results of a chunk, a column each.
enum TransferColumn : int { kLow, kHigh, kForeground, kTransferColumns };

struct TransferViews {
  SourceViews in;
  const void* table;
  int background;
  MapKind kind;
  math::RiskCurve curve;
  MapView out;
  double* partial;
};

template <class Column, int V>
__global__ void __launch_bounds__(kThreads, min_blocks<Column>()) transfer(const TransferViews args) {
  using acc_t = typename Column::acc_t;
  const SourceViews& in = args.in;
  const BlockShape shape(in.parts, in.source.layout == Layout::kVoxels);
  const Chunk chunk(in.chunking, in.voxels);
  const acc_t* table = static_cast<const acc_t*>(args.table);
  ExchangeFor<Column, V, 3> exchange(shape);
  acc_t low = acc_t(1e30), high = acc_t(-1);
  int foreground = 0;

  for (int64_t tile = chunk.begin; tile < chunk.end; tile += shape.threads * V) {
    const Span<V> span = shape.span<V>(tile, chunk.end);
    Column x[V];
    assign_classes(shape.part, in.classes_per_part, in.classes, x);
    load_source(in, chunk.image, span, x);
    int label[V];
    load_labels(in.target, in.label, chunk.image, span, label);

    acc_t max[V], sum[V], weighted[V], value[V];
    const auto largest = [&](int i) { max[i] = math::max_logit<acc_t>(x[i]); };
    const auto sums = [&](int i) {
      const acc_t* row = table + static_cast<int64_t>(label[i] < 0 ? 0 : label[i]) * in.classes;
      sum[i] = x[i].exps(max[i]);
      weighted[i] = 0;
      x[i].each([&](int z) { weighted[i] += x[i].exp_at(z, max[i]) * __ldg(row + x[i].class_of(z)); });
    };
    if constexpr (Column::kShared) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        largest(i);
        exchange.post(0, i, max[i]);
      }
      exchange.meet();
#pragma unroll
      for (int i = 0; i < V; ++i) {
        max[i] = exchange.max(0, i);
        sums(i);
        exchange.post(1, i, sum[i]);
        exchange.post(2, i, weighted[i]);
      }
      exchange.meet();
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sum[i] = exchange.sum(1, i);
        weighted[i] = exchange.sum(2, i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        largest(i);
        sums(i);
      }
    }

#pragma unroll
    for (int i = 0; i < V; ++i) {
      const bool valid = label[i] >= 0;
      const acc_t t = math::transferability(weighted[i] / sum[i]), hardness = -t;
      if (valid && hardness < low) low = hardness;
      if (valid && hardness > high) high = hardness;
      foreground += valid && label[i] != args.background;
      const acc_t ignored = args.kind == MapKind::kMarked ? acc_t(kIgnoredMark) : acc_t(0);
      value[i] = label[i] == kBadLabel         ? not_a_number<acc_t>()
                 : !valid                      ? ignored
                 : args.kind == MapKind::kRisk ? math::risk_weight(hardness, args.curve)
                                               : t;
    }
    if (!Column::kShared || shape.part == 0) store_values(args.out, chunk.image, span, value);
  }
  if (args.kind != MapKind::kMarked) return;
  if (shape.part != 0) foreground = 0;  // voxels that another warp counts
  low = block_least(low);
  high = -block_least(-high);
  foreground = block_sum(foreground);
  if (threadIdx.x != 0) return;
  double* out = args.partial + chunk.image * kTransferColumns * in.chunking.chunks_per_image +
                (blockIdx.x - chunk.image * in.chunking.chunks_per_image);
  out[kLow * in.chunking.chunks_per_image] = static_cast<double>(low);
  out[kHigh * in.chunking.chunks_per_image] = static_cast<double>(high);
  out[kForeground * in.chunking.chunks_per_image] = foreground;
}

// One block.
template <class acc_t>
__global__ void __launch_bounds__(kThreads) table_kernel(const ConditionalTable args) {
  int bad = 0;
  for (int64_t i = threadIdx.x; i < args.count; i += kThreads) {
    const double p = load_scalar(args.values, args.dtype, i);
    bad += !(p >= 0 && p <= 1 + 1e-6);
  }
  bad = block_sum(bad);
  acc_t* table = static_cast<acc_t*>(args.table);
  for (int64_t i = threadIdx.x; i < args.count; i += kThreads)
    table[i] = bad ? not_a_number<acc_t>() : static_cast<acc_t>(load_scalar(args.values, args.dtype, i));
}

// A block for each image. Without foreground the range is degenerate: the weight is 1.
__global__ void __launch_bounds__(kThreads) curve_kernel(const FinishRiskMap args) {
  const double* partial = args.partial + blockIdx.x * kTransferColumns * args.chunks_per_image;
  double low = 1e30, high = -1, foreground = 0;
  for (int64_t chunk = threadIdx.x; chunk < args.chunks_per_image; chunk += kThreads) {
    const double chunk_low = partial[kLow * args.chunks_per_image + chunk];
    const double chunk_high = partial[kHigh * args.chunks_per_image + chunk];
    low = chunk_low < low ? chunk_low : low;
    high = chunk_high > high ? chunk_high : high;
    foreground += partial[kForeground * args.chunks_per_image + chunk];
  }
  low = block_least(low);
  high = -block_least(-high);
  foreground = block_sum(foreground);
  if (threadIdx.x != 0) return;
  if (foreground == 0) low = high = 0;
  const math::RiskCurve curve = math::make_risk_curve(args.scheme, args.log_base, args.alpha, args.scale, low, high);
  double* out = args.curves + static_cast<int64_t>(blockIdx.x) * kCurveNumbers;
  out[0] = curve.rate;
  out[1] = curve.low;
  out[2] = curve.inverse_range;
}

constexpr int kFinishVoxels = 4;

struct FinishViews {
  FinishRiskMap args;
  MapView map;
  Chunking chunking;
  bool neighbours;
};

__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishViews views) {
  constexpr int V = kFinishVoxels;
  const BlockShape shape(1, views.neighbours);
  const Chunk chunk(views.chunking, views.args.voxels);
  const double* numbers = views.args.curves + chunk.image * kCurveNumbers;
  const math::RiskCurve curve{views.args.scheme, numbers[0], numbers[1], numbers[2]};
  float* row = views.args.map + chunk.image * views.args.voxels;
  for (int64_t tile = chunk.begin; tile < chunk.end; tile += shape.threads * V) {
    const Span<V> span = shape.span<V>(tile, chunk.end);
    float value[V];
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = span.has(i) ? row[span.at(i)] : 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = value[i] == kIgnoredMark ? 0.0f : math::risk_weight(-value[i], curve);
    store_values(views.map, chunk.image, span, value);
  }
}

}  // namespace

Chunking transfer_chunking(const SourceInputs& in) {
  Chunking chunking{};
  with_variant<SourceColumn>(in.source.dtype, in.classes, [&](auto variant) {
    chunking = chunk_voxels(in.source.batch, in.source.voxels, decltype(variant)::tile(in.classes));
  });
  return chunking;
}

void make_conditional_table(const ConditionalTable& args, cudaStream_t stream) {
  launch(args.to_double ? table_kernel<double> : table_kernel<float>, 1, kThreads, stream, args);
}

void launch_transfer(const Transfer& args, cudaStream_t stream) {
  const int64_t batch = args.in.source.batch, chunks = args.chunking.chunks(batch);
  if (chunks == 0) return;
  const VoxelMap out{args.out, Dtype::kFloat, args.in.source.voxels};
  with_variant<SourceColumn>(args.in.source.dtype, args.in.classes, [&](auto variant) {
    using V = decltype(variant);
    const TransferViews views{view_of<V::kVoxels>(args.in, args.chunking, V::parts(args.in.classes)),
                              args.table,
                              static_cast<int>(args.background),
                              args.kind,
                              args.curve,
                              view_of<V::kVoxels>(out, batch),
                              args.partial};
    launch(transfer<typename V::Column, V::kVoxels>, blocks(chunks), kThreads, stream, views);
  });
}

void launch_finish_risk_map(const FinishRiskMap& args, cudaStream_t stream) {
  const Chunking chunking = chunk_voxels(args.batch, args.voxels, int64_t(kThreads) * kFinishVoxels);
  if (chunking.chunks(args.batch) == 0) return;
  launch(curve_kernel, blocks(args.batch), kThreads, stream, args);
  const MapView map = view_of<kFinishVoxels>(VoxelMap{args.map, Dtype::kFloat, args.voxels}, args.batch);
  launch(finish_kernel, blocks(chunking.chunks(args.batch)), kThreads, stream,
         FinishViews{args, map, chunking, is_multiple(args.voxels, kFinishVoxels)});
}

}  // namespace riskmap::cuda
