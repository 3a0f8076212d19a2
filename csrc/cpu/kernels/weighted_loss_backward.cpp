// Gradient of the weighted loss over one chunk: one read of the logits, one write of their gradient. As a backward pass
// it makes the softmax again, so that the forward pass has nothing to keep; where the loss is wanted too (partial), it
// is forward and backward in one.
#include <type_traits>

#include "cpu/kernels/loss_tile.h"

namespace riskmap::cpu {
namespace {

template <class acc_t, class Column, LossKind kKind>
struct Backward : LossTile<acc_t> {
  using typename LossTile<acc_t>::F;
  using typename LossTile<acc_t>::I;
  using LossTile<acc_t>::args;
  static constexpr int kLanes = Simd<acc_t>::kLanes;
  static constexpr bool kAny = kKind == LossKind::kAny;

  const LossBackwardArgs& out;
  const acc_t* overall;
  const acc_t* hit;
  const bool class_sums, squared;
  LossPartial total{};

  Backward(const LossBackwardArgs& args_, int64_t chunk, void* scratch)
      : LossTile<acc_t>(args_, chunk, scratch),
        out(args_),
        overall(static_cast<const acc_t*>(args_.dice_overall) + this->image * args_.logits.classes),
        hit(static_cast<const acc_t*>(args_.dice_hit) + this->image * args_.logits.classes),
        class_sums(kAny ? args_.class_sums : kKind == LossKind::kDice),
        squared(kAny && args_.squared) {}

  void run() {
    for (int64_t begin = this->first; begin < this->last; begin += this->tile) {
      const int64_t n = begin + this->tile < this->last ? this->tile : this->last - begin;
      this->stage(begin, n, total);
      if (out.grad_map.data) stage_map(out.grad_map, this->image, begin, n, this->grad);
      this->template for_gradient_rows<Column::kInRegisters>(
          out, begin, n, [&](auto in, auto grads, bool streamed) { tile_gradient(in, grads, n, streamed); });
      if (out.grad_risk.data) unstage_map(this->risk, out.grad_risk, this->image, begin, n);
    }
  }

  template <class T>
  void tile_gradient(Rows<T> in, Rows<T> grads, int64_t n, bool streamed) {
    const acc_t factor = static_cast<acc_t>(out.factor[this->image]);
    const acc_t smooth_total = static_cast<acc_t>(args.smooth_total);
    const acc_t* smooth = kAny ? static_cast<const acc_t*>(args.smooth) : nullptr;
    F ce_sum{};
    for (int64_t v = 0; v < n; v += kLanes) {
      const I y = this->labels(v);
      const I valid = y >= 0;
      const I counted = kAny ? this->counted(v, y, valid, factor) : valid;
      const I used = class_sums ? valid : counted;  // elsewhere not even a NaN may reach the gradient
      Column x(in, v, args.logits.classes);
      const Terms<acc_t, Column, kKind> terms(args, x, y, valid);
      const F sum = math::exp_in_place(x, terms.max);
      const F inverse = math::inverse(sum);

      F scale = broadcast(factor);
      if (kAny && out.grad_map.data) scale *= load<F>(this->grad + v);
      const F w = this->risk_at(v);
      const F scaled_risk = math::select(counted, F(scale * w), F{});
      if (kKind != LossKind::kDice && (out.partial || (kAny && out.grad_risk.data))) {
        const F ce = terms.cross_entropy(args, sum);
        if (kAny && out.grad_risk.data) store(this->risk + v, math::select(counted, F(scale * ce), F{}));
        ce_sum += math::select(counted, F(w * ce), F{});
      }

      auto voxel =
          kAny ? math::cross_entropy_gradient(inverse, F(scaled_risk * terms.hot), F(scaled_risk * smooth_total))
               : math::cross_entropy_gradient(inverse, scaled_risk, F{});
      if (class_sums) {
        F slope_sum{}, hit_sum{};
        x.each([&](int c) RISKMAP_LAMBDA {
          const F e = x.get(c);
          slope_sum += e * slope_of(c, e);
          hit_sum = add_where(y == c, hit_sum, F(e * hit[c]));
        });
        math::add_dice_gradient(voxel, inverse, slope_sum, hit_sum, squared);
      }
      const F at_label = math::select(used, voxel.at_label, F{});
      x.each([&](int c) RISKMAP_LAMBDA {
        const F e = x.get(c);
        const F of_exp = class_sums ? F(voxel.of_exp + voxel.of_slope * slope_of(c, e)) : voxel.of_exp;
        F g = e * of_exp;
        if (smooth) g -= scaled_risk * smooth[c];
        g = add_where(y == c, F(math::select(used, g, F{})), at_label);
        store_gradient(grads.base + c * grads.pitch + v, g, streamed);
      });
    }
    total.cross_entropy += horizontal_sum(ce_sum);
  }

  // overall, times e where probabilities are squared.
  RISKMAP_MEMBER F slope_of(int c, F e) const { return squared ? F(e * overall[c]) : broadcast(overall[c]); }
};

}  // namespace

namespace RISKMAP_CPU_CAPABILITY {

void weighted_loss_backward(const LossBackwardArgs& args, int64_t chunk, void* scratch) {
  const double factor = args.factor[chunk / args.chunking.chunks_per_image];
  const bool usual = is_usual(args) && !args.grad_map.data && !args.grad_risk.data &&
                     (args.class_sums ? !args.partial : static_cast<float>(factor) != 0);
  with_loss_kind(args, usual, [&](auto acc, auto* column, auto kind) {
    Backward<decltype(acc), std::remove_pointer_t<decltype(column)>, kind> backward(args, chunk, scratch);
    backward.run();
    if (args.streamed) end_of_streaming();
    if (args.partial) args.partial[chunk] = backward.total;
  });
}

}  // namespace RISKMAP_CPU_CAPABILITY
}  // namespace riskmap::cpu
