#include "ops/transferability_map.h"

#include "cuda/source_inputs.h"
#include "cuda/tensors.h"

namespace riskmap::cuda {

DeviceSourceInputs::DeviceSourceInputs(const Tensor& source, const Tensor& target, const OptionalTensor& regions,
                                       int64_t num_classes, int64_t ignore_index)
    : source_(source), target_(target), regions_(source) {
  args.source = view_volume(source, source_);
  args.target = view_map(target, target_);
  args.classes = source.size(1);
  if (regions) {
    regions_ = torch::stable::contiguous(*regions);
    args.regions = static_cast<const uint8_t*>(regions_.data_ptr());
    args.classes = regions_.size(1);
  }
  args.num_classes = num_classes;
  args.label = label_code(args.target.dtype, num_classes, ignore_index);
}

TransferPass transfer_pass(const Tensor& source, const Tensor& target, const Tensor& conditional,
                           const OptionalTensor& regions, int64_t ignore_index, int64_t background, MapKind kind,
                           const math::RiskCurve& curve, cudaStream_t stream) {
  const DeviceSourceInputs in(source, target, regions, conditional.size(0), ignore_index);
  const bool to_double = in.args.source.dtype == Dtype::kDouble;
  const Tensor values = torch::stable::contiguous(conditional);
  const Tensor table = empty_on(source, {values.numel()}, to_double ? ScalarType::Double : ScalarType::Float);
  make_conditional_table({values.data_ptr(), dtype_of_view(values), values.numel(), to_double, table.data_ptr()},
                         stream);

  const Chunking chunking = transfer_chunking(in.args);
  const int64_t partials = kind == MapKind::kMarked ? 3 * chunking.chunks(source.size(0)) : 0;
  TransferPass pass{empty_map(source, ScalarType::Float), empty_on(source, {partials}, ScalarType::Double), chunking};
  launch_transfer({in.args, table.data_ptr(), background, chunking, kind, curve,
                   static_cast<float*>(pass.map.data_ptr()), static_cast<double*>(pass.partial.data_ptr())},
                  stream);
  return pass;
}

Tensor transferability_map(Tensor source, Tensor target, Tensor conditional, OptionalTensor regions,
                           int64_t ignore_index) {
  check_transferability_map("transferability_map", source, target, conditional, regions);
  const DeviceGuard guard(source);
  return transfer_pass(source, target, conditional, regions, ignore_index, -1, MapKind::kTransferability, {},
                       stream_of(source))
      .map;
}

}  // namespace riskmap::cuda

STABLE_TORCH_LIBRARY_IMPL(RISKMAP_NAMESPACE, RISKMAP_CUDA_KEY, m) {
  m.impl("transferability_map", TORCH_BOX(&riskmap::cuda::transferability_map));
}
