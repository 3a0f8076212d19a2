#include "ops/risk_map.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/transfer.h"
#include "ops/transferability_map.h"

namespace riskmap::cpu {
namespace {

// The range of one image, from its chunks. Without foreground it is degenerate: the weight is 1.
math::RiskCurve curve_of_image(const RiskMapOptions& options, const TransferPass& pass, int64_t image) {
  int64_t foreground = 0;
  double low = 1e30, high = -1;
  const int64_t chunks = pass.chunking.chunks_per_image;
  for (int64_t chunk = image * chunks; chunk < (image + 1) * chunks; ++chunk) {
    const TransferPartial& partial = pass.partials[static_cast<size_t>(chunk)];
    foreground += partial.foreground;
    low = std::min(low, partial.low);
    high = std::max(high, partial.high);
  }
  return foreground ? options.curve(low, high) : options.curve(0, 0);
}

}  // namespace

Tensor risk_map(Tensor source, Tensor target, Tensor conditional, OptionalTensor regions, int64_t scheme, double base,
                double alpha, double scale, std::optional<double> low, std::optional<double> high,
                std::optional<int64_t> background, int64_t ignore_index) {
  const RiskMapOptions options{
      static_cast<math::Scheme>(scheme), base, alpha, scale, low, high, background, ignore_index};
  check_transferability_map("risk_map", source, target, conditional, regions);
  const int64_t background_class = background.value_or(-1);
  if (options.one_pass()) {
    const math::RiskCurve curve = options.curve(low.value_or(0), high.value_or(0));
    return transfer_pass("risk_map", source, target, conditional, regions, ignore_index, background_class, &curve,
                         false)
        .map;
  }
  TransferPass pass =
      transfer_pass("risk_map", source, target, conditional, regions, ignore_index, background_class, nullptr, true);
  const int64_t voxels = pass.map.numel() / std::max<int64_t>(1, source.size(0));
  for (int64_t image = 0; image < source.size(0); ++image) {
    const math::RiskCurve curve = curve_of_image(options, pass, image);
    weigh_map(pass.map, image * voxels, voxels, curve);
  }
  return pass.map;
}

}  // namespace riskmap::cpu

STABLE_TORCH_LIBRARY_IMPL(riskmap_ext, CPU, m) { m.impl("risk_map", TORCH_BOX(&riskmap::cpu::risk_map)); }
