// Between torch's tensors and what the kernels take.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/types.h"
#include "ops/check.h"
#include "ops/views.h"

namespace riskmap::cpu {

// Values of a small floating tensor in row-major order.
std::vector<double> values_of(const Tensor& tensor);

// regions [R, L] as 0 and 1, rows `pitch` apart.
std::vector<double> region_rows(const Tensor& regions, int64_t pitch);

Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype);
// Uninitialised, laid out as `logits`; huge pages are asked for, since page faults would cost more than the kernel.
Tensor empty_gradient(const Tensor& logits);

[[noreturn]] void raise_bad_labels(const char* op, const Tensor& target, int64_t count, int64_t classes,
                                   int64_t ignore_index);

// Chunks of about `elements` logits, a whole number of tiles.
Chunking chunk_volume(const Volume& volume, int64_t elements = 1 << 17);

// Calls f(chunk, scratch) for every chunk; scratch is 64-byte aligned and not cleared. One thread takes `together`
// neighbours, in order.
template <class F>
void for_chunks(const Volume& volume, const Chunking& chunking, size_t scratch_bytes, const F& f,
                int64_t together = 1) {
  const int64_t chunks = volume.batch * chunking.chunks_per_image;
  const int64_t elements = std::min(chunking.voxels_per_chunk, volume.voxels) * volume.classes * together;
  const int64_t grain = elements < (1 << 15) ? (1 << 15) / (elements + 1) + 1 : 1;
  std::atomic<bool> out_of_memory{false};  // nothing may be thrown across threads
  torch::stable::parallel_for(0, (chunks + together - 1) / together, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64),
                                                              &std::free);
    if (!scratch) {
      out_of_memory = true;
      return;
    }
    for (int64_t chunk = begin * together; chunk < std::min(end * together, chunks); ++chunk) f(chunk, scratch.get());
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace riskmap::cpu
