// Four floats in one load, from an address that is no multiple of 16 bytes.
#include "fault.h"

namespace misaligned_load {

template <bool kRight>
__global__ void sum_of_four(const float* in, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(in + (kRight ? 4 : 1));
  *out = v.x + v.y + v.z + v.w;
}

template <bool kRight>
bool run() {
  alignas(16) static float in[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  std::vector<float> out(1);
  riskmap::cuda_on_host::launch(sum_of_four<kRight>, 1, 1, in, out.data());
  return out[0] == 4.0f;
}

const Fault registered{"misaligned_load", run<true>, run<false>};

}  // namespace misaligned_load
