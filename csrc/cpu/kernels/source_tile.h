// A tile of source logits, one row a source class.
#pragma once

#include "cpu/kernels/column.h"
#include "cpu/kernels/leep.h"
#include "cpu/kernels/stage.h"

namespace riskmap::cpu {
namespace {

// rows: scratch for `classes` rows, then `spare` rows, then those of the regions.
template <class acc_t>
static Rows<acc_t> stage_source(const SourceArgs& args, int64_t image, int64_t begin, int64_t n, acc_t* rows,
                                int64_t pitch, int64_t spare) {
  const Volume& source = args.source;
  if (!args.regions) {
    stage_in(source, image, begin, n, rows, pitch);
    return {rows, pitch};
  }
  using F = typename Simd<acc_t>::F;
  acc_t* regions = rows + (args.classes + spare) * pitch;
  stage_in(source, image, begin, n, regions, pitch);
  const acc_t* inside = static_cast<const acc_t*>(args.regions);
  for (int64_t v = 0; v < n; v += Simd<acc_t>::kLanes) {
    for (int64_t z = 0; z < args.classes; ++z) {
      F sum{};
      for (int64_t r = 0; r < source.classes; ++r) {
        if (inside[r * args.classes + z] != 0) sum += load<F>(regions + r * pitch + v);
      }
      store(rows + z * pitch + v, sum);
    }
  }
  return {rows, pitch};
}

}  // namespace
}  // namespace riskmap::cpu
