// Build facts for Python. Never meets torch's headers.
#include <pybind11/pybind11.h>

namespace {

// 0x020a000000000000 -> "2.10"
std::string torch_target() {
  const unsigned long long version = RISKMAP_TORCH_TARGET_VERSION;
  return std::to_string(version >> 56) + "." + std::to_string((version >> 48) & 0xff);
}

}  // namespace

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Facts about the build of riskmap_ext's native libraries.";
  m.attr("version") = RISKMAP_VERSION;
  m.attr("torch_built_with") = RISKMAP_TORCH_BUILT_FOR;
  m.attr("torch_abi_target") = torch_target();
  m.attr("compiler") = RISKMAP_COMPILER;
  m.attr("cuda_reason") = RISKMAP_CUDA_REASON;
  m.attr("cuda_toolkit") = RISKMAP_CUDA_TOOLKIT;              // version of nvcc, empty without CUDA
  m.attr("cuda_architectures") = RISKMAP_CUDA_ARCHITECTURES;  // as "80 90", empty without CUDA
}
