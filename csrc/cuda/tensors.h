// New tensors beside those that an op was given, and labels as the kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cuda/device.h"
#include "cuda/labels.h"
#include "ops/check.h"
#include "ops/views.h"

namespace riskmap::cuda {

// Uninitialised, on the device of `like`.
inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::new_empty(like, sizes, dtype);
}

// All scratch memory of a call in one tensor. It may be given up once the kernels are launched: torch's allocator hands
// it out again on the same stream only.
class Workspace {
 public:
  // To be called for every part, before allocate().
  template <class T>
  void reserve(T** part, int64_t count) {
    parts_.push_back({reinterpret_cast<void**>(part), bytes_});
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
  }
  void allocate(const Tensor& like) {
    memory_ = empty_on(like, {bytes_}, ScalarType::Byte);
    for (const auto& [part, at] : parts_) *part = static_cast<char*>(memory_.data_ptr()) + at;
  }

 private:
  std::vector<std::pair<void**, int64_t>> parts_;
  int64_t bytes_ = 0;
  Tensor memory_;
};

// Keeps the copy that `map` points to, where it took one.
struct Labels {
  Tensor keep;
  VoxelMap map;
  LabelCode code;

  Labels(const Tensor& target, int64_t num_labels, int64_t ignore_index, cudaStream_t stream)
      : keep(target), map(view_map(target, keep)), code(label_code(map.dtype, num_labels, ignore_index)) {
    if (!is_floating(target)) return;
    const int64_t batch = target.size(0), voxels = batch == 0 ? 0 : target.numel() / batch;
    const Tensor floats = keep;
    keep = empty_on(target, {batch, voxels}, ScalarType::Int);
    convert_labels({map, batch, voxels, num_labels, ignore_index, static_cast<int32_t*>(keep.data_ptr())}, stream);
    map = {keep.data_ptr(), Dtype::kInt32, voxels};
    code = label_code(Dtype::kInt32, num_labels, kConvertedIgnore);
  }
};

// The kernels count the voxels of an image in 32 bits.
inline void check_voxels(const char* op, int64_t voxels) {
  check(voxels < int64_t(1) << 31, op, ": an image may have at most 2^31 - 1 voxels on CUDA, got ", voxels);
}

}  // namespace riskmap::cuda
