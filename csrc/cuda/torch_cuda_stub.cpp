// Stands in for libtorch_cuda when libriskmap_cuda is linked; see cmake/CudaLibrary.cmake. Never installed, never run.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) {
  return 1;
}
