// The weighted loss over overlapping regions: a sigmoid for each, their loss averaged; sums and gradient.
#include "cuda/any_column.cuh"
#include "cuda/class_sums.cuh"
#include "cuda/loss_gradient.cuh"

namespace riskmap::cuda {
namespace {

// Which regions a label is in.
struct RegionTable {
  const uint8_t* table;  // [R, L]
  int64_t num_labels;

  __device__ __forceinline__ bool inside(int r, int label) const {
    return label >= 0 && __ldg(table + r * num_labels + label) != 0;
  }
};

// The same of few regions in shared memory, a bit for each.
constexpr int kMaxLabels = 256;

struct RegionBits {
  uint32_t* bits;

  // To be followed by a barrier.
  __device__ __forceinline__ RegionBits(const RegionTable& of, int regions) {
    __shared__ uint32_t memory[kMaxLabels];
    bits = memory;
    for (int label = static_cast<int>(threadIdx.x); label < of.num_labels; label += kThreads) {
      uint32_t inside = 0;
      for (int r = 0; r < regions; ++r) inside |= (of.inside(r, label) ? 1u : 0u) << r;
      memory[label] = inside;
    }
  }
  __device__ __forceinline__ uint32_t of(int label) const { return label < 0 ? 0 : bits[label]; }
};

template <class Logits>
struct ForwardPass {
  ForwardViews<Logits> of;
  RegionTable regions;
};

template <class Logits>
struct BackwardPass {
  GradientViews<Logits> of;
  RegionTable regions;
};

// What the smoothed labels of a region are.
struct Smoothed {
  float outside, inside;

  __device__ __forceinline__ explicit Smoothed(double smoothing)
      : outside(static_cast<float>(smoothing / 2)), inside(static_cast<float>(1 - smoothing / 2)) {}
  __device__ __forceinline__ float of(bool hit) const { return hit ? inside : outside; }
};

template <class acc_t>
__device__ __forceinline__ acc_t smoothed(const LossViews& in, bool inside) {
  const acc_t smoothing = static_cast<acc_t>(in.label_smoothing), t = inside ? acc_t(1) : acc_t(0);
  return t * (acc_t(1) - smoothing) + smoothing / 2;
}

// Each region's mean over regions is part of its weight: CE = mean over r of c[r] BCE_r.
template <class acc_t, class Weights>
__device__ __forceinline__ acc_t weight_in_mean(const LossViews& in, const Weights& weights, int r) {
  return weights.of(r) * math::inverse(static_cast<acc_t>(in.classes));
}

template <class T, int kSlots>
__global__ void __launch_bounds__(kThreads, 2) few_forward(const ForwardPass<TileVolume> args) {
  using Tile = FewTile<T, kSlots, false>;
  const LossViews& in = args.of.in;
  const Chunk chunk(in.chunking, in.voxels);
  const ClassWeights<float, kSlots> weights(in);
  const RegionBits regions(args.regions, in.classes);
  __syncthreads();
  FewClassSums<kSlots> sums;
  const LossRows rows(in, chunk.image);
  LossSums total;

  for (uint32_t first = chunk.begin; first < chunk.end; first += Tile::kVoxels) {
    const auto span = Tile::span(first, chunk.end);
    Tile tile;
    VoxelData<float, kTileVoxels> data;
    tile.load(args.of.logits, chunk.image, first, chunk.end, span);
    data.load(in, rows, span);
    float value[kTileVoxels], ce[kTileVoxels] = {}, ce_sum = 0;
    uint32_t inside[kTileVoxels];
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) inside[i] = regions.of(data.label[i]);
#pragma unroll
    for (int r = 0; r < kSlots; ++r) {
      if (r >= in.classes) break;
      const float weight = weight_in_mean<float>(in, weights, r);
      const Smoothed smoothed(in.label_smoothing);
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) {
        const bool hit = (inside[i] >> r & 1) != 0;
        const auto term = math::region_term(tile.x[r][i], smoothed.of(hit));
        ce[i] += term.loss * weight;
        const float pi = data.valid(i) ? term.pi : 0.0f;
        sums.predicted[r] += in.squared ? pi * pi : pi;
        sums.intersection[r] += hit ? pi : 0.0f;
        sums.labelled[r] += hit;
      }
    }
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) {
      const float weighted = data.counted(in, i) ? data.risk[i] * ce[i] : 0.0f;
      value[i] = args.of.value(data, i, weighted);
      ce_sum += weighted;
      total.look(data, i);
      total.count(in, data, i);
    }
    total.cross_entropy += static_cast<double>(ce_sum);
    if (args.of.map.data) store_values(args.of.map_row(chunk), span, value);
  }
  const PartialColumns out = args.of.columns(chunk);
  write_sums(total, true, out);
  if (in.class_sums) sums.write(in, out);
}

