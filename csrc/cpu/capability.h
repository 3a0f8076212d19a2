// The CPU instruction set the kernels run with: the best this machine has, or what the environment variable
// RISKMAP_CPU_CAPABILITY (baseline, avx2, avx512) asks for. Read once.
#pragma once

namespace riskmap::cpu {

enum class Capability { kBaseline, kAvx2, kAvx512 };

Capability capability();  // std::invalid_argument where the variable asks for what this machine has not
const char* name_of(Capability capability);

template <class Kernel>
Kernel* choose(Kernel* baseline, Kernel* avx2, Kernel* avx512) {
  switch (capability()) {
    case Capability::kAvx512: return avx512;
    case Capability::kAvx2: return avx2;
    default: return baseline;
  }
}

}  // namespace riskmap::cpu

// The copy of a kernel for this machine. A macro, since a namespace cannot be an argument.
#if defined(__x86_64__)
#define RISKMAP_CPU_KERNEL(kernel) choose(&baseline::kernel, &avx2::kernel, &avx512::kernel)
#else
#define RISKMAP_CPU_KERNEL(kernel) (capability(), &baseline::kernel)
#endif
