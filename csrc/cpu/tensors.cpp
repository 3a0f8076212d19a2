#include "cpu/tensors.h"

#include <algorithm>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/dtypes.h"

namespace riskmap::cpu {
std::vector<double> values_of(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  std::vector<double> values(static_cast<size_t>(dense.numel()));
  with_floating(dtype_of_view(dense), [&](auto tag) {
    using T = decltype(tag);
    const T* data = static_cast<const T*>(dense.data_ptr());
    for (size_t i = 0; i < values.size(); ++i) values[i] = to_acc<double>(data[i]);
  });
  return values;
}

std::vector<double> region_rows(const Tensor& regions, int64_t pitch) {
  const Tensor dense = torch::stable::contiguous(regions);
  const bool* inside = static_cast<const bool*>(dense.data_ptr());
  const int64_t labels = dense.size(1);
  std::vector<double> table(static_cast<size_t>(dense.size(0) * pitch));
  for (int64_t r = 0; r < dense.size(0); ++r)
    for (int64_t l = 0; l < labels; ++l) table[static_cast<size_t>(r * pitch + l)] = inside[r * labels + l] ? 1 : 0;
  return table;
}

Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::empty(sizes, dtype);
}

Tensor empty_gradient(const Tensor& logits) {
  Tensor grad = torch::stable::empty_like(logits);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(grad.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(grad.numel()) * grad.element_size();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = end / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return grad;
}

void raise_bad_labels(const char* op, const Tensor& target, int64_t count, int64_t classes, int64_t ignore_index) {
  const Tensor dense = torch::stable::contiguous(target);
  int64_t position = 0;
  std::ostringstream first;
  with_any(dtype_of_view(dense), [&](auto tag) {
    using T = decltype(tag);
    const T* data = static_cast<const T*>(dense.data_ptr());
    const int64_t bad = ignore_index == INT64_MIN ? INT64_MIN + 1 : INT64_MIN;
    for (; position < dense.numel(); ++position) {
      const int64_t y = label_value(data[position], bad);
      if (y != ignore_index && (y < 0 || y >= classes)) {
        if (y != bad) {
          first << y;
        } else {
          first << to_acc<double>(data[position]);  // no integer, or beyond int64
        }
        return;
      }
    }
  });
  fail_bad_labels(op, dense, count, classes, ignore_index, first.str(), position);
}

Chunking chunk_volume(const Volume& volume, int64_t elements) {
  const int64_t tile = tile_voxels(volume.classes, volume.dtype);
  const int64_t voxels = std::max<int64_t>(1, elements / volume.classes / tile) * tile;
  return {voxels, (volume.voxels + voxels - 1) / voxels};
}

}  // namespace riskmap::cpu
