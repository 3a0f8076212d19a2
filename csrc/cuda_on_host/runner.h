// Runs a CUDA kernel, compiled by g++, on the CPU: one fiber for every CUDA thread of a block, the blocks one after the
// other. Barriers and warp operations switch fibers. RISKMAP_CUDA_ON_HOST_ORDER (forward, reverse or random:SEED) is
// the order of blocks and threads: the result of a right kernel does not depend on it.
// What a kernel may not do ends the process with a message: a barrier that not all threads reach, a warp operation
// whose mask names a lane that does not take part, a shuffle that reads from one.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned int x, y, z;
};

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int vx = 1, unsigned int vy = 1, unsigned int vz = 1) : x(vx), y(vy), z(vz) {}
};

// Of the CUDA thread that runs at present.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace riskmap::cuda_on_host {

inline constexpr int kWarp = 32;

// Where in the source a thread waits; barriers met in different lines are divergent.
struct Site {
  const char* what;
  const char* file;
  int line;
};

// Calls body(context) for every thread; false if the configuration is beyond the limits of a GPU.
bool run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* context);

// Of the block that runs at present: as many bytes as its launch asked for, no more.
char* dynamic_shared();

// A launch as csrc/cuda/machine_code sees it; `argument` is the one struct that a kernel takes.
struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;  // dynamic shared memory
  const void* argument;
  size_t argument_size;
};

// Tells whoever listens (riskmap_cuda_on_host_record) of a launch; false: the kernel shall not run here.
bool record(const Launch& launch);

int lane();
void block_barrier(Site site);
bool block_any(bool value, Site site);  // a barrier that tells whether any thread brought true
void warp_barrier(unsigned int mask, Site site);
// The value that the thread of lane `source` brought.
uint64_t warp_exchange(unsigned int mask, uint64_t value, int source, Site site);
unsigned int warp_ballot(unsigned int mask, bool predicate, Site site);
void fence();

}  // namespace riskmap::cuda_on_host
