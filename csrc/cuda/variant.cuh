// Which kernel serves which logits: the column, and the voxels that a thread holds at once.
#pragma once

#include "cuda/column.cuh"

namespace riskmap::cuda {

template <class Column_, int kVoxels_>
struct Variant {
  using Column = Column_;
  static constexpr int kVoxels = kVoxels_;

  static int parts(int64_t classes) { return Column::kShared ? parts_of(classes, Column::kSlots) : 1; }
  static int64_t tile(int64_t classes) { return int64_t(kThreads) / parts(classes) * kVoxels; }
};

// Blocks that a multiprocessor must have room for: bounds the registers where the compiler would take so many, or so
// few, that it spills. 0: it finds a better number itself. csrc/cuda/resources.json has what comes of it.
template <class Column>
constexpr int min_blocks() {
  if (!Column::kInRegisters || Column::kShared || Column::kSlots > 5) return 2;
  return sizeof(typename Column::T) == 4 && Column::kSlots <= 2 ? 3 : 0;
}

// 16 bytes of a class at once; 8 where more would take too many registers.
template <class T, int kClasses>
constexpr int voxels_at_once() {
  return sizeof(T) == 2 && kClasses <= 3 ? 8 : 4;
}

// Calls f with the variant for up to 8 classes; false beyond.
template <class T, class F>
bool with_register_variant(int64_t classes, const F& f) {
  switch (classes) {
    case 1: f(Variant<RegisterColumn<T, 1>, voxels_at_once<T, 1>()>{}); return true;
    case 2: f(Variant<RegisterColumn<T, 2>, voxels_at_once<T, 2>()>{}); return true;
    case 3: f(Variant<RegisterColumn<T, 3>, voxels_at_once<T, 3>()>{}); return true;
    case 4: f(Variant<RegisterColumn<T, 4>, voxels_at_once<T, 4>()>{}); return true;
    case 5: f(Variant<RegisterColumn<T, 5>, voxels_at_once<T, 5>()>{}); return true;
    case 6: f(Variant<RegisterColumn<T, 6>, voxels_at_once<T, 6>()>{}); return true;
    case 7: f(Variant<RegisterColumn<T, 7>, voxels_at_once<T, 7>()>{}); return true;
    case 8: f(Variant<RegisterColumn<T, 8>, voxels_at_once<T, 8>()>{}); return true;
    default: return false;
  }
}

// Memory: the column for more classes than fit in registers, and for double.
template <template <class> class Memory, class F>
void with_variant(Dtype dtype, int64_t classes, const F& f) {
  with_floating(dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (sizeof(T) < sizeof(double)) {
      if (with_register_variant<T>(classes, f)) return;
      if (classes <= kMaxSharedClasses) return f(Variant<SharedColumn<T>, 2>{});
    }
    f(Variant<Memory<T>, 4>{});
  });
}

}  // namespace riskmap::cuda
