// Products of matrices that lie in the caches: tiles of voxels times the weights of a head.
#pragma once

#include <cstdint>

namespace riskmap::cpu {

// Element (i, k) is at data[i * row + k * step].
template <class acc_t>
struct Factor {
  const acc_t* data;
  int64_t row, step;
};

// out = start + a b, or out += a b, in rows x columns. Rows of b and out are read and written up to a whole vector.
template <class acc_t>
struct Product {
  Factor<acc_t> a;
  const acc_t* b;
  int64_t b_pitch;
  int64_t steps;       // columns of a, rows of b
  const acc_t* start;  // one number for each row of out; nullptr: out is added to
  acc_t* out;
  int64_t out_pitch;
  int64_t rows, columns;
};

namespace baseline {
void multiply(const Product<float>& product);
void multiply(const Product<double>& product);
}  // namespace baseline
namespace avx2 {
void multiply(const Product<float>& product);
void multiply(const Product<double>& product);
}  // namespace avx2
namespace avx512 {
void multiply(const Product<float>& product);
void multiply(const Product<double>& product);
}  // namespace avx512

}  // namespace riskmap::cpu
