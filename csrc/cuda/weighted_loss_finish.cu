// Around the passes over the logits: tables, counts of voxels, and the sums that become scales, slopes and the loss.
#include "cuda/loss.cuh"

namespace riskmap::cuda {
namespace {

// One block.
template <class acc_t>
__global__ void __launch_bounds__(kThreads) tables_kernel(const LossTables args) {
  const auto weight = [&](int64_t c) { return args.given ? load_scalar(args.given, args.given_dtype, c) : 1.0; };
  int bad = 0;
  double sum = 0;
  for (int64_t c = threadIdx.x; c < args.classes; c += kThreads) {
    const double w = weight(c);
    bad += !(w >= 0 && w - w == 0);
    sum += w * args.smooth_factor;
  }
  bad = block_sum(bad);
  sum = block_sum(sum);
  const double factor = bad ? not_a_number<double>() : 1.0;
  acc_t* table = static_cast<acc_t*>(args.class_weight);
  acc_t* smooth = static_cast<acc_t*>(args.smooth);
  for (int64_t c = threadIdx.x; c < args.classes; c += kThreads) {
    if (table) table[c] = static_cast<acc_t>(weight(c) * args.weight_factor * factor);
    if (smooth) smooth[c] = static_cast<acc_t>(weight(c) * args.smooth_factor * factor);
  }
  if (threadIdx.x != 0) return;
  if (smooth) smooth[args.classes] = static_cast<acc_t>(sum * factor);
  *args.bad_class_weight = bad != 0;
}

constexpr int kCountVoxels = 4;

struct CountViews {
  LossViews in;
  uint8_t* codes;
  bool aligned_codes;
  double* partial;
};

__global__ void __launch_bounds__(kThreads) count_kernel(const CountViews args) {
  constexpr int V = kCountVoxels;
  const LossViews& in = args.in;
  const BlockShape shape(1, args.aligned_codes);
  const Chunk chunk(in.chunking, in.voxels);
  LossSums total;
  for (int64_t tile = chunk.begin; tile < chunk.end; tile += shape.threads * V) {
    const Span<V> span = shape.span<V>(tile, chunk.end);
    VoxelData<float, V> data;
    data.load(in, chunk.image, span);
    Pack<uint8_t, V> codes;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      total.add(in, data, i);
      codes.values[i] = data.valid(i)                ? static_cast<uint8_t>(data.label[i])
                        : data.label[i] == kBadLabel ? kBadCode
                                                     : kIgnoredCode;
    }
    if (!args.codes) continue;
    uint8_t* row = args.codes + chunk.image * in.voxels;
    if (shape.neighbours) {
      if (span.has(0)) codes.store(row + span.first);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (span.has(i)) row[span.at(i)] = codes.values[i];
    }
  }
  total.write(args.partial, in.chunking, kLossColumns, chunk.image);
}

struct ColumnSums {
  const double* partial;
  double* sums;
  int64_t columns, chunks;  // columns of all images
};

// A column for each warp.
__global__ void __launch_bounds__(kThreads) sum_columns(const ColumnSums args) {
  const int64_t column = blockIdx.x * static_cast<int64_t>(kWarps) + warp_index();
  if (column >= args.columns) return;
  const double sum = warp_sum_of(args.partial + column * args.chunks, args.chunks);
  if (lane_index() == 0) args.sums[column] = sum;
}

// What one block can add up beside its other work.
constexpr int64_t kFewNumbers = 1 << 15;

__device__ __forceinline__ void sum_here(const ColumnSums& args) {
  for (int64_t column = warp_index(); column < args.columns; column += kWarps) {
    const double sum = warp_sum_of(args.partial + column * args.chunks, args.chunks);
    if (lane_index() == 0) args.sums[column] = sum;
  }
  __syncthreads();
}

struct FinishViews {
  LossFinish args;
  ColumnSums columns;
  bool summed;

