// J[y, z] = sum of theta_z over the voxels labelled y: one read of the logits, sums in acc_t for at most
// kVoxelsPerFlush voxels, in double beyond.
#include <type_traits>

#include "cpu/kernels/labels.h"
#include "cpu/kernels/source_tile.h"
#include "math/softmax.h"

namespace riskmap::cpu {
namespace {

constexpr int64_t kVoxelsPerFlush = 512;

template <class acc_t, class Column>
struct Statistics {
  using F = typename Simd<acc_t>::F;
  using I = typename Simd<acc_t>::I;
  static constexpr int kLanes = Simd<acc_t>::kLanes;

  const StatisticsArgs& args;
  const int64_t classes, source_classes, pitch_z, tile, pitch;
  acc_t* rows;     // [Z, pitch]
  acc_t* sums;     // [C, pitch_z], or [C, Z] vectors when masked
  int32_t* label;  // [tile]
  double* joint;   // [C, Z]
  const bool masked;

  Statistics(const StatisticsArgs& args_, int64_t chunk, void* scratch)
      : args(args_),
        classes(args_.num_classes),
        source_classes(args_.classes),
        pitch_z(padded_classes(args_)),
        tile(tile_voxels(padded_rows(args_), args_.source.dtype)),
        pitch(tile_pitch(tile)),
        rows(static_cast<acc_t*>(scratch)),
        sums(rows + padded_rows(args_) * pitch),
        label(reinterpret_cast<int32_t*>(sums + statistics_sums(source_classes, classes))),
        joint(args_.joint + chunk * classes * source_classes),
        masked(classes * source_classes <= kMaxMaskedSums && source_classes <= kMaxRegisterClasses) {}

  int64_t run(int64_t chunk) {
    const int64_t image = chunk / args.chunking.chunks_per_image;
    const int64_t first = chunk % args.chunking.chunks_per_image * args.chunking.voxels_per_chunk;
    const int64_t end = first + args.chunking.voxels_per_chunk;
    const int64_t last = end < args.source.voxels ? end : args.source.voxels;
    for (int64_t i = 0; i < classes * source_classes; ++i) joint[i] = 0;
    // Classes beyond Z, up to a whole vector, stay 0 in scratch.
    for (int64_t i = source_classes * pitch; i < pitch_z * pitch; ++i) rows[i] = 0;
    clear();
    int64_t bad_labels = 0, since_flush = 0;
    for (int64_t begin = first; begin < last; begin += tile) {
      const int64_t n = begin + tile < last ? tile : last - begin;
      bad_labels += stage_labels(args.target, image, begin, n, classes, args.ignore_index, label);
      if (!masked || !masked_in_place(image, begin, n)) {
        const Rows<acc_t> in = stage_source(args, image, begin, n, rows, pitch, pitch_z - source_classes);
        if (masked) {
          add_masked(in, n);
        } else {
          add_rows(in, n);
        }
      }
      since_flush += n;
      if (since_flush + tile > kVoxelsPerFlush || begin + tile >= last) {
        flush();
        since_flush = 0;
      }
    }
    return bad_labels;
  }

  int64_t sums_length() const { return masked ? classes * source_classes * kLanes : classes * pitch_z; }
  void clear() { std::memset(sums, 0, sizeof(acc_t) * sums_length()); }

  void flush() {
    for (int64_t y = 0; y < classes; ++y) {
      double* out = joint + y * source_classes;
      if (masked) {
        for (int64_t z = 0; z < source_classes; ++z)
          out[z] += horizontal_sum(load<F>(sums + (y * source_classes + z) * kLanes));
      } else {
        for (int64_t z = 0; z < source_classes; ++z) out[z] += static_cast<double>(sums[y * pitch_z + z]);
      }
    }
    clear();
  }

  bool masked_in_place(int64_t image, int64_t begin, int64_t n) {
    if constexpr (Column::kInRegisters) {
      if (!args.regions) return visit_in_place(args.source, image, begin, n, [&](auto in) { add_masked(in, n); });
    }
    return false;
  }

  template <class T>
  void add_masked(Rows<T> in, int64_t n) {
    for (int64_t v = 0; v < n; v += kLanes) {
      const I y = load_labels<acc_t>(label + v);
      Column x(in, v, source_classes);
      const F inverse = math::inverse(math::exp_in_place(x, math::max_logit<F>(x)));
      x.each([&](int z) RISKMAP_LAMBDA { x.set(z, x.get(z) * inverse); });
      for (int64_t c = 0; c < classes; ++c) {
        const I labelled = y == static_cast<typename math::Traits<acc_t>::Bits>(c);
        acc_t* row = sums + c * source_classes * kLanes;
        x.each([&](int z) RISKMAP_LAMBDA {
          store(row + z * kLanes, F(load<F>(row + z * kLanes) + math::select(labelled, x.get(z), F{})));
        });
      }
    }
  }

  // Turns kLanes voxels x kLanes source classes in registers, then adds whole rows of theta to row y of the sums.
  void add_rows(Rows<acc_t> in, int64_t n) {
    for (int64_t v = 0; v < n; v += kLanes) {
      ScratchColumn<acc_t> x(in, v, source_classes);
      const F sum = math::exp_in_place(x, math::max_logit<F>(x));
      const F inverse = math::inverse(sum);
      for (int64_t z = 0; z < source_classes; z += kLanes) {
        F block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = load<F>(in.base + (z + i) * in.pitch + v) * inverse;
        transpose<acc_t>(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const int32_t y = label[v + i];
          if (y < 0) continue;
          acc_t* at = sums + y * pitch_z + z;
          store(at, F(load<F>(at) + block[i]));
        }
      }
    }
  }
};

}  // namespace

namespace RISKMAP_CPU_CAPABILITY {

void leep_statistics(const StatisticsArgs& args, int64_t chunk, void* scratch) {
  const auto run = [&](auto acc) {
    using acc_t = decltype(acc);
    with_column<acc_t>(args.classes, [&](auto* column) {
      Statistics<acc_t, std::remove_pointer_t<decltype(column)>> statistics(args, chunk, scratch);
      args.bad_labels[chunk] = statistics.run(chunk);
    });
  };
  if (args.source.dtype == Dtype::kDouble) return run(double{});
  run(float{});
}

}  // namespace RISKMAP_CPU_CAPABILITY
}  // namespace riskmap::cpu
