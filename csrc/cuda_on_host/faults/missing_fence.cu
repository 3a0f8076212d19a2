// The last block adds up what the others wrote, without a fence between their writes and the ticket.
#include "fault.h"

namespace missing_fence {

template <bool kRight>
__global__ void sum(const int* in, int* partial, unsigned int* ticket, int* out) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = in[blockIdx.x];
    if (kRight) __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (kRight) __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x != 32) return;
  int total = 0;
  for (unsigned int b = 0; b < gridDim.x; ++b) total += partial[b];
  *out = total;
}

template <bool kRight>
bool run() {
  std::vector<int> in{1, 2, 3, 4, 5}, partial(5), out(1);
  std::vector<unsigned int> ticket(1);
  riskmap::cuda_on_host::launch(sum<kRight>, 5, 64, in.data(), partial.data(), ticket.data(), out.data());
  return out[0] == 15;
}

const Fault registered{"missing_fence", run<true>, run<false>};

}  // namespace missing_fence
