// The weighted loss over overlapping regions: a sigmoid for each, their loss averaged; sums and gradient of one chunk.
#include "cpu/kernels/class_sums.h"
#include "cpu/kernels/loss_tile.h"

namespace riskmap::cpu {
namespace {

// Up to this many regions of few labels are written out; squared probabilities are not among them.
constexpr int kMaxWrittenOut = 4;

// kRegions: 0 for as many as there are.
template <class acc_t, int kRegions>
struct RegionTile : LossTile<acc_t> {
  using typename LossTile<acc_t>::F;
  using typename LossTile<acc_t>::I;
  using LossTile<acc_t>::args;

  const acc_t* regions;
  const acc_t* weight_of;
  const int64_t region_pitch;
  const acc_t keep, shift;  // t (1 - eps) + eps / 2
  LossPartial total{};

  RegionTile(const LossArgs& args_, int64_t chunk, void* scratch)
      : LossTile<acc_t>(args_, chunk, scratch),
        regions(static_cast<const acc_t*>(args_.regions)),
        weight_of(static_cast<const acc_t*>(args_.class_weight)),
        region_pitch(table_pitch(args_.num_labels)),
        keep(static_cast<acc_t>(1 - args_.label_smoothing)),
        shift(static_cast<acc_t>(args_.label_smoothing / 2)) {}

  template <class Body>
  RISKMAP_MEMBER void each(const Body& body) const {
    if constexpr (kRegions > 0) {
      RegisterColumn<acc_t, kRegions>::each(body);
    } else {
      for (int r = 0; r < static_cast<int>(args.logits.classes); ++r) body(r);
    }
  }
  RISKMAP_MEMBER F inside(int r, I y, I valid) const {
    if constexpr (kRegions > 0) return math::select(valid, lookup_short(regions + r * kMinTile, y), F{});
    return math::select(valid, lookup(regions + r * region_pitch, args.num_labels, I(y & valid)), F{});
  }
  RISKMAP_MEMBER F smoothed(F t) const { return t * keep + shift; }

