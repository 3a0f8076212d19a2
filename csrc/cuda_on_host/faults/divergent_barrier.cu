// Threads without work leave before the barrier that the others wait at.
#include "fault.h"

namespace divergent_barrier {

template <bool kRight>
__global__ void reverse_part(const float* in, float* out, int count) {
  __shared__ float tile[64];
  const int i = threadIdx.x;
  if (!kRight && i >= count) return;
  tile[i] = i < count ? in[i] : 0.0f;
  __syncthreads();
  if (i < count) out[i] = tile[count - 1 - i];
}

template <bool kRight>
bool run() {
  const int count = 50;
  std::vector<float> in(count), out(count);
  for (int i = 0; i < count; ++i) in[i] = static_cast<float>(i + 1);
  riskmap::cuda_on_host::launch(reverse_part<kRight>, 1, 64, in.data(), out.data(), count);
  for (int i = 0; i < count; ++i)
    if (out[i] != in[count - 1 - i]) return false;
  return true;
}

const Fault registered{"divergent_barrier", run<true>, run<false>};

}  // namespace divergent_barrier
