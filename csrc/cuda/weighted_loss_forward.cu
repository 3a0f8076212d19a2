// Forward pass of the weighted loss: one read of the logits, nothing of their size written.
#include "cuda/dice.cuh"

namespace riskmap::cuda {
namespace {

struct ForwardViews {
  LossViews in;
  MapView map;
  double map_factor;
  double* partial;
};

template <class Column, int V, bool kSquared>
__global__ void __launch_bounds__(kThreads, min_blocks<Column>()) forward(const ForwardViews args) {
  using acc_t = typename Column::acc_t;
  const LossViews& in = args.in;
  const BlockShape shape(in.parts, in.logits.layout == Layout::kVoxels);
  const Chunk chunk(in.chunking, in.voxels);
  const DiceColumns dice_columns(args.partial, in, chunk.image);
  DiceSums<Column, V> dice(in, shape, dice_columns);
  ExchangeFor<Column, V, kExchangeSlots> exchange(shape);
  LossSums total;

  for (int64_t tile = chunk.begin; tile < chunk.end; tile += shape.threads * V) {
    const Span<V> span = shape.span<V>(tile, chunk.end);
    Column x[V];
    assign_classes(shape.part, in.classes_per_part, in.classes, x);
    load_columns(in.logits, chunk.image, span, x);
    VoxelData<acc_t, V> data;
    data.load(in, chunk.image, span);

    acc_t value[V], max[V], sum[V], ce_sum = 0;
    const auto finish = [&](int i, const Softmax<acc_t>& softmax, acc_t) {
      const acc_t ce = softmax.cross_entropy(in, hot_factor<acc_t>(in, data.label[i]));
      const acc_t weighted = data.counted(in, i) ? data.risk[i] * ce : acc_t(0);
      const bool bad = data.label[i] == kBadLabel || data.bad_risk(i);
      value[i] = bad                    ? not_a_number<acc_t>()
                 : args.map_factor == 0 ? acc_t(0)
                                        : weighted * static_cast<acc_t>(args.map_factor);
      ce_sum += weighted;
      total.add(in, data, i);
      if constexpr (Column::kInRegisters) {
        if (in.class_sums) dice.template add<kSquared>(x[i], softmax.sum, data.label[i]);
      }
      max[i] = softmax.max;
      sum[i] = softmax.sum;
    };
    for_voxels(in, x, data.label, exchange, [](int, acc_t) { return acc_t(0); }, finish);
    if (!Column::kShared || shape.part == 0) {
      total.cross_entropy += static_cast<double>(ce_sum);
      if (args.map.data) store_values(args.map, chunk.image, span, value);
    }
    if constexpr (!Column::kInRegisters) {
      if (in.class_sums) dice.template add_tile<kSquared>(x, max, sum, data.label);
    }
  }
  if (shape.part != 0) total = LossSums{};  // of voxels that another warp counts
  total.write(args.partial, in.chunking, loss_columns(in.classes, in.class_sums), chunk.image);
  if (in.class_sums) dice.write(dice_columns);
}

}  // namespace

Chunking loss_chunking(const LossInputs& in) {
  Chunking chunking{};
  with_variant<MemoryColumn>(in.logits.dtype, in.logits.classes, [&](auto variant) {
    chunking = chunk_voxels(in.logits.batch, in.logits.voxels, decltype(variant)::tile(in.logits.classes));
  });
  return chunking;
}

void launch_weighted_loss_forward(const LossForward& args, cudaStream_t stream) {
  const Volume& logits = args.in.logits;
  if (args.chunking.chunks(logits.batch) == 0) return;
  with_variant<MemoryColumn>(logits.dtype, logits.classes, [&](auto variant) {
    using V = decltype(variant);
    const ForwardViews views{view_of<V::kVoxels>(args.in, args.chunking, V::parts(logits.classes)),
                             view_of<V::kVoxels>(args.map, logits.batch), args.map_factor, args.partial};
    with_flag(args.in.squared, [&](auto squared) {
      launch(forward<typename V::Column, V::kVoxels, squared>, blocks(args.chunking.chunks(logits.batch)), kThreads,
             stream, views);
    });
  });
}

}  // namespace riskmap::cuda
