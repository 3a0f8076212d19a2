// The block of a grid that ends last: it sees what all others have written.
#pragma once

#include "cuda/launch.cuh"

namespace riskmap::cuda {

// `ticket` is 0 when the kernel starts. Every thread of the block must come here; what other blocks have written is
// then to be read by __ldcg, past this multiprocessor's own cache.
__device__ __forceinline__ bool is_last_block(uint32_t* ticket) {
  __shared__ bool last;
  __syncthreads();  // the block has written everything
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace riskmap::cuda
