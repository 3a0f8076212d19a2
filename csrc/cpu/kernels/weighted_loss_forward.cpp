// Forward pass of the weighted loss over one chunk: one read of the logits, nothing of their size written.
#include <type_traits>

#include "cpu/kernels/class_sums.h"
#include "cpu/kernels/loss_tile.h"

namespace riskmap::cpu {
namespace {

template <class acc_t, class Column, LossKind kKind>
struct Forward : LossTile<acc_t> {
  using typename LossTile<acc_t>::F;
  using typename LossTile<acc_t>::I;
  using LossTile<acc_t>::args;
  using Sums = ClassSums<acc_t, Column::kCount>;
  static constexpr int kLanes = Simd<acc_t>::kLanes;

  const LossForwardArgs& out;
  const bool class_sums;
  LossPartial total{};
  double* dice;

  Forward(const LossForwardArgs& args_, int64_t chunk, void* scratch)
      : LossTile<acc_t>(args_, chunk, scratch),
        out(args_),
        class_sums(kKind == LossKind::kAny ? args_.class_sums : kKind == LossKind::kDice),
        dice(args_.class_partial + chunk * 3 * args_.logits.classes) {
    if (class_sums)
      for (int64_t i = 0; i < 3 * args.logits.classes; ++i) dice[i] = 0;
  }

  void run() {
    for (int64_t begin = this->first; begin < this->last; begin += this->tile) {
      const int64_t n = begin + this->tile < this->last ? this->tile : this->last - begin;
      this->stage(begin, n, total);
      this->template for_rows<Column::kInRegisters>(begin, n, [&](auto in) { tile_sums(in, begin, n); });
    }
  }

  template <class T>
  void tile_sums(Rows<T> in, int64_t begin, int64_t n) {
    constexpr bool kAny = kKind == LossKind::kAny;
    Sums of_tile(this->sums, class_sums ? args.logits.classes : 0);
    F ce_sum{};
    I valid_count{}, foreground_count{};
    for (int64_t v = 0; v < n; v += kLanes) {
      const I y = this->labels(v);
      const I valid = y >= 0;
      const I foreground = this->foreground(v, y, valid);
      valid_count = count_where(valid, valid_count);
      foreground_count = count_where(foreground, foreground_count);

      Column x(in, v, args.logits.classes);
      const Terms<acc_t, Column, kKind> terms(args, x, y, valid);
      const F sum = class_sums ? math::exp_in_place(x, terms.max) : math::sum_exp(x, terms.max);
      const F weighted = this->risk_at(v) * terms.cross_entropy(args, sum);
      const F value = math::select(kAny && args.ce_in_foreground ? foreground : valid, weighted, F{});
      ce_sum += value;
      if (kAny && out.map.data) store(this->grad + v, this->scaled(value, static_cast<acc_t>(out.map_factor)));
      if (class_sums) add_dice(of_tile, x, math::inverse(sum), y, valid);
    }
    if (kAny && out.map.data) unstage_map(this->grad, out.map, this->image, begin, n);
    total.cross_entropy += horizontal_sum(ce_sum);
    total.valid += horizontal_count(valid_count);
    total.foreground += horizontal_count(foreground_count);
    if (class_sums) of_tile.flush(dice);
  }

  // x holds exp(logit - max); inverse: 1 / their sum.
  RISKMAP_MEMBER void add_dice(Sums& of_tile, const Column& x, F inverse, I y, I valid) const {
    const auto of_all = [&](F pi) RISKMAP_LAMBDA { return kKind == LossKind::kAny && args.squared ? F(pi * pi) : pi; };
    if constexpr (Column::kInRegisters) {
      x.each([&](int c) RISKMAP_LAMBDA {
        const F pi = math::select(valid, F(x.get(c) * inverse), F{});
        of_tile.update(c, [&](F& inside, F& all, F& labelled) RISKMAP_LAMBDA {
          inside = add_where(y == c, inside, pi);
          all += of_all(pi);
          labelled = add_where(y == c, labelled, broadcast(acc_t(1)));
        });
      });
    } else {
      x.each([&](int c)
                 RISKMAP_LAMBDA { of_tile.add_to_all(c, of_all(math::select(valid, F(x.get(c) * inverse), F{}))); });
      of_tile.add_labelled(y, F(x.pick(I(y & valid)) * inverse));
    }
  }
};

}  // namespace

namespace RISKMAP_CPU_CAPABILITY {

void weighted_loss_forward(const LossForwardArgs& args, int64_t chunk, void* scratch) {
  with_loss_kind(args, is_usual(args) && !args.map.data, [&](auto acc, auto* column, auto kind) {
    Forward<decltype(acc), std::remove_pointer_t<decltype(column)>, kind> forward(args, chunk, scratch);
    forward.run();
    args.partial[chunk] = forward.total;
  });
}

void weighted_loss_count(const LossArgs& args, LossPartial* partial, int64_t chunk, void* scratch) {
  using I = Simd<float>::I;
  LossTile<float> tile(args, chunk, scratch);
  LossPartial total{};
  for (int64_t begin = tile.first; begin < tile.last; begin += tile.tile) {
    const int64_t n = begin + tile.tile < tile.last ? tile.tile : tile.last - begin;
    total.bad_labels += tile.stage_labels_only(begin, n);
    I valid_count{}, foreground_count{};
    for (int64_t v = 0; v < n; v += Simd<float>::kLanes) {
      const I y = tile.labels(v);
      const I valid = y >= 0;
      valid_count -= valid;
      foreground_count -= tile.foreground(v, y, valid);
    }
    total.valid += horizontal_count(valid_count);
    total.foreground += horizontal_count(foreground_count);
  }
  partial[chunk] = total;
}

}  // namespace RISKMAP_CPU_CAPABILITY
}  // namespace riskmap::cpu
