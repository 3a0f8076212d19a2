// Gradient of the weighted loss: one read of the logits, one write of their gradient. As a backward pass it makes the
// softmax again, so that the forward pass has nothing to keep; where the loss is wanted too (partial), it is forward
// and backward in one.
#include "cuda/loss_gradient.cuh"

namespace riskmap::cuda {
namespace {

// Slopes of the Dice loss at a voxel, from those of its sums; in shared memory up to kMaxSharedClasses.
template <class Column, bool kSquared>
struct DiceSlopes {
  using acc_t = typename Column::acc_t;
  static constexpr int kClasses = Column::kShared ? kMaxSharedClasses : Column::kSlots;
  const double* slopes;  // [2, C]
  double grad;
  int classes;
  acc_t (*table)[kClasses];

  __device__ __forceinline__ DiceSlopes(const double* dice_slopes, double grad_, int classes_)
      : slopes(dice_slopes), grad(grad_), classes(classes_) {
    if constexpr (Column::kInRegisters) {
      __shared__ acc_t memory[2][kClasses];
      table = memory;
      if (!slopes) return;
      for (int j = static_cast<int>(threadIdx.x); j < 2 * classes; j += kThreads)
        table[j / classes][j % classes] = static_cast<acc_t>(grad * slopes[j]);
      __syncthreads();
    }
  }
  __device__ __forceinline__ acc_t overall(int c) const {
    if constexpr (Column::kInRegisters) return table[0][c];
    return static_cast<acc_t>(grad * slopes[c]);
  }
  __device__ __forceinline__ acc_t hit(int c) const {
    if constexpr (Column::kInRegisters) return table[1][c];
    return static_cast<acc_t>(grad * slopes[classes + c]);
  }
  __device__ __forceinline__ acc_t at(int c, bool here, acc_t pi) const {
    const acc_t slope = math::dice_overall<kSquared>(pi, overall(c));
    return here ? slope + hit(c) : slope;
  }
};

template <class Column, int V, bool kSquared>
__global__ void __launch_bounds__(kThreads, min_blocks<Column>()) backward(const GradientViews args) {
  using T = typename Column::T;
  using acc_t = typename Column::acc_t;
  const LossViews& in = args.in;
  const BlockShape shape(in.parts, in.logits.layout == Layout::kVoxels);
  const Chunk chunk(in.chunking, in.voxels);
  const double grad = args.grad();
  const acc_t factor = static_cast<acc_t>(grad * args.scale[chunk.image]);
  const double* image_slopes = in.class_sums ? args.dice_slopes + chunk.image * 2 * in.classes : nullptr;
  const DiceSlopes<Column, kSquared> dice(image_slopes, grad, in.classes);
  ExchangeFor<Column, V, kExchangeSlots> exchange(shape);
  LossSums total;

  for (int64_t tile = chunk.begin; tile < chunk.end; tile += shape.threads * V) {
    const Span<V> span = shape.span<V>(tile, chunk.end);
    Column x[V];
    assign_classes(shape.part, in.classes_per_part, in.classes, x);
    load_columns(in.logits, chunk.image, span, x);
    VoxelData<acc_t, V> data;
    data.load(in, chunk.image, span);
    acc_t grad_map[V];
    load_values(args.grad_map, chunk.image, span, grad_map);

    // sum_c e_c d D / d pi_c, before the division by sum_c e_c; of squared probabilities the part that is divided
    // twice, since that sum is not known yet.
    const auto slope_sum = [&](int i, acc_t max) {
      acc_t sum = 0;
      if (!in.class_sums) return sum;
      x[i].each([&](int c) {
        const int k = x[i].class_of(c);
        const acc_t e = x[i].exp_at(c, max);
        sum += e * dice.at(k, !kSquared && data.label[i] == k, e);
      });
      return sum;
    };
    acc_t grad_risk[V], ce_sum = 0;
    const auto finish = [&](int i, const Softmax<acc_t>& softmax, acc_t slopes) {
      const VoxelGradient<acc_t> voxel(args, data, i, factor, grad_map[i]);
      const acc_t own_factor = hot_factor<acc_t>(in, data.label[i]);
      if (args.grad_risk.data || args.partial) {
        const acc_t ce = softmax.cross_entropy(in, own_factor);
        grad_risk[i] = voxel.of_risk(ce);
        ce_sum += voxel.counted ? data.risk[i] * ce : acc_t(0);
      }
      const acc_t hot = voxel.scaled_risk * own_factor;
      const acc_t hot_plus_total = hot + voxel.scaled_risk * smooth_total<acc_t>(in);
      const acc_t inverse = acc_t(1) / softmax.sum;
      acc_t mean_slope = slopes * inverse;
      if constexpr (kSquared) {
        const acc_t hit = in.class_sums && data.valid(i) ? dice.hit(data.label[i]) : acc_t(0);
        mean_slope = (mean_slope + math::exp(softmax.target) * hit) * inverse;
      }
      const acc_t* smooth = static_cast<const acc_t*>(in.smooth);
      x[i].each([&](int c) {
        const int k = x[i].class_of(c);
        const bool here = data.label[i] == k;
        const acc_t pi = x[i].exp_at(c, softmax.max) * inverse;
        const acc_t smooth_k = smooth ? voxel.scaled_risk * __ldg(smooth + k) : acc_t(0);
        acc_t g = math::cross_entropy_grad(pi, hot_plus_total, here ? hot : acc_t(0), smooth_k);
        if (in.class_sums) g += math::dice_grad(pi, dice.at(k, here, pi), mean_slope);
        g = voxel.finish(g);
        if constexpr (Column::kInRegisters) {
          x[i].set(c, g);
        } else if (span.has(i)) {
          store_element<T>(args.grad_logits, chunk.image, c, span.at(i), g);
        }
      });
      total.add_bad(data, i);
    };
    for_voxels(in, x, data.label, exchange, slope_sum, finish);
    if constexpr (Column::kInRegisters) store_columns(args.grad_logits, chunk.image, span, x);
    if (!Column::kShared || shape.part == 0) {
      total.cross_entropy += static_cast<double>(ce_sum);
      if (args.grad_risk.data) store_values(args.grad_risk, chunk.image, span, grad_risk);
    }
  }
  if (shape.part != 0) total = LossSums{};  // of voxels that another warp counts
  if (args.partial) total.write(args.partial, in.chunking, kLossColumns, chunk.image);
}

}  // namespace

void launch_weighted_loss_backward(const LossBackward& args, cudaStream_t stream) {
  const Volume& logits = args.in.logits;
  const int64_t chunks = args.chunking.chunks(logits.batch);
  if (chunks == 0) return;
  with_variant<MemoryColumn>(logits.dtype, logits.classes, [&](auto variant) {
    using V = decltype(variant);
    const GradientViews views = view_of<V::kVoxels>(args, V::parts(logits.classes));
    with_flag(args.in.squared, [&](auto squared) {
      launch(backward<typename V::Column, V::kVoxels, squared>, blocks(chunks), kThreads, stream, views);
    });
  });
}

}  // namespace riskmap::cuda
