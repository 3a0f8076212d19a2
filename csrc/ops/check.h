// Contract checks. What fails here is an error of the caller: std::invalid_argument arrives in Python as ValueError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "ops/dtypes.h"

namespace riskmap {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) fail(parts...);
}

std::string shape_of(const Tensor& tensor);
std::string dtype_of(const Tensor& tensor);
std::optional<Dtype> find_dtype(const Tensor& tensor);  // none: an op takes no such tensor
bool is_floating(const Tensor& tensor);

// logits [B, C, *S] with 1 to 3 spatial dimensions, floating, at least one class.
void check_logits(const char* op, const char* name, const Tensor& logits);
// [B, *S] beside logits, same device.
void check_voxel_map(const char* op, const char* name, const Tensor& map, const char* logits_name,
                     const Tensor& logits);
void check_labels(const char* op, const char* name, const Tensor& target, const char* logits_name,
                  const Tensor& logits);
// Table [R, L], bool, of the labels that make up each of R overlapping regions, on the device of `beside`.
void check_regions(const char* op, const Tensor& regions, int64_t channels, const Tensor& beside);
void check_range(const char* op, const char* name, double value, double low, double high);

// Message for labels that are neither a class nor ignore_index; the first one is looked up.
[[noreturn]] void fail_bad_labels(const char* op, const Tensor& target, int64_t count, int64_t classes,
                                  int64_t ignore_index, const std::string& first, int64_t position);

}  // namespace riskmap
