// A helper that has only a pointer reads past the end of a shared array.
#include "fault.h"

namespace out_of_bounds_shared {

template <bool kRight>
__device__ float next(const float* tile, int i) {
  return tile[kRight ? (i + 1) % 32 : i + 1];
}

template <bool kRight>
__global__ void rotate(const float* in, float* out) {
  __shared__ float tile[32];
  const int i = threadIdx.x;
  tile[i] = in[i];
  __syncthreads();
  out[i] = next<kRight>(tile, i);
}

template <bool kRight>
bool run() {
  std::vector<float> in(32), out(32);
  for (int i = 0; i < 32; ++i) in[i] = static_cast<float>(i + 1);
  riskmap::cuda_on_host::launch(rotate<kRight>, 1, 32, in.data(), out.data());
  for (int i = 0; i < 32; ++i)
    if (out[i] != in[(i + 1) % 32]) return false;
  return true;
}

const Fault registered{"out_of_bounds_shared", run<true>, run<false>};

}  // namespace out_of_bounds_shared
