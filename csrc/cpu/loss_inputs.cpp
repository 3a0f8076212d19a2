#include "cpu/loss_inputs.h"

#include <algorithm>

namespace riskmap::cpu {
namespace {

std::vector<double> class_weights(const LossTensors& tensors, double factor) {
  const size_t classes = static_cast<size_t>(tensors.logits.size(1));
  std::vector<double> values = tensors.weight ? values_of(*tensors.weight) : std::vector<double>(classes, 1.0);
  for (size_t c = 0; c < classes; ++c) {
    check(std::isfinite(values[c]) && values[c] >= 0, "weighted_loss: weight must be finite and at least 0, got ",
          values[c], " for class ", c);
    values[c] *= factor;
  }
  return values;
}

// Each region's mean over regions is part of its weight: CE = mean over r of c[r] BCE_r.
double weight_factor(const LossTensors& tensors) {
  return tensors.regions ? 1.0 / static_cast<double>(tensors.logits.size(1)) : 1.0;
}

double smooth_factor(const LossTensors& tensors, double label_smoothing) {
  return label_smoothing / static_cast<double>(tensors.logits.size(1));
}

bool wants_double(const LossTensors& tensors) { return tensors.logits.scalar_type() == ScalarType::Double; }

}  // namespace

size_t loss_scratch_bytes(int64_t classes, Dtype dtype) {
  const int64_t tile = tile_voxels(classes, dtype);
  const int64_t elements = classes * tile_pitch(tile) + 3 * classes * kMinTile + 2 * tile;
  return static_cast<size_t>(elements) * acc_size(dtype) + 2 * static_cast<size_t>(tile) * sizeof(int32_t);
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

LossInputs::LossInputs(const LossTensors& tensors, int64_t ignore_index, std::optional<int64_t> background,
                       Region region, double label_smoothing, bool dice)
    : logits_(tensors.logits),
      target_(tensors.logits),
      risk_(tensors.logits),
      foreground_(tensors.logits),
      class_weight_(class_weights(tensors, weight_factor(tensors)), wants_double(tensors)),
      smooth_(class_weights(tensors, smooth_factor(tensors, label_smoothing)), wants_double(tensors)),
      membership_(
          tensors.regions ? membership_of(*tensors.regions, table_pitch(tensors.num_labels())) : std::vector<double>{},
          wants_double(tensors)) {
  args.logits = view_volume(tensors.logits, logits_);
  args.target = view_map(tensors.target, target_);
  args.risk = view_map(tensors.risk, risk_);
  args.foreground = view_map(tensors.foreground, foreground_);
  args.num_labels = tensors.num_labels();
  args.membership = tensors.regions ? membership_.data() : nullptr;
  args.class_weight = tensors.weight || tensors.regions ? class_weight_.data() : nullptr;
  args.label_smoothing = label_smoothing;
  if (label_smoothing > 0) {
    args.smooth = smooth_.data();
    for (double each : class_weights(tensors, smooth_factor(tensors, label_smoothing))) args.smooth_total += each;
  }
  args.ignore_index = ignore_index;
  args.background = background.value_or(-1);
  args.region_foreground = region == Region::kForeground;
  args.dice = dice;
  args.chunking = chunk_volume(args.logits);
}

LossCounts add_up(const std::vector<LossPartial>& partials, const LossInputs& in) {
  LossCounts counts{std::vector<LossPartial>(static_cast<size_t>(in.args.logits.batch)), {}};
  const auto add = [](LossPartial& sum, const LossPartial& part) {
    sum.cross_entropy += part.cross_entropy;
    sum.valid += part.valid;
    sum.foreground += part.foreground;
    sum.bad_labels += part.bad_labels;
    sum.bad_risk += part.bad_risk;
  };
  for (size_t chunk = 0; chunk < partials.size(); ++chunk) {
    add(counts.images[chunk / static_cast<size_t>(in.args.chunking.chunks_per_image)], partials[chunk]);
  }
  for (const LossPartial& image : counts.images) add(counts.batch, image);
  return counts;
}

std::vector<double> image_scales(const LossOptions& options, const LossCounts& counts) {
  const int64_t batch = static_cast<int64_t>(counts.images.size());
  const math::VoxelCounts whole{counts.batch.valid, counts.batch.foreground};
  std::vector<double> scales;
  for (const LossPartial& image : counts.images) {
    const double n = math::normalizer(options.normalization, options.foreground_floor, {image.valid, image.foreground},
                                      whole, batch);
    scales.push_back(math::image_scale(options.reduction, options.ce_weight, n, batch));
  }
  return scales;
}

void raise_bad_values(const LossTensors& tensors, const LossPartial& batch, int64_t ignore_index) {
  if (batch.bad_labels)
    raise_bad_labels("weighted_loss", tensors.target, batch.bad_labels, tensors.num_labels(), ignore_index);
  check(batch.bad_risk == 0, "weighted_loss: risk must be finite and at least 0, but ", batch.bad_risk,
        batch.bad_risk == 1 ? " valid voxel is not" : " valid voxels are not");
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

Tensor vector_tensor(const std::vector<double>& values) {
  Tensor tensor = empty({static_cast<int64_t>(values.size())}, ScalarType::Double);
  std::copy(values.begin(), values.end(), static_cast<double*>(tensor.data_ptr()));
  return tensor;
}

}  // namespace riskmap::cpu
