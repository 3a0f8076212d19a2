// Around the passes over the logits: counts of voxels, and the sums that become scales, slopes and the loss.
#include "cuda/last_block.cuh"
#include "cuda/loss.cuh"
#include "cuda/loss_gradient.cuh"

namespace riskmap::cuda {
namespace {

struct CountViews {
  LossViews in;
  uint8_t* codes;
  VoxelCount* counts;
  uint32_t* ticket;
};

// Span: kTileVoxels neighbours, or one voxel.
template <class Span>
__global__ void __launch_bounds__(kThreads) count_kernel(const CountViews args) {
  constexpr int V = Span::kVoxels;
  const LossViews& in = args.in;
  const Chunk chunk(in.chunking, in.voxels);
  const LossRows rows(in, chunk.image);
  const MapRow codes(MapView{reinterpret_cast<char*>(args.codes), in.voxels, Dtype::kUInt8, 1}, chunk.image);
  LossSums total;
  for (uint32_t tile = chunk.begin; tile < chunk.end; tile += kThreads * V) {
    const Span span{tile + threadIdx.x * V, chunk.end};
    VoxelData<float, V> data;
    data.load(in, rows, span);
    Pack<uint8_t, V> code;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      total.count(in, data, i);
      total.look(data, i);
      code.values[i] = static_cast<uint8_t>(data.label[i] < 0 ? 256 + data.label[i] : data.label[i]);
    }
    if (args.codes) store_elements(codes, span, code);
  }
  const bool bad = __syncthreads_or(total.has_bad_label()) != 0;
  const uint64_t both = block_sum(uint64_t(total.valid) << 32 | total.foreground);
  if (threadIdx.x != 0) return;
  args.counts[chunk.image * in.chunking.chunks_per_image + chunk.index] = {
      static_cast<uint32_t>(both >> 32), static_cast<uint32_t>(both), bad ? 1u : 0u, 0};
  if (blockIdx.x == 0) *args.ticket = 0;
}

struct ColumnSums {
  const double* partial;
  double* sums;
  int64_t columns, chunks;  // columns of all images
};

// A column for each warp.
__device__ __forceinline__ void sum_column(const ColumnSums& args) {
  const int64_t column = blockIdx.x * static_cast<int64_t>(kWarps) + warp_index();
  if (column >= args.columns) return;
  const double sum = warp_sum_of(args.partial + column * args.chunks, args.chunks);
  if (lane_index() == 0) args.sums[column] = sum;
}

__global__ void __launch_bounds__(kThreads) sum_columns(const ColumnSums args) { sum_column(args); }

struct FinishViews {
  LossFinish args;
  ColumnSums columns;

