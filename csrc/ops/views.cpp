#include "ops/views.h"

#include <vector>

namespace riskmap {
namespace {

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

Dtype dtype_of_view(const Tensor& tensor) { return find_dtype(tensor).value(); }

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

Tensor empty_map(const Tensor& logits, ScalarType dtype) {
  std::vector<int64_t> sizes{logits.size(0)};
  for (int64_t d = 2; d < logits.dim(); ++d) sizes.push_back(logits.size(d));
  return torch::stable::new_empty(logits, sizes, dtype);
}

}  // namespace riskmap