// d loss / d logit of a region, but for what is bad or not used. weight: of its cross-entropy.
template <class acc_t>
__device__ __forceinline__ acc_t region_gradient(const LossViews& in, acc_t pi, acc_t t, bool hit, acc_t weight,
                                                 acc_t overall, acc_t hit_slope) {
  const acc_t g = math::region_cross_entropy_grad(pi, t, weight), inside = hit ? acc_t(1) : acc_t(0);
  if (!in.class_sums) return g;
  return g + (in.squared ? math::region_dice_grad<true>(pi, inside, overall, hit_slope)
                         : math::region_dice_grad<false>(pi, inside, overall, hit_slope));
}

// What a region's gradient is made of, for a voxel: the weight of its cross-entropy, and what is added, NaN for what is
// bad.
template <class acc_t>
struct RegionGradient {
  bool counted, used, bad;
  acc_t scale, scaled_risk;

  template <class Views, int V>
  __device__ __forceinline__ RegionGradient(const Views& args, const VoxelData<acc_t, V>& data, int i, acc_t factor,
                                            acc_t grad_map)
      : counted(factor != acc_t(0) && data.counted(args.in, i)),
        used(is_used<LossKind::kAny>(args.in, data, i, factor)),
        bad(data.label[i] == kBadLabel || data.bad_risk(i)),
        scale(factor * grad_map),
        scaled_risk(counted ? scale * data.risk[i] : acc_t(0)) {}

  __device__ __forceinline__ acc_t of_risk(acc_t ce) const {
    return bad ? not_a_number<acc_t>() : counted ? scale * ce : acc_t(0);
  }
};

