// The weighted loss over overlapping regions: a sigmoid for each, their loss averaged; sums and gradient of one chunk.
#include "cpu/kernels/loss_tile.h"

namespace riskmap::cpu {
namespace {

template <class acc_t>
struct RegionTile : LossTile<acc_t> {
  using typename LossTile<acc_t>::F;
  using typename LossTile<acc_t>::I;
  using LossTile<acc_t>::args;
  static constexpr int kLanes = Simd<acc_t>::kLanes;

  const acc_t* membership;
  const acc_t* weight_of;
  const int64_t membership_pitch;
  const acc_t keep, shift;  // t (1 - eps) + eps / 2
  LossPartial total{};

  RegionTile(const LossArgs& args_, int64_t chunk, void* scratch)
      : LossTile<acc_t>(args_, chunk, scratch),
        membership(static_cast<const acc_t*>(args_.membership)),
        weight_of(static_cast<const acc_t*>(args_.class_weight)),
        membership_pitch(table_pitch(args_.num_labels)),
        keep(static_cast<acc_t>(1 - args_.label_smoothing)),
        shift(static_cast<acc_t>(args_.label_smoothing / 2)) {}

  RISKMAP_MEMBER F inside(int64_t r, I label_or_0) const {
    return lookup(membership + r * membership_pitch, args.num_labels, label_or_0);
  }
  RISKMAP_MEMBER F smoothed(F t) const { return t * keep + shift; }

  template <bool kSquared>
  RISKMAP_MEMBER void add_dice(int64_t r, F pi, F t) {
    const F terms[3] = {pi * t, kSquared ? F(pi * pi) : pi, t};
    for (int64_t i = 0; i < 3; ++i) {
      acc_t* at = this->sums + (i * args.logits.classes + r) * kLanes;
      store(at, F(load<F>(at) + terms[i]));
    }
  }

  template <class T>
  RISKMAP_MEMBER F logit(Rows<T> in, int64_t r, int64_t v) const {
    return load_values(in.base + r * in.pitch + v);
  }

