// The lanes of a warp exchange values through shared memory as if they ran in lockstep.
#include "fault.h"

namespace missing_syncwarp {

template <bool kRight>
__global__ void reverse_warp(const float* in, float* out) {
  __shared__ float tile[32];
  const int i = threadIdx.x;
  tile[i] = in[i];
  if (kRight) __syncwarp();
  out[i] = tile[31 - i];
}

template <bool kRight>
bool run() {
  std::vector<float> in(32), out(32);
  for (int i = 0; i < 32; ++i) in[i] = static_cast<float>(i + 1);
  riskmap::cuda_on_host::launch(reverse_warp<kRight>, 1, 32, in.data(), out.data());
  for (int i = 0; i < 32; ++i)
    if (out[i] != in[31 - i]) return false;
  return true;
}

const Fault registered{"missing_syncwarp", run<true>, run<false>};

}  // namespace missing_syncwarp
