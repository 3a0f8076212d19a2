// Threads of different blocks add to one counter, not atomically.
#include "fault.h"

namespace plain_add {

template <bool kRight>
__global__ void count(unsigned int* counter) {
  if (threadIdx.x != 0) return;
  if (kRight) {
    atomicAdd(counter, 1u);
  } else {
    *counter += 1;
  }
}

template <bool kRight>
bool run() {
  std::vector<unsigned int> counter(1);
  riskmap::cuda_on_host::launch(count<kRight>, 5, 32, counter.data());
  return counter[0] == 5;
}

const Fault registered{"plain_add", run<true>, run<false>};

}  // namespace plain_add
