// The sums over voxels of every class, or region: of pi inside, of pi (or pi^2) everywhere, and of the voxels inside.
#pragma once

#include <cstring>

#include "cpu/kernels/column.h"

namespace riskmap::cpu {
namespace {

// Few classes: in registers.
template <class acc_t, int kClasses>
struct ClassSums {
  using F = typename Simd<acc_t>::F;
  F inside[kClasses]{}, all[kClasses]{}, labelled[kClasses]{};

  ClassSums(acc_t*, int64_t) {}
  // Calls change(inside, all, labelled) with references to the sums of class c.
  template <class Change>
  RISKMAP_MEMBER void update(int c, const Change& change) {
    change(inside[c], all[c], labelled[c]);
  }
  // Adds the sums to those of a chunk, [3, classes].
  void flush(double* into) const {
    RegisterColumn<acc_t, kClasses>::each([&](int c) RISKMAP_LAMBDA {
      into[c] += horizontal_sum(inside[c]);
      into[kClasses + c] += horizontal_sum(all[c]);
      into[2 * kClasses + c] += horizontal_sum(labelled[c]);
    });
  }
};

// As many as there are: in scratch, [3, classes] vectors.
template <class acc_t>
struct ClassSums<acc_t, 0> {
  using F = typename Simd<acc_t>::F;
  static constexpr int kLanes = Simd<acc_t>::kLanes;
  acc_t* sums;
  int64_t classes;

  ClassSums(acc_t* scratch, int64_t classes_) : sums(scratch), classes(classes_) {
    std::memset(sums, 0, sizeof(F) * 3 * static_cast<size_t>(classes));
  }
  template <class Change>
  RISKMAP_MEMBER void update(int c, const Change& change) {
    acc_t* at = sums + c * kLanes;
    const int64_t row = classes * kLanes;
    F inside = load<F>(at), all = load<F>(at + row), labelled = load<F>(at + 2 * row);
    change(inside, all, labelled);
    store(at, inside);
    store(at + row, all);
    store(at + 2 * row, labelled);
  }
  RISKMAP_MEMBER void add_to_all(int c, F value) {
    acc_t* at = sums + (classes + c) * kLanes;
    store(at, F(load<F>(at) + value));
  }
  // Of the class of every voxel alone: its pi, and that it is inside. A voxel has one class of many.
  RISKMAP_MEMBER void add_labelled(typename Simd<acc_t>::I label, F pi) {
    for (int i = 0; i < kLanes; ++i) {
      if (label[i] < 0) continue;
      acc_t* at = sums + label[i] * kLanes + i;
      at[0] += pi[i];
      at[2 * classes * kLanes] += 1;
    }
  }
  void flush(double* into) const {
    for (int64_t i = 0; i < 3 * classes; ++i) into[i] += horizontal_sum(load<F>(sums + i * kLanes));
  }
};

}  // namespace
}  // namespace riskmap::cpu
