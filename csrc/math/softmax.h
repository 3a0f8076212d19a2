// Softmax over the classes of one voxel (or of one vector of voxels).
// Column: x.get(c) reads the logit of class c, x.set(c, v) overwrites it, x.each(f) calls f(c) for every class.
#pragma once

#include "math/elementary.h"

namespace riskmap::math {

template <class V, class Column>
RISKMAP_HD V max_logit(const Column& x) {
  V m = x.get(0);
  x.each([&](int c) RISKMAP_LAMBDA { m = maximum(x.get(c), m); });
  return m;
}

// Leaves exp(x_c - max) in x and returns their sum.
template <class V, class Column>
RISKMAP_HD V exp_in_place(Column& x, V max) {
  V sum{};
  x.each([&](int c) RISKMAP_LAMBDA {
    const V e = exp_of_negative(V(x.get(c) - max));
    x.set(c, e);
    sum += e;
  });
  return sum;
}

// sum_c exp(x_c - max), x untouched.
template <class V, class Column>
RISKMAP_HD V sum_exp(const Column& x, V max) {
  V sum{};
  x.each([&](int c) RISKMAP_LAMBDA { sum += exp_of_negative(V(x.get(c) - max)); });
  return sum;
}

}  // namespace riskmap::math
