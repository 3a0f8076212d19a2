#include "cpu/tensors.h"

#include <algorithm>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/dtypes.h"

namespace riskmap::cpu {
namespace {

Dtype dtype_of_view(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Dtype::kDouble;
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Byte: return Dtype::kUInt8;
    case ScalarType::Char: return Dtype::kInt8;
    case ScalarType::Short: return Dtype::kInt16;
    case ScalarType::Int: return Dtype::kInt32;
    case ScalarType::Long: return Dtype::kInt64;
    case ScalarType::UInt16: return Dtype::kUInt16;
    case ScalarType::UInt32: return Dtype::kUInt32;
    case ScalarType::UInt64: return Dtype::kUInt64;
    case ScalarType::Bool: return Dtype::kBool;
    default: return Dtype::kFloat;
  }
}

// One stride for all dimensions from `first` on, or 0 where there is none.
int64_t flat_stride(const Tensor& tensor, int64_t first) {
  int64_t stride = 0, next = 0;
  for (int64_t d = tensor.dim() - 1; d >= first; --d) {
    const int64_t size = tensor.size(d);
    if (size == 1) continue;
    if (stride == 0) {
      stride = tensor.stride(d);
      if (stride == 0) return 0;
    } else if (tensor.stride(d) != next) {
      return 0;
    }
    next = tensor.stride(d) * size;
  }
  return stride == 0 ? 1 : stride;
}

int64_t count_from(const Tensor& tensor, int64_t first) {
  int64_t count = 1;
  for (int64_t d = first; d < tensor.dim(); ++d) count *= tensor.size(d);
  return count;
}

}  // namespace

bool is_viewable(const Tensor& logits) {
  if (logits.numel() == 0) return true;
  const int64_t voxel = flat_stride(logits, 2);
  return voxel == 1 || (voxel > 1 && (logits.stride(1) == 1 || logits.size(1) == 1));
}

Volume view_volume(const Tensor& tensor, Tensor& keep) {
  keep = is_viewable(tensor) ? tensor : torch::stable::contiguous(tensor);
  int64_t voxel = keep.numel() == 0 ? 1 : flat_stride(keep, 2);
  return {keep.data_ptr(),     dtype_of_view(keep), keep.size(0),   keep.size(1),
          count_from(keep, 2), keep.stride(0),      keep.stride(1), voxel};
}

VoxelMap view_map(const Tensor& tensor, Tensor& keep) {
  keep = tensor.numel() == 0 || flat_stride(tensor, 1) == 1 ? tensor : torch::stable::contiguous(tensor);
  return {keep.data_ptr(), dtype_of_view(keep), keep.stride(0)};
}

VoxelMap view_map(const OptionalTensor& tensor, Tensor& keep) {
  return tensor ? view_map(*tensor, keep) : VoxelMap{nullptr, Dtype::kFloat, 0};
}

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

std::vector<double> membership_of(const Tensor& regions, int64_t pitch) {
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

Tensor empty_map(const Tensor& logits, ScalarType dtype) {
  std::vector<int64_t> sizes{logits.size(0)};
  for (int64_t d = 2; d < logits.dim(); ++d) sizes.push_back(logits.size(d));
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

Chunking chunk_volume(const Volume& volume, size_t acc_size, int64_t elements) {
  const int64_t tile = tile_voxels(volume.classes, acc_size);
  const int64_t voxels = std::max<int64_t>(1, elements / volume.classes / tile) * tile;
  return {voxels, (volume.voxels + voxels - 1) / voxels};
}

}  // namespace riskmap::cpu
