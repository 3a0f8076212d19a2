#include "ops/risk_map.h"

#include <cmath>

#include "cuda/source_inputs.h"
#include "cuda/tensors.h"
#include "ops/transferability_map.h"

namespace riskmap::cuda {

Tensor risk_map(Tensor source, Tensor target, Tensor conditional, OptionalTensor regions, int64_t scheme, double base,
                double alpha, double scale, std::optional<double> low, std::optional<double> high,
                std::optional<int64_t> background, int64_t ignore_index) {
  const RiskMapOptions options{
      static_cast<math::Scheme>(scheme), base, alpha, scale, low, high, background, ignore_index};
  check_transferability_map("risk_map", source, target, conditional, regions);
  const DeviceGuard guard(source);
  const cudaStream_t stream = stream_of(source);
  const int64_t background_class = background.value_or(-1);
  if (options.one_pass()) {
    const math::RiskCurve curve = options.curve(low.value_or(0), high.value_or(0));
    return transfer_pass("risk_map", source, target, conditional, regions, ignore_index, background_class,
                         MapKind::kRisk, curve, stream)
        .map;
  }
  TransferPass pass = transfer_pass("risk_map", source, target, conditional, regions, ignore_index, background_class,
                                    MapKind::kMarked, {}, stream);
  const int64_t batch = source.size(0);
  if (pass.map.numel() == 0) return pass.map;
  launch_finish_risk_map({batch, pass.map.numel() / batch, pass.chunking.chunks_per_image,
                          static_cast<const double*>(pass.partial.data_ptr()), options.scheme, std::log(base), alpha,
                          scale, static_cast<float*>(pass.map.data_ptr())},
                         stream);
  return pass.map;
}

}  // namespace riskmap::cuda

STABLE_TORCH_LIBRARY_IMPL(RISKMAP_NAMESPACE, RISKMAP_CUDA_KEY, m) {
  m.impl("risk_map", TORCH_BOX(&riskmap::cuda::risk_map));
}
