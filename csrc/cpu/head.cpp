#include "cpu/head.h"

#include <algorithm>

#include "cpu/dtypes.h"

namespace riskmap::cpu {
namespace {

constexpr int64_t kFewestGroups = 16, kMostGroups = 128;  // enough to share among threads
constexpr int64_t kGroupBytes = 8 << 20;                  // of all groups, where that is more than the fewest

template <class Value>
Tensor filled(std::initializer_list<int64_t> shape, ScalarType dtype, const Value& value) {
  Tensor tensor = empty(shape, dtype);
  with_floating(dtype_of_view(tensor), [&](auto tag) {
    using T = decltype(tag);
    T* data = static_cast<T*>(tensor.data_ptr());
    for (int64_t i = 0; i < tensor.numel(); ++i) data[i] = from_acc<T>(value(i));
  });
  return tensor;
}

}  // namespace

ParameterSums::ParameterSums(const LossInputs& in)
    : double_(in.is_double()),
      classes_(in.args.logits.classes),
      channels_(in.args.head.features.classes),
      sums_(nullptr, &std::free) {
  const int64_t chunks = std::max<int64_t>(in.chunks(), 1);
  const int64_t bytes = parameter_sums(classes_, channels_) * static_cast<int64_t>(acc_size(in.args.logits.dtype));
  const int64_t most = std::min(std::max(kGroupBytes / bytes, kFewestGroups), kMostGroups);
  chunks_per_group_ = (chunks + most - 1) / most;
  groups_ = (chunks + chunks_per_group_ - 1) / chunks_per_group_;
  sums_.reset(std::calloc(static_cast<size_t>(groups_), static_cast<size_t>(bytes)));
  if (!sums_) throw std::bad_alloc();
}

double ParameterSums::total(int64_t index) const {
  const int64_t size = parameter_sums(classes_, channels_);
  double sum = 0;
  for (int64_t g = 0; g < groups_; ++g) {
    const int64_t at = g * size + index;
    sum += double_ ? static_cast<const double*>(sums_.get())[at] : static_cast<const float*>(sums_.get())[at];
  }
  return sum;
}

Tensor ParameterSums::weight(ScalarType dtype) const {
  return filled({classes_, channels_}, dtype,
                [&](int64_t i) { return total(i / channels_ * padded_channels(channels_) + i % channels_); });
}

Tensor ParameterSums::bias(ScalarType dtype) const {
  return filled({classes_}, dtype, [&](int64_t c) { return total(classes_ * padded_channels(channels_) + c); });
}

}  // namespace riskmap::cpu
