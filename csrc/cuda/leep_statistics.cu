// J[y, z] = sum of theta_z over the voxels labelled y: one read of the logits. Sums in float for at most kMostInFloat
// voxels, in double beyond; always added in the same order.
#include "cuda/source.cuh"

namespace riskmap::cuda {
namespace {

constexpr int kMostInFloat = 512;

struct StatisticsViews {
  SourceViews in;
  double* partial;
  int64_t tables;
  int32_t* bad_labels;
};

// Of a block of any number of warps; every thread must come here.
__device__ __forceinline__ void write_bad_labels(const StatisticsViews& args, int bad) {
  __shared__ int warp_sums[kWarps];
  bad = warp_sum(bad);
  if (lane_index() == 0) warp_sums[warp_index()] = bad;
  __syncthreads();
  if (threadIdx.x != 0) return;
  int sum = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) sum += warp_sums[w];
  args.bad_labels[blockIdx.x] = sum;
}

// Few entries: every thread has a place of its own for each, in shared memory. Their number bounds C * Z times warps.
constexpr int kPlaces = 352;
constexpr int kPlaceTiles = 16;  // of at most 8 voxels for each thread

// As min_blocks: one of these kernels would be given too few registers.
template <class Column>
constexpr int blocks_with_places() {
  return sizeof(typename Column::T) == 2 && Column::kSlots == 5 ? 3 : 0;
}

template <class Column, int V>
__global__ void __launch_bounds__(kThreads, blocks_with_places<Column>())
    statistics_in_places(const StatisticsViews args) {
  __shared__ float places[kPlaces * kWarp];
  const SourceViews& in = args.in;
  const int warps = static_cast<int>(blockDim.x) / kWarp, entries = in.num_classes * in.classes;
  const BlockShape shape(1, in.source.layout == Layout::kVoxels, static_cast<int>(blockDim.x));
  const Chunk chunk(in.chunking, in.voxels);
  float* own = places + warp_index() * entries * kWarp + lane_index();
  for (int e = 0; e < entries; ++e) own[e * kWarp] = 0;
  int bad = 0;

  for (int64_t tile = chunk.begin; tile < chunk.end; tile += shape.threads * V) {
    const Span<V> span = shape.span<V>(tile, chunk.end);
    Column x[V];
    load_source(in, chunk.image, span, x);
    int label[V];
    load_labels(in.target, in.label, chunk.image, span, label);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      bad += label[i] == kBadLabel;
      const float inverse = 1.0f / x[i].exps(math::max_logit<float>(x[i]));
      if (label[i] < 0) continue;
      float* row = own + label[i] * in.classes * kWarp;
      x[i].each([&](int z) { row[z * kWarp] += x[i].get(z) * inverse; });
    }
  }
  write_bad_labels(args, bad);
  __syncthreads();
  for (int e = warp_index(); e < entries; e += warps) {
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += static_cast<double>(places[(w * entries + e) * kWarp + lane_index()]);
    sum = warp_sum(sum);
    if (lane_index() == 0) args.partial[e * args.tables + blockIdx.x] = sum;
  }
}

// More entries: the warps that share a voxel turn 32 voxels over, so that a lane has a source class; it walks through
// the voxels and adds to a row of the table where the label changes. Every group of warps has a table of its own.
constexpr int kTableSlots = 32;
constexpr int kMaxTableClasses = kTableSlots * kWarps;

