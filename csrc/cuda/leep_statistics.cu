// J[y, z] = sum of theta_z over the voxels labelled y: one read of the logits. Sums in float for at most kMostInFloat
// voxels, in double beyond; always added in the same order.
#include "cuda/source.cuh"

namespace riskmap::cuda {
namespace {

constexpr uint32_t kMostInFloat = 512;

template <class Logits>
struct StatisticsViews {
  SourceViews in;
  Logits source;
  double* partial;
  uint8_t* touched;     // [blocks, C]
  int32_t* bad_labels;  // [blocks]
  uint32_t own_at;      // of what a kernel keeps behind a tile in dynamic shared memory
};

// Every thread of the block must come here.
template <class Logits>
__device__ __forceinline__ void write_bad_labels(const StatisticsViews<Logits>& args, bool bad) {
  bad = __syncthreads_or(bad) != 0;
  if (threadIdx.x == 0) args.bad_labels[blockIdx.x] = bad;
}

// Few entries: every thread has a place of its own for each, in shared memory. Their number bounds C * Z times warps.
constexpr int kPlaceTiles = kMostInFloat / kTileVoxels;

template <class T, int kSlots, bool kExact>
__global__ void __launch_bounds__(kThreads, 2) few_statistics(const StatisticsViews<TileVolume> args) {
  const SourceViews& in = args.in;
  const int warps = static_cast<int>(blockDim.x) / kWarp, entries = in.num_classes * in.classes;
  const Chunk chunk(in.chunking, in.voxels);
  const int classes = kExact ? kSlots : in.classes;
  float* const places = reinterpret_cast<float*>(dynamic_shared() + args.own_at);
  float* const own = places + warp_index() * entries * kWarp + lane_index();
  for (int e = 0; e < entries; ++e) own[e * kWarp] = 0;
  const MapRow target(in.target, chunk.image);
  bool bad = false;

  for (uint32_t first = chunk.begin; first < chunk.end; first += blockDim.x * kTileVoxels) {
    using Tile = FewTile<T, kSlots, kExact>;
    const auto span = Tile::span(first, chunk.end);
    if (Tile::is_done(span, chunk.end)) break;
    Tile tile;
    int label[kTileVoxels];
    load_source(tile, in, args.source, chunk.image, first, chunk.end, span);
    load_labels(target, in.label, span, label);
    float inverse[kTileVoxels];
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) {
      bad |= label[i] == kBadLabel;
      inverse[i] = math::inverse(exponentials_of(tile, i));
    }
    if (label[0] == label[1] && label[0] == label[2] && label[0] == label[3]) {
      if (label[0] < 0) continue;
      float* row = own + label[0] * classes * kWarp;
#pragma unroll
      for (int z = 0; z < kSlots; ++z) {
        if (!kExact && z >= classes) break;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kTileVoxels; ++i) sum += tile.x[z][i] * inverse[i];
        row[z * kWarp] += sum;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) {
        if (label[i] < 0) continue;
        float* row = own + label[i] * classes * kWarp;
#pragma unroll
        for (int z = 0; z < kSlots; ++z) {
          if (!kExact && z >= classes) break;
          row[z * kWarp] += tile.x[z][i] * inverse[i];
        }
      }
    }
  }
  write_bad_labels(args, bad);  // and a barrier
  for (int e = warp_index(); e < entries; e += warps) {
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += static_cast<double>(places[(w * entries + e) * kWarp + lane_index()]);
    sum = warp_sum(sum);
    if (lane_index() == 0) args.partial[static_cast<int64_t>(blockIdx.x) * entries + e] = sum;
  }
}

// The sums of a warp's classes over voxels of one label after the other. Two lanes have a class: they walk through its
// probabilities, which the warp turns in shared memory kWarp voxels at a time, and add to a row of the block's table
// where the label changes.
class LabelRuns {
 public:
  static constexpr int kPitch = kWarp + 4;
  static constexpr int kNumbers = kManySlots * kPitch;  // of shared memory, for each warp

