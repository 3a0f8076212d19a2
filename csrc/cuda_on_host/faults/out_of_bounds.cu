// The last block writes past the end of a global array.
#include "fault.h"

namespace out_of_bounds {

template <bool kRight>
__global__ void fill_ones(float* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (!kRight || i < count) out[i] = 1.0f;
}

template <bool kRight>
bool run() {
  const int count = 63;
  std::vector<float> out(count);
  riskmap::cuda_on_host::launch(fill_ones<kRight>, 2, 32, out.data(), count);
  for (float value : out)
    if (value != 1.0f) return false;
  return true;
}

const Fault registered{"out_of_bounds", run<true>, run<false>};

}  // namespace out_of_bounds
