// The part of a weighted-loss tile that forward and backward share.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/kernels/column.h"
#include "cpu/kernels/head.h"
#include "cpu/kernels/labels.h"
#include "cpu/kernels/weighted_loss.h"
#include "math/weighted_loss.h"

namespace riskmap::cpu {
namespace {

using math::LossKind;

template <class acc_t>
struct LossTile {
  using F = typename Simd<acc_t>::F;
  using I = typename Simd<acc_t>::I;

  const LossArgs& args;
  int64_t chunk, image, first, last;  // voxels of the chunk
  int64_t tile, pitch;
  HeadTile<acc_t> head;
  acc_t* rows;       // [C, pitch]
  acc_t* sums;       // [3, C] vectors
  acc_t* risk;       // [tile]
  acc_t* grad;       // [tile]
  int32_t* label;    // [tile], -1: ignored
  int32_t* in_mask;  // [tile]

  LossTile(const LossArgs& args_, int64_t chunk_, void* scratch)
      : args(args_),
        chunk(chunk_),
        image(chunk / args.chunking.chunks_per_image),
        first(chunk % args.chunking.chunks_per_image * args.chunking.voxels_per_chunk),
        last(first + args.chunking.voxels_per_chunk),
        tile(tile_voxels(args.logits.classes, args.logits.dtype)),
        pitch(tile_pitch(tile)),
        head(args, static_cast<acc_t*>(scratch)) {
    if (last > args.logits.voxels) last = args.logits.voxels;
    rows = static_cast<acc_t*>(scratch) + head_scratch(args);
    sums = rows + args.logits.classes * pitch;
    risk = sums + 3 * args.logits.classes * Simd<acc_t>::kLanes;
    grad = risk + tile;
    label = reinterpret_cast<int32_t*>(grad + tile);
    in_mask = label + tile;
  }

  // What is wrong with them is added to total.
  void stage(int64_t begin, int64_t n, LossPartial& total) {
    total.bad_labels += stage_labels_only(begin, n);
    if (!args.risk.data) return;
    stage_map(args.risk, image, begin, n, risk);
    total.bad_risk += bad_risks(n);
  }
  // Returns the number of bad labels.
  int64_t stage_labels_only(int64_t begin, int64_t n) {
    if (args.foreground.data) stage_mask(args.foreground, image, begin, n, in_mask);
    return stage_labels(args.target, image, begin, n, args.num_labels, args.ignore_index, label);
  }

  Rows<acc_t> staged_logits(int64_t begin, int64_t n) {
    if (args.head.weight) {
      head.make_logits(image, begin, n, rows);
    } else {
      stage_in(args.logits, image, begin, n, rows, pitch);
    }
    return {rows, pitch};
  }

  // Calls body with the logits of a tile.
  template <bool kInPlace, class Body>
  void for_rows(int64_t begin, int64_t n, const Body& body) {
    if constexpr (kInPlace) {
      if (visit_in_place(args.logits, image, begin, n, body)) return;
    }
    body(staged_logits(begin, n));
  }

  // Calls body with the logits of a tile, with where their gradient goes and whether past the caches.
  template <bool kInPlace, class Body>
  void for_gradient_rows(const LossBackwardArgs& out, int64_t begin, int64_t n, const Body& body) {
    if constexpr (kInPlace) {
      const bool done =
          out.grad_logits.stride_voxel == 1 && visit_in_place(args.logits, image, begin, n, [&](auto in) {
            const auto grads = rows_in_place<std::remove_pointer_t<decltype(in.base)>>(out.grad_logits, image, begin);
            body(in, grads, out.streamed && is_aligned(grads.base) && is_aligned(grads.base + grads.pitch));
          });
      if (done) return;
    }
    const Rows<acc_t> in = staged_logits(begin, n);
    body(in, in, false);
    if (args.head.weight) return head.add_gradients(out.grad_head, chunk, image, begin, n, rows);
    stage_out(rows, pitch, out.grad_logits, image, begin, n, out.streamed);
  }

  RISKMAP_MEMBER I labels(int64_t v) const { return load_labels<acc_t>(label + v); }

  // Lanes that are labelled or inside the mask; all lanes of y >= 0 where there is no background class.
  RISKMAP_MEMBER I foreground(int64_t v, I y, I valid) const {
    if (args.background < 0) return valid;
    using Bits = typename math::Traits<acc_t>::Bits;
    I inside = y != static_cast<Bits>(args.background);
    if (args.foreground.data) inside |= load_labels<acc_t>(in_mask + v) != 0;
    return valid & inside;
  }

