// A shuffle of the whole warp that some of its lanes never reach.
#include "fault.h"

namespace partial_warp {

template <bool kRight>
__global__ void sum(const float* in, float* out, int count) {
  const int i = threadIdx.x;
  if (!kRight && i >= count) return;
  float value = i < count ? in[i] : 0.0f;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (i == 0) *out = value;
}

template <bool kRight>
bool run() {
  std::vector<float> in(20, 1.0f), out(1);
  riskmap::cuda_on_host::launch(sum<kRight>, 1, 32, in.data(), out.data(), 20);
  return out[0] == 20.0f;
}

const Fault registered{"partial_warp", run<true>, run<false>};

}  // namespace partial_warp
