#include "cpu/loss_inputs.h"

#include <algorithm>

namespace riskmap::cpu {
namespace {

std::vector<double> scaled_class_weights(const LossTensors& tensors, double factor) {
  std::vector<double> values =
      class_weights(tensors.op(), tensors.class_weight_name(), tensors.class_weight, tensors.classes());
  for (double& each : values) each *= factor;
  return values;
}

// Each region's mean over regions is part of its weight: CE = mean over r of c[r] BCE_r.
double weight_factor(const LossTensors& tensors) {
  return tensors.regions ? 1.0 / static_cast<double>(tensors.classes()) : 1.0;
}

double smooth_factor(const LossTensors& tensors, double label_smoothing) {
  return label_smoothing / static_cast<double>(tensors.classes());
}

bool wants_double(const LossTensors& tensors) { return tensors.logits.scalar_type() == ScalarType::Double; }

}  // namespace

std::vector<double> class_weights(const char* op, const char* name, const OptionalTensor& weight, int64_t classes) {
  if (!weight) return std::vector<double>(static_cast<size_t>(classes), 1.0);
  const std::vector<double> values = values_of(*weight);
  for (size_t c = 0; c < values.size(); ++c)
    check(std::isfinite(values[c]) && values[c] >= 0, op, ": ", name, " must be finite and at least 0, got ", values[c],
          " for class ", c);
  return values;
}

size_t loss_scratch_bytes(const LossArgs& args) {
  const int64_t classes = args.logits.classes, tile = tile_voxels(classes, args.logits.dtype);
  const int64_t elements = head_scratch(args) + classes * tile_pitch(tile) + 3 * classes * kMinTile + 2 * tile;
  return static_cast<size_t>(elements) * acc_size(args.logits.dtype) + 2 * static_cast<size_t>(tile) * sizeof(int32_t);
}

Table::Table(const std::vector<double>& values, bool as_double) : double_(as_double) {
  const size_t padded = values.size() + kMinTile;
  if (double_) {
    wide_ = values;
    wide_.resize(padded);
  } else {
    narrow_.assign(values.begin(), values.end());
    narrow_.resize(padded);
  }
}

LossInputs::LossInputs(const LossTensors& tensors, const LossOptions& options, bool class_sums)
    : logits_(tensors.logits),
      target_(tensors.logits),
      risk_(tensors.logits),
      foreground_(tensors.logits),
      class_weight_(scaled_class_weights(tensors, weight_factor(tensors)), wants_double(tensors)),
      smooth_(scaled_class_weights(tensors, smooth_factor(tensors, options.label_smoothing)), wants_double(tensors)),
      regions_(
          tensors.regions ? region_rows(*tensors.regions, table_pitch(tensors.num_labels())) : std::vector<double>{},
          wants_double(tensors)),
      head_weight_(tensors.head ? values_of(tensors.head->weight) : std::vector<double>{}, wants_double(tensors)),
      head_bias_(tensors.head && tensors.head->bias
                     ? values_of(*tensors.head->bias)
                     : std::vector<double>(static_cast<size_t>(tensors.head ? tensors.classes() : 0)),
                 wants_double(tensors)),
      zeros_(std::vector<double>(static_cast<size_t>(tensors.head ? tensors.logits.size(1) : 0)),
             wants_double(tensors)) {
  args.logits = view_volume(tensors.logits, logits_);
  if (tensors.head) {
    args.head = {args.logits, head_weight_.data(), head_bias_.data(), zeros_.data()};
    args.logits = logits_of_head(args.logits, tensors.classes());
  }
  args.target = view_map(tensors.target, target_);
  args.risk = view_map(tensors.risk, risk_);
  args.foreground = view_map(tensors.foreground, foreground_);
  args.num_labels = tensors.num_labels();
  args.regions = tensors.regions ? regions_.data() : nullptr;
  args.class_weight = tensors.class_weight || tensors.regions ? class_weight_.data() : nullptr;
  args.label_smoothing = options.label_smoothing;
  if (options.label_smoothing > 0) {
    args.smooth = smooth_.data();
    for (double each : scaled_class_weights(tensors, smooth_factor(tensors, options.label_smoothing)))
      args.smooth_total += each;
  }
  args.ignore_index = options.ignore_index;
  args.background = options.background.value_or(-1);
  args.ce_in_foreground = options.ce_voxels == CeVoxels::kForeground;
  args.class_sums = class_sums;
  args.squared = options.squared_pred;
  args.chunking = chunk_volume(args.logits);
}

Tensor scalar_tensor(double value, ScalarType dtype) {
  Tensor tensor = empty({}, dtype);
  if (dtype == ScalarType::Double) {
    *static_cast<double*>(tensor.data_ptr()) = value;
  } else {
    *static_cast<float*>(tensor.data_ptr()) = static_cast<float>(value);
  }
  return tensor;
}

Tensor tensor_of(const std::vector<double>& values, std::initializer_list<int64_t> shape) {
  Tensor tensor = empty(shape, ScalarType::Double);
  std::copy(values.begin(), values.end(), static_cast<double*>(tensor.data_ptr()));
  return tensor;
}

}  // namespace riskmap::cpu
