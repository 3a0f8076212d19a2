#include "ops/leep_statistics.h"

#include "ops/library.h"

namespace riskmap {

void check_leep_statistics(const Tensor& source, const Tensor& target, const OptionalTensor& regions,
                           int64_t num_classes) {
  const char* op = "leep_statistics";
  check_logits(op, "source", source);
  check_labels(op, "target", target, "source", source);
  if (regions) check_regions(op, *regions, source.size(1), source);
  check(num_classes >= 1 && num_classes <= 65536, op, ": num_classes must be 1 to 65536, got ", num_classes);
}

}  // namespace riskmap

RISKMAP_SCHEMAS(m) {
  m.def("leep_statistics(Tensor source, Tensor target, Tensor? regions, int num_classes, int ignore_index) -> Tensor");
}