  template <class Body>
  void for_tiles(const Body& body) {
    for (int64_t begin = this->first; begin < this->last; begin += this->tile) {
      const int64_t n = begin + this->tile < this->last ? this->tile : this->last - begin;
      total.bad_labels += this->stage(begin, n);
      body(begin, n);
    }
  }
};

template <class acc_t, bool kSquared>
void forward_chunk(const LossForwardArgs& args, int64_t chunk, void* scratch) {
  using F = typename Simd<acc_t>::F;
  using I = typename Simd<acc_t>::I;
  constexpr int kLanes = Simd<acc_t>::kLanes;
  RegionTile<acc_t> tile(args, chunk, scratch);
  const int64_t regions = args.logits.classes;
  double* dice = args.class_partial + chunk * 3 * regions;
  if (args.class_sums)
    for (int64_t i = 0; i < 3 * regions; ++i) dice[i] = 0;

  const auto sums = [&](auto in, int64_t begin, int64_t n) {
    if (args.class_sums) std::memset(tile.sums, 0, sizeof(acc_t) * 3 * regions * kLanes);
    F ce_sum{};
    I valid_count{}, foreground_count{}, bad_risk{};
    for (int64_t v = 0; v < n; v += kLanes) {
      const I y = tile.labels(v);
      const I valid = y >= 0;
      const I foreground = tile.foreground(v, y, valid);
      valid_count -= valid;
      foreground_count -= foreground;
      const F w = tile.risk_at(v);
      bad_risk -= valid & tile.bad_risk(w);
      F ce{};
      for (int64_t r = 0; r < regions; ++r) {
        const F t = tile.inside(r, I(y & valid));
        const math::RegionTerm<F> term = math::region_term(tile.logit(in, r, v), tile.smoothed(t));
        ce += term.loss * tile.weight_of[r];
        if (args.class_sums)
          tile.template add_dice<kSquared>(r, math::select(valid, term.pi, F{}), math::select(valid, t, F{}));
      }
      const F value = math::select(args.ce_in_foreground ? foreground : valid, F(w * ce), F{});
      ce_sum += value;
      if (args.map.data) store(tile.grad + v, tile.scaled(value, static_cast<acc_t>(args.map_factor)));
    }
    if (args.map.data) unstage_map(tile.grad, args.map, tile.image, begin, n);
    tile.total.cross_entropy += horizontal_sum(ce_sum);
    tile.total.valid += horizontal_count(valid_count);
    tile.total.foreground += horizontal_count(foreground_count);
    tile.total.bad_risk += horizontal_count(bad_risk);
    for (int64_t i = 0; args.class_sums && i < 3 * regions; ++i)
      dice[i] += horizontal_sum(load<F>(tile.sums + i * kLanes));
  };
  tile.for_tiles([&](int64_t begin, int64_t n) {
    tile.template for_rows<sizeof(acc_t) == 4>(begin, n, [&](auto in) { sums(in, begin, n); });
  });
  args.partial[chunk] = tile.total;
}

template <class acc_t, bool kSquared>
void backward_chunk(const LossBackwardArgs& args, int64_t chunk, void* scratch) {
  using F = typename Simd<acc_t>::F;
  using I = typename Simd<acc_t>::I;
  constexpr int kLanes = Simd<acc_t>::kLanes;
  RegionTile<acc_t> tile(args, chunk, scratch);
  const int64_t regions = args.logits.classes;
  const acc_t* overall = static_cast<const acc_t*>(args.dice_overall) + tile.image * regions;
  const acc_t* hit = static_cast<const acc_t*>(args.dice_hit) + tile.image * regions;

  const bool wants_loss = args.partial || args.grad_risk.data;

  const auto gradient = [&](auto in, auto grads, int64_t n) {
    const acc_t factor = static_cast<acc_t>(args.factor[tile.image]);
    F ce_sum{};
    I bad_risk{};
    for (int64_t v = 0; v < n; v += kLanes) {
      const I y = tile.labels(v);
      const I valid = y >= 0;
      const I label_or_0 = y & valid;
      const I counted = tile.counted(v, y, valid, factor);
      const I used = args.class_sums ? valid : counted;
      F scale = F{} + factor;
      if (args.grad_map.data) scale *= load<F>(tile.grad + v);
      const F w = tile.risk_at(v);
      const F scaled_risk = math::select(counted, F(scale * w), F{});
      F ce{};
      for (int64_t r = 0; r < regions; ++r) {
        const F t = tile.inside(r, label_or_0);
        const F smooth_t = tile.smoothed(t);
        const math::RegionTerm<F> term = math::region_term(tile.logit(in, r, v), smooth_t);
        if (wants_loss) ce += term.loss * tile.weight_of[r];
        F g = math::region_cross_entropy_grad(term.pi, smooth_t, F(scaled_risk * tile.weight_of[r]));
        if (args.class_sums) g += math::region_dice_grad<kSquared>(term.pi, t, F(F{} + overall[r]), F(F{} + hit[r]));
        store_values(grads.base + r * grads.pitch + v, math::select(used, g, F{}));
      }
      if (args.grad_risk.data) store(tile.risk + v, math::select(counted, F(scale * ce), F{}));
      ce_sum += math::select(counted, F(w * ce), F{});
      bad_risk -= valid & tile.bad_risk(w);
    }
    tile.total.cross_entropy += horizontal_sum(ce_sum);
    tile.total.bad_risk += horizontal_count(bad_risk);
  };
  tile.for_tiles([&](int64_t begin, int64_t n) {
    if (args.grad_map.data) stage_map(args.grad_map, tile.image, begin, n, tile.grad);
    tile.template for_gradient_rows<sizeof(acc_t) == 4>(args, begin, n,
                                                        [&](auto in, auto grads, bool) { gradient(in, grads, n); });
    if (args.grad_risk.data) unstage_map(tile.risk, args.grad_risk, tile.image, begin, n);
  });
  if (args.streamed) end_of_streaming();
  if (args.partial) args.partial[chunk] = tile.total;
}

}  // namespace

namespace RISKMAP_CPU_CAPABILITY {

void region_loss_forward(const LossForwardArgs& args, int64_t chunk, void* scratch) {
  with_flag(args.squared, [&](auto squared) {
    if (args.logits.dtype == Dtype::kDouble) return forward_chunk<double, squared>(args, chunk, scratch);
    forward_chunk<float, squared>(args, chunk, scratch);
  });
}

void region_loss_backward(const LossBackwardArgs& args, int64_t chunk, void* scratch) {
  with_flag(args.squared, [&](auto squared) {
    if (args.logits.dtype == Dtype::kDouble) return backward_chunk<double, squared>(args, chunk, scratch);
    backward_chunk<float, squared>(args, chunk, scratch);
  });
}

}  // namespace RISKMAP_CPU_CAPABILITY
}  // namespace riskmap::cpu