  __device__ __forceinline__ LabelRuns(float* turned, uint8_t* touched, double* table, const ManyShape& shape,
                                       int classes)
      : own_(turned + (lane_index() % kManySlots) * kPitch + lane_index() / kManySlots * kHalf),
        touched_(touched),
        table_(table + shape.first + lane_index() % kManySlots),
        classes_(classes),
        half_(lane_index() / kManySlots),
        has_class_(lane_index() % kManySlots < shape.count) {}

  // Of kWarp voxels with these labels; ignored ones have the probability 0.
  __device__ __forceinline__ void add(const int* labels) {
    const int label = labels[lane_index()];
    uint32_t left = __ballot_sync(kAllLanes, label >= 0);
    if (left == 0) return;
    // First what goes on, then one label after the other.
    uint32_t same = __ballot_sync(kAllLanes, label == label_) & left;
    if (same == 0) same = next(label, left);
    if (same == left) {
      add_all();
    } else {
      add(same);
      while ((left &= ~same) != 0) {
        same = next(label, left);
        add(same);
      }
    }
    voxels_ += kWarp;
    if (voxels_ == kMostInFloat) flush();
  }
  __device__ __forceinline__ void flush() {
    const float sum = run_ + __shfl_xor_sync(kAllLanes, run_, kManySlots);
    run_ = 0;
    voxels_ = 0;
    if (label_ < 0) return;
    const bool first = touched_[label_] == 0;
    __syncwarp();  // before it is touched
    if (half_ == 0 && has_class_) {
      double& entry = table_[static_cast<int64_t>(label_) * classes_];
      entry = first ? static_cast<double>(sum) : entry + static_cast<double>(sum);
    }
    if (first && lane_index() == 0) touched_[label_] = 1;
    __syncwarp();
  }

 private:
  // Of the lane's half of the voxels all, or those with a bit.
  __device__ __forceinline__ void add_all() {
#pragma unroll
    for (int v = 0; v < kHalf; v += kTileVoxels) {
      const auto pack = Pack<float, kTileVoxels>::load_shared(own_ + v);
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) run_ += pack.values[i];
    }
  }
  __device__ __forceinline__ void add(uint32_t voxels) {
    const uint32_t mine = voxels >> (half_ * kHalf);
#pragma unroll
    for (int v = 0; v < kHalf; v += kTileVoxels) {
      const auto pack = Pack<float, kTileVoxels>::load_shared(own_ + v);
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) run_ += mine >> (v + i) & 1 ? pack.values[i] : 0.0f;
    }
  }
  // Goes over to the first label of these voxels, and says which have it.
  __device__ __forceinline__ uint32_t next(int label, uint32_t left) {
    flush();
    label_ = __shfl_sync(kAllLanes, label, __ffs(static_cast<int>(left)) - 1);
    return __ballot_sync(kAllLanes, label == label_);
  }

  static constexpr int kHalf = kWarp / 2;

  const float* own_;
  uint8_t* touched_;
  double* table_;
  int classes_, half_;
  bool has_class_;
  int label_ = kIgnored;
  uint32_t voxels_ = 0;
  float run_ = 0;
};

constexpr int kMaxTableRows = 256;  // labels; a byte of shared memory for each and each warp
template <bool kPlanar>
using StatisticsExchange = ManyExchange<2, 2, kPlanar>;

// The memory of the exchange is that of turning, too.
template <class T>
int64_t bytes_of_many(const TileVolume& source) {
  const int64_t turned =
      ManyShape::warps_of(source.classes) * LabelRuns::kNumbers * static_cast<int64_t>(sizeof(float));
  const int64_t exchange = StatisticsExchange<false>::shared_bytes(source, ManyTile<T, 4, false>::stage_bytes(source));
  return turned > exchange ? turned : exchange;
}

