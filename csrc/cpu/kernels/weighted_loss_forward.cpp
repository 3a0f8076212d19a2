// Forward pass of the weighted loss over one chunk: one read of the logits, nothing of their size written.
#include <type_traits>

#include "cpu/kernels/loss_tile.h"

namespace riskmap::cpu {
namespace {

template <class acc_t, class Column, bool kSquared>
struct Forward : LossTile<acc_t> {
  using typename LossTile<acc_t>::F;
  using typename LossTile<acc_t>::I;
  using LossTile<acc_t>::args;
  static constexpr int kLanes = Simd<acc_t>::kLanes;

  const LossForwardArgs& out;
  LossPartial total{};
  double* dice;

  Forward(const LossForwardArgs& args_, int64_t chunk, void* scratch)
      : LossTile<acc_t>(args_, chunk, scratch),
        out(args_),
        dice(args_.class_partial + chunk * 3 * args_.logits.classes) {
    if (args.class_sums)
      for (int64_t i = 0; i < 3 * args.logits.classes; ++i) dice[i] = 0;
  }

  void run() {
    for (int64_t begin = this->first; begin < this->last; begin += this->tile) {
      const int64_t n = begin + this->tile < this->last ? this->tile : this->last - begin;
      this->stage(begin, n, total);
      this->template for_rows<Column::kInRegisters>(begin, n, [&](auto in) { tile_sums(in, begin, n); });
      if (args.class_sums) flush_dice();
    }
  }

  template <class T>
  void tile_sums(Rows<T> in, int64_t begin, int64_t n) {
    const int64_t classes = args.logits.classes;
    if (args.class_sums) std::memset(this->sums, 0, sizeof(acc_t) * 3 * classes * kLanes);
    F ce_sum{};
    I valid_count{}, foreground_count{};
    for (int64_t v = 0; v < n; v += kLanes) {
      const I y = this->labels(v);
      const I valid = y >= 0;
      const I foreground = this->foreground(v, y, valid);
      const I counted = args.ce_in_foreground ? foreground : valid;
      valid_count -= valid;
      foreground_count -= foreground;

      Column x(in, v, classes);
      const I label_or_0 = y & valid;
      const Terms<acc_t, Column> terms(args, x, label_or_0);
      const F sum = args.class_sums ? math::exp_in_place(x, terms.max) : math::sum_exp(x, terms.max);
      const F ce = terms.cross_entropy(args, sum);
      const F w = this->risk_at(v);
      const F value = math::select(counted, F(w * ce), F{});
      ce_sum += value;
      if (out.map.data) store(this->grad + v, this->scaled(value, static_cast<acc_t>(out.map_factor)));
      if (args.class_sums) add_dice(x, sum, y, valid);
    }
    if (out.map.data) unstage_map(this->grad, out.map, this->image, begin, n);
    total.cross_entropy += horizontal_sum(ce_sum);
    total.valid += horizontal_count(valid_count);
    total.foreground += horizontal_count(foreground_count);
  }

  // x holds exp(logit - max) and sum their sum.
  RISKMAP_MEMBER void add_dice(const Column& x, F sum, I y, I valid) {
    const F inverse = math::inverse(sum);
    const int64_t row = args.logits.classes * kLanes;
    x.each([&](int c) RISKMAP_LAMBDA {
      acc_t* at = this->sums + c * kLanes;
      const F pi = math::select(valid, F(x.get(c) * inverse), F{});
      const I hit = y == c;
      store(at, F(load<F>(at) + math::select(hit, pi, F{})));
      store(at + row, F(load<F>(at + row) + (kSquared ? F(pi * pi) : pi)));
      store(at + 2 * row, F(load<F>(at + 2 * row) + math::select(hit, F{} + acc_t(1), F{})));
    });
  }

  void flush_dice() {
    for (int64_t i = 0; i < 3 * args.logits.classes; ++i) dice[i] += horizontal_sum(load<F>(this->sums + i * kLanes));
  }
};

}  // namespace

namespace RISKMAP_CPU_CAPABILITY {

void weighted_loss_forward(const LossForwardArgs& args, int64_t chunk, void* scratch) {
  const auto run = [&](auto acc) {
    using acc_t = decltype(acc);
    with_column<acc_t>(args.logits.classes, [&](auto* column) {
      with_flag(args.squared, [&](auto squared) {
        Forward<acc_t, std::remove_pointer_t<decltype(column)>, squared> forward(args, chunk, scratch);
        forward.run();
        args.partial[chunk] = forward.total;
      });
    });
  };
  if (args.logits.dtype == Dtype::kDouble) return run(double{});
  run(float{});
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
