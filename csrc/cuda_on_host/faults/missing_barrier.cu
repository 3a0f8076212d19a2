// A thread reads what another wrote to shared memory, without a barrier in between.
#include "fault.h"

namespace missing_barrier {

template <bool kRight>
__global__ void reverse_block(const float* in, float* out) {
  __shared__ float tile[64];
  const int i = threadIdx.x;
  tile[i] = in[i];
  if (kRight) __syncthreads();
  out[i] = tile[63 - i];
}

template <bool kRight>
bool run() {
  std::vector<float> in(64), out(64);
  for (int i = 0; i < 64; ++i) in[i] = static_cast<float>(i + 1);
  riskmap::cuda_on_host::launch(reverse_block<kRight>, 1, 64, in.data(), out.data());
  for (int i = 0; i < 64; ++i)
    if (out[i] != in[63 - i]) return false;
  return true;
}

const Fault registered{"missing_barrier", run<true>, run<false>};

}  // namespace missing_barrier