template <class T, int kSlots>
__global__ void __launch_bounds__(kThreads, 2) few_backward(const BackwardPass<TileVolume> args) {
  using Tile = FewTile<T, kSlots, false>;
  const LossViews& in = args.of.in;
  const Chunk chunk(in.chunking, in.voxels);
  const ClassWeights<float, kSlots> weights(in);
  const RegionBits regions(args.regions, in.classes);
  const float factor = args.of.template factor<float, LossKind::kAny>(chunk);
  float overall[kSlots] = {}, hit_slope[kSlots] = {};
#pragma unroll
  for (int r = 0; r < kSlots; ++r) {
    if (!in.class_sums || r >= in.classes) break;
    overall[r] = args.of.slope(chunk.image, 0, r);
    hit_slope[r] = args.of.slope(chunk.image, 1, r);
  }
  __syncthreads();
  const LossRows rows(in, chunk.image);
  LossSums total;

  for (uint32_t first = chunk.begin; first < chunk.end; first += Tile::kVoxels) {
    const auto span = Tile::span(first, chunk.end);
    Tile tile;
    VoxelData<float, kTileVoxels> data;
    float grad_map[kTileVoxels], grad_risk[kTileVoxels], ce_sum = 0;
    tile.load(args.of.logits, chunk.image, first, chunk.end, span);
    data.load(in, rows, span);
    args.of.template load_grad_map<LossKind::kAny>(chunk.image, span, grad_map);
    float ce[kTileVoxels] = {}, scaled_risk[kTileVoxels], poison[kTileVoxels];
    uint32_t inside[kTileVoxels];
    bool used[kTileVoxels];
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) {
      const RegionGradient<float> voxel(args.of, data, i, factor, grad_map[i]);
      inside[i] = regions.of(data.label[i]);
      scaled_risk[i] = voxel.scaled_risk;
      used[i] = voxel.used;
      poison[i] = voxel.bad ? not_a_number<float>() : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < kSlots; ++r) {
      if (r >= in.classes) break;
      const float weight = weight_in_mean<float>(in, weights, r);
      const Smoothed smoothed(in.label_smoothing);
      if (args.of.wants_cross_entropy()) {
#pragma unroll
        for (int i = 0; i < kTileVoxels; ++i)
          ce[i] += math::region_term(tile.x[r][i], smoothed.of((inside[i] >> r & 1) != 0)).loss * weight;
      }
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) {
        const bool hit = (inside[i] >> r & 1) != 0;
        const float t = smoothed.of(hit);
        const auto term = math::region_term(tile.x[r][i], t);  // the loss is not made twice
        const float g = region_gradient(in, term.pi, t, hit, scaled_risk[i] * weight, overall[r], hit_slope[r]);
        tile.x[r][i] = (used[i] ? g : 0.0f) + poison[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) {
      const RegionGradient<float> voxel(args.of, data, i, factor, grad_map[i]);
      grad_risk[i] = voxel.of_risk(ce[i]);
      ce_sum += voxel.counted ? data.risk[i] * ce[i] : 0.0f;
      total.look(data, i);
    }
    tile.store(args.of.grad, chunk.image, first, chunk.end, span);
    total.cross_entropy += static_cast<double>(ce_sum);
    if (args.of.grad_risk.data) store_values(MapRow(args.of.grad_risk, chunk.image), span, grad_risk);
  }
  args.of.finish(total, chunk);
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_of_any(const ForwardPass<AnyVolume> args) {
  using acc_t = typename AccOf<T>::type;
  const LossViews& in = args.of.in;
  const Chunk chunk(in.chunking, in.voxels);
  const ClassWeights<acc_t, 0> weights(in);
  const PartialColumns out = args.of.columns(chunk);
  const LossRows rows(in, chunk.image);
  LossSums total;
  for (uint32_t at = chunk.begin + threadIdx.x; at < chunk.end; at += kThreads) {
    const Spread<1> span{at, chunk.end, 0};
    VoxelData<acc_t, 1> data;
    data.load(in, rows, span);
    acc_t ce = 0;
    const AnyColumn<T> x(args.of.logits, chunk.image, at);
    x.each([&](int r) {
      const bool hit = args.regions.inside(r, data.label[0]);
      ce += math::region_term(x.get(r), smoothed<acc_t>(in, hit)).loss * weight_in_mean<acc_t>(in, weights, r);
    });
    const acc_t weighted = data.counted(in, 0) ? data.risk[0] * ce : acc_t(0);
    const acc_t value[1] = {args.of.value(data, 0, weighted)};
    total.cross_entropy += static_cast<double>(weighted);
    total.look(data, 0);
    total.count(in, data, 0);
    if (args.of.map.data) store_values(args.of.map_row(chunk), span, value);
  }
  write_sums(total, true, out);
  for (int r = warp_index(); in.class_sums && r < in.classes; r += kWarps) {
    WarpClassSums sums;
    for (uint32_t at = chunk.begin + static_cast<uint32_t>(lane_index()); at < chunk.end; at += kWarp) {
      int label[1];
      load_labels(rows.target, in.label, Spread<1>{at, chunk.end, 0}, label);
      if (label[0] < 0) continue;
      const bool hit = args.regions.inside(r, label[0]);
      const AnyColumn<T> x(args.of.logits, chunk.image, at);
      sums.add(static_cast<double>(math::region_term(x.get(r), acc_t(0)).pi), in.squared, hit);
    }
    sums.write(true, in.classes, r, out);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward_of_any(const BackwardPass<AnyVolume> args) {
  using acc_t = typename AccOf<T>::type;
  const LossViews& in = args.of.in;
  const Chunk chunk(in.chunking, in.voxels);
  const ClassWeights<acc_t, 0> weights(in);
  const acc_t factor = args.of.template factor<acc_t, LossKind::kAny>(chunk);
  const LossRows rows(in, chunk.image);
  LossSums total;
  for (uint32_t at = chunk.begin + threadIdx.x; at < chunk.end; at += kThreads) {
    const Spread<1> span{at, chunk.end, 0};
    VoxelData<acc_t, 1> data;
    acc_t grad_map[1], ce = 0;
    data.load(in, rows, span);
    args.of.template load_grad_map<LossKind::kAny>(chunk.image, span, grad_map);
    const RegionGradient<acc_t> voxel(args.of, data, 0, factor, grad_map[0]);
    const AnyColumn<T> x(args.of.logits, chunk.image, at);
    T* out = voxel_of<T>(args.of.grad, chunk.image, at);
    x.each([&](int r) {
      const bool hit = args.regions.inside(r, data.label[0]);
      const acc_t t = smoothed<acc_t>(in, hit), weight = weight_in_mean<acc_t>(in, weights, r);
      const acc_t overall = in.class_sums ? args.of.template slope<acc_t>(chunk.image, 0, r) : acc_t(0);
      const acc_t hit_slope = in.class_sums ? args.of.template slope<acc_t>(chunk.image, 1, r) : acc_t(0);
      const auto term = math::region_term(x.get(r), t);
      ce += term.loss * weight;
      const acc_t g = region_gradient(in, term.pi, t, hit, voxel.scaled_risk * weight, overall, hit_slope);
      out[r * args.of.grad.stride_class] = from_acc<T>(voxel.bad ? not_a_number<acc_t>() : voxel.used ? g : acc_t(0));
    });
    const acc_t grad_risk[1] = {voxel.of_risk(ce)};
    total.cross_entropy += voxel.counted ? static_cast<double>(data.risk[0] * ce) : 0.0;
    total.look(data, 0);
    if (args.of.grad_risk.data) store_values(MapRow(args.of.grad_risk, chunk.image), span, grad_risk);
  }
  args.of.finish(total, chunk);
}

// Calls f with the dtype, and the regions that a thread holds: 0 where they fit no tile.
template <class F>
void with_region_kernel(const LossInputs& in, bool fits, const F& f) {
  with_floating(in.logits.dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (sizeof(T) < sizeof(double)) {
      if (in.logits.classes <= kFewClasses && in.num_labels <= kMaxLabels && fits)
        return in.logits.classes <= 4 ? f(T{}, std::integral_constant<int, 4>{})
                                      : f(T{}, std::integral_constant<int, 8>{});
    }
    f(T{}, std::integral_constant<int, 0>{});
  });
}

RegionTable region_table_of(const LossInputs& in) { return {in.regions, in.num_labels}; }

}  // namespace

Chunking region_chunking(const LossInputs& in) {
  return chunk_voxels(in.logits.batch, in.logits.voxels, kThreads * kTileVoxels, 64);
}

void launch_region_loss_forward(const LossForward& args, cudaStream_t stream) {
  const Volume& logits = args.in.logits;
  const int64_t blocks = args.chunking.chunks(logits.batch);
  if (blocks == 0) return;
  with_region_kernel(args.in, fits_tiles(args.in), [&](auto tag, auto slots) {
    using T = decltype(tag);
    constexpr int kSlots = decltype(slots)::value;
    if constexpr (kSlots == 0) {
      launch(forward_of_any<T>, blocks, kThreads, 0, stream,
             ForwardPass<AnyVolume>{view_of(args, any_view_of(logits)), region_table_of(args.in)});
    } else {
      const TileVolume view = tile_view_of(logits);
      launch(few_forward<T, kSlots>, blocks, kThreads, FewTile<T, kSlots, false>::shared_bytes(view), stream,
             ForwardPass<TileVolume>{view_of(args, view), region_table_of(args.in)});
    }
  });
}

void launch_region_loss_backward(const LossBackward& args, cudaStream_t stream) {
  const Volume& logits = args.in.logits;
  const int64_t blocks = args.chunking.chunks(logits.batch);
  if (blocks == 0) return;
  with_region_kernel(args.in, fits_tiles(args), [&](auto tag, auto slots) {
    using T = decltype(tag);
    constexpr int kSlots = decltype(slots)::value;
    if constexpr (kSlots == 0) {
      launch(backward_of_any<T>, blocks, kThreads, 0, stream,
             BackwardPass<AnyVolume>{view_of(args, any_view_of(logits), any_view_of(args.grad_logits)),
                                     region_table_of(args.in)});
    } else {
      const auto views = view_of(args, tile_view_of(logits), tile_view_of(args.grad_logits));
      launch(few_backward<T, kSlots>, blocks, kThreads, FewTile<T, kSlots, false>::shared_bytes(views.logits), stream,
             BackwardPass<TileVolume>{views, region_table_of(args.in)});
    }
  });
}

}  // namespace riskmap::cuda
