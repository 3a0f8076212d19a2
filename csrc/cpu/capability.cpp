#include "cpu/capability.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

#include "ops/check.h"

namespace riskmap::cpu {
namespace {

bool supported(Capability wanted) {
  if (wanted == Capability::kBaseline) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
  if (wanted == Capability::kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Capability decide() {
  const Capability all[] = {Capability::kAvx512, Capability::kAvx2, Capability::kBaseline};
  const char* wanted = std::getenv("RISKMAP_CPU_CAPABILITY");
  if (wanted && *wanted) {
    for (Capability each : all) {
      if (std::string(wanted) != name_of(each)) continue;
      check(supported(each), "RISKMAP_CPU_CAPABILITY: this machine has no ", wanted);
      return each;
    }
    fail("RISKMAP_CPU_CAPABILITY must be baseline, avx2 or avx512, got ", wanted);
  }
  for (Capability each : all)
    if (supported(each)) return each;
  return Capability::kBaseline;
}

std::string cpu_capability() { return name_of(capability()); }

}  // namespace

Capability capability() {
  static const Capability chosen = decide();
  return chosen;
}

const char* name_of(Capability capability) {
  switch (capability) {
    case Capability::kAvx512: return "avx512";
    case Capability::kAvx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace riskmap::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(riskmap_ext, m) { m.def("_cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(riskmap_ext, CompositeExplicitAutograd, m) {
  m.impl("_cpu_capability", TORCH_BOX(&riskmap::cpu::cpu_capability));
}
