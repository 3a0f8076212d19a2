// A sum in the shared memory that the launch asked for, which nobody set to 0.
#include "fault.h"

namespace unset_dynamic_shared {

struct Arguments {
  const int* in;
  unsigned int* out;
};

template <bool kRight>
__global__ void count_positive(const Arguments args) {
  unsigned int* count = reinterpret_cast<unsigned int*>(riskmap::cuda_on_host::dynamic_shared());
  if (kRight) {
    if (threadIdx.x == 0) *count = 0;
    __syncthreads();
  }
  if (args.in[threadIdx.x] > 0) atomicAdd(count, 1u);
  __syncthreads();
  if (threadIdx.x == 0) *args.out = *count;
}

template <bool kRight>
bool run() {
  std::vector<int> in(32, 1);
  std::vector<unsigned int> out(1);
  riskmap::cuda_on_host::launch(count_positive<kRight>, 1, 32, sizeof(unsigned int), Arguments{in.data(), out.data()});
  return out[0] == 32;
}

const Fault registered{"unset_dynamic_shared", run<true>, run<false>};

}  // namespace unset_dynamic_shared