// One of a few rounds of turning: its voxels lie in some of the lanes, or one of each lane's.
template <class Tile>
__device__ __forceinline__ void turn(const Tile& tile, bool channels_last, int round, float* turned) {
  constexpr int kLanes = kWarp / kTileVoxels;
#pragma unroll
  for (int k = 0; k < Tile::kSlots; ++k) {
    float* row = turned + k * LabelRuns::kPitch;
    if (channels_last) {
      row[lane_index()] = tile.x[k][round];
    } else if (lane_index() / kLanes == round) {
      Pack<float, kTileVoxels>::of(tile.x[k]).store(row + lane_index() % kLanes * kTileVoxels);
    }
  }
}

template <class T, int kSlots, bool kPlanar>
__global__ void __launch_bounds__(kManyWarps* kWarp, 1) many_statistics(const StatisticsViews<TileVolume> args) {
  __shared__ int labels[kWarpVoxels];
  const SourceViews& in = args.in;
  const Chunk chunk(in.chunking, in.voxels);
  const ManyShape shape(in.classes);
  StatisticsExchange<kPlanar> exchange(args.source.channels_last);
  float* const turned = reinterpret_cast<float*>(dynamic_shared()) + warp_index() * LabelRuns::kNumbers;
  uint8_t* const all_touched = reinterpret_cast<uint8_t*>(dynamic_shared() + args.own_at);
  uint8_t* const touched = all_touched + warp_index() * in.num_classes;
  for (int y = lane_index(); y < in.num_classes; y += kWarp) touched[y] = 0;
  __syncwarp();
  LabelRuns runs(turned, touched, args.partial + static_cast<int64_t>(blockIdx.x) * in.num_classes * in.classes, shape,
                 in.classes);
  const MapRow target(in.target, chunk.image);
  bool bad = false;

  for (uint32_t first = chunk.begin; first < chunk.end; first += kWarpVoxels) {
    int label[1] = {kIgnored};
    if (shape.is_owner()) {
      load_labels(target, in.label, shape.own(first, chunk.end), label);
      bad |= label[0] == kBadLabel;
    }
    using Tile = ManyTile<T, kSlots, kPlanar>;
    Tile tile;
    float max[kTileVoxels], sum[kTileVoxels];
    if (!kPlanar && args.source.channels_last) __syncthreads();  // as below: it is loaded through the same memory
    tile.load(args.source, shape, chunk.image, first, Tile::span(first, chunk.end), exchange.stage());
    largest_of(tile, max);
    exponentials(tile, max, sum);
    __syncthreads();  // nobody turns in the memory of the exchange any more
    exchange.post(0, max);
    exchange.post(1, sum);
    __syncthreads();
    if (shape.is_owner()) {
      const float largest = exchange.largest(shape.thread);
      labels[shape.thread] = label[0] < 0 ? kIgnored : label[0];
      exchange.result(0, shape.thread) = largest;
      exchange.result(1, shape.thread) = label[0] < 0 ? 0.0f : math::inverse(exchange.sum(1, shape.thread, largest));
    }
    __syncthreads();
    float factor[kTileVoxels], largest[kTileVoxels];
    exchange.results(0, largest);
    exchange.results(1, factor);
    __syncthreads();  // from here on the memory is for turning
    const bool used[] = {factor[0] != 0, factor[1] != 0, factor[2] != 0, factor[3] != 0};
    clear_unused(tile, used);
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) factor[i] *= used[i] ? math::exp(max[i] - largest[i]) : 0.0f;
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) tile.x[k][i] *= factor[i];
#pragma unroll
    for (int round = 0; round < kTileVoxels; ++round) {
      __syncwarp();
      turn(tile, !kPlanar && args.source.channels_last, round, turned);
      __syncwarp();
      runs.add(labels + round * kWarp);
    }
  }
  runs.flush();
  write_bad_labels(args, bad);
  for (int y = static_cast<int>(threadIdx.x); y < in.num_classes; y += static_cast<int>(blockDim.x))
    args.touched[static_cast<int64_t>(blockIdx.x) * in.num_classes + y] = all_touched[y];
}