  template <class Body>
  void for_tiles(const Body& body) {
    for (int64_t begin = this->first; begin < this->last; begin += this->tile) {
      const int64_t n = begin + this->tile < this->last ? this->tile : this->last - begin;
      this->stage(begin, n, total);
      body(begin, n);
    }
  }
};

template <class T>
RISKMAP_HD auto logit(Rows<T> in, int r, int64_t v) {
  return load_values(in.base + r * in.pitch + v);
}

template <class acc_t, int kRegions, bool kSquared>
void forward_chunk(const LossForwardArgs& args, int64_t chunk, void* scratch) {
  using F = typename Simd<acc_t>::F;
  using I = typename Simd<acc_t>::I;
  RegionTile<acc_t, kRegions> tile(args, chunk, scratch);
  const int64_t num_regions = args.logits.classes;
  double* dice = args.class_partial + chunk * 3 * num_regions;
  if (args.class_sums)
    for (int64_t i = 0; i < 3 * num_regions; ++i) dice[i] = 0;

  const auto tile_sums = [&](auto in, int64_t begin, int64_t n) {
    ClassSums<acc_t, kRegions> sums(tile.sums, num_regions);
    F ce_sum{};
    I valid_count{}, foreground_count{};
    for (int64_t v = 0; v < n; v += Simd<acc_t>::kLanes) {
      const I y = tile.labels(v);
      const I valid = y >= 0;
      const I foreground = tile.foreground(v, y, valid);
      valid_count = count_where(valid, valid_count);
      foreground_count = count_where(foreground, foreground_count);
      F ce{};
      tile.each([&](int r) RISKMAP_LAMBDA {
        const F t = tile.inside(r, y, valid);
        const math::RegionTerm<F> term = math::region_term(logit(in, r, v), tile.smoothed(t));
        ce += term.loss * tile.weight_of[r];
        sums.update(r, [&](F& hit, F& all, F& labelled) RISKMAP_LAMBDA {
          hit = add_where(valid, hit, F(term.pi * t));
          all = add_where(valid, all, kSquared ? F(term.pi * term.pi) : term.pi);
          labelled += t;
        });
      });
      const F value = math::select(args.ce_in_foreground ? foreground : valid, F(tile.risk_at(v) * ce), F{});
      ce_sum += value;
      if (args.map.data) store(tile.grad + v, tile.scaled(value, static_cast<acc_t>(args.map_factor)));
    }
    if (args.map.data) unstage_map(tile.grad, args.map, tile.image, begin, n);
    tile.total.cross_entropy += horizontal_sum(ce_sum);
    tile.total.valid += horizontal_count(valid_count);
    tile.total.foreground += horizontal_count(foreground_count);
    if (args.class_sums) sums.flush(dice);
  };
  tile.for_tiles([&](int64_t begin, int64_t n) {
    tile.template for_rows<sizeof(acc_t) == 4>(begin, n, [&](auto in) { tile_sums(in, begin, n); });
  });
  args.partial[chunk] = tile.total;
}

template <class acc_t, int kRegions, bool kSquared>
void backward_chunk(const LossBackwardArgs& args, int64_t chunk, void* scratch) {
  using F = typename Simd<acc_t>::F;
  using I = typename Simd<acc_t>::I;
  RegionTile<acc_t, kRegions> tile(args, chunk, scratch);
  const int64_t num_regions = args.logits.classes;
  const acc_t* overall = static_cast<const acc_t*>(args.dice_overall) + tile.image * num_regions;
  const acc_t* hit = static_cast<const acc_t*>(args.dice_hit) + tile.image * num_regions;

  const auto gradient = [&](auto wants_loss, auto in, auto grads, int64_t n, bool streamed) {
    const acc_t factor = static_cast<acc_t>(args.factor[tile.image]);
    F ce_sum{};
    for (int64_t v = 0; v < n; v += Simd<acc_t>::kLanes) {
      const I y = tile.labels(v);
      const I valid = y >= 0;
      const I counted = tile.counted(v, y, valid, factor);
      const I used = args.class_sums ? valid : counted;
      F scale = broadcast(factor);
      if (args.grad_map.data) scale *= load<F>(tile.grad + v);
      const F w = tile.risk_at(v);
      const F scaled_risk = math::select(counted, F(scale * w), F{});
      F ce{};
      tile.each([&](int r) RISKMAP_LAMBDA {
        const F t = tile.inside(r, y, valid);
        const F smooth_t = tile.smoothed(t);
        const math::RegionTerm<F> term = math::region_term(logit(in, r, v), smooth_t);
        if (wants_loss) ce += term.loss * tile.weight_of[r];
        F g = math::region_cross_entropy_grad(term.pi, smooth_t, F(scaled_risk * tile.weight_of[r]));
        if (args.class_sums)
          g += math::region_dice_grad<kSquared>(term.pi, t, broadcast(overall[r]), broadcast(hit[r]));
        store_gradient(grads.base + r * grads.pitch + v, math::select(used, g, F{}), streamed);
      });
      if (!wants_loss) continue;
      if (args.grad_risk.data) store(tile.risk + v, math::select(counted, F(scale * ce), F{}));
      ce_sum += math::select(counted, F(w * ce), F{});
    }
    tile.total.cross_entropy += horizontal_sum(ce_sum);
  };
  tile.for_tiles([&](int64_t begin, int64_t n) {
    if (args.grad_map.data) stage_map(args.grad_map, tile.image, begin, n, tile.grad);
    with_flag(args.partial || args.grad_risk.data, [&](auto wants_loss) {
      tile.template for_gradient_rows<sizeof(acc_t) == 4>(
          args, begin, n, [&](auto in, auto grads, bool streamed) { gradient(wants_loss, in, grads, n, streamed); });
    });
    if (args.grad_risk.data) unstage_map(tile.risk, args.grad_risk, tile.image, begin, n);
  });
  if (args.streamed) end_of_streaming();
  if (args.partial) args.partial[chunk] = tile.total;
}

// Calls body(acc_t{}, number of regions, squared) with what the kernel is compiled for.
template <class Body>
static void with_kind(const LossArgs& args, const Body& body) {
  const bool is_double = args.logits.dtype == Dtype::kDouble;
  if (!is_double && !args.squared && args.num_labels <= Simd<float>::kLanes) {
    static_assert(kMaxWrittenOut == 4);
    switch (args.logits.classes) {
      case 1: return body(float{}, std::integral_constant<int, 1>{}, std::false_type{});
      case 2: return body(float{}, std::integral_constant<int, 2>{}, std::false_type{});
      case 3: return body(float{}, std::integral_constant<int, 3>{}, std::false_type{});
      case 4: return body(float{}, std::integral_constant<int, 4>{}, std::false_type{});
    }
  }
  with_flag(args.squared, [&](auto squared) {
    if (is_double) return body(double{}, std::integral_constant<int, 0>{}, squared);
    body(float{}, std::integral_constant<int, 0>{}, squared);
  });
}

}  // namespace

namespace RISKMAP_CPU_CAPABILITY {

void region_loss_forward(const LossForwardArgs& args, int64_t chunk, void* scratch) {
  with_kind(args, [&](auto acc, auto count, auto squared) {
    forward_chunk<decltype(acc), count, squared>(args, chunk, scratch);
  });
}

void region_loss_backward(const LossBackwardArgs& args, int64_t chunk, void* scratch) {
  with_kind(args, [&](auto acc, auto count, auto squared) {
    backward_chunk<decltype(acc), count, squared>(args, chunk, scratch);
  });
}

}  // namespace RISKMAP_CPU_CAPABILITY
}  // namespace riskmap::cpu