template <class Column>
__global__ void __launch_bounds__(kThreads) statistics_in_tables(const StatisticsViews args) {
  __shared__ float turned[kWarps][kTableSlots][kWarp + 1];
  __shared__ int labels[kWarps][kWarp];
  const SourceViews& in = args.in;
  const BlockShape shape(in.parts, false);
  const Chunk chunk(in.chunking, in.voxels);
  Exchange<float, 1, 2> exchange(shape);
  Column x[1];
  assign_classes(shape.part, in.classes_per_part, in.classes, x);
  const int lane = lane_index(), warp = warp_index(), groups = kWarps / in.parts;
  const bool has_class = lane < x[0].count;
  double* table = args.partial +
                  (blockIdx.x * static_cast<int64_t>(groups) + warp / in.parts) * in.num_classes * in.classes +
                  x[0].first + lane;
  for (int64_t y = 0; has_class && y < in.num_classes; ++y) table[y * in.classes] = 0;

  int bad = 0, run_label = kIgnored, tiles = 0;
  float run = 0;
  const auto flush = [&] {
    if (run_label >= 0 && has_class) table[static_cast<int64_t>(run_label) * in.classes] += static_cast<double>(run);
    run = 0;
  };
  for (int64_t tile = chunk.begin; tile < chunk.end; tile += shape.threads) {
    const Span<1> span = shape.span<1>(tile, chunk.end);
    load_source(in, chunk.image, span, x);
    int label[1];
    load_labels(in.target, in.label, chunk.image, span, label);
    bad += label[0] == kBadLabel;
    exchange.post(0, 0, math::max_logit<float>(x[0]));
    exchange.meet();
    exchange.post(1, 0, x[0].exps(exchange.max(0, 0)));
    exchange.meet();
    const float inverse = 1.0f / exchange.sum(1, 0);
    const bool valid = label[0] >= 0;
    x[0].each([&](int z) { turned[warp][z][lane] = valid ? x[0].get(z) * inverse : 0.0f; });
    labels[warp][lane] = valid ? label[0] : kIgnored;
    __syncwarp();

    const float* own = turned[warp][lane];
    const int before = lane == 0 ? run_label : labels[warp][lane - 1];
    const unsigned changes = __ballot_sync(kAllLanes, labels[warp][lane] != before);
    if (changes == 0) {
#pragma unroll
      for (int v = 0; v < kWarp; ++v) run += own[v];
    } else {
      for (int v = 0; v < kWarp; ++v) {
        if (changes >> v & 1) {
          flush();
          run_label = labels[warp][v];
        }
        run += own[v];
      }
    }
    if (++tiles == kMostInFloat / kWarp) {
      flush();
      tiles = 0;
    }
    __syncwarp();  // everything is read before the next tile overwrites it
  }
  flush();
  write_bad_labels(args, shape.part == 0 ? bad : 0);
}

// Anything else: a thread has source classes kThreads apart, and walks through the voxels of a tile.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) statistics_of_any(const StatisticsViews args) {
  using acc_t = typename AccOf<T>::type;
  __shared__ acc_t maxima[kThreads], inverses[kThreads];
  __shared__ int labels[kThreads];
  const SourceViews& in = args.in;
  const BlockShape shape(1, false);
  const Chunk chunk(in.chunking, in.voxels);
  double* table = args.partial + static_cast<int64_t>(blockIdx.x) * in.num_classes * in.classes;
  for (int64_t z = threadIdx.x; z < in.classes; z += kThreads)
    for (int64_t y = 0; y < in.num_classes; ++y) table[y * in.classes + z] = 0;

  int bad = 0;
  for (int64_t tile = chunk.begin; tile < chunk.end; tile += kThreads) {
    SourceColumn<T> x[1];
    assign_classes(0, in.classes, in.classes, x);
    const Span<1> span = shape.span<1>(tile, chunk.end);
    load_source(in, chunk.image, span, x);
    int label[1];
    load_labels(in.target, in.label, chunk.image, span, label);
    bad += label[0] == kBadLabel;
    const acc_t max = math::max_logit<acc_t>(x[0]);
    maxima[threadIdx.x] = max;
    inverses[threadIdx.x] = acc_t(1) / x[0].exps(max);
    labels[threadIdx.x] = label[0];
    __syncthreads();
    const int voxels = static_cast<int>(chunk.end - tile < kThreads ? chunk.end - tile : kThreads);
    for (int64_t z = threadIdx.x; z < in.classes; z += kThreads) {
      acc_t run = 0;
      int run_label = kIgnored;
      for (int v = 0; v <= voxels; ++v) {
        const int next = v < voxels ? labels[v] : kIgnored;
        if (v == voxels || next != run_label) {
          if (run_label >= 0) table[run_label * static_cast<int64_t>(in.classes) + z] += static_cast<double>(run);
          run = 0;
          run_label = next;
        }
        if (next < 0) continue;
        const Span<1> at{tile + v, chunk.end, 1};
        load_source(in, chunk.image, at, x);
        run += x[0].exp_at(static_cast<int>(z), maxima[v]) * inverses[v];
      }
    }
    __syncthreads();
  }
  write_bad_labels(args, bad);
}

struct SumViews {
  const double* partial;
  int64_t entries, tables, chunks;
  bool entries_first;  // [C, Z, tables], else [tables, C, Z]
  const int32_t* bad_labels;
  double* joint;
};

