// The logits of one vector of voxels: in registers for few classes, in scratch for many.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/kernels/stage.h"

namespace riskmap::cpu {
namespace {

constexpr int kMaxRegisterClasses = 8;

// The rows of a tile, one for each class: of the tensor where it is read in place, else of scratch.
template <class T>
struct Rows {
  T* base;
  int64_t pitch;
};

template <class acc_t, int kClasses>
struct RegisterColumn {
  static constexpr bool kInRegisters = true;
  static constexpr int kCount = kClasses;
  using F = typename Simd<acc_t>::F;
  using I = typename Simd<acc_t>::I;
  F x[kClasses];

  template <class T>
  RISKMAP_MEMBER RegisterColumn(Rows<T> rows, int64_t v, int64_t) {
    each([&](int c) RISKMAP_LAMBDA { x[c] = load_values(rows.base + c * rows.pitch + v); });
  }
  // Written out for every class: an index that is no constant would move x to memory.
  template <class Body, int... kEach>
  RISKMAP_MEMBER static void expand(const Body& body, std::integer_sequence<int, kEach...>) {
    (body(kEach), ...);
  }
  template <class Body>
  RISKMAP_MEMBER static void each(const Body& body) {
    expand(body, std::make_integer_sequence<int, kClasses>{});
  }
  RISKMAP_MEMBER F get(int c) const { return x[c]; }
  RISKMAP_MEMBER void set(int c, F v) { x[c] = v; }
  // The value of class `index`, lane by lane; that of class 0 where index is none.
  RISKMAP_MEMBER F pick(I index) const {
    F v = x[0];
    each([&](int c) RISKMAP_LAMBDA {
      if (c > 0) v = math::select(index == c, x[c], v);
    });
    return v;
  }
};

template <class acc_t>
struct ScratchColumn {
  static constexpr bool kInRegisters = false;
  static constexpr int kCount = 0;
  using F = typename Simd<acc_t>::F;
  using I = typename Simd<acc_t>::I;
  acc_t* base;
  int64_t pitch;
  int count;

  RISKMAP_MEMBER ScratchColumn(Rows<acc_t> rows, int64_t v, int64_t count_)
      : base(rows.base + v), pitch(rows.pitch), count(static_cast<int>(count_)) {}
  template <class Body>
  RISKMAP_MEMBER void each(const Body& body) const {
    for (int c = 0; c < count; ++c) body(c);
  }
  RISKMAP_MEMBER F get(int c) const { return load<F>(base + c * pitch); }
  RISKMAP_MEMBER void set(int c, F v) { store(base + c * pitch, v); }
  RISKMAP_MEMBER F pick(I index) const {
    F v{};
    for (int i = 0; i < Simd<acc_t>::kLanes; ++i) v[i] = base[index[i] * pitch + i];
    return v;
  }
};

// Calls f with the column type for this number of classes as a (null) tag.
template <class acc_t, class F>
static void with_column(int64_t classes, F&& f) {
  if constexpr (sizeof(acc_t) == 4) {
    switch (classes) {
      case 1: return f(static_cast<RegisterColumn<acc_t, 1>*>(nullptr));
      case 2: return f(static_cast<RegisterColumn<acc_t, 2>*>(nullptr));
      case 3: return f(static_cast<RegisterColumn<acc_t, 3>*>(nullptr));
      case 4: return f(static_cast<RegisterColumn<acc_t, 4>*>(nullptr));
      case 5: return f(static_cast<RegisterColumn<acc_t, 5>*>(nullptr));
      case 6: return f(static_cast<RegisterColumn<acc_t, 6>*>(nullptr));
      case 7: return f(static_cast<RegisterColumn<acc_t, 7>*>(nullptr));
      case 8: return f(static_cast<RegisterColumn<acc_t, 8>*>(nullptr));
    }
  }
  f(static_cast<ScratchColumn<acc_t>*>(nullptr));
}

// Calls f with the flag as a constant.
template <class F>
static void with_flag(bool flag, const F& f) {
  if (flag) return f(std::true_type{});
  f(std::false_type{});
}

template <class T>
static Rows<T> rows_in_place(const Volume& volume, int64_t image, int64_t begin) {
  return {static_cast<T*>(volume.data) + image * volume.stride_batch + begin, volume.stride_class};
}

// Calls body with the rows of a tile where they lie, if that is possible and pays; else returns false.
template <class Body>
static bool visit_in_place(const Volume& volume, int64_t image, int64_t begin, int64_t n, const Body& body) {
  if (volume.stride_voxel != 1 || volume.classes > kMaxRegisterClasses || n % kMinTile != 0) return false;
  const auto visit = [&](auto tag) {
    body(rows_in_place<decltype(tag)>(volume, image, begin));
    return true;
  };
  if (volume.dtype == Dtype::kFloat) return visit(float{});
  if (volume.dtype == Dtype::kBFloat16) return visit(BFloat16{});
  return false;
}

}  // namespace
}  // namespace riskmap::cpu