  __device__ __forceinline__ int64_t per_image() const { return loss_columns(args.classes, args.class_sums); }
  __device__ __forceinline__ double sum(int64_t image, int64_t column) const {
    return args.sums[image * per_image() + column];
  }
  __device__ __forceinline__ bool bad(int64_t image) const {
    return sum(image, kBadLabels) + sum(image, kBadRisk) > 0 || (args.bad_class_weight && *args.bad_class_weight);
  }
  __device__ __forceinline__ bool bad_dice_class_weight(int64_t c) const {
    const double weight = class_weight(args.dice_class_weight, c);
    return !(weight >= 0 && weight - weight == 0);
  }
  __device__ __forceinline__ static double class_weight(const ClassWeight& weight, int64_t c) {
    return weight.data ? load_scalar(weight.data, weight.dtype, c) : 1.0;
  }
  // Over the images of a Dice group.
  __device__ __forceinline__ double dice_sum(int64_t image, int which, int64_t c) const {
    const int64_t column = kLossColumns + which * args.classes + c;
    if (!args.batch_dice) return sum(image, column);
    double total = 0;
    for (int64_t b = 0; b < args.batch; ++b) total += sum(b, column);
    return total;
  }
};

// The Dice part of the loss of the thread's (image, class) pairs; writes their slopes.
__device__ __forceinline__ double finish_dice(const FinishViews& views, bool any_bad) {
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
      const double own_share = share * views.class_weight(args.dice_class_weight, c);
      overall = own_share * term.overall;
      hit = own_share * term.hit;
      if (image < groups) loss += own_share * term.loss;
    }
    const bool bad = args.batch_dice ? any_bad : views.bad(image);
    args.dice_slopes[image * 2 * args.classes + c] = bad ? not_a_number<double>() : overall;
    args.dice_slopes[(image * 2 + 1) * args.classes + c] = bad ? not_a_number<double>() : hit;
  }
  return loss;
}

__device__ __forceinline__ void write_loss(const LossFinish& args, double loss) {
  if (!args.loss || threadIdx.x != 0) return;
  if (args.loss_is_double) {
    *static_cast<double*>(args.loss) = loss;
  } else {
    *static_cast<float*>(args.loss) = static_cast<float>(loss);
  }
}

// One block.
__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishViews views) {
  const LossFinish& args = views.args;
  if (!views.summed) sum_here(views.columns);
  double valid = 0, foreground = 0;
  int bad = 0;
  for (int64_t b = threadIdx.x; b < args.batch; b += kThreads) {
    valid += views.sum(b, kValid);
    foreground += views.sum(b, kForegroundVoxels);
    bad += views.bad(b);
  }
  bad += threadIdx.x == 0 && args.bad_class_weight && *args.bad_class_weight;
  const bool weighted = args.normalization == math::Normalization::kWeighted;
  double class_weight = valid;
  if (weighted && args.class_weight.data) {
    class_weight = 0;
    for (int64_t j = threadIdx.x; j < args.batch * args.classes; j += kThreads) {
      const int64_t image = j / args.classes, c = j % args.classes;
      class_weight += views.class_weight(args.class_weight, c) * views.sum(image, kLossColumns + 2 * args.classes + c);
    }
  }
  if (args.dice_weight != 0)
    for (int64_t c = threadIdx.x; c < args.classes; c += kThreads) bad += views.bad_dice_class_weight(c);
  const math::VoxelCounts batch{static_cast<int64_t>(block_sum(valid)), static_cast<int64_t>(block_sum(foreground)),
                                weighted ? block_sum(class_weight) : 0};
  const bool any_bad = block_sum(bad) > 0;

  double loss = 0;
  for (int64_t b = threadIdx.x; b < args.batch; b += kThreads) {
    const math::VoxelCounts image{static_cast<int64_t>(views.sum(b, kValid)),
                                  static_cast<int64_t>(views.sum(b, kForegroundVoxels)), 0};
    const double n = math::normalizer(args.normalization, args.foreground_floor, image, batch, args.batch);
    const double scale = math::image_scale(args.reduction, args.ce_weight, n, args.batch);
    if (scale != 0) loss += scale * views.sum(b, kCrossEntropy);  // a weight of 0 switches the part off
    args.scale[b] = views.bad(b) ? not_a_number<double>() : scale;
  }
  if (args.dice_weight != 0) loss += finish_dice(views, any_bad);
  loss = block_sum(loss);
  write_loss(args, any_bad ? not_a_number<double>() : loss);
}

