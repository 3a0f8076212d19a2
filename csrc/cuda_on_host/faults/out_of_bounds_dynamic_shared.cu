// Reads past the end of the shared memory that the launch asked for.
#include "fault.h"

namespace out_of_bounds_dynamic_shared {

struct Arguments {
  const float* in;
  float* out;
};

template <bool kRight>
__global__ void rotate(const Arguments args) {
  float* tile = reinterpret_cast<float*>(riskmap::cuda_on_host::dynamic_shared());
  const int i = threadIdx.x;
  tile[i] = args.in[i];
  __syncthreads();
  args.out[i] = tile[kRight ? (i + 1) % 32 : i + 1];
}

template <bool kRight>
bool run() {
  std::vector<float> in(32), out(32);
  for (int i = 0; i < 32; ++i) in[i] = static_cast<float>(i + 1);
  riskmap::cuda_on_host::launch(rotate<kRight>, 1, 32, 32 * sizeof(float), Arguments{in.data(), out.data()});
  for (int i = 0; i < 32; ++i)
    if (out[i] != in[(i + 1) % 32]) return false;
  return true;
}

const Fault registered{"out_of_bounds_dynamic_shared", run<true>, run<false>};

}  // namespace out_of_bounds_dynamic_shared
