#include "ops/leep_statistics.h"

#include "cuda/source_inputs.h"
#include "cuda/tensors.h"

namespace riskmap::cuda {

Tensor leep_statistics(Tensor source, Tensor target, OptionalTensor regions, int64_t num_classes,
                       int64_t ignore_index) {
  check_leep_statistics(source, target, regions, num_classes);
  const DeviceGuard guard(source);
  const DeviceSourceInputs in(source, target, regions, num_classes, ignore_index);
  Statistics args{in.args, plan_statistics(in.args), nullptr, nullptr, nullptr};
  const Tensor partial = empty_on(source, {num_classes * in.args.classes * args.plan.tables}, ScalarType::Double);
  const Tensor bad_labels = empty_on(source, {args.plan.chunking.chunks(source.size(0))}, ScalarType::Int);
  Tensor joint = empty_on(source, {num_classes, in.args.classes}, ScalarType::Double);
  args.partial = static_cast<double*>(partial.data_ptr());
  args.bad_labels = static_cast<int32_t*>(bad_labels.data_ptr());
  args.joint = static_cast<double*>(joint.data_ptr());
  launch_statistics(args, stream_of(source));
  return joint;
}

}  // namespace riskmap::cuda

STABLE_TORCH_LIBRARY_IMPL(RISKMAP_NAMESPACE, RISKMAP_CUDA_KEY, m) {
  m.impl("leep_statistics", TORCH_BOX(&riskmap::cuda::leep_statistics));
}
