// A sum in shared memory that nobody set to 0.
#include "fault.h"

namespace unset_shared {

template <bool kRight>
__global__ void count_positive(const int* in, unsigned int* out) {
  __shared__ unsigned int count;
  if (kRight) {
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
  }
  if (in[threadIdx.x] > 0) atomicAdd(&count, 1u);
  __syncthreads();
  if (threadIdx.x == 0) *out = count;
}

template <bool kRight>
bool run() {
  std::vector<int> in(32, 1);
  std::vector<unsigned int> out(1);
  riskmap::cuda_on_host::launch(count_positive<kRight>, 1, 32, in.data(), out.data());
  return out[0] == 32;
}

const Fault registered{"unset_shared", run<true>, run<false>};

}  // namespace unset_shared