  __device__ __forceinline__ int64_t per_image() const { return loss_columns(args.classes, args.class_sums); }
  __device__ __forceinline__ double sum(int64_t image, int64_t column) const {
    return __ldcg(args.sums + image * per_image() + column);
  }
  __device__ __forceinline__ bool bad(int64_t image) const { return sum(image, kBadLabels) + sum(image, kBadRisk) > 0; }
  // Over the images of a Dice group.
  __device__ __forceinline__ double dice_sum(int64_t image, int which, int64_t c) const {
    const int64_t column = class_column(which, args.classes, c);
    if (!args.batch_dice) return sum(image, column);
    double total = 0;
    for (int64_t b = 0; b < args.batch; ++b) total += sum(b, column);
    return total;
  }
};

// The Dice part of the loss of the thread's (image, class) pairs; writes their slopes.
__device__ __forceinline__ double finish_dice(const FinishViews& views, bool any_bad, bool bad_weight) {
  const LossFinish& args = views.args;
  const int64_t groups = args.batch_dice && args.batch > 1 ? 1 : args.batch;
  const int64_t counted = args.classes - (args.excluded_class >= 0 ? 1 : 0);
  const double share = math::dice_share(args.reduction, args.dice_weight, counted, groups);
  double loss = 0;
  for (int64_t j = threadIdx.x; j < args.batch * args.classes; j += kThreads) {
    const int64_t image = j / args.classes, c = j % args.classes;
    double overall = 0, hit = 0;
    if (c != args.excluded_class) {
      const double intersection = views.dice_sum(image, 0, c), predicted = views.dice_sum(image, 1, c),
                   labelled = views.dice_sum(image, 2, c);
      const math::DiceTerm term = math::dice_term(intersection, predicted, labelled, args.dice_formula);
      const double own_share = share * weight_of(args.dice_class_weight, c);
      overall = own_share * term.overall;
      hit = own_share * term.hit;
      if (image < groups) loss += own_share * term.loss;
    }
    const bool bad = args.batch_dice ? any_bad : bad_weight || views.bad(image);
    args.dice_slopes[image * 2 * args.classes + c] = bad ? not_a_number<double>() : overall;
    args.dice_slopes[(image * 2 + 1) * args.classes + c] = bad ? not_a_number<double>() : hit;
  }
  return loss;
}

// As many blocks as it takes to sum the columns; the last one goes on alone.
__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishViews views) {
  const LossFinish& args = views.args;
  if (args.ticket) {
    sum_column(views.columns);
    if (!is_last_block(args.ticket)) return;
  }
  double valid = 0, foreground = 0;
  int bad = 0;
  for (int64_t b = threadIdx.x; b < args.batch; b += kThreads) {
    valid += views.sum(b, kValid);
    foreground += views.sum(b, kForegroundVoxels);
    bad |= views.bad(b);
  }
  const bool weighted = args.normalization == math::Normalization::kWeighted;
  double class_weight = valid;
  if (weighted && args.class_weight.data) {
    class_weight = 0;
    for (int64_t j = threadIdx.x; j < args.batch * args.classes; j += kThreads) {
      const int64_t image = j / args.classes, c = j % args.classes;
      class_weight += weight_of(args.class_weight, c) * views.sum(image, class_column(2, args.classes, c));
    }
  }
  const math::VoxelCounts batch{static_cast<int64_t>(block_sum(valid)), static_cast<int64_t>(block_sum(foreground)),
                                weighted ? block_sum(class_weight) : 0};
  const bool bad_weight = has_bad_weight(args.class_weight, args.classes);
  bool any_bad = __syncthreads_or(bad) != 0 || bad_weight;
  if (args.dice_weight != 0 && has_bad_weight(args.dice_class_weight, args.classes)) any_bad = true;

  double loss = 0;
  for (int64_t b = threadIdx.x; b < args.batch; b += kThreads) {
    const math::VoxelCounts image{static_cast<int64_t>(views.sum(b, kValid)),
                                  static_cast<int64_t>(views.sum(b, kForegroundVoxels)), 0};
    const double n = math::normalizer(args.normalization, args.foreground_floor, image, batch, args.batch);
    const double scale = math::image_scale(args.reduction, args.ce_weight, n, args.batch);
    if (scale != 0) loss += scale * views.sum(b, kCrossEntropy);  // a weight of 0 switches the part off
    args.scale[b] = bad_weight || views.bad(b) ? not_a_number<double>() : scale;
  }
  if (args.dice_weight != 0) loss += finish_dice(views, any_bad, bad_weight);
  loss = block_sum(loss);
  if (args.loss && threadIdx.x == 0)
    write_loss(args.loss, args.loss_is_double, any_bad ? not_a_number<double>() : loss);
}

int64_t column_blocks(int64_t columns) { return (columns + kWarps - 1) / kWarps; }

}  // namespace

void sum_partials(const double* partial, double* sums, int64_t columns, int64_t chunks, cudaStream_t stream) {
  if (columns == 0) return;
  launch(sum_columns, column_blocks(columns), kThreads, 0, stream, ColumnSums{partial, sums, columns, chunks});
}

Chunking count_chunking(const LossInputs& in) {
  return chunk_voxels(in.logits.batch, in.logits.voxels, int64_t(kThreads) * kTileVoxels, 1 << 20);
}

void count_voxels(const LossCount& args, cudaStream_t stream) {
  const int64_t batch = args.in.logits.batch, chunks = args.chunking.chunks(batch);
  if (chunks == 0) return;
  CountViews views{view_of(args.in, args.chunking), args.codes, args.counts, args.ticket};
  views.in.risk.data = nullptr;  // the gradient pass looks at it
  const bool packs = is_multiple(args.in.logits.voxels, kTileVoxels) && has_packs<kTileVoxels>(args.in.target, batch) &&
                     has_packs<kTileVoxels>(args.in.foreground, batch);
  launch(packs ? count_kernel<Neighbours<kTileVoxels>> : count_kernel<Neighbours<1>>, chunks, kThreads, 0, stream,
         views);
}

void finish_loss(const LossFinish& args, cudaStream_t stream) {
  const ColumnSums columns{args.partial, args.sums, args.batch * loss_columns(args.classes, args.class_sums),
                           args.chunks_per_image};
  const int64_t blocks = args.ticket ? column_blocks(columns.columns) : 1;
  if (args.ticket && args.batch * args.chunks_per_image == 0)  // no pass was launched
    cudaMemsetAsync(args.ticket, 0, sizeof(*args.ticket), stream);
  launch(finish_kernel, blocks < 1 ? 1 : blocks, kThreads, 0, stream, FinishViews{args, columns});
}

}  // namespace riskmap::cuda