// A warp for each entry, or a thread where neighbouring entries are neighbours in memory.
__global__ void __launch_bounds__(kThreads) sum_tables(const SumViews args) {
  int bad = 0;
  for (int64_t chunk = threadIdx.x; chunk < args.chunks; chunk += kThreads) bad += args.bad_labels[chunk] != 0;
  bad = block_sum(bad);
  if (args.entries_first) {
    const int64_t entry = blockIdx.x * static_cast<int64_t>(kWarps) + warp_index();
    if (entry >= args.entries) return;
    const double sum = warp_sum_of(args.partial + entry * args.tables, args.tables);
    if (lane_index() == 0) args.joint[entry] = bad ? not_a_number<double>() : sum;
  } else {
    const int64_t entry = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
    if (entry >= args.entries) return;
    double sum = 0;
    for (int64_t i = 0; i < args.tables; ++i) sum += args.partial[i * args.entries + entry];
    args.joint[entry] = bad ? not_a_number<double>() : sum;
  }
}

int warps_for_places(int64_t entries) {
  int warps = kWarps;
  while (warps > 1 && warps * entries > kPlaces) warps /= 2;
  return warps;
}

}  // namespace

StatisticsPlan plan_statistics(const SourceInputs& in) {
  const int64_t entries = in.num_classes * in.classes, batch = in.source.batch, voxels = in.source.voxels;
  const bool narrow = in.source.dtype != Dtype::kDouble;
  if (narrow && in.classes <= 8 && entries <= kPlaces) {
    StatisticsPlan plan{StatisticsWay::kPlaces, {}, 0};
    const int64_t threads = int64_t(warps_for_places(entries)) * kWarp;
    with_variant<SourceColumn>(in.source.dtype, in.classes, [&](auto variant) {
      plan.chunking = chunk_voxels(batch, voxels, threads * decltype(variant)::kVoxels, kPlaceTiles);
    });
    plan.tables = plan.chunking.chunks(batch);
    return plan;
  }
  const bool in_tables = narrow && in.classes <= kMaxTableClasses;
  const int parts = in_tables ? parts_of(in.classes, kTableSlots) : kWarps;
  const int64_t groups = kWarps / parts;
  // The partial tables may take an eighth of what the logits take, or there may be a few of them.
  const int64_t bytes = batch * voxels * in.source.classes * size_of(in.source.dtype);
  const int64_t fitting = bytes / (8 * 8 * entries * groups);
  const int64_t few = kUsualChunks / 64 + 1;
  const int64_t most = fitting < few ? few : fitting > kUsualChunks ? kUsualChunks : fitting;
  const Chunking chunking = chunk_voxels(batch, voxels, int64_t(kThreads) / parts, INT32_MAX, most);
  return {in_tables ? StatisticsWay::kTables : StatisticsWay::kAny, chunking, chunking.chunks(batch) * groups};
}

void launch_statistics(const Statistics& args, cudaStream_t stream) {
  const SourceInputs& in = args.in;
  const StatisticsPlan& plan = args.plan;
  const int64_t chunks = plan.chunking.chunks(in.source.batch), entries = in.num_classes * in.classes;
  const bool in_places = plan.way == StatisticsWay::kPlaces;
  if (chunks > 0) {
    with_floating(in.source.dtype, [&](auto tag) {
      using T = decltype(tag);
      const auto views = [&](auto voxels, int parts) {
        return StatisticsViews{view_of<decltype(voxels)::value>(in, plan.chunking, parts), args.partial, plan.tables,
                               args.bad_labels};
      };
      if (plan.way == StatisticsWay::kAny) {
        return launch(statistics_of_any<T>, blocks(chunks), kThreads, stream,
                      views(std::integral_constant<int, 1>{}, 1));
      }
      if constexpr (sizeof(T) < sizeof(double)) {
        if (plan.way == StatisticsWay::kTables) {
          return launch(statistics_in_tables<SharedColumn<T, kTableSlots>>, blocks(chunks), kThreads, stream,
                        views(std::integral_constant<int, 1>{}, parts_of(in.classes, kTableSlots)));
        }
        with_register_variant<T>(in.classes, [&](auto variant) {
          using V = decltype(variant);
          launch(statistics_in_places<typename V::Column, V::kVoxels>, blocks(chunks),
                 static_cast<unsigned>(warps_for_places(entries) * kWarp), stream,
                 views(std::integral_constant<int, V::kVoxels>{}, 1));
        });
      }
    });
  }
  const SumViews sums{args.partial, entries, plan.tables, chunks, in_places, args.bad_labels, args.joint};
  const int64_t per_block = in_places ? kWarps : kThreads;
  launch(sum_tables, blocks((entries + per_block - 1) / per_block), kThreads, stream, sums);
}

}  // namespace riskmap::cuda
