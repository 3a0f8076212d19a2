#include "ops/weighted_loss.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/capability.h"
#include "cpu/kernels/weighted_loss.h"
#include "cpu/tensors.h"
#include "math/weighted_loss.h"

namespace riskmap::cpu {

size_t loss_scratch_bytes(int64_t classes, size_t acc_size) {
  const int64_t tile = tile_voxels(classes, acc_size);
  const int64_t elements = classes * tile_pitch(tile) + 3 * classes * kMinTile + 2 * tile;
  return static_cast<size_t>(elements) * acc_size + 2 * static_cast<size_t>(tile) * sizeof(int32_t);
}

namespace {

// A table in float or double, as the kernels sum; padded so that a whole vector can be read (see lookup).
class Table {
 public:
  Table(const std::vector<double>& values, bool as_double) : double_(as_double) {
    const size_t padded = values.size() + kMinTile;
    if (double_) {
      wide_ = values;
      wide_.resize(padded);
    } else {
      narrow_.assign(values.begin(), values.end());
      narrow_.resize(padded);
    }
  }
  const void* data() const { return double_ ? static_cast<const void*>(wide_.data()) : narrow_.data(); }

 private:
  bool double_;
  std::vector<float> narrow_;
  std::vector<double> wide_;
};

// Inputs as the kernels take them, with the tables and copies they point to.
struct LossInputs {
  LossArgs args{};
  Tensor logits, target, risk, foreground;
  Table class_weight, smooth;

  LossInputs(const Tensor& logits_, const Tensor& target_, const OptionalTensor& risk_, const OptionalTensor& weight,
             const OptionalTensor& foreground_, int64_t ignore_index, std::optional<int64_t> background, Region region,
             double label_smoothing, bool dice)
      : logits(logits_),
        target(target_),
        risk(logits_),
        foreground(logits_),
        class_weight(class_weights(logits_, weight, 1), logits_.scalar_type() == ScalarType::Double),
        smooth(class_weights(logits_, weight, label_smoothing / static_cast<double>(logits_.size(1))),
               logits_.scalar_type() == ScalarType::Double) {
    args.logits = view_volume(logits_, logits);
    args.target = view_map(target_, target);
    args.risk = view_map(risk_, risk);
    args.foreground = view_map(foreground_, foreground);
    args.class_weight = weight ? class_weight.data() : nullptr;
    args.smooth = label_smoothing > 0 ? smooth.data() : nullptr;
    if (label_smoothing > 0) {
      for (double each : class_weights(logits_, weight, label_smoothing / static_cast<double>(logits_.size(1))))
        args.smooth_total += each;
    }
    args.hot_factor = 1 - label_smoothing;
    args.ignore_index = ignore_index;
    args.background = background.value_or(-1);
    args.region_foreground = region == Region::kForeground;
    args.dice = dice;
    args.chunking = chunk_volume(args.logits, acc_size(args.logits));
  }
  LossInputs(const LossInputs&) = delete;

  static std::vector<double> class_weights(const Tensor& logits, const OptionalTensor& weight, double factor) {
    std::vector<double> values =
        weight ? values_of(*weight) : std::vector<double>(static_cast<size_t>(logits.size(1)), 1.0);
    for (size_t c = 0; c < values.size(); ++c) {
      check(std::isfinite(values[c]) && values[c] >= 0, "weighted_loss: weight must be finite and at least 0, got ",
            values[c], " for class ", c);
      values[c] *= factor;
    }
    return values;
  }

