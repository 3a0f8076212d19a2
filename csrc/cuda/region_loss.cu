// The weighted loss over overlapping regions: a sigmoid for each, their loss averaged; sums and gradient.
#include "cuda/dice.cuh"
#include "cuda/loss_gradient.cuh"

namespace riskmap::cuda {
namespace {

constexpr int kVoxels = 4;

// What a region asks of a voxel.
struct RegionTable {
  const uint8_t* membership;  // [R, L]
  int64_t num_labels;
  double smoothing;

  __device__ __forceinline__ bool inside(int r, int label) const {
    return label >= 0 && __ldg(membership + r * num_labels + label) != 0;
  }
  template <class acc_t>
  __device__ __forceinline__ acc_t smoothed(bool inside_) const {
    const acc_t t = inside_ ? acc_t(1) : acc_t(0);
    return t * static_cast<acc_t>(1 - smoothing) + static_cast<acc_t>(smoothing / 2);
  }
};

RegionTable table_of(const LossInputs& in) { return {in.membership, in.num_labels, in.label_smoothing}; }

struct ForwardViews {
  LossViews in;
  RegionTable table;
  MapView map;
  double map_factor;
  double* partial;
};

template <class acc_t>
__device__ __forceinline__ acc_t weight_of(const LossViews& in, int r) {
  return __ldg(static_cast<const acc_t*>(in.class_weight) + r);
}

// Regions whose Dice sums fit in shared memory; more are dealt with in groups, each with a pass over the chunk.
template <class acc_t>
constexpr int kGroup = 32 / static_cast<int>(sizeof(acc_t));

template <class T, bool kSquared>
__global__ void __launch_bounds__(kThreads) forward(const ForwardViews args) {
  using acc_t = typename AccOf<T>::type;
  constexpr int V = kVoxels;
  __shared__ acc_t dice[kGroup<acc_t>][3][kThreads];  // a place for each thread
  const LossViews& in = args.in;
  const BlockShape shape(1, in.logits.layout == Layout::kVoxels);
  const Chunk chunk(in.chunking, in.voxels);
  const DiceColumns columns(args.partial, in, chunk.image);
  LossSums total;

  const int step = in.class_sums ? kGroup<acc_t> : in.classes;
  for (int group = 0; group < in.classes; group += step) {
    const int last = group + step < in.classes ? group + step : in.classes;
    for (int r = group; in.class_sums && r < last; ++r)
      for (int k = 0; k < 3; ++k) dice[r - group][k][threadIdx.x] = 0;

    for (int64_t tile = chunk.begin; tile < chunk.end; tile += shape.threads * V) {
      const Span<V> span = shape.span<V>(tile, chunk.end);
      VoxelData<acc_t, V> data;
      data.load(in, chunk.image, span);
      acc_t ce[V] = {};
      for (int r = group; r < last; ++r) {
        const Pack<T, V> x = load_class<T, V>(in.logits, chunk.image, r, span);
        acc_t intersection = 0, predicted = 0, labelled = 0;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const bool inside = args.table.inside(r, data.label[i]);
          const auto term = math::region_term(to_acc<acc_t>(x.values[i]), args.table.smoothed<acc_t>(inside));
          ce[i] += term.loss * weight_of<acc_t>(in, r);
          const acc_t pi = data.valid(i) ? term.pi : acc_t(0);
          predicted += dice_power<kSquared>(pi);
          intersection += inside ? pi : acc_t(0);
          labelled += inside ? acc_t(1) : acc_t(0);
        }
        if (!in.class_sums) continue;
        dice[r - group][0][threadIdx.x] += intersection;
        dice[r - group][1][threadIdx.x] += predicted;
        dice[r - group][2][threadIdx.x] += labelled;
      }

      acc_t value[V], ce_sum = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const acc_t weighted = data.counted(in, i) ? data.risk[i] * ce[i] : acc_t(0);
        const bool bad = data.label[i] == kBadLabel || data.bad_risk(i);
        value[i] = bad                    ? not_a_number<acc_t>()
                   : args.map_factor == 0 ? acc_t(0)
                                          : weighted * static_cast<acc_t>(args.map_factor);
        ce_sum += weighted;
        if (group == 0) total.add(in, data, i);
      }
      total.cross_entropy += static_cast<double>(ce_sum);
      if (args.map.data) store_values(args.map, chunk.image, span, value);
    }

    for (int r = group; in.class_sums && r < last; ++r)
      for (int k = 0; k < 3; ++k) {
        const double sum = block_sum(static_cast<double>(dice[r - group][k][threadIdx.x]));
        if (threadIdx.x == 0) columns.at(k, r) = sum;
      }
  }
  total.write(args.partial, in.chunking, loss_columns(in.classes, in.class_sums), chunk.image);
}