// Anything else: a thread has source classes kThreads apart, and walks through the voxels of a tile.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) statistics_of_any(const StatisticsViews<AnyVolume> args) {
  using acc_t = typename AccOf<T>::type;
  __shared__ acc_t maxima[kThreads], inverses[kThreads];
  __shared__ int labels[kThreads];
  const SourceViews& in = args.in;
  const Chunk chunk(in.chunking, in.voxels);
  double* table = args.partial + static_cast<int64_t>(blockIdx.x) * in.num_classes * in.classes;
  for (int64_t z = threadIdx.x; z < in.classes; z += kThreads)
    for (int64_t y = 0; y < in.num_classes; ++y) table[y * in.classes + z] = 0;

  const MapRow target(in.target, chunk.image);
  bool bad = false;
  for (uint32_t tile = chunk.begin; tile < chunk.end; tile += kThreads) {
    const Spread<1> span{tile + threadIdx.x, chunk.end, 0};
    int label[1];
    load_labels(target, in.label, span, label);
    bad |= label[0] == kBadLabel;
    if (span.has(0)) {
      const SourceColumn<T> x(in, args.source, chunk.image, span.first);
      const acc_t max = math::max_logit<acc_t>(x);
      maxima[threadIdx.x] = max;
      inverses[threadIdx.x] = acc_t(1) / math::sum_exp(x, max);
    }
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
        const SourceColumn<T> x(in, args.source, chunk.image, tile + static_cast<uint32_t>(v));
        run += math::exp(x.get(static_cast<int>(z)) - maxima[v]) * inverses[v];
      }
    }
    __syncthreads();
  }
  write_bad_labels(args, bad);
}

struct SumViews {
  const double* partial;  // [tables, C, Z]
  int64_t num_classes, classes, tables;
  const uint8_t* touched;  // [tables, C]; nullptr: all rows are there
  const int32_t* bad_labels;
  double* joint;
};

constexpr int kTablesAtOnce = 1024;

// A block for each class of the target: its warps share the tables, in the same order always.
__global__ void __launch_bounds__(kThreads) sum_tables(const SumViews args) {
  __shared__ double of_warp[kWarps][kWarp];
  __shared__ uint8_t present[kTablesAtOnce];
  const int64_t y = blockIdx.x;
  int bad = 0;
  for (int64_t t = threadIdx.x; t < args.tables; t += kThreads) bad |= args.bad_labels[t] != 0;
  bad = __syncthreads_or(bad);
  for (int64_t first = 0; first < args.classes; first += kWarp) {
    const int64_t z = first + lane_index();
    double sum = 0;
    for (int64_t begin = 0; begin < args.tables; begin += kTablesAtOnce) {
      const int64_t count = args.tables - begin < kTablesAtOnce ? args.tables - begin : kTablesAtOnce;
      __syncthreads();
      for (int64_t t = threadIdx.x; t < count; t += kThreads)
        present[t] = !args.touched || args.touched[(begin + t) * args.num_classes + y] != 0;
      __syncthreads();
#pragma unroll 4
      for (int64_t t = warp_index(); t < count; t += kWarps)
        if (present[t] && z < args.classes)
          sum += args.partial[((begin + t) * args.num_classes + y) * args.classes + z];
    }
    of_warp[warp_index()][lane_index()] = sum;
    __syncthreads();
    if (warp_index() == 0 && z < args.classes) {
      for (int w = 1; w < kWarps; ++w) sum += of_warp[w][lane_index()];
      args.joint[y * args.classes + z] = bad ? not_a_number<double>() : sum;
    }
  }
}

