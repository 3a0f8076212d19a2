#include "ops/leep_statistics.h"

#include "cuda/source_inputs.h"
#include "cuda/tensors.h"

namespace riskmap::cuda {

Tensor leep_statistics(Tensor source, Tensor target, OptionalTensor regions, int64_t num_classes,
                       int64_t ignore_index) {
  check_leep_statistics(source, target, regions, num_classes);
  const DeviceGuard guard(source);
  const cudaStream_t stream = stream_of(source);
  const DeviceSourceInputs in("leep_statistics", source, target, regions, num_classes, ignore_index, stream);
  Tensor joint = empty_on(source, {num_classes, in.args.classes}, ScalarType::Double);
  Statistics args{in.args, plan_statistics(in.args), nullptr, nullptr, nullptr, nullptr};
  args.joint = static_cast<double*>(joint.data_ptr());
  const int64_t chunks = args.plan.chunking.chunks(source.size(0));
  Workspace workspace;
  workspace.reserve(&args.partial, chunks * num_classes * in.args.classes);
  workspace.reserve(&args.touched, chunks * num_classes);
  workspace.reserve(&args.bad_labels, chunks);
  workspace.allocate(source);
  launch_statistics(args, stream);
  return joint;
}

}  // namespace riskmap::cuda

STABLE_TORCH_LIBRARY_IMPL(RISKMAP_NAMESPACE, RISKMAP_CUDA_KEY, m) {
  m.impl("leep_statistics", TORCH_BOX(&riskmap::cuda::leep_statistics));
}