  int64_t chunks() const { return args.logits.batch * args.chunking.chunks_per_image; }
};

struct Counts {
  std::vector<LossPartial> images;
  LossPartial batch{};
};

Counts add_up(const std::vector<LossPartial>& partials, const LossInputs& in) {
  Counts counts{std::vector<LossPartial>(static_cast<size_t>(in.args.logits.batch)), {}};
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

// The Dice part of the loss; fills slopes [B, 2, C].
double dice_loss(const LossOptions& options, const LossInputs& in, const std::vector<double>& partials,
                 double* slopes) {
  const int64_t batch = in.args.logits.batch, classes = in.args.logits.classes;
  const int64_t row = 3 * classes;
  std::vector<double> sums(static_cast<size_t>(batch * row));
  for (int64_t chunk = 0; chunk < in.chunks(); ++chunk)
    for (int64_t i = 0; i < row; ++i)
      sums[static_cast<size_t>(chunk / in.args.chunking.chunks_per_image * row + i)] +=
          partials[static_cast<size_t>(chunk * row + i)];
  const int64_t groups = options.batch_dice ? std::min<int64_t>(batch, 1) : batch;
  if (options.batch_dice)
    for (int64_t b = 1; b < batch; ++b)
      for (int64_t i = 0; i < row; ++i) sums[static_cast<size_t>(i)] += sums[static_cast<size_t>(b * row + i)];

  int64_t counted = 0;
  for (int64_t c = 0; c < classes; ++c) counted += options.in_dice(c);
  const bool mean = options.reduction == Reduction::kMean;
  const double share = options.dice_weight / static_cast<double>(counted) / (mean ? static_cast<double>(groups) : 1.0);
  double loss = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const double* sum = sums.data() + (options.batch_dice ? 0 : b * row);
    for (int64_t c = 0; c < classes; ++c) {
      double* overall = slopes + (2 * b) * classes + c;
      double* hit = slopes + (2 * b + 1) * classes + c;
      *overall = *hit = 0;
      if (!options.in_dice(c)) continue;
      const math::DiceSlope slope = math::dice_slope(sum[c], sum[classes + c], sum[2 * classes + c]);
      *overall = share * slope.overall;
      *hit = share * slope.hit;
      if (b < groups) loss += share * (1 - math::dice_score(sum[c], sum[classes + c], sum[2 * classes + c]));
    }
  }
  return loss;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> weighted_loss(Tensor logits, Tensor target, OptionalTensor risk,
                                                 OptionalTensor weight, OptionalTensor foreground, int64_t ignore_index,
                                                 std::optional<int64_t> background, double foreground_floor,
                                                 int64_t normalization, int64_t region, int64_t reduction,
                                                 double label_smoothing, double ce_weight, double dice_weight,
                                                 bool include_background, bool batch_dice) {
  const LossOptions options{ignore_index,
                            background,
                            foreground_floor,
                            static_cast<Normalization>(normalization),
                            static_cast<Region>(region),
                            static_cast<Reduction>(reduction),
                            label_smoothing,
                            ce_weight,
                            dice_weight,
                            include_background,
                            batch_dice};
  check_weighted_loss(logits, target, risk, weight, foreground, options);
  const LossInputs in(logits, target, risk, weight, foreground, ignore_index, background, options.region,
                      label_smoothing, options.dice());
  const ScalarType result_dtype = in.args.logits.dtype == Dtype::kDouble ? ScalarType::Double : ScalarType::Float;
  const bool as_map = options.reduction == Reduction::kNone;
  const int64_t batch = in.args.logits.batch, classes = in.args.logits.classes;
  Tensor loss = as_map ? empty_map(logits, result_dtype) : empty({}, result_dtype);
  Tensor scale = empty({batch}, ScalarType::Double);
  Tensor dice_slopes = options.dice() ? empty({batch, 2, classes}, ScalarType::Double) : empty({0}, ScalarType::Double);

  std::vector<LossPartial> partials(static_cast<size_t>(in.chunks()));
  std::vector<double> dice_partials(options.dice() ? static_cast<size_t>(in.chunks() * 3 * classes) : 0);
  LossForwardArgs args{};
  static_cast<LossArgs&>(args) = in.args;
  Tensor keep_map = loss;
  if (as_map) args.map = view_map(loss, keep_map);
  args.map_factor = ce_weight;
  args.partial = partials.data();
  args.dice_partial = dice_partials.data();
  auto* kernel = RISKMAP_CPU_KERNEL(weighted_loss_forward);
  for_chunks(args.logits, args.chunking, loss_scratch_bytes(classes, acc_size(args.logits)),
             [&](int64_t chunk, void* scratch) { kernel(args, chunk, scratch); });

  const Counts counts = add_up(partials, in);
  if (counts.batch.bad_labels)
    raise_bad_labels("weighted_loss", target, counts.batch.bad_labels, classes, ignore_index);
  check(counts.batch.bad_risk == 0, "weighted_loss: risk must be finite and at least 0, but ", counts.batch.bad_risk,
        " valid voxels are not");

  double total = 0;
  double* scales = static_cast<double*>(scale.data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    const LossPartial& image = counts.images[static_cast<size_t>(b)];
    const double n =
        normalizer(options, image.valid, image.foreground, counts.batch.valid, counts.batch.foreground, batch);
    const double share = options.reduction == Reduction::kMean ? 1.0 / static_cast<double>(batch) : 1.0;
    scales[b] = as_map ? ce_weight : n > 0 ? ce_weight * share / n : 0;
    if (scales[b] != 0) total += scales[b] * image.cross_entropy;  // a weight of 0 switches the part off
  }
  if (options.dice()) total += dice_loss(options, in, dice_partials, static_cast<double*>(dice_slopes.data_ptr()));
  if (!as_map) {
    if (result_dtype == ScalarType::Double) {
      *static_cast<double*>(loss.data_ptr()) = total;
    } else {
      *static_cast<float*>(loss.data_ptr()) = static_cast<float>(total);
    }
  }
  return {loss, scale, dice_slopes};
}

std::tuple<Tensor, Tensor> weighted_loss_backward(Tensor grad_loss, Tensor logits, Tensor target, OptionalTensor risk,
                                                  OptionalTensor weight, OptionalTensor foreground, Tensor scale,
                                                  Tensor dice_slopes, int64_t ignore_index,
                                                  std::optional<int64_t> background, int64_t region,
                                                  double label_smoothing, bool grad_risk) {
  const char* op = "_weighted_loss_backward";
  check_logits(op, "logits", logits);
  check_labels(op, "target", target, "logits", logits);
  check(!grad_risk || risk.has_value(), op, ": grad_risk needs risk");
  const int64_t batch = logits.size(0), classes = logits.size(1);
  const bool as_map = grad_loss.dim() != 0;
  if (as_map) check_voxel_map(op, "grad_loss", grad_loss, "logits", logits);
  check(scale.numel() == batch, op, ": scale must be [B]");
  const bool dice = dice_slopes.numel() != 0;
  check(!dice || dice_slopes.numel() == batch * 2 * classes, op, ": dice_slopes must be [B, 2, C] or [0]");
  const LossInputs in(logits, target, risk, weight, foreground, ignore_index, background, static_cast<Region>(region),
                      label_smoothing, dice);

  const double grad = as_map ? 1.0 : values_of(grad_loss)[0];
  std::vector<double> factor = values_of(scale);
  for (double& each : factor) each *= grad;
  std::vector<double> overall, hit;
  if (dice) {
    const std::vector<double> slopes = values_of(dice_slopes);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t c = 0; c < classes; ++c) {
        overall.push_back(grad * slopes[static_cast<size_t>(2 * b * classes + c)]);
        hit.push_back(grad * slopes[static_cast<size_t>((2 * b + 1) * classes + c)]);
      }
  }
  const bool as_double = in.args.logits.dtype == Dtype::kDouble;
  const Table overall_table(overall, as_double), hit_table(hit, as_double);

  // The result is laid out as logits; where that is neither planar nor channels-last, the kernel writes a
  // contiguous tensor first.
  Tensor grad_logits = empty_gradient(logits);
  Tensor written = is_viewable(grad_logits) ? grad_logits : empty_gradient(in.logits);
  Tensor grad_risk_map = grad_risk ? empty_map(logits, risk->scalar_type()) : empty({0}, ScalarType::Float);
  Tensor keep_written = written, keep_grad = grad_loss, keep_grad_risk = grad_risk_map;

  LossBackwardArgs args{};
  static_cast<LossArgs&>(args) = in.args;
  args.factor = factor.data();
  if (as_map) args.grad_map = view_map(grad_loss, keep_grad);
  args.dice_overall = overall_table.data();
  args.dice_hit = hit_table.data();
  args.grad_logits = view_volume(written, keep_written);
  if (grad_risk) args.grad_risk = view_map(grad_risk_map, keep_grad_risk);
  auto* kernel = RISKMAP_CPU_KERNEL(weighted_loss_backward);
  for_chunks(args.logits, args.chunking, loss_scratch_bytes(classes, acc_size(args.logits)),
             [&](int64_t chunk, void* scratch) { kernel(args, chunk, scratch); });
  if (written.data_ptr() != grad_logits.data_ptr()) torch::stable::copy_(grad_logits, written);
  return {grad_logits, grad_risk_map};
}

}  // namespace riskmap::cpu

STABLE_TORCH_LIBRARY_IMPL(riskmap_ext, CPU, m) {
  m.impl("weighted_loss", TORCH_BOX(&riskmap::cpu::weighted_loss));
  m.impl("_weighted_loss_backward", TORCH_BOX(&riskmap::cpu::weighted_loss_backward));
}
