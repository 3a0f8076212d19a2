// gradient *= factor, in place.
#include "cuda/dtypes.cuh"
#include "cuda/weighted_loss.h"

namespace riskmap::cuda {
namespace {

// V elements a thread; the last ones one by one.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) scale_kernel(const ScaleGradient args) {
  using acc_t = typename AccOf<T>::type;
  const acc_t factor = static_cast<acc_t>(load_scalar(args.factor, args.factor_dtype));
  if (factor == acc_t(1)) return;
  const auto scaled = [factor](T v) { return from_acc<T>(factor == acc_t(0) ? acc_t(0) : to_acc<acc_t>(v) * factor); };
  T* data = static_cast<T*>(args.data);
  using Word = typename WordOf<word_bytes(V * static_cast<int>(sizeof(T)))>::type;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * V;
  for (int64_t first = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * V; first < args.count;
       first += stride) {
    if (first + V <= args.count) {
      Word word = *reinterpret_cast<const Word*>(data + first);  // not __ldg: it is written to
      T values[V];
      memcpy(values, &word, sizeof(values));
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = scaled(values[i]);
      memcpy(&word, values, sizeof(values));
      *reinterpret_cast<Word*>(data + first) = word;
    } else {
      for (int64_t i = first; i < args.count; ++i) data[i] = scaled(data[i]);
    }
  }
}

// With a factor of 1 there is nothing to do.
int64_t most_blocks() { return 4 * usual_blocks(); }

template <class T, int V>
void scale_as(const ScaleGradient& args, cudaStream_t stream) {
  const int64_t wanted = (args.count + int64_t(kThreads) * V - 1) / (int64_t(kThreads) * V);
  launch(scale_kernel<T, V>, wanted < most_blocks() ? wanted : most_blocks(), kThreads, 0, stream, args);
}

}  // namespace

void scale_gradient(const ScaleGradient& args, cudaStream_t stream) {
  if (args.count == 0) return;
  const bool aligned = reinterpret_cast<uintptr_t>(args.data) % 16 == 0;
  with_floating(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (aligned) {
      scale_as<T, 16 / static_cast<int>(sizeof(T))>(args, stream);
    } else {
      scale_as<T, 1>(args, stream);
    }
  });
}

}  // namespace riskmap::cuda
