#include "ops/transferability_map.h"

#include "cuda/source_inputs.h"
#include "cuda/tensors.h"

namespace riskmap::cuda {

DeviceSourceInputs::DeviceSourceInputs(const char* op, const Tensor& source, const Tensor& target,
                                       const OptionalTensor& regions, int64_t num_classes, int64_t ignore_index,
                                       cudaStream_t stream)
    : source_(source), labels_(target, num_classes, ignore_index, stream), regions_(source) {
  args.source = view_volume(source, source_);
  check_voxels(op, args.source.voxels);
  args.target = labels_.map;
  args.label = labels_.code;
  args.classes = source.size(1);
  if (regions) {
    regions_ = torch::stable::contiguous(*regions);
    args.regions = static_cast<const uint8_t*>(regions_.data_ptr());
    args.classes = regions_.size(1);
  }
  args.num_classes = num_classes;
}

TransferPass transfer_pass(const char* op, const Tensor& source, const Tensor& target, const Tensor& conditional,
                           const OptionalTensor& regions, int64_t ignore_index, int64_t background, MapKind kind,
                           const math::RiskCurve& curve, cudaStream_t stream) {
  const DeviceSourceInputs in(op, source, target, regions, conditional.size(0), ignore_index, stream);
  const bool to_double = in.args.source.dtype == Dtype::kDouble;
  const Tensor values = torch::stable::contiguous(conditional);
  ConditionalTable table{values.data_ptr(), dtype_of_view(values), values.numel(), to_double, nullptr};
  Tensor converted = values;
  if (!has_small_table(in.args)) {
    converted = empty_on(source, {values.numel()}, to_double ? ScalarType::Double : ScalarType::Float);
    table.table = converted.data_ptr();
    make_conditional_table(table, stream);
  }
  const Chunking chunking = transfer_chunking(in.args);
  TransferPass pass{empty_map(source, ScalarType::Float), values, chunking};
  double* partial = nullptr;
  if (kind == MapKind::kMarked) {
    pass.partial = empty_on(source, {3 * chunking.chunks(source.size(0))}, ScalarType::Double);
    partial = static_cast<double*>(pass.partial.data_ptr());
  }
  launch_transfer(
      {in.args, table, background, chunking, kind, curve, static_cast<float*>(pass.map.data_ptr()), partial}, stream);
  return pass;
}

Tensor transferability_map(Tensor source, Tensor target, Tensor conditional, OptionalTensor regions,
                           int64_t ignore_index) {
  check_transferability_map("transferability_map", source, target, conditional, regions);
  const DeviceGuard guard(source);
  return transfer_pass("transferability_map", source, target, conditional, regions, ignore_index, -1,
                       MapKind::kTransferability, {}, stream_of(source))
      .map;
}

}  // namespace riskmap::cuda

STABLE_TORCH_LIBRARY_IMPL(RISKMAP_NAMESPACE, RISKMAP_CUDA_KEY, m) {
  m.impl("transferability_map", TORCH_BOX(&riskmap::cuda::transferability_map));
}
