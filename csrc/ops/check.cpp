#include "ops/check.h"

namespace riskmap {

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

std::string dtype_of(const Tensor& tensor) { return torch::headeronly::toString(tensor.scalar_type()); }

std::optional<Dtype> find_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
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
    default: return std::nullopt;
  }
}

bool is_floating(const Tensor& tensor) {
  const std::optional<Dtype> dtype = find_dtype(tensor);
  return dtype && is_floating(*dtype);
}

void check_logits(const char* op, const char* name, const Tensor& logits) {
  check(is_floating(logits), op, ": ", name, " must be float32, float64, float16 or bfloat16, got ", dtype_of(logits));
  check(logits.dim() >= 3 && logits.dim() <= 5, op, ": ", name,
        " must be [B, C, *S] with 1 to 3 spatial dimensions, got shape ", shape_of(logits));
  check(logits.size(1) >= 1, op, ": ", name, " must have at least one class, got shape ", shape_of(logits));
  check(logits.size(1) <= INT32_MAX, op, ": ", name, " has too many classes: shape ", shape_of(logits));
}

void check_voxel_map(const char* op, const char* name, const Tensor& map, const char* logits_name,
                     const Tensor& logits) {
  bool same = map.dim() == logits.dim() - 1 && map.size(0) == logits.size(0);
  for (int64_t d = 1; same && d < map.dim(); ++d) same = map.size(d) == logits.size(d + 1);
  check(same, op, ": ", name, " must be [B, *S] beside ", logits_name, " of shape ", shape_of(logits), ", got shape ",
        shape_of(map));
  check(map.device() == logits.device(), op, ": ", name, " must be on the same device as ", logits_name);
}

void check_labels(const char* op, const char* name, const Tensor& target, const char* logits_name,
                  const Tensor& logits) {
  check(find_dtype(target).has_value(), op, ": ", name, " must hold integers or integral floats, got ",
        dtype_of(target));
  check_voxel_map(op, name, target, logits_name, logits);
}

void check_regions(const char* op, const Tensor& regions, int64_t channels, const Tensor& beside) {
  check(regions.scalar_type() == ScalarType::Bool, op, ": regions must be bool, got ", dtype_of(regions));
  check(regions.dim() == 2 && regions.size(0) == channels && regions.size(1) >= 1, op,
        ": regions must be [R, L] with R = ", channels, " as there are channels, got shape ", shape_of(regions));
  check(regions.device() == beside.device(), op, ": regions must be on the same device as the other tensors");
}

void check_range(const char* op, const char* name, double value, double low, double high) {
  check(value >= low && value <= high && std::isfinite(value), op, ": ", name, " must be within [", low, ", ", high,
        "], got ", value);
}

void fail_bad_labels(const char* op, const Tensor& target, int64_t count, int64_t classes, int64_t ignore_index,
                     const std::string& first, int64_t position) {
  int64_t rest = position;
  std::string text;
  for (int64_t d = target.dim() - 1; d >= 0; --d) {
    text = std::to_string(rest % target.size(d)) + (text.empty() ? "" : ", ") + text;
    rest /= target.size(d);
  }
  fail(op, ": target must hold classes 0 to ", classes - 1, " or ignore_index ", ignore_index, ", but ", count,
       count == 1 ? " voxel does not; it is " : " voxels do not; the first is ", first, " at [", text, "]");
}

}  // namespace riskmap
