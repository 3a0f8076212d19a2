// From sums over chunks to sums over images, and from these to scales, slopes and the loss.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/loss_inputs.h"

namespace riskmap::cpu {
namespace {

int64_t column_of(int64_t classes, int64_t which, int64_t c) { return math::kLossColumns + which * classes + c; }

int64_t classes_of(const LossSums& sums) { return (sums.columns - math::kLossColumns) / 3; }

}  // namespace

LossSums::LossSums(const std::vector<LossPartial>& partials, const std::vector<double>& class_partials,
                   const LossInputs& in, bool with_classes)
    : batch(in.args.logits.batch), columns(math::loss_columns(in.args.logits.classes, with_classes)) {
  values.resize(static_cast<size_t>(batch * columns));
  const int64_t of_classes = columns - math::kLossColumns;
  for (int64_t chunk = 0; chunk < in.chunks(); ++chunk) {
    double* sum = values.data() + chunk / in.args.chunking.chunks_per_image * columns;
    const LossPartial& part = partials[static_cast<size_t>(chunk)];
    sum[math::kCrossEntropy] += part.cross_entropy;
    sum[math::kValid] += static_cast<double>(part.valid);
    sum[math::kForegroundVoxels] += static_cast<double>(part.foreground);
    sum[math::kBadLabels] += static_cast<double>(part.bad_labels);
    sum[math::kBadRisk] += static_cast<double>(part.bad_risk);
    for (int64_t i = 0; i < of_classes; ++i)
      sum[math::kLossColumns + i] += class_partials[static_cast<size_t>(chunk * of_classes + i)];
  }
}

LossSums::LossSums(const Tensor& sums) : batch(sums.size(0)), columns(sums.size(1)), values(values_of(sums)) {}

double LossSums::total(int64_t column) const {
  double sum = 0;
  for (int64_t b = 0; b < batch; ++b) sum += at(b, column);
  return sum;
}

math::VoxelCounts LossSums::counts(int64_t image) const {
  return {static_cast<int64_t>(at(image, math::kValid)), static_cast<int64_t>(at(image, math::kForegroundVoxels)), 0};
}

std::vector<double> image_scales(const LossOptions& options, const LossSums& sums, const OptionalTensor& class_weight) {
  math::VoxelCounts whole{static_cast<int64_t>(sums.total(math::kValid)),
                          static_cast<int64_t>(sums.total(math::kForegroundVoxels)), sums.total(math::kValid)};
  if (options.normalization == Normalization::kWeighted && class_weight) {
    const int64_t classes = classes_of(sums);
    const std::vector<double> weights = class_weights("weighted_loss", "weight", class_weight, classes);
    whole.class_weight = 0;
    for (int64_t c = 0; c < classes; ++c)
      whole.class_weight += weights[static_cast<size_t>(c)] * sums.total(column_of(classes, 2, c));
  }
  std::vector<double> scales;
  for (int64_t b = 0; b < sums.batch; ++b) {
    const double n =
        math::normalizer(options.normalization, options.foreground_floor, sums.counts(b), whole, sums.batch);
    scales.push_back(math::image_scale(options.reduction, options.ce_weight, n, sums.batch));
  }
  return scales;
}

double cross_entropy_total(const LossSums& sums, const std::vector<double>& scales) {
  double total = 0;
  for (int64_t b = 0; b < sums.batch; ++b) {
    const double scale = scales[static_cast<size_t>(b)];
    if (scale != 0) total += scale * sums.at(b, math::kCrossEntropy);  // a weight of 0 switches the part off
  }
  return total;
}

double dice_total(const LossOptions& options, int64_t excluded_class, const LossSums& sums,
                  const OptionalTensor& dice_class_weight, std::vector<double>& slopes) {
  const int64_t classes = classes_of(sums);
  const std::vector<double> weights = class_weights("weighted_loss", "dice_class_weight", dice_class_weight, classes);
  const int64_t groups = options.batch_dice ? std::min<int64_t>(sums.batch, 1) : sums.batch;
  const double share =
      math::dice_share(options.reduction, options.dice_weight, classes - (excluded_class >= 0 ? 1 : 0), groups);
  slopes.assign(static_cast<size_t>(sums.batch * 2 * classes), 0.0);
  double loss = 0;
  for (int64_t c = 0; c < classes; ++c) {
    if (c == excluded_class) continue;
    const double own_share = share * weights[static_cast<size_t>(c)];
    math::DiceTerm term{};  // of the image, or of the batch
    for (int64_t b = 0; b < sums.batch; ++b) {
      const auto sum = [&](int64_t which) {
        const int64_t column = column_of(classes, which, c);
        return options.batch_dice ? sums.total(column) : sums.at(b, column);
      };
      if (b < groups) {
        term = math::dice_term(sum(0), sum(1), sum(2), options.dice_formula);
        loss += own_share * term.loss;
      }
      slopes[static_cast<size_t>(2 * b * classes + c)] = own_share * term.overall;
      slopes[static_cast<size_t>((2 * b + 1) * classes + c)] = own_share * term.hit;
    }
  }
  return loss;
}

void raise_bad_values(const LossTensors& tensors, const LossSums& sums, int64_t ignore_index) {
  if (const int64_t bad = static_cast<int64_t>(sums.total(math::kBadLabels)))
    raise_bad_labels(tensors.op(), tensors.target, bad, tensors.num_labels(), ignore_index);
  const int64_t bad = static_cast<int64_t>(sums.total(math::kBadRisk));
  check(bad == 0, tensors.op(), ": risk must be finite and at least 0, but ", bad,
        bad == 1 ? " valid voxel is not" : " valid voxels are not");
}

std::tuple<Tensor, Tensor, Tensor> weighted_loss_finish(Tensor sums, OptionalTensor class_weight,
                                                        OptionalTensor dice_class_weight,
                                                        std::optional<int64_t> excluded_class, double foreground_floor,
                                                        int64_t normalization, int64_t reduction, double ce_weight,
                                                        double dice_weight, double smooth_nr, double smooth_dr,
                                                        double alpha, double beta, bool batch_dice, bool as_double) {
  const LossOptions options = finish_options(foreground_floor, normalization, reduction, ce_weight, dice_weight,
                                             smooth_nr, smooth_dr, alpha, beta, batch_dice);
  const FinishTensors tensors{sums, class_weight, dice_class_weight};
  check_loss_finish(tensors);
  const int64_t batch = sums.size(0), classes = tensors.classes();
  const LossSums values(sums);
  const std::vector<double> scales = image_scales(options, values, class_weight);
  std::vector<double> slopes;
  const double loss = cross_entropy_total(values, scales) +
                      dice_total(options, excluded_class.value_or(-1), values, dice_class_weight, slopes);
  return {scalar_tensor(loss, as_double ? ScalarType::Double : ScalarType::Float), tensor_of(scales, {batch}),
          tensor_of(slopes, {batch, 2, classes})};
}

}  // namespace riskmap::cpu

STABLE_TORCH_LIBRARY_IMPL(riskmap_ext, CPU, m) {
  m.impl("_weighted_loss_finish", TORCH_BOX(&riskmap::cpu::weighted_loss_finish));
}