  // Lanes whose cross-entropy counts in a gradient: a factor of 0 switches the part off.
  RISKMAP_MEMBER I counted(int64_t v, I y, I valid, acc_t factor) const {
    if (factor == 0) return I{};
    return args.ce_in_foreground ? foreground(v, y, valid) : valid;
  }

  // A factor of 0 switches the part off, infinite values included.
  RISKMAP_MEMBER static F scaled(F value, acc_t factor) { return factor == 0 ? F{} : F(value * factor); }

  // Voxels whose risk no caller may give: negative, NaN or infinite. Mostly there are none, and one sign bit tells.
  int64_t bad_risks(int64_t n) const {
    constexpr int kLanes = Simd<acc_t>::kLanes;
    using Bits = typename math::Traits<acc_t>::Bits;
    const I infinite = math::bit_cast<I>(F{} + acc_t(__builtin_inf()));
    const I magnitude = I{} + std::numeric_limits<Bits>::max();
    I odd{};
    for (int64_t v = 0; v < n; v += kLanes) {
      const I bits = load<I>(risk + v);
      odd |= bits | (infinite - 1 - (bits & magnitude));
    }
    if (!any_negative(odd)) return 0;
    I bad{};
    for (int64_t v = 0; v < n; v += kLanes) {
      const F w = load<F>(risk + v);
      bad = count_where(I((labels(v) >= 0) & ~((w >= acc_t(0)) & (w - w == acc_t(0)))), bad);
    }
    return horizontal_count(bad);
  }

  RISKMAP_MEMBER F risk_at(int64_t v) const { return args.risk.data ? load<F>(risk + v) : F{} + acc_t(1); }
};

template <class T, class F>
RISKMAP_HD void store_gradient(T* p, F g, bool streamed) {
  if constexpr (__is_same(T, float)) {
    if (streamed) return stream(p, g);
  }
  store_values(p, g);
}

// Cross-entropy terms of one vector of voxels, with logits relative to the voxel's largest: a large common offset
// costs no digits.
template <class acc_t, class Column, LossKind kKind>
struct Terms {
  using F = typename Simd<acc_t>::F;
  using I = typename Simd<acc_t>::I;
  F max, x_target, hot, smooth_dot;

  RISKMAP_MEMBER Terms(const LossArgs& args, const Column& x, I label, I valid)
      : max(math::max_logit<F>(x)),
        x_target(x.pick(Column::kInRegisters ? label : I(label & valid)) - max),
        hot(broadcast(acc_t(1))),
        smooth_dot() {
    if (kKind != LossKind::kAny) return;
    hot *= static_cast<acc_t>(1 - args.label_smoothing);
    if (args.class_weight) {
      hot *= lookup(static_cast<const acc_t*>(args.class_weight), args.logits.classes, I(label & valid));
    }
    if (args.smooth) {
      const acc_t* smooth = static_cast<const acc_t*>(args.smooth);
      x.each([&](int c) RISKMAP_LAMBDA { smooth_dot += (x.get(c) - max) * smooth[c]; });
    }
  }

  // sum: sum_c exp(x_c - max).
  RISKMAP_MEMBER F cross_entropy(const LossArgs& args, F sum) const {
    if (kKind != LossKind::kAny) return math::log(sum) - x_target;
    return math::cross_entropy(math::log(sum), x_target, hot, broadcast(static_cast<acc_t>(args.smooth_total)),
                               smooth_dot);
  }
};

// Whether a call is one of the usual ones, as far as forward and backward share it.
[[maybe_unused]] static bool is_usual(const LossArgs& args) {
  return !args.class_weight && !args.smooth && !args.ce_in_foreground && !(args.class_sums && args.squared);
}

// Calls body(acc_t{}, column, kind) with what a kernel is compiled for; column: a null pointer.
template <class Body>
static void with_loss_kind(const LossArgs& args, bool usual, const Body& body) {
  using Any = std::integral_constant<LossKind, LossKind::kAny>;
  if (args.logits.dtype == Dtype::kDouble) return body(double{}, static_cast<ScratchColumn<double>*>(nullptr), Any{});
  with_column<float>(args.logits.classes, [&](auto* column) {
    if (!usual) return body(float{}, column, Any{});
    if (args.class_sums) return body(float{}, column, std::integral_constant<LossKind, LossKind::kDice>{});
    body(float{}, column, std::integral_constant<LossKind, LossKind::kCrossEntropy>{});
  });
}

}  // namespace
}  // namespace riskmap::cpu