struct BackwardViews {
  GradientViews of;
  RegionTable table;
};

template <class T, bool kSquared>
__global__ void __launch_bounds__(kThreads) backward(const BackwardViews args) {
  using acc_t = typename AccOf<T>::type;
  constexpr int V = kVoxels;
  const LossViews& in = args.of.in;
  const BlockShape shape(1, in.logits.layout == Layout::kVoxels);
  const Chunk chunk(in.chunking, in.voxels);
  const double grad = args.of.grad();
  const acc_t factor = static_cast<acc_t>(grad * args.of.scale[chunk.image]);
  const double* slopes = args.of.dice_slopes + chunk.image * 2 * in.classes;  // read with Dice only
  LossSums total;

  for (int64_t tile = chunk.begin; tile < chunk.end; tile += shape.threads * V) {
    const Span<V> span = shape.span<V>(tile, chunk.end);
    VoxelData<acc_t, V> data;
    data.load(in, chunk.image, span);
    acc_t grad_map[V];
    load_values(args.of.grad_map, chunk.image, span, grad_map);
    // Of each voxel: what a region's gradient is multiplied by, and what is added to it (NaN for bad input).
    acc_t ce[V] = {}, scaled_risk[V], poison[V];
    bool used[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const VoxelGradient<acc_t> voxel(args.of, data, i, factor, grad_map[i]);
      scaled_risk[i] = voxel.scaled_risk;
      used[i] = voxel.used;
      poison[i] = voxel.bad ? not_a_number<acc_t>() : acc_t(0);
    }
    for (int r = 0; r < in.classes; ++r) {
      const Pack<T, V> x = load_class<T, V>(in.logits, chunk.image, r, span);
      const acc_t weight = weight_of<acc_t>(in, r);
      const acc_t overall = in.class_sums ? static_cast<acc_t>(grad * slopes[r]) : acc_t(0);
      const acc_t hit = in.class_sums ? static_cast<acc_t>(grad * slopes[in.classes + r]) : acc_t(0);
      Pack<T, V> out;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const bool inside = args.table.inside(r, data.label[i]);
        const acc_t t = args.table.smoothed<acc_t>(inside);
        const auto term = math::region_term(to_acc<acc_t>(x.values[i]), t);
        ce[i] += term.loss * weight;
        acc_t g = math::region_cross_entropy_grad(term.pi, t, scaled_risk[i] * weight);
        if (in.class_sums) g += math::region_dice_grad<kSquared>(term.pi, inside ? acc_t(1) : acc_t(0), overall, hit);
        out.values[i] = from_acc<T>((used[i] ? g : acc_t(0)) + poison[i]);
      }
      store_class<T, V>(args.of.grad_logits, chunk.image, r, span, out);
    }

    acc_t grad_risk[V], ce_sum = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const VoxelGradient<acc_t> voxel(args.of, data, i, factor, grad_map[i]);
      grad_risk[i] = voxel.of_risk(ce[i]);
      ce_sum += voxel.counted ? data.risk[i] * ce[i] : acc_t(0);
      total.add_bad(data, i);
    }
    total.cross_entropy += static_cast<double>(ce_sum);
    if (args.of.grad_risk.data) store_values(args.of.grad_risk, chunk.image, span, grad_risk);
  }
  if (args.of.partial) total.write(args.of.partial, in.chunking, kLossColumns, chunk.image);
}

}  // namespace

Chunking region_chunking(const LossInputs& in) {
  return chunk_voxels(in.logits.batch, in.logits.voxels, int64_t(kThreads) * kVoxels);
}

void launch_region_loss_forward(const LossForward& args, cudaStream_t stream) {
  const int64_t batch = args.in.logits.batch, chunks = args.chunking.chunks(batch);
  if (chunks == 0) return;
  const ForwardViews views{view_of<kVoxels>(args.in, args.chunking, 1), table_of(args.in),
                           view_of<kVoxels>(args.map, batch), args.map_factor, args.partial};
  with_floating(args.in.logits.dtype, [&](auto tag) {
    with_flag(args.in.squared,
              [&](auto squared) { launch(forward<decltype(tag), squared>, blocks(chunks), kThreads, stream, views); });
  });
}

void launch_region_loss_backward(const LossBackward& args, cudaStream_t stream) {
  const int64_t chunks = args.chunking.chunks(args.in.logits.batch);
  if (chunks == 0) return;
  const BackwardViews views{view_of<kVoxels>(args, 1), table_of(args.in)};
  with_floating(args.in.logits.dtype, [&](auto tag) {
    with_flag(args.in.squared,
              [&](auto squared) { launch(backward<decltype(tag), squared>, blocks(chunks), kThreads, stream, views); });
  });
}

}  // namespace riskmap::cuda
