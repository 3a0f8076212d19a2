#include "cpu/kernels/product.h"

#include <utility>

#include "cpu/kernels/simd.h"

namespace riskmap::cpu {
namespace {

// Rows of a block of the result. With two vectors of each it stays in registers, and there are enough of them to hide
// how long a multiply-add takes.
#if defined(__AVX512F__)
constexpr int kBlockRows = 12;
#else
constexpr int kBlockRows = 6;
#endif

template <class acc_t, int kRows, int kVectors>
void multiply_block(const Product<acc_t>& p, int64_t row, int64_t column) {
  using F = typename Simd<acc_t>::F;
  constexpr int kLanes = Simd<acc_t>::kLanes;
  F sum[kRows][kVectors];
  acc_t* const out = p.out + row * p.out_pitch + column;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j)
      sum[i][j] = p.start ? broadcast(p.start[row + i]) : load<F>(out + i * p.out_pitch + j * kLanes);
  }
  const acc_t* left = p.a.data + row * p.a.row;
  const acc_t* right = p.b + column;
  for (int64_t k = 0; k < p.steps; ++k, left += p.a.step, right += p.b_pitch) {
    F other[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) other[j] = load<F>(right + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const F one = broadcast(left[i * p.a.row]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] += one * other[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) store(out + i * p.out_pitch + j * kLanes, sum[i][j]);
  }
}

// A block of as many rows as there are left, up to kBlockRows.
template <class acc_t, int kVectors, int... kFewer>
RISKMAP_HD void multiply_rows(const Product<acc_t>& p, int64_t row, int64_t column,
                              std::integer_sequence<int, kFewer...>) {
  const int64_t left = p.rows - row;
  if (left >= kBlockRows) return multiply_block<acc_t, kBlockRows, kVectors>(p, row, column);
  (void)((left == kFewer + 1 && (multiply_block<acc_t, kFewer + 1, kVectors>(p, row, column), true)) || ...);
}

template <class acc_t>
RISKMAP_HD void multiply_all(const Product<acc_t>& p) {
  constexpr int kLanes = Simd<acc_t>::kLanes;
  constexpr auto fewer = std::make_integer_sequence<int, kBlockRows - 1>{};
  for (int64_t row = 0; row < p.rows; row += kBlockRows)
    for (int64_t column = 0; column < p.columns; column += 2 * kLanes) {
      if (p.columns - column > kLanes) {
        multiply_rows<acc_t, 2>(p, row, column, fewer);
      } else {
        multiply_rows<acc_t, 1>(p, row, column, fewer);
      }
    }
}

}  // namespace

namespace RISKMAP_CPU_CAPABILITY {

void multiply(const Product<float>& product) { multiply_all(product); }
void multiply(const Product<double>& product) { multiply_all(product); }

}  // namespace RISKMAP_CPU_CAPABILITY
}  // namespace riskmap::cpu
