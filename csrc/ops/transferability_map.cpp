#include "ops/transferability_map.h"

#include "ops/library.h"

namespace riskmap {

void check_transferability_map(const char* op, const Tensor& source, const Tensor& target, const Tensor& conditional,
                               const OptionalTensor& regions) {
  check_logits(op, "source", source);
  check_labels(op, "target", target, "source", source);
  if (regions) check_regions(op, *regions, source.size(1), source);
  check(is_floating(conditional), op, ": conditional must be floating, got ", dtype_of(conditional));
  const int64_t classes = regions ? regions->size(1) : source.size(1);
  check(conditional.dim() == 2 && conditional.size(0) >= 1 && conditional.size(1) == classes, op,
        ": conditional must be [C, Z] with Z = ", classes, " as in source, got shape ", shape_of(conditional));
  check(conditional.device() == source.device(), op, ": conditional must be on the same device as source");
}

}  // namespace riskmap

RISKMAP_SCHEMAS(m) {
  m.def(
      "transferability_map(Tensor source, Tensor target, Tensor conditional, Tensor? regions, int ignore_index) -> "
      "Tensor");
}