struct TotalViews {
  FinishViews sums;
  Volume grad_logits;
  VoxelMap grad_risk;
};

__device__ __forceinline__ void write_nan(void* data, Dtype dtype, int64_t index) {
  switch (dtype) {
    case Dtype::kDouble: static_cast<double*>(data)[index] = not_a_number<double>(); break;
    case Dtype::kHalf: static_cast<uint16_t*>(data)[index] = 0x7e00; break;
    case Dtype::kBFloat16: static_cast<uint16_t*>(data)[index] = 0x7fc0; break;
    default: static_cast<float*>(data)[index] = not_a_number<float>(); break;
  }
}

// One block. Slow where there is a bad risk, which is an error.
__global__ void __launch_bounds__(kThreads) total_kernel(const TotalViews views) {
  const LossFinish& args = views.sums.args;
  if (!views.sums.summed) sum_here(views.sums.columns);
  double loss = 0;
  int bad = threadIdx.x == 0 && args.bad_class_weight && *args.bad_class_weight;
  for (int64_t b = threadIdx.x; b < args.batch; b += kThreads) {
    const double scale = args.scale[b];
    if (scale != 0) loss += scale * views.sums.sum(b, kCrossEntropy);
    bad += views.sums.bad(b) || scale != scale;
  }
  loss = block_sum(loss);
  write_loss(args, block_sum(bad) > 0 ? not_a_number<double>() : loss);

  const Volume& out = views.grad_logits;
  for (int64_t b = 0; b < args.batch; ++b) {
    if (views.sums.sum(b, kBadRisk) == 0) continue;
    for (int64_t v = threadIdx.x; v < out.voxels; v += kThreads) {
      for (int64_t c = 0; c < out.classes; ++c)
        write_nan(out.data, out.dtype, b * out.stride_batch + c * out.stride_class + v * out.stride_voxel);
      if (views.grad_risk.data)
        write_nan(views.grad_risk.data, views.grad_risk.dtype, b * views.grad_risk.stride_batch + v);
    }
  }
}

}  // namespace

void sum_partials(const double* partial, double* sums, int64_t columns, int64_t chunks, cudaStream_t stream) {
  if (columns == 0) return;
  launch(sum_columns, blocks((columns + kWarps - 1) / kWarps), kThreads, stream,
         ColumnSums{partial, sums, columns, chunks});
}

namespace {

FinishViews prepare(const LossFinish& args, cudaStream_t stream) {
  const ColumnSums columns{args.partial, args.sums, args.batch * loss_columns(args.classes, args.class_sums),
                           args.chunks_per_image};
  const bool summed = columns.columns * columns.chunks > kFewNumbers;
  if (summed) sum_partials(columns.partial, columns.sums, columns.columns, columns.chunks, stream);
  return {args, columns, summed};
}

}  // namespace

void make_tables(const LossTables& args, cudaStream_t stream) {
  launch(args.to_double ? tables_kernel<double> : tables_kernel<float>, 1, kThreads, stream, args);
}

Chunking count_chunking(const LossInputs& in) {
  return chunk_voxels(in.logits.batch, in.logits.voxels, int64_t(kThreads) * kCountVoxels, 64);
}

void count_voxels(const LossCount& args, cudaStream_t stream) {
  const int64_t chunks = args.chunking.chunks(args.in.logits.batch);
  if (chunks == 0) return;
  CountViews views{view_of<kCountVoxels>(args.in, args.chunking, 1), args.codes,
                   is_multiple(args.in.logits.voxels, kCountVoxels), args.partial};
  views.in.risk.data = nullptr;  // the gradient pass looks at it
  launch(count_kernel, blocks(chunks), kThreads, stream, views);
}

void finish_loss(const LossFinish& args, cudaStream_t stream) {
  launch(finish_kernel, 1, kThreads, stream, prepare(args, stream));
}

void total_loss(const LossTotal& args, cudaStream_t stream) {
  launch(total_kernel, 1, kThreads, stream, TotalViews{prepare(args.sums, stream), args.grad_logits, args.grad_risk});
}

}  // namespace riskmap::cuda
