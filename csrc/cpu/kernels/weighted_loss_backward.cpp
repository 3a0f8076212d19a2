// Gradient of the weighted loss over one chunk: one read of the logits, one write of their gradient. As a backward pass
// it makes the softmax again, so that the forward pass has nothing to keep; where the loss is wanted too (partial), it
// is forward and backward in one.
#include <type_traits>

#include "cpu/kernels/loss_tile.h"

namespace riskmap::cpu {
namespace {

template <class acc_t, class Column, bool kSquared>
struct Backward : LossTile<acc_t> {
  using typename LossTile<acc_t>::F;
  using typename LossTile<acc_t>::I;
  using LossTile<acc_t>::args;
  static constexpr int kLanes = Simd<acc_t>::kLanes;

  const LossBackwardArgs& out;
  const acc_t* overall;
  const acc_t* hit;
  LossPartial total{};

  Backward(const LossBackwardArgs& args_, int64_t chunk, void* scratch)
      : LossTile<acc_t>(args_, chunk, scratch),
        out(args_),
        overall(static_cast<const acc_t*>(args_.dice_overall) + this->image * args_.logits.classes),
        hit(static_cast<const acc_t*>(args_.dice_hit) + this->image * args_.logits.classes) {}

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
    const acc_t* smooth = static_cast<const acc_t*>(args.smooth);
    F ce_sum{};
    for (int64_t v = 0; v < n; v += kLanes) {
      const I y = this->labels(v);
      const I valid = y >= 0;
      const I counted = this->counted(v, y, valid, factor);
      const I used = args.class_sums ? valid : counted;  // elsewhere not even a NaN may reach the gradient
      Column x(in, v, args.logits.classes);
      const Terms<acc_t, Column> terms(args, x, I(y & valid));
      const F sum = math::exp_in_place(x, terms.max);
      const F inverse = math::inverse(sum);

      F scale = F{} + factor;
      if (out.grad_map.data) scale *= load<F>(this->grad + v);
      const F w = this->risk_at(v);
      const F scaled_risk = math::select(counted, F(scale * w), F{});
      if (out.grad_risk.data || out.partial) {
        const F ce = terms.cross_entropy(args, sum);
        if (out.grad_risk.data) store(this->risk + v, math::select(counted, F(scale * ce), F{}));
        ce_sum += math::select(counted, F(w * ce), F{});
      }

      const F hot = scaled_risk * terms.hot;
      const F hot_plus_total = hot + scaled_risk * smooth_total;
      F mean_slope{};
      if (args.class_sums) {
        x.each([&](int c) RISKMAP_LAMBDA { mean_slope += x.get(c) * dice_slope(c, y, F(x.get(c) * inverse)); });
        mean_slope *= inverse;
      }
      x.each([&](int c) RISKMAP_LAMBDA {
        const F pi = x.get(c) * inverse;
        const F smooth_c = smooth ? F(scaled_risk * smooth[c]) : F{};
        F g = math::cross_entropy_grad(pi, hot_plus_total, math::select(y == c, hot, F{}), smooth_c);
        if (args.class_sums) g += math::dice_grad(pi, dice_slope(c, y, pi), mean_slope);
        store_gradient(grads.base + c * grads.pitch + v, math::select(used, g, F{}), streamed);
      });
    }
    total.cross_entropy += horizontal_sum(ce_sum);
  }

  RISKMAP_MEMBER F dice_slope(int c, I y, F pi) const {
    if constexpr (!kSquared) return math::select(y == c, F{} + (overall[c] + hit[c]), F{} + overall[c]);
    const F slope = math::dice_overall<kSquared>(pi, F(F{} + overall[c]));
    return math::select(y == c, F(slope + hit[c]), slope);
  }
};

}  // namespace

namespace RISKMAP_CPU_CAPABILITY {

void weighted_loss_backward(const LossBackwardArgs& args, int64_t chunk, void* scratch) {
  const auto run = [&](auto acc) {
    using acc_t = decltype(acc);
    with_column<acc_t>(args.logits.classes, [&](auto* column) {
      with_flag(args.squared, [&](auto squared) {
        Backward<acc_t, std::remove_pointer_t<decltype(column)>, squared> backward(args, chunk, scratch);
        backward.run();
        if (args.streamed) end_of_streaming();
        if (args.partial) args.partial[chunk] = backward.total;
      });
    });
  };
  if (args.logits.dtype == Dtype::kDouble) return run(double{});
  run(float{});
}

}  // namespace RISKMAP_CPU_CAPABILITY
}  // namespace riskmap::cpu