int64_t place_bytes(const SourceInputs& in) {  // of a warp
  return in.num_classes * in.classes * kWarp * static_cast<int64_t>(sizeof(float));
}
int64_t stage_bytes(const SourceInputs& in) {  // of a warp
  return in.source.stride_voxel == 1 ? 0 : kWarpVoxels * in.classes * size_of(in.source.dtype);
}

// With places; 0 where they do not fit.
int warps_for_places(const SourceInputs& in) {
  int warps = kWarps;
  while (warps > 0 && warps * (place_bytes(in) + stage_bytes(in)) > kMaxDynamicShared) warps /= 2;
  return warps;
}

}  // namespace

StatisticsPlan plan_statistics(const SourceInputs& in) {
  const int64_t entries = in.num_classes * in.classes, batch = in.source.batch, voxels = in.source.voxels;
  StatisticsPlan plan{};
  plan.way = way_of(in, warps_for_places(in) > 0);
  if (plan.way == SourceWay::kMany && in.num_classes > kMaxTableRows) plan.way = SourceWay::kAny;
  if (plan.way == SourceWay::kFew) {
    const int64_t threads = int64_t(warps_for_places(in)) * kWarp;
    plan.chunking =
        chunk_voxels(batch, voxels, threads * kTileVoxels, kPlaceTiles, usual_blocks() * (kThreads / threads));
    return plan;
  }
  // The partial tables may take a quarter of what the logits take, or a few megabytes.
  const int64_t table = 8 * entries;
  const int64_t bytes = batch * voxels * in.source.classes * size_of(in.source.dtype) / 4;
  const int64_t fitting = (bytes < (32 << 20) ? 32 << 20 : bytes) / (table > 0 ? table : 1);
  const int64_t blocks = fitting < 1 ? 1 : fitting < usual_blocks() ? fitting : usual_blocks();
  plan.chunking = chunk_voxels(batch, voxels, plan.way == SourceWay::kMany ? kWarpVoxels : kThreads, INT32_MAX, blocks);
  return plan;
}

void launch_statistics(const Statistics& args, cudaStream_t stream) {
  const SourceInputs& in = args.in;
  const int64_t blocks = args.plan.chunking.chunks(in.source.batch);
  const SourceViews views = view_of(in, args.plan.chunking);
  if (blocks > 0) {
    with_source_kernel(in, args.plan.way, [&](auto kernel) {
      using Kernel = decltype(kernel);
      using T = typename Kernel::T;
      if constexpr (Kernel::kWay == SourceWay::kAny) {
        launch(statistics_of_any<T>, blocks, kThreads, 0, stream,
               StatisticsViews<AnyVolume>{views, any_view_of(in.source), args.partial, nullptr, args.bad_labels, 0});
      } else {
        const TileVolume source = tile_view_of(in.source);
        StatisticsViews<TileVolume> all{views, source, args.partial, args.touched, args.bad_labels, 0};
        if constexpr (Kernel::kWay == SourceWay::kMany) {
          const int warps = ManyShape::warps_of(in.classes);
          all.own_at = static_cast<uint32_t>(bytes_of_many<T>(source));
          launch(many_statistics<T, Kernel::kSlots, Kernel::kExact>, blocks, warps * kWarp,
                 all.own_at + warps * in.num_classes, stream, all);
        } else {
          const int warps = warps_for_places(in);
          all.own_at = static_cast<uint32_t>(warps * stage_bytes(in));
          launch(few_statistics<T, Kernel::kSlots, Kernel::kExact>, blocks, warps * kWarp,
                 all.own_at + warps * place_bytes(in), stream, all);
        }
      }
    });
  }
  if (in.num_classes * in.classes == 0) return;
  launch(sum_tables, in.num_classes, kThreads, 0, stream,
         SumViews{args.partial, in.num_classes, in.classes, blocks,
                  args.plan.way == SourceWay::kMany ? args.touched : nullptr, args.bad_labels, args.joint});
}

}  // namespace riskmap::cuda
