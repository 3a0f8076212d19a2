#include "ops/weighted_loss.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/capability.h"
#include "cpu/loss_inputs.h"
#include "math/weighted_loss.h"

namespace riskmap::cpu {
namespace {

// The Dice part of the loss; fills slopes [B, 2, C].
double dice_loss(const LossOptions& options, const LossInputs& in, const std::vector<double>& partials,
                 std::vector<double>& slopes) {
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
  for (int64_t c = 0; c < classes; ++c) counted += options.in_dice(c, in.args.membership);
  const double share = math::dice_share(options.reduction, options.dice_weight, counted, groups);
  double loss = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const double* sum = sums.data() + (options.batch_dice ? 0 : b * row);
    for (int64_t c = 0; c < classes; ++c) {
      double* overall = slopes.data() + (2 * b) * classes + c;
      double* hit = slopes.data() + (2 * b + 1) * classes + c;
      *overall = *hit = 0;
      if (!options.in_dice(c, in.args.membership)) continue;
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
                                                 OptionalTensor weight, OptionalTensor foreground,
                                                 OptionalTensor regions, int64_t ignore_index,
                                                 std::optional<int64_t> background, double foreground_floor,
                                                 int64_t normalization, int64_t region, int64_t reduction,
                                                 double label_smoothing, double ce_weight, double dice_weight,
                                                 bool include_background, bool batch_dice) {
  const LossTensors tensors{logits, target, risk, weight, foreground, regions};
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
  check_weighted_loss(tensors, options);
  const LossInputs in(tensors, ignore_index, background, options.region, label_smoothing, options.dice());
  const bool as_map = options.reduction == Reduction::kNone;
  const int64_t batch = in.args.logits.batch, classes = in.args.logits.classes;

  std::vector<LossPartial> partials(static_cast<size_t>(in.chunks()));
  std::vector<double> dice_partials(options.dice() ? static_cast<size_t>(in.chunks() * 3 * classes) : 0);
  LossForwardArgs args{};
  static_cast<LossArgs&>(args) = in.args;
  Tensor map = as_map ? empty_map(logits, in.result_dtype()) : empty({0}, in.result_dtype()), keep_map = map;
  if (as_map) args.map = view_map(map, keep_map);
  args.map_factor = ce_weight;
  args.partial = partials.data();
  args.dice_partial = dice_partials.data();
  auto* kernel = regions ? RISKMAP_CPU_KERNEL(region_loss_forward) : RISKMAP_CPU_KERNEL(weighted_loss_forward);
  for_chunks(args.logits, args.chunking, in.scratch_bytes(),
             [&](int64_t chunk, void* scratch) { kernel(args, chunk, scratch); });

  const LossCounts counts = add_up(partials, in);
  raise_bad_values(tensors, counts.batch, ignore_index);
  const std::vector<double> scales = image_scales(options, counts);
  double total = 0;
  for (size_t b = 0; b < scales.size(); ++b) {
    if (scales[b] != 0) total += scales[b] * counts.images[b].cross_entropy;  // a weight of 0 switches the part off
  }
  Tensor dice_slopes = options.dice() ? empty({batch, 2, classes}, ScalarType::Double) : empty({0}, ScalarType::Double);
  if (options.dice()) {
    std::vector<double> slopes(static_cast<size_t>(batch * 2 * classes));
    total += dice_loss(options, in, dice_partials, slopes);
    std::copy(slopes.begin(), slopes.end(), static_cast<double*>(dice_slopes.data_ptr()));
  }
  return {as_map ? map : scalar_tensor(total, in.result_dtype()), vector_tensor(scales), dice_slopes};
}

}  // namespace riskmap::cpu

STABLE_TORCH_LIBRARY_IMPL(riskmap_ext, CPU, m) { m.impl("weighted_loss", TORCH_BOX(&riskmap::cpu::weighted_loss)); }
